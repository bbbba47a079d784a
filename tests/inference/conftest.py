"""Folders as users have them: an adapter that changes the model much, a run around it, a base with a chat template."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from trained_adapter import save_adapter
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

CHAT = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="session")
def adapter(babyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-8 adapter on babyllama-361."""
    return save_adapter(babyllama, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def run_folder(adapter: Path, babyllama: Path, tmp_path: Path) -> Path:
    """A finished run whose base is babyllama-361 and whose template is short."""
    run = tmp_path / "runs" / "first"
    shutil.copytree(adapter, run / "adapter")
    model = {"model": str(babyllama), "dtype": "float32"}
    config = {"config": {"model": model, "data": {"prompt_template": "short"}}}
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture(scope="session")
def chat_model(babyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """babyllama-361 with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(babyllama, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    return folder


@pytest.fixture(scope="session")
def stranger(babyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shapes of babyllama-361."""
    folder = tmp_path_factory.mktemp("stranger") / "model"
    shutil.copytree(babyllama, folder)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(babyllama)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 24 positions: transposed weights, biases, learned positions, tied embeddings, no tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=24, bos_token_id=0, eos_token_id=0)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
