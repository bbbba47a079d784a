"""Settings that differ from those a run recorded: which of them change its learning curve, and which do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters.schedule import has_schedule
from launcher.config import Config, OptimizerConfig, as_dict
from launcher.methods import peft_config
from launcher.training.loop import learning_rate_at

# The learning rate of each step follows from these, and from the number of steps.
SCHEDULE = ("learning_rate", "schedule", "warmup_ratio", "max_steps", "epochs")
CURVE = {  # what else a learning curve follows from, besides the run's identity
    "model": ("train_text_encoder",),
    "data": ("random_crop", "random_flip"),
    "optimizer": (
        "optimizer", "weight_decay", "adam_beta1", "adam_beta2", "clip_norm", "projection_rank", "projection_every",
    ),
}  # fmt: skip
# Paths, and settings of this start only.
NOT_COMPARED = {"output", "resume", "accept_changes", "cache", "cache_per_node", "verify_base", "max_seconds"}


@dataclass(frozen=True)
class Changes:
    """What differs, each as `--option VALUE (was VALUE)`."""

    curve: tuple[str, ...] = ()  # a run with these from the beginning would have another learning curve
    other: tuple[str, ...] = ()


def changes(recorded: Mapping[str, Any], config: Config, steps: int) -> Changes:
    """Compare a config with the content of a run's config.json. steps: the optimizer steps of this start.

    A setting that config.json lacks did not exist when it was written, and counts as unchanged.
    """
    before, now = recorded["config"], as_dict(config)
    differ = {
        (part, name): f"--{name.replace('_', '-')} {_shown(value)} (was {_shown(before[part][name])})"
        for part in ("model", "data", "optimizer", "run")
        for name, value in now[part].items()
        if name in before.get(part, {}) and before[part][name] != value and name not in NOT_COMPARED
        if part != "model" or name in CURVE["model"]  # the rest is in the identity, or changes nothing
    }
    scheduled = has_schedule(peft_config(config.adapter)) and steps != recorded["resolved"]["steps"]
    curve = {(part, name): text for (part, name), text in differ.items() if name in CURVE.get(part, ())}
    if scheduled or _other_learning_rates(before["optimizer"], recorded["resolved"]["steps"], config.optimizer, steps):
        curve |= {key: text for key, text in differ.items() if key[0] == "optimizer" and key[1] in SCHEDULE}
    other = [text for key, text in differ.items() if key not in curve]
    return Changes(tuple(curve.values()), tuple(other))


def _other_learning_rates(before: Mapping[str, Any], steps_before: int, now: OptimizerConfig, steps: int) -> bool:
    """Whether any step that both runs have uses another learning rate."""
    known = {name: before[name] for name in ("learning_rate", "schedule", "warmup_ratio") if name in before}
    then = OptimizerConfig(**known)
    if steps == steps_before and all(getattr(now, name) == value for name, value in known.items()):
        return False
    rates = (
        (learning_rate_at(step, steps_before, then), learning_rate_at(step, steps, now))
        for step in range(1, min(steps, steps_before) + 1)
    )
    return any(one != other for one, other in rates)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
