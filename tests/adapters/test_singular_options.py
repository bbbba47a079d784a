"""Options of the methods on singular vectors: energy, bands, and what is saved."""

import logging

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft_folders import edit_json, opened, saved
from safetensors.torch import load_file
from tiny_models import layers, logits, randomise, tiny_llama
from torch import nn

from adapters import SVFitConfig, SVFTConfig


@pytest.mark.parametrize("b", [-1, 1.5, True])
def test_a_wrong_number_of_diagonals_is_refused(b):
    with pytest.raises(ValueError, match="off_diagonals is a whole number of at least 0"):
        SVFTConfig(off_diagonals=b)


@pytest.mark.parametrize(("b", "expected"), [(0, 12), (1, 34), (3, 72), (20, 144)])
def test_svfts_core_has_the_papers_count(b, expected):
    """k (2 b + 1) - b (b + 1) for k = 12, and the whole matrix if b exceeds it."""
    model = get_peft_model(nn.Sequential(nn.Linear(12, 16)), SVFTConfig(r=12, off_diagonals=b, target_modules=["0"]))

    assert layers(model)[0].maps["default"].core.shape == (expected,)


def test_svfits_file_holds_the_singular_values(base, tmp_path):
    model = randomise(get_peft_model(opened(base), SVFitConfig(r=5, target_modules="all-linear")))
    folder = saved(model, tmp_path / "adapter")

    tensors = load_file(folder / "adapter_model.safetensors")

    assert PeftConfig.from_pretrained(folder).peft_type == "SVFIT"
    assert len(tensors) == 4 * 14
    q = {n.rpartition(".")[2]: t for n, t in tensors.items() if "layers.0.self_attn.q_proj" in n}
    W = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj").base.weight
    torch.testing.assert_close(q["values"], torch.linalg.svdvals(W.double())[:5].float())
    assert set(q) == {"core", "pivots", "values", "probe"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_ranks_that_energy_chose_are_logged_saved_and_loaded(base, tmp_path, caplog, low_cpu_mem_usage):
    caplog.set_level(logging.INFO)
    config = SVFitConfig(energy=0.9, target_modules="all-linear", task_type="CAUSAL_LM")
    model = randomise(get_peft_model(opened(base), config)).eval()
    folder = saved(model, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(opened(base), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    through_transformers = opened(base)
    through_transformers.load_adapter(str(folder))

    ranks = {layer.name: len(layer.maps["default"].core) for layer in layers(model)}
    assert len(set(ranks.values())) > 1
    assert PeftConfig.from_pretrained(folder).ranks == ranks
    assert "ranks chosen from the weights: 11 on 4 weights, " in caplog.text
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(through_transformers), logits(model))


def test_ranks_that_energy_chose_stay_on_a_rounded_base(base, tmp_path):
    """The rounded weights might choose other ranks, and the cores would not fit."""
    config = SVFitConfig(energy=0.9, target_modules="all-linear", task_type="CAUSAL_LM")
    folder = saved(randomise(get_peft_model(opened(base), config)), tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", ranks={name: r - 1 for name, r in config.ranks.items()})

    with pytest.raises(ValueError, match="was saved at rank"):  # so it is the saved ranks that count
        PeftModel.from_pretrained(opened(base), folder)


def test_energy_needs_the_weights_or_the_ranks():
    with torch.device("meta"):
        model = tiny_llama()

    with pytest.raises(ValueError, match=r"the rank of model\.layers\.0.* is on the meta device: set ranks"):
        get_peft_model(model, SVFitConfig(energy=0.9, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "SVFitConfig.r is a whole number of at least 1, got 0"),
        ({"energy": 1.0}, "energy is a share between 0 and 1, got 1.0"),
        ({"energy": 0}, "energy is a share between 0 and 1, got 0"),
        ({"svd": "lucky"}, "svd is one of auto, exact, block, got 'lucky'"),
        ({"normalize_directions": False}, "singular vectors already have norm one"),
    ],
)
def test_a_wrong_setting_of_svfit_is_refused_on_construction(options, said):
    with pytest.raises(ValueError, match=said):
        SVFitConfig(**options)
