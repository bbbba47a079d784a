"""A trained adapter of ours as an ordinary LoRA adapter, for stock PEFT and LoRA servers.

Exact, because the update is a product B A of rank r: A = U_r, B = Write diag(scale delta). Files: adapter_config.json
and adapter_model.safetensors in float32, rank and alpha per layer (alpha = rank, so that PEFT's own scaling is 1).
`lower_rank` rewrites such files at a lower rank, each product by its best approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from adapters.experts import FORMER_NAMES
from adapters.layer import FactorLayer
from adapters.trained import UpdateLayer

Progress = Callable[[int, int], None]  # layers done, and of how many

FILE = "adapter_model.safetensors"
PARTS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}  # the two tensors of a layer
ROWS = 4096  # of a weight at once, where two updates are compared


def as_lora(
    model: PeftModel, adapter_name: str = "default", progress: Progress = lambda done, total: None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA config and its tensors, named as PEFT saves them. Raises ValueError for an adapter that is not ours."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    modules = list(model.named_modules())
    count = sum(isinstance(layer, (FactorLayer, UpdateLayer)) and adapter_name in layer.maps for _, layer in modules)
    for name, layer in modules:
        if isinstance(layer, (FactorLayer, UpdateLayer)) and adapter_name in layer.maps:
            progress(len(ranks) + 1, count)
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
    return config, _as_peft_reads(model, config, tensors)


def _as_peft_reads(model: PeftModel, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that PEFT maps to these.

    It renames what it reads as transformers renames an old checkpoint's tensors, and takes the patterns for regular
    expressions: Laguna's `mlp.shared_expert.` also matches in `mlp.shared_experts.`, its new name. The old name is then
    the one to write.
    """
    found = convert_peft_adapter_state_dict_for_transformers(model, config, dict(tensors))
    base: Any = model.get_base_model()
    every = [one for one in get_model_conversion_mapping(base) if isinstance(one, WeightRenaming)]
    renamings = [(one.target_patterns[0], one.source_patterns[0]) for one in every]

    def written(name: str, tensor: Tensor) -> str:
        older = [name.replace(new, old) for new, old in renamings if new in name]
        read = (convert_peft_adapter_state_dict_for_transformers(model, config, {one: tensor}) for one in older)
        return next((one for one, names in zip(older, read, strict=True) if name in names), name)

    return {name if name in found else written(name, tensor): tensor for name, tensor in tensors.items()}


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
        taken = {name for name in names if name.rpartition(".")[2] in FORMER_NAMES}
    config.target_modules = names - taken
    config.target_parameters = sorted(f"{name}.weight" for name in taken) or None
    for pattern in (config.rank_pattern, config.alpha_pattern):
        pattern |= {f"{name}.weight": pattern[name] for name in taken if name in pattern}


def export_lora(
    model: PeftModel, out: Path, adapter_name: str = "default", progress: Progress = lambda done, total: None
) -> None:
    """Write the adapter as a LoRA adapter into the folder out. progress: as `as_lora` has it."""
    config, tensors = as_lora(model, adapter_name, progress)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / FILE, metadata={"format": "pt"})
    config.save_pretrained(str(out))


def lower_rank(
    folder: Path, rank: int, device: torch.device, progress: Callable[[str, int, float], None]
) -> dict[str, float]:
    """Rewrite a LoRA adapter's files so that no layer has a rank above `rank`.

    progress(layer, its rank so far, relative error) is called for each layer. Returns those errors, in the Frobenius
    norm of the update and measured on the tensors as they are written; 0 for layers whose rank stays.
    """
    config: Any = LoraConfig.from_pretrained(str(folder))
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    with safe_open(folder / FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            first = next((part for part in PARTS if key.endswith(f".{part}")), None)
            if first is None:
                if not any(key.endswith(f".{part}") for part in PARTS.values()):
                    tensors[key] = file.get_tensor(key)
                continue
            name, other = key.removesuffix(f".{first}"), key.removesuffix(first) + PARTS[first]
            A, B = file.get_tensor(key), file.get_tensor(other)
            (low_A, low_B), error = low_rank(A.flatten(1).to(device), B.flatten(1).to(device), rank)
            tensors[key] = low_A.reshape(-1, *A.shape[1:]).contiguous().cpu()
            tensors[other] = low_B.reshape(len(B), -1, *B.shape[2:]).contiguous().cpu()
            layer = name.removeprefix("base_model.model.")
            errors[layer], ranks[layer] = error, len(tensors[key])
            progress(layer, len(A), error)
    config.r = config.lora_alpha = max(ranks.values())
    named = {f"{layer}.weight" if f"{layer}.weight" in (config.target_parameters or ()) else layer: r
             for layer, r in ranks.items()}  # fmt: skip
    config.rank_pattern = {name: r for name, r in named.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    lowered_file = folder / f".{FILE}"  # the tensors that stay are read from the old file while this one is written
    save_file(tensors, lowered_file, metadata={"format": "pt"})
    lowered_file.replace(folder / FILE)
    config.save_pretrained(str(folder))
    return errors


def low_rank(A: Tensor, B: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
    """The pair A' (k, n), B' (m, k), k <= rank, whose product is nearest to B A, and its relative error.

    A (r, n), B (m, r). Exact, up to rounding, if no more than `rank` directions of the update are nonzero: if that many
    columns of B are, they are used unchanged.
    """
    if len(A) <= rank:
        return (A, B), 0.0
    used = ((B != 0).any(0) & (A != 0).any(1)).nonzero().flatten()
    if len(used) <= rank:
        used = used if len(used) else torch.zeros(1, dtype=torch.long, device=A.device)  # PEFT wants one at least
        return (A[used], B[:, used]), 0.0
    QB, RB = torch.linalg.qr(B[:, used].double())
    QA, RA = torch.linalg.qr(A[used].double().T)
    U, s, Vh = torch.linalg.svd(RB @ RA.T)  # B A = (QB U) diag(s) (QA V)^T
    root = s[:rank].sqrt()
    low_B = (QB @ U[:, :rank] * root).to(B.dtype)
    low_A = (root[:, None] * (QA @ Vh[:rank].T).T).to(A.dtype)
    gap = whole = 0.0
    for at in range(0, len(B), ROWS):
        wanted = B[at : at + ROWS].double() @ A.double()
        gap += float((low_B[at : at + ROWS].double() @ low_A.double() - wanted).square().sum())
        whole += float(wanted.square().sum())
    return (low_A, low_B), (gap / whole) ** 0.5
