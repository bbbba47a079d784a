"""A trained adapter of ours as an ordinary LoRA adapter, for stock PEFT and LoRA servers.

Exact, because the update is a product B A of rank r: A = U_r, B = Write diag(scale delta). Files: adapter_config.json
and adapter_model.safetensors in float32, rank and alpha per layer (alpha = rank, so that PEFT's own scaling is 1).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    _MOE_TARGET_MODULE_MAPPING,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from adapters.layer import FactorLayer


def as_lora(model: PeftModel, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA config and its tensors, named as PEFT saves them. Raises ValueError for an adapter that is not ours."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for name, layer in model.named_modules():
        if isinstance(layer, FactorLayer) and adapter_name in layer.maps:
            A, B = layer.lora(adapter_name)
            ranks[layer.name] = len(A)
            transposed |= isinstance(layer.base, Conv1D)
            if layer.embedding:
                parts = {"lora_embedding_A": A, "lora_embedding_B": B}
            elif len(layer.base.weight.shape) == 4:
                kernel = layer.base.weight.shape[1:]
                parts = {"lora_A.weight": A.view(-1, *kernel), "lora_B.weight": B[:, :, None, None]}
            else:
                parts = {"lora_A.weight": A, "lora_B.weight": B}
            tensors |= {f"{name}.{part}": value.float().contiguous().cpu() for part, value in parts.items()}
    if not ranks:
        known = ", ".join(f"{name} ({config.peft_type})" for name, config in model.peft_config.items())
        raise ValueError(f"the model has no adapter of ours named {adapter_name}, it has {known}")
    ours: Any = model.peft_config[adapter_name]
    family = model.base_model.prefix
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors |= {name: value.contiguous().cpu() for name, value in saved.items() if f".{family}" not in name}
    r = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=sorted(ranks),
        fan_in_fan_out=transposed,
        modules_to_save=ours.modules_to_save,
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        inference_mode=True,
    )
    _keep_from_experts(config, model.get_base_model(), set(ranks))
    return config, tensors


def _keep_from_experts(config: Any, base: Any, names: set[str]) -> None:
    """Let PEFT find these layers in a mixture of experts as well, in place.

    PEFT takes target modules named like a projection of transformers 4's experts (gate_proj, also of a dense layer) for
    the fused experts, and adapts those instead. Named as parameters (NAME.weight) it finds the layers.
    """
    seen = replace(config, target_modules=set(names))
    try:
        convert_peft_config_for_transformers(seen, base, None)
        taken = names - set(seen.target_modules)
    except ValueError:  # a part of the fused projections alone
        last = {old for mapping in _MOE_TARGET_MODULE_MAPPING.values() for old in mapping}
        taken = {name for name in names if name.rpartition(".")[2] in last}
    config.target_modules = names - taken
    config.target_parameters = sorted(f"{name}.weight" for name in taken) or None
    for pattern in (config.rank_pattern, config.alpha_pattern):
        pattern |= {f"{name}.weight": pattern[name] for name in taken if name in pattern}


def export_lora(model: PeftModel, out: Path, adapter_name: str = "default") -> None:
    """Write the adapter as a LoRA adapter into the folder out."""
    config, tensors = as_lora(model, adapter_name)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(out))
