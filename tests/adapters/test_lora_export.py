"""A trained adapter as an ordinary LoRA: the same logits in stock PEFT, for every kind of layer."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import adapted, config, layers, lm_config, logits, one_layer, randomise, tiny_gpt2, tiny_llama, tokens
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from adapters.layer import FactorLayer
from adapters.lora_export import as_lora, export_lora, low_rank, lower_rank

pytestmark = pytest.mark.usefixtures("method")
not_lorasb = pytest.mark.not_lorasb
CLOSE = {"rtol": 0, "atol": 1e-4}  # float32 logits of size 1: the project's promise; 1e-6 to 2e-5 in practice


def exported(model, base, out):
    """The base with the exported adapter, loaded only with PEFT."""
    export_lora(model, out)
    return PeftModel.from_pretrained(base, out).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 24},  # more than the 16 rows of k_proj and v_proj: clamped there
        {"r": 1000, "scale": -0.5},
        {"scale": 3.0},
        pytest.param({"target_modules": ["embed_tokens", "lm_head", "down_proj"]}, marks=not_lorasb),
        {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_stock_peft_gives_the_same_logits(options, tmp_path):
    base = tiny_llama()
    model = adapted(copy.deepcopy(base), **options)

    lora = exported(model, copy.deepcopy(base), tmp_path)

    assert not any(isinstance(module, FactorLayer) for module in lora.modules())
    torch.testing.assert_close(logits(lora), logits(model), **CLOSE)
    assert (logits(model) - logits(base)).abs().max() > 100 * CLOSE["atol"]


def test_only_the_adapted_layers_become_lora_layers(tmp_path):
    base = tiny_llama()
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"], layers_to_transform=[1])

    lora = exported(model, copy.deepcopy(base), tmp_path)

    found = {n for n, m in lora.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert found == {"model.layers.1.self_attn.q_proj"}


def test_ranks_are_those_of_each_layer_and_scaling_is_one(tmp_path):
    model = adapted(tiny_llama(), r=24)

    lora = exported(model, tiny_llama(), tmp_path)

    for layer in layers(model):
        theirs = lora.get_base_model().get_submodule(layer.name)
        assert theirs.r["default"] == len(layer.maps["default"].values)
        assert theirs.scaling["default"] == 1
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


def test_conv1d_is_exported_with_its_transpose(tmp_path):
    base = tiny_gpt2()
    model = adapted(copy.deepcopy(base), r=12, target_modules=["c_attn", "c_proj", "c_fc"])

    lora = exported(model, copy.deepcopy(base), tmp_path)
    merged = copy.deepcopy(lora).merge_and_unload()

    assert PeftConfig.from_pretrained(tmp_path).fan_in_fan_out
    torch.testing.assert_close(logits(lora), logits(model), **CLOSE)
    torch.testing.assert_close(logits(merged), logits(model), **CLOSE)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.Conv2d(4, 12, 3, stride=2, padding=1), marks=not_lorasb),
        pytest.param(nn.Conv2d(16, 12, 1, bias=False), marks=not_lorasb),
        nn.Linear(16, 12),
        pytest.param(nn.Embedding(40, 16), marks=not_lorasb),
        pytest.param(Gemma3TextScaledWordEmbedding(40, 16, padding_idx=0, embed_scale=4.0), marks=not_lorasb),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_kind_of_layer_is_exported(layer, tmp_path):
    torch.manual_seed(0)
    model = one_layer(copy.deepcopy(layer), r=5)
    if isinstance(layer, nn.Embedding):
        x = tokens(40)
    else:
        x = torch.randn(2, 4, 9, 7) if layer.weight.shape[1:] == (4, 3, 3) else torch.randn(2, 16, 16, 16)

    lora = exported(model, nn.Sequential(layer), tmp_path)

    torch.testing.assert_close(lora(x), model(x), **CLOSE)


def test_modules_to_save_go_along(tmp_path):
    base = tiny_llama()
    model = get_peft_model(copy.deepcopy(base), lm_config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomise(model).eval()
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.1

    lora = exported(model, copy.deepcopy(base), tmp_path)

    assert PeftConfig.from_pretrained(tmp_path).modules_to_save == ["lm_head"]
    torch.testing.assert_close(logits(lora), logits(model), **CLOSE)


def test_one_of_two_adapters_is_exported_while_the_other_is_active(tmp_path):
    base = tiny_llama()
    model = get_peft_model(copy.deepcopy(base), lm_config(), adapter_name="A")
    model.add_adapter("B", lm_config(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomise(randomise(model, "A"), "B", seed=2).eval()

    export_lora(model, tmp_path, adapter_name="B")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()

    model.set_adapter("B")
    torch.testing.assert_close(logits(lora), logits(model), **CLOSE)


def test_a_merged_adapter_is_exported_from_the_unmerged_weight(tmp_path):
    base = tiny_llama()
    model = adapted(copy.deepcopy(base))
    model.merge_adapter()

    lora = exported(model, copy.deepcopy(base), tmp_path)

    torch.testing.assert_close(logits(lora), logits(model), **CLOSE)


@not_lorasb
def test_the_export_of_an_untrained_adapter_is_the_base(tmp_path):
    base = tiny_llama()

    lora = exported(get_peft_model(copy.deepcopy(base), lm_config()), copy.deepcopy(base), tmp_path)

    assert torch.equal(logits(lora), logits(base))


def test_a_bfloat16_base_is_exported_in_float32(tmp_path):
    base = tiny_llama().bfloat16()
    model = adapted(copy.deepcopy(base))
    expected = {layer.name: layer.get_delta_weight("default").float() for layer in layers(model)}

    lora = exported(model, tiny_llama().bfloat16().float(), tmp_path)

    for name, delta in expected.items():
        theirs = lora.get_base_model().get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(theirs, delta, rtol=0, atol=1e-6 * float(delta.abs().max()) * 24)


def test_loading_and_going_on_with_the_export_trains_lora(tmp_path):
    seen = []
    export_lora(adapted(tiny_llama()), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert seen == [(number, len(seen)) for number in range(1, len(seen) + 1)]

    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)

    assert {n.split(".")[-3] for n, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def lowered(model, base, out, rank):
    """The base with the exported adapter at a lower rank, loaded by PEFT alone; and the error of each layer."""
    export_lora(model, out)
    errors = lower_rank(out, rank, torch.device("cpu"), lambda *_: None)
    return PeftModel.from_pretrained(base, out).eval(), errors


@not_lorasb  # its core does not start at zero
def test_a_rank_that_the_cores_do_not_need_is_left_out_without_loss(tmp_path):
    base = tiny_llama()
    model = adapted(copy.deepcopy(base), r=12)
    for layer in layers(model):
        core = layer.maps["default"].core
        core.data[3:] = 0  # three directions of each weight are trained
        if core.ndim == 2:
            core.data[:, 3:] = 0

    lora, errors = lowered(model, copy.deepcopy(base), tmp_path, rank=4)

    assert max(errors.values()) < 1e-6
    assert PeftConfig.from_pretrained(tmp_path).r <= 4
    torch.testing.assert_close(logits(lora), logits(model), **CLOSE)


def test_a_lower_rank_is_the_best_approximation_and_its_error_is_that_of_what_peft_loads(tmp_path):
    """The error of the best approximation follows from the singular values alone (Eckart and Young)."""
    base = tiny_llama()
    model = adapted(copy.deepcopy(base), r=24)

    lora, errors = lowered(model, copy.deepcopy(base), tmp_path, rank=3)

    for layer in layers(model):
        wanted = layer.get_delta_weight("default").double()
        found = lora.get_base_model().get_submodule(layer.name).get_delta_weight("default").double()
        s = torch.linalg.svdvals(wanted)
        assert errors[layer.name] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-3, abs=1e-6)
        assert float((found - wanted).norm() / wanted.norm()) == pytest.approx(errors[layer.name], rel=1e-3, abs=1e-6)
        assert lora.get_base_model().get_submodule(layer.name).scaling["default"] == 1


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 12, 3, stride=2, padding=1), nn.Linear(16, 12), nn.Embedding(40, 16)],
    ids=lambda layer: type(layer).__name__,
)
@not_lorasb
def test_the_rank_of_every_kind_of_layer_can_be_lowered(layer, tmp_path):
    """At one rank below the full one, the outputs change by less than that rank contributes, and not at all at the
    adapter's own rank."""
    torch.manual_seed(0)
    model = one_layer(copy.deepcopy(layer), r=5)
    x = tokens(40) if isinstance(layer, nn.Embedding) else torch.randn(2, 4, 9, 7)
    x = torch.randn(2, 16) if isinstance(layer, nn.Linear) else x

    same, _ = lowered(model, nn.Sequential(copy.deepcopy(layer)), tmp_path / "5", rank=5)
    lower, errors = lowered(model, nn.Sequential(copy.deepcopy(layer)), tmp_path / "4", rank=4)

    torch.testing.assert_close(same(x), model(x), **CLOSE)
    assert 0 < (error := max(errors.values())) < 1
    effect = model(x) - layer(x)
    assert 0 < (lower(x) - model(x)).norm() < 5 * error * effect.norm()


def test_an_update_of_zero_keeps_one_direction():
    (A, B), error = low_rank(torch.randn(6, 8), torch.zeros(5, 6), 2)

    assert (A.shape, B.shape, error) == ((1, 8), (5, 1), 0.0)
    assert not B.any()


def test_a_model_without_our_adapter_is_refused(method, tmp_path):
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    ours = get_peft_model(tiny_llama(), config(target_modules=["q_proj"]))

    with pytest.raises(ValueError, match=r"no adapter of ours named default, it has default \(.*LORA\)"):
        as_lora(lora)
    with pytest.raises(ValueError, match=rf"named other, it has default \(.*{method.upper()}\)"):
        as_lora(ours, "other")
