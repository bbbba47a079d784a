"""An adapter on its base in another precision, and on another base."""

import copy

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from peft_folders import distance, edit_json, factors_by_name, nf4, not_lorasb, opened, saved
from tiny_models import adapted, layers, lm_config, logits, tiny_llama, tokens

from adapters import BasePrecisionWarning, factors_from


@not_lorasb
def test_the_same_base_in_bfloat16_works_from_the_saved_pivots(method, babyllama, tmp_path):
    """babyllama's own rounding moves its logits by 1 %; the adapter's part may add that much again."""
    model = adapted(opened(babyllama), r=64)
    folder = saved(model, tmp_path / "adapter")
    base_moves = distance(logits(opened(babyllama, dtype=torch.bfloat16), 361), logits(opened(babyllama), 361))

    with pytest.warns(BasePrecisionWarning):
        loaded = PeftModel.from_pretrained(opened(babyllama, dtype=torch.bfloat16), folder).eval()

    assert distance(logits(loaded, 361), logits(model, 361)) < 2 * base_moves < 0.04
    for mine, theirs in zip(layers(model), layers(loaded), strict=True):  # the float32 checkpoint is available
        assert torch.equal(mine.maps["default"].read, theirs.maps["default"].read)


@not_lorasb
def test_rounded_weights_without_a_checkpoint_give_nearly_the_same_factors(method, babyllama, tmp_path):
    """bf16 rounding; LoLDU rebuilds with the saved pivots: with new pivots the update would be a different one."""
    model = adapted(opened(babyllama), r=64)
    folder = saved(model, tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    rounded = opened(babyllama).bfloat16().float()
    rounded.config._name_or_path = ""

    with pytest.warns(BasePrecisionWarning, match="rebuilt from its weights"):
        loaded = PeftModel.from_pretrained(rounded, folder).eval()

    for mine, theirs in zip(layers(model), layers(loaded), strict=True):
        moved = distance(theirs.get_delta_weight("default"), mine.get_delta_weight("default"))
        assert moved < {"loldu": 0.2, "svfit": 0.1, "loraxs": 0.1}[method]  # measured 0.13, 0.07, 0.06
    assert distance(logits(loaded, 361), logits(model, 361)) < 0.02


@pytest.mark.parametrize(
    ("method", "r"), [("loldu", 8), ("loldu", 1000), ("svfit", 8), ("svfit", 64)], indirect=["method"]
)
def test_an_nf4_base_takes_its_factors_from_the_full_precision_checkpoint(method, babyllama, tmp_path, r):
    """The update acts on the NF4 base's output, with the true L and read: NF4's own error (0.1), not LU's (24)."""
    model = adapted(opened(babyllama), r=r)
    folder = saved(model, tmp_path / "adapter")
    quantised = nf4(babyllama)
    base_moves = distance(logits(quantised, 361), logits(opened(babyllama), 361))

    loaded = PeftModel.from_pretrained(quantised, folder).eval()

    for mine, theirs in zip(layers(model), layers(loaded), strict=True):
        assert torch.equal(mine.maps["default"].write, theirs.maps["default"].write)
        assert torch.equal(mine.maps["default"].read, theirs.maps["default"].read)
    # reads amplify the base's error by 1 / d_r or 1 / s_r: SVFit's at full rank by so much that nothing is left
    assert distance(logits(loaded, 361), logits(model, 361)) < 3 * base_moves


def test_the_adapters_config_names_the_checkpoint_where_the_model_does_not(babyllama, tmp_path):
    model = adapted(opened(babyllama), target_modules=["q_proj"])
    folder = saved(model, tmp_path / "adapter")
    quantised = nf4(babyllama)
    quantised.config._name_or_path = ""

    loaded = PeftModel.from_pretrained(quantised, folder)

    assert torch.equal(layers(loaded)[0].maps["default"].write, layers(model)[0].maps["default"].write)


@not_lorasb
def test_an_nf4_base_without_its_checkpoint_is_refused_with_the_remedy(method, babyllama, tmp_path):
    """Rebuilt from NF4 weights the adapter would be another one: loss 5.1 instead of 3.2 at full rank."""
    folder = saved(adapted(opened(babyllama), r=64), tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/gone")
    quantised = nf4(babyllama)
    quantised.config._name_or_path = ""

    with pytest.raises(ValueError, match=r"rebuilt from its weight are off by .*\(looked for: /gone\)"):
        PeftModel.from_pretrained(quantised, folder)


@not_lorasb
def test_an_adapter_made_on_an_nf4_base_without_a_checkpoint_comes_back_on_it(method, babyllama, tmp_path):
    first, second = nf4(babyllama), nf4(babyllama)
    for model in (first, second):
        model.config._name_or_path = model.name_or_path = ""

    with pytest.warns(BasePrecisionWarning, match="no full-precision checkpoint of this quantised base"):
        model = adapted(first, r=16)
    folder = saved(model, tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    loaded = PeftModel.from_pretrained(second, folder).eval()

    assert torch.equal(logits(loaded, 361), logits(model, 361))


def test_an_nf4_base_trains_the_cores_with_right_gradients(method, babyllama):
    """Against the same numbers dequantised; float32 sums in another order through five layers."""
    quantised = adapted(nf4(babyllama), r=16)
    plain = opened(babyllama)
    for layer in layers(quantised):
        plain.get_submodule(layer.name).weight.data = layer.matrix().clone()
    with factors_from(lambda name, _: factors_by_name(quantised)[name]):
        plain = adapted(plain, r=16)
    for mine, theirs in zip(layers(plain), layers(quantised), strict=True):
        mine.maps["default"].core.data = theirs.maps["default"].core.data.clone()

    for model in (quantised, plain):
        model(tokens(361), labels=tokens(361)).loss.backward()

    for mine, theirs in zip(layers(plain), layers(quantised), strict=True):
        gradient = mine.maps["default"].core.grad
        assert distance(theirs.maps["default"].core.grad, gradient) < 1e-4, mine.name


def test_merging_into_a_quantised_base_is_refused(babyllama):
    model = adapted(nf4(babyllama), target_modules=["q_proj"])

    with pytest.raises(ValueError, match=r"q_proj is quantised, .* load the base in full precision and merge there"):
        model.merge_and_unload()


@not_lorasb
def test_another_base_of_the_same_shapes_is_refused(method, base, tmp_path):
    folder = saved(adapted(opened(base)), tmp_path / "adapter")

    with (
        pytest.raises(ValueError, match=r"adapter default does not fit this base: .* Load it on the base it was"),
        pytest.warns(BasePrecisionWarning, match="another precision or another model"),
    ):
        PeftModel.from_pretrained(tiny_llama(seed=5), folder)


@not_lorasb
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_another_base_is_refused_by_transformers_load_adapter_before_its_first_output(
    method, base, tmp_path, low_cpu_mem_usage
):
    """It sets tensors one by one and calls no hook: the check is then made at the first forward pass."""
    folder = saved(adapted(opened(base)), tmp_path / "adapter")
    other = tiny_llama(seed=5)

    def load_and_run():
        other.load_adapter(str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
        logits(other)

    with pytest.raises(ValueError, match="does not fit this base"), pytest.warns(BasePrecisionWarning):
        load_and_run()
    with pytest.raises(ValueError, match="does not fit this base"):  # and at every other one
        logits(other)


def test_a_compiled_model_checks_and_rebuilds_what_transformers_loaded(babyllama, tmp_path):
    """Its loader calls no hook, and the rounded weights would choose other pivots; so would a compiled forward."""
    options = {"r": 64, "target_modules": ["o_proj"], "layers_to_transform": [0]}
    one_layer = opened(babyllama, num_hidden_layers=1)
    folder = saved(adapted(copy.deepcopy(one_layer), **options), tmp_path / "adapter")
    rounded = one_layer.bfloat16().float()
    own = get_peft_model(copy.deepcopy(rounded), lm_config(**options))
    expected = PeftModel.from_pretrained(copy.deepcopy(rounded), folder).eval()
    rounded.load_adapter(str(folder))

    compiled = torch.compile(rounded, backend="eager")

    torch.testing.assert_close(logits(compiled, 361), logits(expected, 361), rtol=0, atol=1e-4)  # fused otherwise
    for mine, theirs in zip(layers(rounded), layers(expected), strict=True):
        assert torch.equal(mine.maps["default"].write, theirs.maps["default"].write)
    own_choice = [layer.maps["default"].pivots.tolist() for layer in layers(own)]
    assert own_choice != [layer.maps["default"].pivots.tolist() for layer in layers(expected)]


def test_another_rank_than_the_saved_one_is_named(method, base, tmp_path):
    folder = saved(adapted(opened(base), r=8), tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", r=4)

    with pytest.raises(ValueError, match=r"q_proj.* was saved at rank 8 but has rank 4 here"):
        PeftModel.from_pretrained(opened(base), folder)


@not_lorasb
def test_another_width_is_refused(method, base, tmp_path):
    folder = saved(adapted(opened(base)), tmp_path / "adapter")
    other = tiny_llama(hidden_size=48)

    with pytest.raises(ValueError, match="does not fit this base"), pytest.warns(BasePrecisionWarning):
        PeftModel.from_pretrained(other, folder)
