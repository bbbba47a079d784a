"""Matrix products of bfloat16 in float32, for CPUs without instructions for bfloat16.

Each is rounded once, as a CPU with AMX does but for the order of its sums. torch's own way there takes longer: a step
of SmolLM2-135M (8 samples of OpenBookQA, LoLDU of rank 64, one thread) 13.7 s instead of 5.1 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.devices import emulated_bfloat16

PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


class Float32Products(TorchDispatchMode):
    """Used as `with Float32Products():`, for this thread and its backward passes."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        wide = (each.float() if isinstance(each, Tensor) else each for each in args)
        return func(*wide, **(kwargs or {})).bfloat16()


def products() -> AbstractContextManager[Any]:
    """`Float32Products` where this CPU has no instructions for bfloat16; else nothing changes."""
    return Float32Products() if emulated_bfloat16() else nullcontext()
