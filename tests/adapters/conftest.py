"""Each test that takes `method`, or whose module does, runs for one method of each build."""

import pytest
import tiny_models


@pytest.fixture(params=["loldu", "svfit", "loraxs"])
def method(request, monkeypatch) -> str:
    """The method of the adapters that tiny_models makes: rows and diagonal, vectors and diagonal, dense."""
    monkeypatch.setattr(tiny_models, "METHOD", request.param)
    return request.param
