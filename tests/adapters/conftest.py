"""Each test that takes `method`, or whose module does, runs for one method of each build."""

import pytest
import tiny_models

from adapters import factors_from

# LoRA-SB starts at its first step, not at the base; its file brings the factors, whatever the base; it has no other
# starts or norms, and is for linear layers.
NOT_LORA_SB = (
    "step_0", "untrained", "add_adapter", "change_of_dtype", "bfloat16_works", "rounded_weights", "without_its_check",
    "comes_back_on_it", "another_base", "another_width", "normalis", "normalize", "embed", "Embed", "Conv2d",
)  # fmt: skip


def pytest_collection_modifyitems(items: list) -> None:
    items[:] = [item for item in items if "lorasb" not in item.name or not any(n in item.name for n in NOT_LORA_SB)]


@pytest.fixture(params=["loldu", "svfit", "loraxs", "lorasb"])
def method(request, monkeypatch) -> str:
    """The method of the adapters that tiny_models makes: rows and diagonal, vectors and diagonal, dense, input."""
    monkeypatch.setattr(tiny_models, "METHOD", request.param)
    if request.param != "lorasb":
        yield request.param
        return
    with factors_from(tiny_models.factors_of_gradient):
        yield request.param
