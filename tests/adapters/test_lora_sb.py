"""LoRA-SB's factors from gradients; what it shares with the family is tested with the family."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import layers, logits, tiny_llama, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters import LoRASBConfig, factors_from, factors_from_gradients
from adapters.gradients import gradient_sums, groups_of
from adapters.lora_sb import first_step_factors

NAMES = [
    f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]


def samples(count=3):
    return [tokens(shape=(2, 12), seed=seed) for seed in range(count)]


def losses_of(model):
    return lambda: (model(ids, labels=ids).loss for ids in samples())


def with_lora_sb(base, r=4, step=0.01, **options):
    """The base with an adapter from its own gradients."""
    source = factors_from_gradients(base.requires_grad_(False), NAMES, losses_of(base), r, **options)
    with factors_from(source):
        config = LoRASBConfig(r=r, step=step, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
        return get_peft_model(base, config)


@pytest.mark.parametrize("build", [lambda: nn.Linear(12, 16), lambda: Conv1D(16, 12)], ids=["Linear", "Conv1D"])
def test_sums_are_autograds_over_several_backward_passes(build):
    torch.manual_seed(0)
    layer, xs = build(), torch.randn(3, 2, 5, 12)
    nn.init.normal_(layer.weight)
    for x in xs:
        layer(x).square().sum().backward()
    expected = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
    layer.requires_grad_(False)

    with gradient_sums({"layer": layer}) as sums:
        for x in xs:
            layer(x).square().sum().backward()
    layer(xs[0])

    torch.testing.assert_close(sums["layer"], expected)
    assert layer.weight.grad.equal(expected if isinstance(layer, nn.Linear) else expected.T)  # not touched


def test_weights_taken_one_at_a_time_give_the_same_factors_bit_for_bit():
    base = tiny_llama().requires_grad_(False)
    passes = []

    def losses():
        passes.append(1)
        return losses_of(base)()

    together = factors_from_gradients(base, NAMES, losses, 4)
    apart = factors_from_gradients(base, NAMES, losses, 4, bytes_at_once=1)

    assert len(passes) == 1 + len(NAMES)
    for name in NAMES:
        for one, other in zip(together(name, ()), apart(name, ()), strict=True):
            assert torch.equal(one, other)


def test_groups_fit_into_the_bytes_and_keep_the_order():
    shapes = {"a": (2, 3), "b": (4, 4), "c": (100, 100), "d": (1, 1), "e": (2, 2)}

    groups = list(groups_of(shapes, 4 * (6 + 16)))

    assert groups == [["a", "b"], ["c"], ["d", "e"]]


def test_the_start_is_the_best_step_of_rank_r_that_full_fine_tuning_would_make():
    """W - step sign(G), truncated by an SVD in float64; the factors are float32."""
    base = tiny_llama()
    full = copy.deepcopy(base)
    for ids in samples():
        full(ids, labels=ids).loss.backward()

    model = with_lora_sb(base, r=4, step=0.01)

    for layer in layers(model):
        step = -0.01 * full.get_submodule(layer.name).weight.grad.sign().double()
        U, s, Vh = torch.linalg.svd(step, full_matrices=False)
        best = (U[:, :4] * s[:4]) @ Vh[:4]
        torch.testing.assert_close(layer.get_delta_weight("default").double(), best, rtol=0, atol=1e-6)


def test_the_first_step_lowers_the_loss_of_its_samples():
    base = tiny_llama()
    before = float(sum(losses_of(base)()).detach())

    model = with_lora_sb(base, step=1e-3)

    assert float(sum(losses_of(model)()).detach()) < before


def test_a_loaded_adapter_needs_no_gradients_and_follows_no_source(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = with_lora_sb(base).eval()
    model.save_pretrained(tmp_path / "adapter")

    def refuse(name, shape):
        raise AssertionError("a loaded adapter has its factors")

    with factors_from(refuse):
        loaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")

    assert torch.equal(logits(loaded.eval()), logits(model))


def test_what_is_loaded_onto_a_skeleton_stays_in_memory_for_merging(tmp_path):
    """PEFT moves an adapter to its base layer's device, here meta."""
    model = with_lora_sb(tiny_llama())
    model.save_pretrained(tmp_path / "adapter")
    with torch.device("meta"):
        skeleton = tiny_llama()

    loaded = PeftModel.from_pretrained(skeleton, tmp_path / "adapter", low_cpu_mem_usage=True)

    for mine, theirs in zip(layers(model), layers(loaded), strict=True):
        assert torch.equal(theirs.get_delta_weight("default"), mine.get_delta_weight("default"))


def test_an_adapter_without_factors_says_where_they_come_from():
    model = get_peft_model(tiny_llama(), LoRASBConfig(r=4, step=0.1, target_modules=["q_proj"]))

    with pytest.raises(ValueError, match=r"no factors on model\.layers\.0.*factors_from_gradients"):
        logits(model)


def test_a_layer_that_is_not_linear_is_refused_by_name():
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding; lorasb supports Linear and Conv1D"):
        get_peft_model(tiny_llama(), LoRASBConfig(r=4, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="e is a Embedding; gradients are taken on Linear and Conv1D"):
        gradient_sums({"e": nn.Embedding(4, 4)}).__enter__()


@pytest.mark.parametrize(
    ("gradient", "said"),
    [
        (torch.zeros(6, 5), "its gradient is zero: no sample reaches it"),
        (torch.ones(6, 5), "singular value 1 is zero: it has only 1 directions"),
        (torch.full((6, 5), float("nan")), "30 of its 30 numbers are NaN or infinite"),
    ],
)
def test_a_gradient_without_directions_is_refused(gradient, said):
    with pytest.raises(ValueError, match=said):
        first_step_factors(gradient, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step": 0.0}, "step is a positive number, got 0"),
        ({"step": float("nan")}, "step is a positive number"),
        ({"samples": 0}, "samples is a whole number of at least 1, got 0"),
        ({"svd": "lucky"}, "svd is one of auto, exact, block"),
        ({"r": 0}, "r is a whole number of at least 1"),
    ],
)
def test_a_wrong_setting_is_refused_on_construction(options, said):
    with pytest.raises(ValueError, match=said):
        LoRASBConfig(**options)


def test_a_step_of_no_size_is_refused_where_it_is_needed():
    with pytest.raises(ValueError, match=r"LoRASBConfig\.step is the size of the step"):
        with_lora_sb(tiny_llama(), step=None)
