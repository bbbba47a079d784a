"""PEFT's own way to several adapters in a batch: adapter_names."""

import pytest
import torch
from many_folders import CLOSE
from peft import PeftModel, get_peft_model
from tiny_models import layers, lm_config, randomise, tiny_llama, tokens


def with_adapters(count=3, **changes):
    model = get_peft_model(tiny_llama(), lm_config(**changes), adapter_name="a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", lm_config(**changes))
    for i in range(count):
        randomise(model, f"a{i}", seed=40 + i)
    return model.eval()


def test_adapter_names_gives_each_sample_its_adapter(method):
    model, ids = with_adapters(), tokens(shape=(5, 12))
    names = ["a2", "__base__", "a0", "a2", "a1"]

    with torch.no_grad():
        mixed = model(ids, adapter_names=names).logits

    for row, name in enumerate(names):
        with torch.no_grad():
            if name == "__base__":
                with model.disable_adapter():
                    assert torch.equal(mixed[row], model(ids).logits[row])
            else:
                model.set_adapter(name)
                torch.testing.assert_close(mixed[row : row + 1], model(ids[row : row + 1]).logits, **CLOSE)


def test_adapter_names_generates_with_beams_too(method):
    model, ids = with_adapters(), tokens(shape=(3, 9))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    for beams in (1, 2):
        mixed = model.generate(input_ids=ids, adapter_names=["a2", "a0", "a1"], num_beams=beams, **settings)
        for row, name in enumerate(["a2", "a0", "a1"]):
            model.set_adapter(name)
            assert mixed[row].tolist() == model.generate(input_ids=ids, num_beams=beams, **settings)[row].tolist()


@pytest.mark.not_lorasb
def test_adapters_of_one_kind_hold_their_maps_once(method, tmp_path):
    model = with_adapters()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a0", adapter_name="a0")
    loaded.load_adapter(tmp_path / "a1", adapter_name="a1")
    loaded(tokens())

    for each in (model, loaded):
        for layer in layers(each):
            assert layer.maps["a0"].write.data_ptr() == layer.maps["a1"].write.data_ptr()
            assert layer.maps["a0"].core.data_ptr() != layer.maps["a1"].core.data_ptr()


def test_adapter_names_that_cannot_be_are_refused():
    model, ids = with_adapters(), tokens()

    with pytest.raises(ValueError, match="names nobody, which this model does not have"):
        model(ids, adapter_names=["nobody", "a0"])
    with pytest.raises(ValueError, match="3 names for a batch of 2 samples"):
        model(ids, adapter_names=["a0"] * 3)
    model.train()
    with pytest.raises(ValueError, match="evaluation mode only"):
        model(ids, adapter_names=["a0", "a1"])
    model.eval().merge_adapter(["a0"])
    with pytest.raises(ValueError, match="a0 is merged: call unmerge_adapter"):
        model(ids, adapter_names=["a0", "a1"])
