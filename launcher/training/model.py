"""From a config to the model that trains: base, attention, adapter with factors from the cache."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapters
from adapters.checkpoint_files import list_tensors, local_folder
from launcher.config import AdapterConfig, ModelConfig, nearest

log = logging.getLogger(__name__)


def base_folder(model: str) -> Path:
    """The local folder of the base model. Raises ValueError with what to do where there is none."""
    folder = local_folder(model)
    if folder is None:
        raise ValueError(
            f"--model {model} is neither a folder here nor in the hub cache: give a folder with config.json and "
            f"model.safetensors, or fetch it first with: hf download {model}"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder} has no config.json: it is not a Hugging Face model folder")
    list_tensors(folder)
    return folder


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises ValueError where the folder has none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{folder} has no tokenizer that loads ({reason}): copy tokenizer.json and its config there"
        ) from None


def choose_dtype(wanted: str) -> str:
    """The base's dtype: where auto is asked for, bfloat16 on a GPU that computes in it, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def choose_attention(wanted: str, *, on_gpu: bool, dtype: str) -> tuple[str, str]:
    """transformers' name of the attention and the reason for it."""
    installed = importlib.util.find_spec("flash_attn") is not None
    missing = (
        "flash-attn is not installed" if not installed
        else "no GPU" if not on_gpu
        else "flash-attn needs bfloat16" if dtype != "bfloat16"
        else ""
    )  # fmt: skip
    if wanted == "flash" and missing:
        raise ValueError(f"--attention flash cannot be used: {missing}; give --attention auto or sdpa")
    if wanted == "sdpa" or missing:
        return "sdpa", "as asked" if wanted == "sdpa" else missing
    return "flash_attention_2", "as asked" if wanted == "flash" else "flash-attn and a GPU are there"


def peft_config(config: AdapterConfig) -> PeftConfig | None:
    """The PEFT config of the adapter, ours or PEFT's own; None for full fine-tuning.

    Raises ValueError for an unknown method or option, listing the nearest valid ones.
    """
    if config.method == "full":
        return None
    known = {str(kind.value).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if config.method not in known:
        raise ValueError(f"unknown --method {config.method}; {nearest(config.method, {*known, 'full'})}")
    cls = known[config.method]
    fields = set(cls.__dataclass_fields__)
    targets = config.targets[0] if config.targets == ("all-linear",) else list(config.targets)
    values: dict[str, Any] = {
        "r": config.rank,
        "target_modules": targets,
        "exclude_modules": list(config.exclude) or None,
        "modules_to_save": list(config.modules_to_save) or None,
        "task_type": "CAUSAL_LM",
    }
    values = {name: value for name, value in values.items() if name in fields}
    for option in config.options:
        name, _, text = option.partition("=")
        if name not in fields:
            raise ValueError(f"unknown option {name} of method {config.method}; {nearest(name, fields)}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"options of method {config.method}: {error}") from None


def build(
    config: ModelConfig,
    folder: Path,
    adapter: PeftConfig | None,
    *,
    dtype: str,
    attention: str,
    factors: Callable[..., Any],
    device: torch.device,
) -> nn.Module:
    """The model ready to train on one device: base frozen (unless adapter is None), cores float32.

    factors(name, (m, n)) hands out the frozen factors of our methods.
    """
    base: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=config.trust_remote_code,
        local_files_only=True,
    )
    base.name_or_path = str(folder.resolve()) if Path(config.model).is_dir() else config.model
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapter is None:
        return base.to(device)
    with adapters.factors_from(factors):
        return get_peft_model(base, adapter, autocast_adapter_dtype=True).to(device)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name and parameter of everything that trains, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
