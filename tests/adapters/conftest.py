"""Each test that takes `method`, or whose module does, runs for one method of each build."""

import pytest
import tiny_models

from adapters import factors_from, functions


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "not_lorasb: not for LoRA-SB, which starts at its first step and not at the base, whose file brings the "
        "factors whatever the base, which has no norms to choose, and which is for linear layers",
    )


def pytest_collection_modifyitems(items: list) -> None:
    def left_out(item) -> bool:
        return item.get_closest_marker("not_lorasb") is not None and item.callspec.params["method"] == "lorasb"

    items[:] = [item for item in items if not left_out(item)]


@pytest.fixture(params=["loldu", "svfit", "loraxs", "lorasb"])
def method(request, monkeypatch) -> str:
    """The method of the adapters that tiny_models makes: rows and diagonal, vectors and diagonal, dense, input."""
    monkeypatch.setattr(tiny_models, "METHOD", request.param)
    if request.param != "lorasb":
        yield request.param
        return
    with factors_from(tiny_models.factors_of_gradient):
        yield request.param


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Split triangles of four rows into blocks already, even for a single token; otherwise no tiny model's would be
    split."""
    for name, value in {"SMALLEST": 3, "FROM": 4, "TOKENS": 1}.items():
        monkeypatch.setattr(functions, name, value)


@pytest.fixture(params=["whole", "in blocks"])
def triangles(request) -> None:
    """Whether frozen triangles are multiplied whole or in blocks."""
    if request.param == "in blocks":
        request.getfixturevalue("small_blocks")


@pytest.fixture
def base(tmp_path):
    """A tiny Llama's folder on disk."""
    tiny_models.tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"
