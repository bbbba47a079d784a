"""How many tokens of keys and values to keep: from the memory there is, and no more than can be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from launcher.main_memory import main_memory

SHARE = {"cpu": 0.4, "cuda": 0.8}  # of the free memory; on a CPU activations and all else come out of it too
LEAST_TOKENS = 64


@dataclass(frozen=True)
class CacheSize:
    """blocks of page tokens each; bytes of keys, values, masks and what is read of them at once."""

    blocks: int
    page: int
    bytes: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.page


def cache_size(
    config: Any, dtype: torch.dtype, *, context: int, running: int, batch_tokens: int, page: int, budget: int
) -> CacheSize:
    """The cache for `running` requests of `context` tokens, or as much of it as fits `budget` bytes.

    Raises ValueError, with the arithmetic, if not even a short request fits.
    """
    per_token = bytes_per_token(config, dtype, batch_tokens)
    fixed = batch_tokens * batch_tokens * dtype.itemsize + running * config.vocab_size * 4 * 3
    wanted = -(-running * context // page)
    fitting = max(0, budget - fixed) // (per_token * page)
    blocks = min(wanted, fitting)
    if blocks * page < min(LEAST_TOKENS, context):
        raise ValueError(
            f"{budget / 1e9:.3g} GB for the cache is not enough: logits and masks of a batch take {fixed / 1e9:.3g} "
            f"GB, a token {per_token / 1e3:.3g} KB; give more memory, or a smaller dtype (--dtype bfloat16)"
        )
    return CacheSize(int(blocks), page, int(fixed + blocks * page * per_token))


def bytes_per_token(config: Any, dtype: torch.dtype, batch_tokens: int) -> int:
    """Bytes that a token in the cache takes: its keys and values in all layers, a copy of one layer's as it is read
    (repeated for all heads), its place, and its column of the attention mask."""
    heads, dim = find_num_key_value_heads(config), find_head_dim(config)
    kept = config.num_hidden_layers * 2 * heads * dim
    read = (2 * config.num_attention_heads + heads) * dim
    return (kept + read + batch_tokens) * dtype.itemsize + 8


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; of main memory, at most what this container may still use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limit, _ = main_memory()
    return max(0, min(limit - psutil.Process().memory_info().rss, psutil.virtual_memory().available))
