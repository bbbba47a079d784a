"""A start of a run before anything large is read: its settings resolved, its base found and checked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from adapters.checkpoint_files import list_tensors
from launcher.engines.engine import engine_class
from launcher.files import user_path
from launcher.models.build import settle_base
from launcher.models.quantize import check_base
from launcher.processes import SLOW_S, Communicator
from launcher.training.memory import check_memory
from launcher.training.report import Screen
from launcher.training.resolve import Resolved, check_context
from launcher.training.stop import StopRequest


@dataclass(frozen=True, kw_only=True)
class Start:
    """What every later phase of a run is given."""

    resolved: Resolved
    comm: Communicator
    stop: StopRequest
    screen: Screen
    output: Path
    base: Path  # the base model's folder
    bare: Any  # the model on the meta device, without adapter


def begin(resolved: Resolved, name: str, comm: Communicator, stop: StopRequest, screen: Screen) -> Start:
    """Find the base and check, from headers alone, that this run can train it: weights, attention, context and memory.

    Called by all ranks. If the model lacks the attention that was resolved, Start.resolved has one that it supports.
    Raises ValueError, on all ranks, for what is missing or does not fit.
    """
    config = resolved.config
    named = config.run.output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    output = user_path(comm.from_main("run folder", lambda: named))
    base = Path(comm.together("base model", lambda: str(resolved.task.base_folder(config.model.model)), SLOW_S)[0])
    trusted = config.model.trust_remote_code

    def check() -> tuple[Any, str, str]:
        check_base(base, config.model.quantize)
        settled = settle_base(
            config.model, base, **resolved.how, reason=resolved.attention_reason, labels=resolved.task.labels
        )
        if resolved.task.text:
            check_context(config, AutoConfig.from_pretrained(base, trust_remote_code=trusted))
        check_memory(resolved, base)
        engine_class(resolved.sharding).check_base(settled[0])
        return settled

    bare, attention, reason = comm.each("base model", check)
    resolved = replace(resolved, attention=attention, attention_reason=reason)
    return Start(resolved=resolved, comm=comm, stop=stop, screen=screen, output=output, base=base, bare=bare)


def watch(base: Path) -> Callable[[], None]:
    """A function that checks whether the base's files have changed since: a CPU trains on a memory map of them.

    The files that are open now are watched, not their names: a file that is renamed to one of these names has no
    effect.
    """
    opened = {file: os.open(file, os.O_RDONLY) for file in sorted({info.file for info in list_tensors(base).values()})}

    def state(descriptor: int) -> tuple[int, int]:
        found = os.fstat(descriptor)
        return found.st_size, found.st_mtime_ns

    before = {file: state(descriptor) for file, descriptor in opened.items()}

    def check() -> None:
        if changed := [file for file, descriptor in opened.items() if state(descriptor) != before[file]]:
            raise ValueError(
                f"{changed[0]} was rewritten while this run trains on it, so what it learned since the last checkpoint "
                "is of another base: no checkpoint is written. Bring the file back, and run the same command again; "
                "replace such files by renaming new ones"
            )

    return check
