"""Each test that takes `method`, or whose module does, runs once for every method of the family."""

import pytest
import tiny_models


@pytest.fixture(params=tiny_models.CONFIGS)
def method(request, monkeypatch) -> str:
    """The method of the adapters that tiny_models makes in this test."""
    monkeypatch.setattr(tiny_models, "METHOD", request.param)
    return request.param
