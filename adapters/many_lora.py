"""LoRA adapters beside ours in one batch: each has its own A (r, n) and B (m, r), which hold the scaling.

They do not follow from the base, so nothing is shared: an adapter's rows are taken out of the batch, multiplied, and
added back, one adapter after the other. LoRA-SB's maps come from gradients, so it is one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from adapters.base import FactorConfig, start_in_base
from adapters.many_tensors import Parts, by_module, module_of, refuse_unknown
from adapters.shapes import matrix_shape

LoraWeights = dict[str, tuple[Tensor, Tensor]]  # module -> A (r, n), B (m, r) with the scaling


def lora_weights(model: nn.Module, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraWeights:
    """A and B of PEFT's LoRA by module. Raises ValueError for its variants and for weights that do not fit."""
    plain = LoraConfig()
    variants = (
        "use_dora",
        "lora_bias",
        "bias",
        "layer_replication",
        "trainable_token_indices",
        "alora_invocation_tokens",
    )
    if other := [each for each in variants if getattr(config, each, None) != getattr(plain, each, None)]:
        raise ValueError(
            f"adapter {name} is a LoRA with {', '.join(other)}, which cannot share a batch: serve it alone"
        )
    if start := start_in_base(config):
        raise ValueError(
            f"adapter {name} is a LoRA with init_lora_weights={start}, which also changes the weights of its base, so "
            "it cannot share them: serve it alone, merged (loldu merge ADAPTER --out FOLDER)"
        )
    downs, rest = by_module(tensors, ".lora_A.")
    ups, rest = by_module(rest, ".lora_B.")
    refuse_unknown(model, name, rest)
    if downs.keys() != ups.keys() or not downs:
        odd = ", ".join(sorted(downs.keys() ^ ups.keys())[:3]) or "any layer"
        raise ValueError(f"adapter {name} lacks lora_A or lora_B of {odd}: copy its file again")
    found, alphas = {}, config.alpha_pattern or {}
    for module in sorted(downs):
        A, B = downs[module]["weight"], ups[module]["weight"]
        alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
        scaling = alpha / (len(A) ** 0.5 if config.use_rslora else len(A))
        found[module] = _fitting(model, name, module, A, B, scaling)
    return found


def lora_weights_of_maps(model: nn.Module, name: str, config: FactorConfig, parts: Parts) -> LoraWeights:
    """The same of a method of ours that saves its maps: A is what it reads through, B what it writes, with the core."""
    found = {}
    for module, tensors in sorted(parts.items()):
        if missing := {"core", "read", "write"} - tensors.keys():
            raise ValueError(f"adapter {name} lacks {', '.join(sorted(missing))} of {module}: copy its file again")
        wide = {part: tensors[part].float() for part in ("core", "read", "write")}
        core = config.core_matrix(wide["core"], len(wide["read"]))
        found[module] = _fitting(model, name, module, wide["read"], wide["write"] @ core, config.scale)
    return found


def _fitting(model: nn.Module, name: str, module: str, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The pair on its layer's device, in at least float32, as PEFT keeps them."""
    layer = module_of(model, name, module)
    (m, n), at = matrix_shape(layer, module), layer.weight.device
    if isinstance(layer, (nn.Embedding, nn.Conv2d)):
        raise ValueError(
            f"adapter {name} adapts {module}, a {type(layer).__name__}: LoRA is served on linear layers only"
        )
    if A.ndim != 2 or tuple(B.shape) != (m, len(A)) or A.shape[1] != n:
        raise ValueError(
            f"adapter {name} does not fit this base: on {module} ({m} x {n}) its A is {tuple(A.shape)} and its B "
            f"{tuple(B.shape)}; load it on the base it was trained on"
        )
    dtype: Any = torch.promote_types(A.dtype, torch.float32)
    return A.to(at, dtype).contiguous(), (scaling * B.to(at, dtype)).contiguous()
