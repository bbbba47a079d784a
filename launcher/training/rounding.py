"""Whether updates of weights that are trained in bfloat16 are lost in rounding: it has 8 significant bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SAMPLED = 1 << 16  # numbers of a parameter that are looked at


def lost_share(parameters: Iterable[Tensor], learning_rate: float) -> float:
    """Share of the trained bfloat16 numbers that a change by the learning rate, about Adam's step, leaves as they are.

    Of each parameter, this rank's first numbers; 0 if none is bfloat16. Moves no data between ranks.
    """
    lost, count = 0, 0
    for parameter in parameters:
        if parameter.dtype != torch.bfloat16:
            continue
        mine: Any = parameter.detach()
        some = (mine.to_local() if isinstance(mine, DTensor) else mine).flatten()[:SAMPLED]
        lost += int(((some + learning_rate == some) & (some - learning_rate == some)).sum())
        count += some.numel()
    return lost / max(count, 1)


def lost_updates(parameters: Iterable[Tensor], learning_rate: float) -> str | None:
    """A warning if most updates of a step would be lost; else None."""
    share = lost_share(parameters, learning_rate)
    if share <= 0.5:
        return None
    return (
        f"at --learning-rate {learning_rate:g}, {share:.0%} of the trained bfloat16 weights are too large for a step "
        "to change them, since the sum is rounded back: give --dtype float32, or train an adapter, which is float32"
    )
