"""`loldu logs`: the logs of a run's job and ranks, merged, each line with its source."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from launcher.cluster import runs, slurm
from launcher.files import read_or_empty

POLL_S = 0.5  # how often the files are read
ASK_SLURM_S = 10.0  # how often Slurm is asked whether the job still runs


def log_files(folder: Path, rank: int | None) -> dict[str, Path]:
    """Log files by the name to show, including those of all runs of an array.

    Raises ValueError for a rank without a log.
    """
    tasks = sorted(folder.glob("task-*"), key=lambda path: int(path.name[5:]))
    if tasks:
        return {f"{task.name}/{name}": path for task in tasks for name, path in log_files(task, rank).items()}
    files = {path.stem: path for path in sorted(folder.glob("slurm-*.log"), key=os.path.getmtime)[-1:]}
    if not files and folder.name.startswith("task-"):  # the batch logs of an array are in the folder above
        found = sorted(folder.parent.glob(f"slurm-*_{folder.name[5:]}.log"), key=os.path.getmtime)[-1:]
        files = {path.stem: path for path in found}
    for path in sorted((folder / "logs").glob("*.log"), key=lambda path: (len(path.name.partition("@")[0]), path.name)):
        files[path.stem] = path
    if rank is not None:
        files = {name: path for name, path in files.items() if name.partition("@")[0] == f"rank{rank}"}
        if not files:
            raise ValueError(f"rank {rank} has no log in {folder / 'logs'}")
    return files


def logs(given: str, *, follow: bool = False, rank: int | None = None, lines: int = 20, limit_s: float = 0.0) -> int:
    """Print the last lines of a run's logs; with follow also new lines until the run ends. Returns an exit code."""
    folder = runs.find_run(given)
    at: dict[str, int] = {}
    end = time.monotonic() + limit_s if limit_s else float("inf")
    files = log_files(folder, rank)
    if not files and not follow:
        shown = shlex.quote(given)
        raise ValueError(
            f"{folder} has no logs yet: loldu status {shown} shows why, loldu logs -f {shown} waits for them"
        )
    ended, asked = False, time.monotonic()
    while True:
        for name, path in files.items():
            if name not in at:
                at[name] = _tail(name, path, lines if path.exists() else 0)
            at[name] = _more(name, path, at[name])
        if not follow or ended or time.monotonic() > end:
            for name, path in files.items():
                _more(name, path, at[name], whole_lines=False)
            return 0
        time.sleep(POLL_S)
        if time.monotonic() - asked > ASK_SLURM_S:
            ended, asked = not alive(folder), time.monotonic()  # then read once more, for the last lines
        files = log_files(folder, None) if rank is None else files


def alive(folder: Path, ask: Callable[[Path], slurm.JobState | None] = slurm.state_of) -> bool:
    """Whether the run may still write."""
    state = ask(folder)
    return state.alive if state is not None else read_or_empty(folder / "state") in ("", "running")


def _tail(name: str, path: Path, lines: int) -> int:
    """Print the last whole lines; returns the offset of the next line."""
    with open(path, "rb") as file:
        kept = deque(file, maxlen=lines + 1)
        partial = kept.pop() if kept and not kept[-1].endswith(b"\n") else b""
        _show(name, b"".join(list(kept)[-lines:] if lines else []))
        return file.tell() - len(partial)


def _more(name: str, path: Path, start: int, *, whole_lines: bool = True) -> int:
    with open(path, "rb") as file:
        file.seek(start)
        new = file.read()
    whole = new.rfind(b"\n") + 1 if whole_lines else len(new)  # a line that is still being written is printed later
    _show(name, new[:whole])
    return start + whole


def _show(name: str, text: bytes) -> None:
    for line in text.decode(errors="replace").splitlines():
        print(f"{name}: {line.rsplit(chr(13), 1)[-1]}")  # only the last state of a progress bar
    sys.stdout.flush()
