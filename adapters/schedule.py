"""What some methods do between the steps of a run: a penalty on their parameters, and an allocation of ranks.

A PEFT config with `schedule(model, adapter_name)` has such work. The training loop calls the object that it returns,
and keeps its state in the run's checkpoints, so that a resumed run continues bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Config = TypeVar("Config")


class Schedule(ABC):
    """The work of one adapter. Every rank does all of it on the same numbers, so that nothing is communicated."""

    def before_update(self) -> None:  # noqa: B027 (by default there is none)
        """Change the gradients, which are those of all ranks' samples: add a penalty's, for example."""

    @abstractmethod
    def after_update(self, step: int) -> None:
        """Called after the update of step 1, 2, ...; the parameters still hold the step's (clipped) gradients."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the trained parameters and their optimizer's state, by name."""

    @abstractmethod
    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned after this step. Raises ValueError if it does not belong to this adapter."""

    @abstractmethod
    def summary(self) -> str:
        """What it has done so far, in one line."""


def schedule_of(model: nn.Module) -> Schedule | None:
    """The schedule of a PEFT model's active adapter; None if its method has none."""
    config = getattr(model, "active_peft_config", None)
    return config.schedule(model, model.active_adapter) if has_schedule(config) else None  # type: ignore[union-attr]


def has_schedule(config: Any) -> bool:
    """Whether the method of this PEFT config works between steps."""
    return hasattr(config, "schedule")


def for_steps(config: Config, steps: int) -> Config:
    """A PEFT config completed, in place, by what it takes from the number of steps."""
    return config.for_steps(steps) if has_schedule(config) else config  # type: ignore[attr-defined]
