"""`--packing`: how a model is told where one sample of a row ends and the next begins, and whether it respects that.

Models differ: most take a 4-dimensional mask, those with sliding windows build their own from position ids that start
again, hybrids with a recurrent state may do neither. So two samples are run packed and separately before training, and
a model whose outputs differ is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launcher.data.batches import PackedAs
from launcher.tasks.joining import COARSE, FLOOR, limits

SHORT = 24  # tokens of a probed sample
# Allowed difference of the second sample's outputs, packed and separate: so many times that of the first sample, which
# no other can reach, or the floor of the dtype.
TIMES = 3.0


class Way(NamedTuple):
    """How a batch of packed rows is laid out; see `launcher.data.batches.collate`."""

    attention: PackedAs = "sdpa"
    windows: dict[str, int | None] | None = None
    padding_mask: bool = True  # of rows that are not packed


def candidates(settings: Any, attention: str, longest: int) -> list[Way]:
    """Ways to lay out packed rows of up to `longest` tokens, the likeliest one first."""
    if attention.startswith("flash"):
        return [Way("flash")]
    if attention == "varlen":
        return [Way("varlen")]
    if attention == "flex_attention":
        return [Way("positions")]
    mask = Way("eager" if attention == "eager" else "sdpa")
    text = settings.get_text_config()
    window, types = getattr(text, "sliding_window", None), getattr(text, "layer_types", None) or ()
    if not limits(settings, longest):
        return [mask, Way("positions")]
    by_type = {name: window if "sliding" in name else None for name in sorted(set(types))}
    return [Way("positions"), *([mask._replace(windows=by_type)] if by_type else []), mask]


def check_packing(
    model: Any,
    forward: Callable[..., Any],
    ways: Sequence[Way],
    collate: Callable[[Sequence[Tensor], Way | None], dict[str, Any]],
    ids: Tensor,
    longest: int,
) -> Way:
    """The first way in which two samples in one row give the same outputs as each alone.

    forward computes the model's output, on every rank alike. collate(samples, way) makes a batch of token ids: packed
    in one row, or with None a sample alone. ids are valid tokens to take. Raises ValueError if no way agrees.
    """
    settings, training = model.config, model.training
    second = min(max([SHORT, *(limit + SHORT for limit in limits(settings, longest))]), longest - SHORT // 2)
    first = min(SHORT // 2, longest - second)
    tried: list[str] = []
    model.eval()
    try:
        for way in ways:
            for attempt in range(3):  # a router that is undecided between experts may send one token elsewhere
                order = torch.randperm(max(first + second, len(ids)), generator=torch.Generator().manual_seed(attempt))
                drawn = ids[order[: first + second] % len(ids)]
                try:
                    reason = _differs(forward, collate, [drawn[:first], drawn[first:]], way)
                except Exception as error:  # code of a model that expects another mask may raise any error
                    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                if reason is None:
                    return way
            tried.append(f"{way.attention}{' by layer type' if way.windows else ''}: {reason}")
    finally:
        model.train(training)
    raise ValueError(
        f"--packing: a {type(model).__name__} lets one sample of a row see another ({'; '.join(tried)}), so "
        "training would not be on the samples alone: leave --packing out"
    )


@torch.no_grad()
def check_causal(model: Any, forward: Callable[..., Any], ids: Tensor) -> None:
    """Raises ValueError if an output depends on later tokens, as an encoder's does: nothing would be predicted.

    In training mode, since some models build another mask there; equal draws give both passes the same dropout.
    """
    outputs, training = [], model.training
    model.train()
    for last in (0, 1):
        tokens = ids[torch.arange(SHORT) % len(ids)].clone()
        tokens[SHORT // 2 :] = ids[(torch.arange(SHORT // 2) * (last + 1) + last) % len(ids)]
        batch = {"input_ids": tokens[None], "position_ids": torch.arange(SHORT, device=ids.device)[None]}
        torch.manual_seed(0)
        outputs.append(_logits(forward, batch | {"attention_mask": torch.ones_like(batch["input_ids"])}).float())
    model.train(training)
    before = [output[: SHORT // 2] for output in outputs]
    apart = float((before[0] - before[1]).norm() / before[0].norm())
    if apart > 0.05:
        raise ValueError(
            f"a {type(model).__name__} sees later tokens in training (outputs change by {apart:.2g} with them), "
            "so there is nothing to predict: give a decoder (or set is_decoder to true in the config.json of one)"
        )


@torch.no_grad()
def check_labels(model: Any, forward: Callable[..., Any], batch: dict[str, Any]) -> None:
    """Raises ValueError, with the model's own words, if a classifier cannot compute this batch of texts."""
    training = model.training
    model.eval()
    try:
        forward(**batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of a model may raise any error
        words = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"a {type(model).__name__} does not compute these texts ({type(error).__name__}: {words}): complete its "
            "config.json or its tokenizer by these words, or give another --model"
        ) from error
    finally:
        model.train(training)


@torch.no_grad()
def needs_padding_mask(model: Any, forward: Callable[..., Any], ids: Tensor) -> bool:
    """Whether a token's output changes without the mask that hides the padding behind it. Called by all ranks.

    In a decoder no token sees later ones, so it should not; experts of limited capacity are one reason why it may.
    Without a mask SDPA takes its causal kernel, and copies no keys and values for grouped heads.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return True  # the loss that balances experts leaves padding out
    training, tokens = model.training, ids[torch.arange(SHORT) % len(ids)][None]
    dtype, found = next(model.parameters()).dtype, []
    batch = {"input_ids": tokens, "position_ids": torch.arange(SHORT, device=ids.device)[None]}
    mask = torch.ones_like(tokens)
    mask[0, SHORT // 2 :] = 0
    try:
        for mode in (True, False):  # some models build another mask for training
            model.train(mode)
            outputs = []
            for masked in ({"attention_mask": mask}, {}):
                torch.manual_seed(0)  # equal draws give both passes the same dropout
                outputs.append(forward(**batch, **masked, use_cache=False).logits[mask.bool()].float())
            found.append(float((outputs[0] - outputs[1]).norm() / outputs[0].norm()))
    except Exception:  # code of a model that needs a mask may raise any error
        return True
    finally:
        model.train(training)
    return not all(apart <= FLOOR.get(dtype, COARSE) for apart in found)


@torch.no_grad()
def _differs(
    forward: Callable[..., Any],
    collate: Callable[[Sequence[Tensor], Way | None], dict[str, Any]],
    samples: list[Tensor],
    way: Way,
) -> str | None:
    """How far the second sample's outputs are from those it gives alone; None if they agree."""
    together = _logits(forward, collate(samples, way))
    alone = [_logits(forward, collate([sample], None)) for sample in samples]
    parts = together[: len(samples[0])], together[len(samples[0]) :][: len(samples[1])]
    apart = [
        float((part.float() - one.float()).norm() / one.float().norm()) for part, one in zip(parts, alone, strict=True)
    ]
    allowed = max(TIMES * apart[0], FLOOR.get(together.dtype, COARSE))
    if math.isfinite(apart[1]) and apart[1] <= allowed:
        return None
    return f"outputs differ by {apart[1]:.2g}, by {apart[0]:.2g} where none precedes"


def _logits(forward: Callable[..., Any], batch: dict[str, Any]) -> Tensor:
    """(tokens, vocabulary) of a batch of one row."""
    return forward(**batch, use_cache=False).logits[0]
