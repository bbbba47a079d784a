"""The shape of the matrix W that a base layer multiplies by."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


def matrix_shape(base: nn.Module, name: str) -> tuple[int, int]:
    """(m, n) of a layer's W. Raises ValueError for a type of layer that is not supported."""
    if isinstance(base, nn.Linear):  # quantised ones too, whose weight is packed
        return base.out_features, base.in_features
    if isinstance(base, Conv1D):
        return base.weight.shape[1], base.weight.shape[0]
    if isinstance(base, nn.Embedding) or (isinstance(base, nn.Conv2d) and base.groups == 1):
        return base.weight.shape[0], base.weight[0].numel()
    groups = f" with groups {base.groups}" if isinstance(base, nn.Conv2d) else ""
    raise ValueError(
        f"{name} is a {type(base).__name__}{groups}; supported are Linear, Conv1D, Embedding and Conv2d "
        "with groups 1: leave it out (exclude_modules) or name other target_modules"
    )


def features(base: nn.Module, shape: tuple[int, int]) -> tuple[int, int]:
    """(in, out) as PEFT's LoRA layers name them: rows and width of an embedding, channels of a convolution."""
    if isinstance(base, nn.Conv2d):
        return base.in_channels, base.out_channels
    m, n = shape
    return (m, n) if isinstance(base, nn.Embedding) else (n, m)
