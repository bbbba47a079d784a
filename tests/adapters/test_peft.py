"""LoLDU as a PEFT method: what is saved, and that it loads as it was."""

import socket
import subprocess
import sys
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_folders import not_lorasb, opened, saved
from safetensors.torch import load_file, save_file
from tiny_models import adapted, layers, lm_config, logits, randomise, tiny_llama, tokens

from adapters import BasePrecisionWarning, LoLDUConfig

NEW_PROCESS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import adapters
base, adapter, out = sys.argv[1:]
torch.set_num_threads(1)
tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3))
seen = []
for low in (False, True):
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=low).eval()
    with torch.no_grad():
        seen.append(model(tokens).logits)
torch.save(seen, out)
"""


@pytest.mark.parametrize("method", ["loldu", "svfit", "lorasb"], indirect=True)
def test_a_new_process_gives_the_same_logits_bit_for_bit(method, base, tmp_path):
    model = adapted(opened(base))
    saved(model, tmp_path / "adapter")

    command = [sys.executable, "-c", NEW_PROCESS, base, tmp_path / "adapter", tmp_path / "logits"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)

    for seen in torch.load(tmp_path / "logits", weights_only=True):
        assert torch.equal(seen, logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_way_of_loading_gives_the_same_bits_and_no_warning(method, base, tmp_path, low_cpu_mem_usage):
    model = adapted(opened(base))
    folder = saved(model, tmp_path / "adapter")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        through_peft = PeftModel.from_pretrained(opened(base), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        through_transformers = opened(base)
        report = through_transformers.load_adapter(str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
        both_in_one = opened(folder)
        auto = AutoPeftModelForCausalLM.from_pretrained(folder)

    assert not report.missing_keys
    assert not report.unexpected_keys
    for loaded in (through_peft, through_transformers, both_in_one, auto):
        assert torch.equal(logits(loaded.eval()), logits(model))
        assert {m.maps[n].core.dtype for m in layers(loaded) for n in m.maps} == {torch.float32}
        assert not [n for n, p in loaded.named_parameters() if p.requires_grad]


def test_nothing_is_said_on_the_screen_while_transformers_loads_an_adapter(method, base, tmp_path, capfd):
    """Its report of missing or newly initialised keys would alarm users; our maps are made from the base, not
    missing."""
    folder = saved(adapted(opened(base)), tmp_path / "adapter")
    model = opened(base)
    capfd.readouterr()

    model.load_adapter(str(folder))

    out, err = capfd.readouterr()
    assert not [line for line in (out + err).splitlines() if line.strip() and "Loading weights" not in line]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_half_precision_base_keeps_float32_cores(method, base, tmp_path, dtype, low_cpu_mem_usage):
    model = adapted(opened(base, dtype=dtype))
    folder = saved(model, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(opened(base, dtype=dtype), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()

    for mine, theirs in zip(layers(model), layers(loaded), strict=True):
        assert theirs.maps["default"].core.dtype == torch.float32
        assert torch.equal(mine.maps["default"].core, theirs.maps["default"].core)
    assert torch.equal(logits(loaded), logits(model))


def test_training_continues_from_a_loaded_adapter(method, base, tmp_path):
    model = adapted(opened(base))
    folder = saved(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(opened(base), folder, is_trainable=True)

    for m in (model, loaded):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        m(tokens(), labels=tokens()).loss.backward()
        optimizer.step()

    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_the_state_dict_goes_through_pefts_own_functions(method, base):
    model = adapted(opened(base))
    other = get_peft_model(opened(base), lm_config())

    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))

    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "loldu" in key]
    assert torch.equal(logits(other.eval()), logits(model))


def test_the_file_holds_core_pivots_values_and_probe_alone(base, tmp_path):
    model = adapted(opened(base), r=5)
    folder = saved(model, tmp_path / "adapter")

    tensors = load_file(folder / "adapter_model.safetensors")
    config = PeftConfig.from_pretrained(folder)

    assert isinstance(config, LoLDUConfig)
    assert config.peft_type == "LOLDU"
    assert len(config.base_fingerprint) == 64
    assert len(tensors) == 4 * 14
    q = {n.rpartition(".")[2]: t for n, t in tensors.items() if "layers.0.self_attn.q_proj" in n}
    W = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj").base.weight
    P, _, U = torch.linalg.lu(W.double())
    assert q["pivots"].tolist() == P.argmax(dim=0)[:5].tolist()
    torch.testing.assert_close(q["values"], U.diagonal()[:5].float(), rtol=1e-5, atol=0)  # float32 elimination
    assert (q["core"].dtype, q["pivots"].dtype, q["probe"].dtype) == (torch.float32, torch.int32, torch.uint8)


@pytest.mark.parametrize(
    ("r", "targets", "limit"), [(64, "all-linear", 2_000_000), (1024, ["q_proj", "v_proj"], 2_000_000)]
)
def test_a_7b_adapter_is_under_2_megabytes(tmp_path, r, targets, limit):
    """Llama-2-7B's shapes, on meta: no weight is made, the factors' shapes decide the file."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    with torch.device("meta"):
        model = tiny_llama(**sizes, num_attention_heads=32, num_key_value_heads=32)
        model = get_peft_model(model, lm_config(r=r, target_modules=targets))

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({n: torch.zeros(t.shape, dtype=t.dtype) for n, t in state.items()}, tmp_path / "adapter.safetensors")

    assert len(state) == 4 * 32 * (7 if targets == "all-linear" else 2)
    assert (tmp_path / "adapter.safetensors").stat().st_size < limit


def test_saving_never_asks_the_network(base, tmp_path, monkeypatch):
    model = adapted(opened(base))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    asked = []

    def refuse(*where):
        asked.append(where)  # raising alone is not enough: PEFT catches it and warns
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(opened(base), tmp_path / "adapter")

    assert not asked


def test_two_adapters_are_saved_and_loaded_side_by_side(method, base, tmp_path):
    model = get_peft_model(opened(base), lm_config(), adapter_name="A")
    model.add_adapter("B", lm_config(r=3, target_modules=["q_proj"]))
    randomise(randomise(model, "A"), "B", seed=2).eval()
    expected = {}
    for name in "AB":
        model.set_adapter(name)
        expected[name] = logits(model)
    folder = saved(model, tmp_path / "adapters")

    loaded = PeftModel.from_pretrained(opened(base), folder / "A", adapter_name="A")
    loaded.load_adapter(folder / "B", adapter_name="B")

    for name in "ABA":
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval()), expected[name])


def test_modules_to_save_are_trained_and_saved_whole(method, base, tmp_path):
    model = get_peft_model(opened(base), lm_config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    randomise(model)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.1
    folder = saved(model.eval(), tmp_path / "adapter")

    with warnings.catch_warnings():
        warnings.simplefilter("error", BasePrecisionWarning)
        loaded = PeftModel.from_pretrained(opened(base), folder).eval()
        loaded.add_adapter("second", lm_config(base_fingerprint=PeftConfig.from_pretrained(folder).base_fingerprint))

    assert len([layer for layer in layers(loaded) if "second" in layer.maps]) == 14  # and not the head's copies

    assert {name for name in trained if "core" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }
    assert torch.equal(logits(loaded), logits(model))


@not_lorasb
def test_an_adapted_embedding_is_saved_and_loaded(method, base, tmp_path):
    model = adapted(opened(base), target_modules=["embed_tokens", "q_proj"])
    folder = saved(model, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(opened(base), folder).eval()

    assert torch.equal(logits(loaded), logits(model))
