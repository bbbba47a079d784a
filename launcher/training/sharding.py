"""How a step's results meet: one all-reduce for every gradient and the few numbers that travel with them.

Trained cores are a few hundred kilobytes in all, so data-parallel training needs no buckets and no overlap: one flat
float32 tensor per step, 4 bytes per trained number plus 4 per number in `extra`. Nothing is ever broadcast: all ranks
load the same files and compute the same step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_over_ranks(parameters: Sequence[nn.Parameter], extra: Sequence[Tensor], world_size: int) -> list[Tensor]:
    """Add up gradients and extra numbers over all ranks.

    Before: each rank holds the gradients of its own samples. After: every rank holds the sum, in parameters' .grad; the
    summed extra numbers (0-dim, float32) are returned.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size == 1:
        return [number.float() for number in extra]
    parts = [parameter.grad.reshape(-1).float() for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*parts, torch.stack([number.float() for number in extra])])
    dist.all_reduce(flat)
    at = 0
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.copy_(flat[at : at + parameter.numel()].view_as(parameter))
        at += parameter.numel()
    return list(flat[at:])


def check_sharding(wanted: str | None, world_size: int) -> str:
    """The sharding to use. Raises ValueError for one that does not fit the number of processes."""
    if wanted is None:
        return "ddp" if world_size > 1 else "none"
    if wanted == "none" and world_size > 1:
        raise ValueError(f"--sharding none is for one process, but WORLD_SIZE is {world_size}: give --sharding ddp")
    if wanted not in ("none", "ddp"):
        raise ValueError(f"--sharding {wanted} is not built yet: give none or ddp")
    return wanted
