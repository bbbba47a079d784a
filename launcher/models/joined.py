"""Attention over samples that stand one after another in a row, the beginning that they share only once.

Without padding, and without computing a common beginning (a system prompt, the words of a prompt template) for each
sample again, every layer but attention sees fewer tokens. Attention gathers the samples into rows of equal length,
which SDPA computes. A batch without `samples` is computed by SDPA as ever.

Shapes: B samples, N tokens of the longest, T tokens in the row, H heads, D numbers per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def joined_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    samples: Mapping[str, Tensor] | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (1, H, T, D), key and value with fewer heads or as many, to (1, T, H, D).

    samples is what `launcher.data.joined.join` makes; attention_mask is not read then.
    """
    if samples is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **rest)
    rows = samples["rows"]
    q, k, v = (
        part[0].transpose(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)
        for part in (query, key, value)
    )  # (B, heads, N, D): padding repeats a token, after all that see it
    out, _ = sdpa_attention_forward(module, q, k, v, None, *args, **rest)
    return out.flatten(0, 1).index_select(0, samples["places"])[None], None


def register() -> None:
    """Make transformers' SDPA understand `samples`."""
    AttentionInterface.register("sdpa", joined_attention)
