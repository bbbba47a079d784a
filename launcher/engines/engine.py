"""The interface of an engine: how the model is distributed over processes and how a step is taken."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from launcher.config import Config, OptimizerConfig
from launcher.engines.registry import ENGINES, EngineInfo
from launcher.models.fill import OnFill
from launcher.processes import Ranks
from launcher.training.checkpoint import Checkpoint, Piece


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What an engine makes its part of the model from."""

    config: Config
    folder: Path  # of the base model
    adapter: Any  # a PEFT config; None for full fine-tuning
    how: dict[str, Any]  # dtype, attention, and the settings of a classification head
    factors: Callable[..., Any]  # (module, rows of `write`) -> frozen factors of our methods
    device: torch.device
    ranks: Ranks
    progress: OnFill


class NonFinite(ArithmeticError):
    """A gradient is NaN or infinite, so the step was not taken."""

    def __init__(self, names: Sequence[str], numbers: Sequence[float] = ()):
        self.numbers = list(numbers)  # those that `update` was given
        which = f"the gradient of {shortened(names)} is" if names else "the norm of all gradients together is"
        super().__init__(f"{which} NaN or infinite")


class Engine(Protocol):
    """One engine of a run. Every method is called by all ranks, in the same order."""

    info: EngineInfo
    model: nn.Module
    forward: Any  # called for a training pass: the model, or what wraps it
    parameters: dict[str, nn.Parameter]  # what is trained, by name

    @property
    def gathers(self) -> bool:
        """Whether a forward pass is a collective: all ranks must make the same number of passes."""
        ...

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        """Raises ValueError if this base, given on the meta device, cannot be sharded. Called before factors are
        made."""
        ...

    @classmethod
    def load(cls, source: ModelSource, info: EngineInfo) -> nn.Module:
        """The model with its adapter: whole, or this rank's part of it. Moves no data between ranks."""
        ...

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, ranks: Ranks, info: EngineInfo, *, cpu_offload: bool = False
    ) -> None: ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of this rank's share of the step's loss."""
        ...

    def reduce(self, extra: Sequence[Tensor]) -> list[Tensor]:
        """After the last backward of a step: sum gradients, and the extra numbers (0-dim), over all ranks."""
        ...

    def update(self, learning_rate: float, numbers: Sequence[Tensor] = ()) -> list[float]:
        """Clip, step, clear; returns the gradient norm before clipping, then the numbers (0-dim, from `reduce`).

        Norm and numbers reach the host together: the only point of a step where it waits for the device. Raises
        NonFinite, on all ranks alike, if a gradient or number is NaN or infinite. Nothing is updated then.
        """
        ...

    def after_step(self, call: Callable[[], None]) -> None:
        """Call this after each update, while the parameters still have its clipped gradients.

        Only engines that step whole parameters are asked (`any_optimizer`).
        """
        ...

    def nonfinite(self) -> list[str]:
        """The trained parameters whose gradient is NaN or infinite on any rank; clears the gradients."""
        ...

    def pieces(self) -> dict[str, Piece]:
        """This rank's rows of the trained state: model/NAME, and optimizer/NAME/exp_avg and exp_avg_sq after a step."""
        ...

    def restore(self, found: Checkpoint) -> None:
        """Put a checkpoint's state back, bit for bit, whatever engine and number of processes wrote it."""
        ...

    def whole_state(self) -> dict[str, Tensor]:
        """The trained parameters and the saved buffers in full, by name, on rank 0; nothing on the others."""
        ...


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Parameter names as the base model has them; the first few of many."""
    shown = ", ".join(name.removeprefix("base_model.model.") for name in names[:most])
    return shown + f" and {len(names) - most} more" * (len(names) > most)


def engine_class(name: str) -> type[Engine]:
    """The engine of that name. Imports its file, and the packages that this needs."""
    module, _, attribute = ENGINES[name].where.partition(":")
    return getattr(importlib.import_module(module), attribute)
