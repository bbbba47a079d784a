"""The runs of a sweep on this machine, one after the other, and the Slurm array that runs them on a cluster."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from launcher.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, STOPPED
from launcher.files import disk_errors, open_to_append, read_or_empty, write_atomically
from launcher.options import parse_config
from launcher.progress import Bars
from launcher.sweeps import child, grid, results
from launcher.sweeps.grid import Variant
from launcher.text import one_line, printable

LOCK_S = 120.0  # how long to wait for a run that saves after its sweep was killed


class Sweep(NamedTuple):
    """Everything about a sweep."""

    recipe: str
    recipe_options: tuple[str, ...]
    vary: dict[str, tuple[str, ...]]
    variants: list[Variant]
    folder: Path
    processes: int

    def options(self, variant: Variant) -> list[str]:
        """The options of loldu train for a run."""
        return [*self.recipe_options, *variant.options, f"--output={self.folder / variant.name}"]

    def unfinished(self) -> list[Variant]:
        """The remaining runs."""
        return [variant for variant in self.variants if not results.is_finished(self.folder / variant.name)]


def train_all(plan: Sweep, console: Console) -> int:
    """Train the runs that have not finished, one after the other; returns the sweep's exit code."""
    left, total, failed = plan.unfinished(), len(plan.variants), 0
    if len(left) < total:
        console.print(f"{total - len(left)} of {total} runs have finished already")
    logs = plan.folder / "logs"
    with disk_errors("logs", plan.folder, "remove what is in their place, or give another --output"):
        if logs.is_symlink():
            raise FileExistsError(errno.EEXIST, "it is a symbolic link", str(logs))
        logs.mkdir(exist_ok=True)
    with _lock(plan.folder, console) as lock, child.stop_requests() as stop:
        for variant in left:
            if stop.requested:
                console.print("stopped; the same command resumes the sweep")
                return STOPPED
            place, folder, log = (
                plan.variants.index(variant) + 1,
                plan.folder / variant.name,
                logs / f"{variant.name}.log",
            )
            name, began = printable(f"[{place} of {total}] {grid.shown(variant.values)}"), time.monotonic()
            words = child.command(plan.recipe, plan.options(variant), plan.processes)
            with Bars(console).bar(name, brief=True) as show:
                show(0, "starting")
                code = child.train(words, log, lock, stop, partial(_show_step, folder, show, child.progress(folder)))
            if code == DONE:
                console.print(f"{name}: {_outcome(folder)}, {time.monotonic() - began:.0f} s")
            elif stop.requested or code in (STOPPED, INTERRUPTED):
                console.print(f"{name}: stopped; the same command resumes the sweep")
                return INTERRUPTED if code == INTERRUPTED else STOPPED
            else:
                failed += 1
                reason = one_line(child.last_error(log)) or f"exit code {code}"
                console.print(printable(f"{name}: failed: {reason} ({log})"))
                if code == MISTAKE and variant is plan.variants[0]:
                    console.print("the first run was refused: no other one is started")
                    return MISTAKE
    return FAILED if failed else DONE


def submit_all(plan: Sweep, words: Sequence[str], console: Console) -> int:
    """Submit the runs that have not finished as a Slurm array; words are options of `loldu submit`."""
    from launcher.cluster.slurm import Resources, submit

    left, array, job = plan.unfinished(), plan.folder / "array.txt", plan.folder / "slurm"
    resources = parse_config(Resources(array=str(array)), words, "loldu sweep --slurm")
    write_atomically(array, "".join(f"{shlex.join(variant.options)}\n" for variant in left))
    code = submit(plan.recipe, resources, plan.recipe_options, folder=job.absolute())
    for task in job.glob("task-*"):
        task.unlink()
    for number, variant in enumerate(left):  # Slurm's commands know the runs of an array by these names
        (plan.folder / variant.name).mkdir(exist_ok=True)
        (job / f"task-{number}").symlink_to(Path("..") / variant.name, target_is_directory=True)
    console.print(f"{len(left)} of {len(plan.variants)} runs submitted; the same command compares them when they end")
    return code


@contextmanager
def _lock(folder: Path, console: Console) -> Iterator[int]:
    """Hold the folder's lock, a file descriptor that runs inherit. Raises ValueError if another sweep is running."""
    with disk_errors(".lock", folder, "remove what is in its place, or give another --output"):
        handle = open_to_append(folder / ".lock", os.O_RDWR)
    until, told = time.monotonic() + LOCK_S, False
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            owner = read_or_empty(folder / ".lock")
            if _alive(owner) or time.monotonic() > until:
                raise ValueError(f"another sweep (process {owner or '?'}) is running in {folder}: wait for its end")
            if not told:
                console.print("the last run of a sweep that was killed is saving: waiting for it")
                told = True
            time.sleep(child.POLL_S)
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _outcome(folder: Path) -> str:
    from launcher.reports.read import read_run

    run = read_run(folder)
    if run.diverged:
        return "held-out loss not finite"
    if run.evaluations:
        return f"held-out loss {run.evaluations[-1]['eval_loss']:.4f}"
    return f"loss {run.steps[-1]['loss']:.4f}" if run.steps else "finished"


def _show_step(folder: Path, show: Callable[..., None], before: tuple[int, int]) -> None:
    """Show the step of a run. before: what its folder holds of an earlier part, which is shown once it has resumed."""
    step, steps = child.progress(folder)
    if steps and (step, steps) != before:
        show(step, of=steps)
