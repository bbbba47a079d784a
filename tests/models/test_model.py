"""Progress and stop requests while the model is loaded."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from peft import BOFTConfig
from transformers import LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

from adapters import LoLDUConfig
from launcher.config import ModelConfig
from launcher.models.build import build
from launcher.models.skeleton import adapted
from launcher.processes import Stopped


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of a process's maps")
def test_a_frozen_base_in_its_files_dtype_is_a_map_of_them(stories):
    how = {"dtype": "float32", "attention": "sdpa", "device": torch.device("cpu")}

    base = build(ModelConfig(), stories, None, factors=lambda module: None, **how)

    file = str((stories / "model.safetensors").resolve())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[-1] == file]
    assert all(any(low <= p.data_ptr() < high for low, high in ends) for p in base.parameters())


def test_a_base_for_a_gpu_is_read_to_it_and_not_to_main_memory_first(stories, monkeypatch):
    """Meta stands for the GPU. On the way there would be a copy in another dtype, in each process."""
    read, asked = LlamaForCausalLM.from_pretrained, []
    monkeypatch.setattr(
        LlamaForCausalLM,
        "from_pretrained",
        lambda *_, device_map=None, **how: asked.append(device_map) or read(*_, **how),
    )
    how = {"dtype": "bfloat16", "attention": "sdpa", "factors": lambda module: None}

    for device in ("meta", "cpu"):
        build(ModelConfig(), stories, None, device=torch.device(device), **how)

    assert asked == [{"": torch.device("meta")}, None]


def test_a_base_that_is_read_to_a_device_is_the_same_and_has_no_hooks(stories):
    plain = LlamaForCausalLM.from_pretrained(stories, dtype=torch.bfloat16)

    placed = LlamaForCausalLM.from_pretrained(stories, dtype=torch.bfloat16, device_map={"": torch.device("cpu")})

    assert not [name for name, module in placed.named_modules() if hasattr(module, "_hf_hook")]
    assert all(torch.equal(placed.get_parameter(name), p) for name, p in plain.named_parameters())


def test_loading_a_base_tells_of_each_parameter_and_can_be_stopped_there(stories):
    told = []

    def progress(done, total):
        told.append((done, total))
        if done == 5:
            raise Stopped

    how = {"dtype": "float32", "attention": "sdpa", "factors": lambda module: None, "device": torch.device("cpu")}
    with pytest.raises(Stopped):
        build(ModelConfig(), stories, None, progress=progress, **how)
    build(ModelConfig(), stories, None, **how)

    assert told == [(number, 47) for number in range(1, 6)]


def test_loading_a_quantised_base_tells_of_each_parameter_and_can_be_stopped_there(stories):
    told = []

    def progress(done, total):
        told.append((done, total))
        if done == 5:
            raise Stopped

    config, how = ModelConfig(quantize="nf4"), {"dtype": "float32", "attention": "sdpa"}
    with pytest.raises(Stopped):
        build(config, stories, None, factors=lambda module: None, device=torch.device("cpu"), progress=progress, **how)

    assert told == [(number, 47) for number in range(1, 6)]  # 5 layers of 9, the embedding and the last norm


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_rwkvs_weights_and_their_adapters_have_one_scale_in_evaluation(kind, tmp_path):
    """transformers halves some from the seventh layer on, and the hidden states with them, but no adapter."""
    torch.manual_seed(0)
    sizes: dict = {"vocab_size": 32, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
    RwkvForCausalLM(RwkvConfig(**sizes, num_hidden_layers=8, context_length=32)).save_pretrained(tmp_path)
    adapter = LoLDUConfig(r=4, target_modules=["output", "value"], task_type="CAUSAL_LM")
    how: dict = {
        "dtype": "float32",
        "attention": "eager",
        "device": torch.device("cpu"),
        "factors": lambda module: None,
    }
    model = build(ModelConfig(model=str(tmp_path), quantize=kind), tmp_path, adapter, **how)
    ids = torch.arange(1, 13)[None]

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        trained, evaluated = (model.train(mode)(input_ids=ids, use_cache=False).logits for mode in (True, False))

    assert torch.equal(trained, evaluated)


def test_the_compiler_that_peft_chooses_for_boft_is_not_that_of_the_process(monkeypatch):
    """Torch would compile the layers with gcc, which does not link C++."""
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", None)
    monkeypatch.delenv("CXX", raising=False)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(base, BOFTConfig(target_modules=["0"], boft_block_size=4))

    assert "CXX" not in os.environ
