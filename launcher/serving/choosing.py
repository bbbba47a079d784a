"""The next token of each request in a batch: its temperature, top_p, seed and log-probabilities.

A request's random numbers follow from its seed and the number of the token, so they depend neither on the rest of the
batch nor on whether an answer was interrupted and computed again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.serving.requests import Sampling


@dataclass(frozen=True)
class Choice:
    """A chosen token, with the requested details; ok is False if its logits are NaN or infinite."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    ok: bool = True


def choose(logits: Tensor, samplings: Sequence[Sampling], numbers: Sequence[float]) -> list[Choice]:
    """A token for each row of logits (requests, vocabulary); numbers are uniform in [0, 1), one a row."""
    largest, best = logits.max(-1)
    ids, ok = best.tolist(), largest.isfinite().tolist()
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0 and ok[row]]
    if drawn:
        how = [(samplings[row].temperature, samplings[row].top_p, numbers[row]) for row in drawn]
        found = draw(logits[drawn], *torch.tensor(how, dtype=torch.float64, device=logits.device).T)
        for row, token in zip(drawn, found.tolist(), strict=True):
            ids[row] = token
    choices = [Choice(token, ok=fine) for token, fine in zip(ids, ok, strict=True)]
    asked = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None and ok[row]]
    if asked:
        logprobs = logits[asked].log_softmax(-1)
        most = max(samplings[row].logprobs or 0 for row in asked)
        values, tokens = (part.tolist() for part in logprobs.topk(min(most, logits.shape[-1])))
        for place, row in enumerate(asked):
            top = tuple(zip(tokens[place], values[place], strict=True))[: samplings[row].logprobs]
            choices[row] = Choice(ids[row], float(logprobs[place, ids[row]]), top)
    return choices


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, numbers: Tensor) -> Tensor:
    """Tokens (rows,) drawn by the numbers (rows,) from the most likely ones whose probabilities add up to top_p.

    All but the logits are float64: a temperature of 1e-50 is 0 in float32, and 0 / 0 NaN.
    """
    p = ((logits - logits.amax(-1, keepdim=True)).double() / temperature[:, None]).softmax(-1)
    p, order = torch.sort(p, dim=-1, descending=True, stable=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p[:, None], 0)  # the first stays whatever top_p
    total = p.cumsum(-1)
    place = torch.searchsorted(total, (numbers * total[:, -1])[:, None], right=True).clamp(max=p.shape[-1] - 1)
    return order.gather(-1, place)[:, 0]


def number(seed: int, position: int) -> float:
    """The random number of a request's token at this position."""
    return random.Random(f"{seed} {position}").random()
