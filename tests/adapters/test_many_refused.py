"""What cannot join a table of adapters is refused by name."""

import pytest
import torch
from many_folders import CONFIGS, written
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import adapted, tiny_llama, tokens

from adapters import (
    ManyAdapters,
)


def broken(tmp_path, change):
    """A saved adapter after a change of its config and tensors."""
    model = adapted(tiny_llama(), seed=1)
    model.save_pretrained(tmp_path)
    from peft import PeftConfig

    config, tensors = PeftConfig.from_pretrained(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    change(config, tensors)
    return config, tensors


def _drop(name):
    return lambda config, tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(name)]


LAYER = "model.layers.0.self_attn.q_proj"
CHANGES = {
    "another base": (lambda c, t: None, "does not fit this base"),
    "a tensor of the base": (
        lambda c, t: t.update(
            {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": torch.ones(32, 32)}
        ),
        "holds tensors that are not part of the adapter",
    ),
    "no pivots": (_drop("pivots"), "lacks pivots of"),
    "a rank of its config alone": (lambda c, t: setattr(c, "r", 10**9), "was saved at rank .*, but with r=1000000000"),
    "another rank": (
        lambda c, t: t.update({key: value[:3] for key, value in t.items() if key.endswith("core")}),
        r"has shape \(3,\)",
    ),
    "a whole module": (lambda c, t: setattr(c, "modules_to_save", ["lm_head"]), "trains whole modules"),
    "unknown modules": (
        lambda c, t: [t.__setitem__(key.replace("q_proj", "query"), t.pop(key)) for key in list(t)],
        "does not have: load it on the base it was trained on",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_does_not_fit_is_refused_by_name(what, tmp_path):
    change, message = CHANGES[what]
    config, tensors = broken(tmp_path, change)
    many = ManyAdapters(tiny_llama(seed=9 if what == "another base" else 0))

    with pytest.raises(ValueError, match=message):
        many.add_tensors("bad", config, tensors)

    assert not many.adapters
    assert not many._hooks


def test_variants_of_lora_are_refused(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig(use_dora=True, target_modules=["q_proj"])).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="is a LoRA with use_dora, which cannot share a batch"):
        ManyAdapters(tiny_llama()).add("dora", tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_that_changes_the_weights_of_its_base_is_refused(start, tmp_path):
    """Its update belongs to what is left of the base after its first product was subtracted."""
    config = LoraConfig(init_lora_weights=start, target_modules=["q_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    many = ManyAdapters(tiny_llama())

    with pytest.raises(ValueError, match=f"init_lora_weights={start}, which also changes .*loldu merge"):
        many.add("residual", tmp_path)

    assert not many.adapters


def test_a_subclass_of_lora_is_named_as_what_it_is(tmp_path):
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="adapter ada is a ADALORA adapter; supported are"):
        ManyAdapters(tiny_llama()).add("ada", tmp_path)


def test_a_name_in_use_an_unknown_name_and_a_wrong_number_of_rows_are_refused(tmp_path):
    written(tmp_path, CONFIGS["loldu"], count=1)
    many = ManyAdapters(model := tiny_llama())
    many.add("a0", tmp_path / "a0")

    with pytest.raises(ValueError, match="there is an adapter a0 already"):
        many.add("a0", tmp_path / "a0")
    with pytest.raises(KeyError, match="nobody"), many.rows(["nobody"]):
        pass
    with pytest.raises(KeyError, match="nobody"):
        many.remove("nobody")
    with pytest.raises(ValueError, match="do not keep rows apart"), many.rows(["a0"] * 3):
        model(tokens(shape=(2, 12)))
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)  # the failed batch left nothing behind
