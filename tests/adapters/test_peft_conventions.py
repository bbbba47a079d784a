"""What PEFT's own tools expect of every method's config and layers."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import adapted, layers, lm_config, logits, one_layer, tiny_gpt2, tiny_llama
from torch import nn

from adapters import METHODS, FactorConfig, LoLDUConfig


def cores(model):
    return {layer.name: layer.maps["default"].core.detach() for layer in layers(model)}


@pytest.mark.not_lorasb
def test_init_weights_true_starts_at_the_base_model(method):
    expected = logits(tiny_llama())

    assert torch.equal(logits(get_peft_model(tiny_llama(), lm_config(init_weights=True)).eval()), expected)


def test_init_weights_false_gives_random_cores_that_follow_from_the_seed(method):
    base = tiny_llama()
    torch.manual_seed(5)
    first, again = (get_peft_model(tiny_llama(), lm_config(init_weights=False)).eval() for _ in range(2))
    values = cores(first)

    assert not torch.allclose(logits(first), logits(base), atol=1e-3)
    assert torch.isfinite(logits(first)).all()
    assert all(torch.equal(core, values[name]) for name, core in cores(again).items())
    assert len({float(core.flatten()[0]) for core in values.values()}) == len(values)  # each layer has its own


def test_random_cores_are_saved_and_loaded(method, tmp_path):
    model = get_peft_model(tiny_llama(), lm_config(init_weights=False)).eval()
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()

    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_saved_before_there_was_init_weights_loads(method, tmp_path):
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    del settings["init_weights"]
    file.write_text(json.dumps(settings))

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()

    assert torch.equal(logits(loaded), logits(model))


def test_every_method_of_ours_has_init_weights():
    assert all(config().init_weights is True for config in METHODS.values() if issubclass(config, FactorConfig))


@pytest.mark.parametrize(
    "layer",
    [lambda: nn.Linear(12, 16), lambda: nn.Embedding(20, 12), lambda: nn.Conv2d(3, 8, 2)],
    ids=["Linear", "Embedding", "Conv2d"],
)
def test_adapted_layers_have_the_features_that_pefts_lora_layers_have(layer):
    lora = get_peft_model(nn.Sequential(layer()), LoraConfig(target_modules=["0"])).base_model.model[0]

    ours = one_layer(layer(), r=4).base_model.model[0]

    assert (ours.in_features, ours.out_features) == (lora.in_features, lora.out_features)


def test_a_conv1d_has_the_features_that_pefts_lora_layer_has():
    options = {"target_modules": ["c_attn"], "r": 4}
    lora = get_peft_model(tiny_gpt2(), LoraConfig(**options, fan_in_fan_out=True))
    ours = get_peft_model(tiny_gpt2(), LoLDUConfig(**options))

    for model in (lora, ours):
        attention = model.base_model.model.transformer.h[0].attn.c_attn
        assert (attention.in_features, attention.out_features) == (32, 96)
