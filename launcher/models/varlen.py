"""Attention over rows of different lengths without padding, by torch alone: `--attention varlen`, for CUDA.

torch.nn.attention.varlen has flash attention's kernels, so the flash-attn package, which takes long to build, is not
needed. All samples of a micro-batch are in one row (1, T) with their borders in cu_seq_lens_*; nothing is padded, and
no sample sees another. A batch without borders (evaluation, generation) is computed by SDPA with its mask.

Shapes: B rows, N tokens, T tokens in all, H heads, G key and value heads, D numbers per head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "varlen"
MOST_PER_HEAD, IN_EIGHTS = 256, 8  # numbers per head that the kernel takes: at most so many, a multiple of eight
UNSUPPORTED = (
    "attn_logit_softcapping", "attention_chunk_size", "alibi",
    "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob",
)  # fmt: skip


def _torchs_kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


_KERNEL = _torchs_kernel()
_TAKES = set(inspect.signature(_KERNEL).parameters) if _KERNEL else set()  # read once: each layer's pass needs it


def varlen_kernel() -> Callable[..., Any] | None:
    """torch's varlen_attn; None if this torch has none, or one without windows."""
    return _KERNEL if "window_size" in _TAKES else None


def missing(*, on_gpu: bool, dtype: str) -> str:
    """Why this machine cannot compute with it; nothing if it can."""
    if not on_gpu:
        return "no GPU"
    if varlen_kernel() is None:
        return f"torch {torch.__version__} has no varlen_attn with windows (2.11 has)"
    if dtype != "bfloat16":
        return "varlen needs bfloat16"
    if torch.cuda.get_device_capability() < (8, 0):
        return "varlen needs a GPU of compute capability 8.0 (Ampere) or more"
    return ""


def unsupported(settings: Any) -> str:
    """What in a model's config the kernel does not compute; nothing if it does."""
    text = settings.get_text_config()
    for name in UNSUPPORTED:
        if value := getattr(text, name, None):
            return f"its config has {name} {value}"
    hidden, heads = getattr(text, "hidden_size", 0), getattr(text, "num_attention_heads", None) or 1
    per_head = getattr(text, "head_dim", None) or hidden // heads
    if per_head > MOST_PER_HEAD:
        return f"its heads have {per_head} numbers, more than {MOST_PER_HEAD}"
    return f"its heads have {per_head} numbers, no multiple of {IN_EIGHTS}" if per_head % IN_EIGHTS else ""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, N, D), key and value (B, G, N, D) to (B, N, H, D).

    With borders, B is 1 and attention_mask is not read. Raises ValueError for what the kernel does not compute.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **rest
        )
    for name, given in (("dropout", dropout), ("softcap", softcap), ("sinks", s_aux)):
        if given is not None and not (isinstance(given, float) and given == 0.0):
            raise ValueError(f"--attention varlen computes no {name}, which this model has: give --attention sdpa")
    kernel = varlen_kernel()
    assert kernel is not None
    assert cu_seq_lens_k is not None
    assert query.shape[0] == 1, f"borders are given, but there are {query.shape[0]} rows"
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (T, heads, D)
    causal = getattr(module, "is_causal", True)
    window = (sliding_window - 1 if sliding_window else -1, 0 if causal else -1)
    # In torch 2.11 the kernel shares keys among groups of heads unasked; in 2.13 it must be asked.
    grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _TAKES else {}
    out = kernel(
        q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
        scale=scaling, window_size=window, **grouped,
    )  # fmt: skip
    return out[None], None


def register() -> None:
    """Make it known to transformers as an attn_implementation."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
