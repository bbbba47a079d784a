"""Whether a model's requests can share batches: transformers' continuous batching does not tell this for each model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from adapters.many import Adapter, ManyAdapters

PROMPTS, TOKENS = ((7, 8, 9, 10, 11), (12, 9, 14, 15, 7, 17, 18, 19, 3)), 3
Made = list[tuple[int, float]]  # tokens with their log-probabilities


def check_attention(config: Any) -> None:
    """Raises ValueError for a model without attention in every layer, whose state is no keys and values."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    with suppress(ValueError):
        find_num_key_value_heads(config)
        find_head_dim(config)
        if not kinds:
            return
    raise ValueError(
        f"models of type {config.model_type} cannot be served: requests share a cache of keys and values, which its "
        f"layers ({', '.join(sorted(kinds)) or 'without attention'}) do not have; use loldu generate"
    )


@torch.no_grad()
def continuation(model: Any, prompt: Sequence[int]) -> Made:
    """The most likely tokens after a prompt, from plain forward passes."""
    ids, found = list(prompt), []
    for _ in range(TOKENS):
        given = torch.tensor([ids], device=model.device)
        logprobs = model(input_ids=given, use_cache=False).logits[0, -1].float().log_softmax(-1)
        ids.append(int(logprobs.argmax()))
        found.append((ids[-1], float(logprobs.max())))
    return found


@torch.no_grad()
def try_adapter(model: Any, many: ManyAdapters, adapter: Adapter, prompt: Sequence[int]) -> None:
    """Raises ValueError for an adapter whose layers do not take a packed row, or whose logits are not finite.

    A model's head, for one, sees only the last token of each request. It is tried on the first adapter of each kind.
    """
    if model.config._attn_implementation.startswith("paged"):  # needs the cache
        return
    ids = torch.tensor([prompt], device=model.device)
    last = torch.tensor([len(prompt) - 1], device=ids.device)
    keep = {"logits_to_keep": last} if model._supports_logits_to_keep() else {}
    with many.packed([(adapter, len(prompt))]):
        logits = model(input_ids=ids, use_cache=False, **keep).logits
    if not torch.isfinite(logits[0, -1].float().amax()):
        raise ValueError(f"with adapter {adapter.name} the logits are NaN or infinite: use an earlier checkpoint")


def check_same(kind: str, packed: Sequence[Made], alone: Sequence[Made]) -> None:
    """Raises ValueError if a packed batch gave other log-probabilities than plain forward passes."""
    for found, wanted in zip(packed, alone, strict=True):
        for (token, here), (expected, there) in zip(found, wanted, strict=False):
            if not abs(here - there) <= 0.1 + 0.02 * abs(there):
                raise ValueError(
                    f"models of type {kind} cannot be served: in a packed batch a token's log-probability is "
                    f"{here:.3f}, alone it is {there:.3f} (transformers' continuous batching does not support it); use "
                    "loldu generate"
                )
            if token != expected:  # the two are equally likely
                break
