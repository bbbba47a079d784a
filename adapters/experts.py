"""Mixtures of experts whose matrices are one 3-dimensional parameter, as transformers 5 holds them."""

from __future__ import annotations

from typing import Any

from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from torch import nn

# Names that the projections of such experts have in older checkpoints, and that PEFT still takes for them.
FORMER_NAMES = frozenset(old for mapping in _MOE_TARGET_MODULE_MAPPING.values() for old in mapping)


def is_fused(model: Any, name: str) -> bool:
    """Whether the parameter of this name holds the matrices of several experts."""
    shape = model.get_parameter(name).shape
    return (
        len(shape) == 3
        and min(shape) > 1
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    )
