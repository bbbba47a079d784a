"""An adapter as training leaves it."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from adapters import LoLDUConfig


def save_adapter(base: Path, folder: Path, *, trust_remote_code: bool = False, **settings: Any) -> Path:
    """Write an adapter with random numbers for trained ones, large enough to change answers; returns its folder."""
    values = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    base_model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=trust_remote_code)
    model = get_peft_model(base_model, LoLDUConfig(**values))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.05 * noise if ".core" in name else parameter.data + 0.05 * noise
    model.save_pretrained(folder)
    return folder
