"""ALLoRA's scaled gradient against its formula; the rest is PEFT's LoRA."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from tiny_models import logits, tiny_gpt2, tiny_llama
from torch import nn

from adapters.allora import ALLoRAConfig, ALLoRALinear


def one_layer(eta, bias=True):
    torch.manual_seed(0)
    config = ALLoRAConfig(r=3, eta=eta, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=bias)), config).double()
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    return model, layer


@pytest.mark.parametrize("eta", [0.5, 1.0, 10.0])
def test_gradients_are_those_of_the_formula_row_by_row(eta):
    model, layer = one_layer(eta)
    A, B = (getattr(layer, f"lora_{part}")["default"].weight for part in "AB")
    x, g = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 5, dtype=torch.float64)

    model(x).backward(g)

    W, rows = layer.base_layer.weight.detach(), (B @ A).detach().norm(dim=1)
    scaled = g / (rows + 1 / eta**2).sqrt()
    dense = torch.einsum("btm,btn->mn", scaled, x.detach())  # of the product B A
    torch.testing.assert_close(B.grad, dense @ A.detach().T)
    torch.testing.assert_close(A.grad, B.detach().T @ dense)
    torch.testing.assert_close(x.grad, g @ (W + (B @ A).detach()))  # unscaled


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_gradients_under_autocast_are_those_without_it_in_float32(x_dtype):
    model, layer = one_layer(2.0)
    model.float()
    parts = [getattr(layer, f"lora_{part}")["default"].weight for part in "AB"]
    x, g = torch.randn(2, 4, 6).to(x_dtype).requires_grad_(), torch.randn(2, 4, 5).bfloat16()
    expected = torch.autograd.grad(model(x.float()), [*parts, x], g.float())

    with torch.autocast("cpu", dtype=torch.bfloat16), disable_input_dtype_casting(model):
        y = model(x)
    found = torch.autograd.grad(y, [*parts, x], g)

    assert y.dtype == torch.bfloat16
    assert [part.dtype for part in found] == [torch.float32, torch.float32, x_dtype]
    for part, exact in zip(found, expected, strict=True):  # bfloat16 rounds by 2^-9, a few times in a row
        torch.testing.assert_close(part, exact.to(part.dtype), rtol=0, atol=float(exact.abs().max()) * 0.02)


def test_the_output_is_loras_without_alpha():
    model, layer = one_layer(2.0)
    x = torch.randn(4, 6, dtype=torch.float64)
    A, B = (getattr(layer, f"lora_{part}")["default"].weight for part in "AB")

    expected = layer.base_layer(x) + x @ (B @ A).T

    torch.testing.assert_close(model(x), expected)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_trained_one_is_plain_lora_for_others(tmp_path):
    base = tiny_llama()
    model = get_peft_model(copy.deepcopy(base), ALLoRAConfig(r=4, eta=3.0, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(base, tmp_path)

    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    assert "eta" not in (tmp_path / "adapter_config.json").read_text()
    torch.testing.assert_close(logits(loaded.eval()), logits(model.eval()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eta": 0.0}, "eta is a positive number, got 0"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"r": 4, "lora_alpha": 8}, "lora_alpha=8, only 4"),
        ({"use_dora": True}, "use_dora=True"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa, only True or False or gaussian"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
    ],
)
def test_a_wrong_setting_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ALLoRAConfig(**options)


@pytest.mark.parametrize(
    ("model", "target", "said"),
    [
        (tiny_gpt2, "c_fc", r"transformer\.h\.0\.mlp\.c_fc is a Conv1D"),
        (tiny_llama, "embed_tokens", r"model\.embed_tokens is a Embedding"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "0", "0 is a Conv2d"),
    ],
)
def test_a_layer_that_would_get_plain_lora_is_refused_by_name(model, target, said):
    with pytest.raises(ValueError, match=f"{said}.*leave it out \\(exclude_modules\\)"):
        get_peft_model(model(), ALLoRAConfig(target_modules=[target]))


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 4},
        {"init_lora_weights": "gaussian"},
        {"bias": "all", "modules_to_save": ["lm_head"], "exclude_modules": ["v_proj"], "task_type": "CAUSAL_LM"},
    ],
)
def test_what_keeps_the_formula_is_taken_with_a_scaling_of_one(options):
    model = get_peft_model(tiny_llama(), ALLoRAConfig(r=4, target_modules=["q_proj"], **options))

    assert {layer.scaling["default"] for layer in model.modules() if isinstance(layer, ALLoRALinear)} == {1.0}


def test_it_is_refused_beside_a_plain_lora_in_whose_layers_it_would_be_plain_lora():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))

    with pytest.raises(ValueError, match=r"unsupported variant.*eta"):
        model.add_adapter("second", ALLoRAConfig(target_modules=["q_proj"]))
