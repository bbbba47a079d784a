"""`loldu logs`: the logs of a run's job and ranks, merged, each line with its source."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher.cluster import runs, slurm_jobs
from launcher.files import open_regular, read_or_empty
from launcher.text import one_line, without_colours

POLL_S = 0.5  # how often the files are read
ASK_SLURM_S = 10.0  # how often Slurm is asked whether the job still runs
TAIL_BYTES = 4 << 20  # of a log, to look for its last lines
PIECE_BYTES = 1 << 20


def log_files(folder: Path, rank: int | None) -> dict[str, Path]:
    """Log files by the name to show, including those of all runs of an array.

    Raises ValueError for a rank without a log.
    """
    if tasks := runs.tasks_of(folder):
        return {f"{task.name}/{name}": path for task in tasks for name, path in log_files(task, rank).items()}
    files = {path.stem: path for path in sorted(folder.glob("slurm-*.log"), key=runs.changed)[-1:]}
    if not files and folder.name.startswith("task-"):  # the batch logs of an array are in the folder above
        found = sorted(folder.parent.glob(f"slurm-*_{folder.name[5:]}.log"), key=runs.changed)[-1:]
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
    end = time.monotonic() + limit_s if limit_s else float("inf")
    files, shown = log_files(folder, rank), shlex.quote(given)
    if not files and not (folder / "job.json").exists() and (folder / "events.jsonl").exists():
        raise ValueError(
            f"{folder} has no logs, since loldu train prints to its terminal: loldu status {shown} shows its step, "
            f"loldu report {shown} its curves"
        )
    if not files and not follow:
        raise ValueError(
            f"{folder} has no logs yet: loldu status {shown} shows why, loldu logs -f {shown} waits for them"
        )
    try:
        _print_logs(folder, files, follow=follow, rank=rank, lines=lines, end=end)
    except BrokenPipeError:  # as in `loldu logs RUN | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _print_logs(
    folder: Path, files: dict[str, Path], *, follow: bool, rank: int | None, lines: int, end: float
) -> None:
    at: dict[str, int] = {}
    ended, asked = False, time.monotonic()
    while True:
        for name, path in files.items():
            if name not in at:
                at[name] = _tail(name, path, lines)
            at[name] = _more(name, path, at[name])
        if not follow or ended or time.monotonic() > end:
            for name, path in files.items():
                _more(name, path, at[name], whole_lines=False)
            return
        time.sleep(POLL_S)
        if time.monotonic() - asked > ASK_SLURM_S:
            ended, asked = not alive(folder), time.monotonic()  # then read once more, for the last lines
        files = log_files(folder, None) if rank is None else files


def alive(folder: Path, ask: Callable[[Path], slurm_jobs.JobState | None] = slurm_jobs.state_of) -> bool:
    """Whether the run may still write."""
    state = ask(folder)
    return state.alive if state is not None else read_or_empty(folder / "state") in ("", "running")


def _tail(name: str, path: Path, lines: int) -> int:
    """Print the last whole lines, of at most TAIL_BYTES; returns the offset of the next line."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            kept = file.read(size - file.tell()).splitlines(keepends=True)
    except OSError:  # not a file, not ours, or not there yet
        return 0
    partial = kept.pop() if kept and not kept[-1].endswith(b"\n") else b""
    _show(name, b"".join(kept[-lines:] if lines > 0 else []))
    return size - len(partial)


def _more(name: str, path: Path, start: int, *, whole_lines: bool = True) -> int:
    """Print what was written since start; returns the offset up to which everything was printed."""
    try:
        with open_regular(path) as file:
            if file.seek(0, os.SEEK_END) < start:
                start = 0  # the file was replaced by a new one
            file.seek(start)
            while new := file.read(PIECE_BYTES):
                whole = new.rfind(b"\n") + 1
                if whole_lines and not whole and len(new) < PIECE_BYTES:
                    break  # a line that is still being written is printed later
                used = new[:whole] if whole_lines and whole else new
                _show(name, used)
                start += len(used)
                file.seek(start)
    except OSError:
        pass
    return start


def _show(name: str, text: bytes) -> None:
    for line in text.decode(errors="replace").split("\n")[: -1 if text.endswith(b"\n") else None] if text else ():
        last = without_colours(line.rstrip("\r")).rsplit("\r", 1)[-1]  # only the last state of a progress bar
        print(f"{one_line(name)}: {one_line(last)}")
    sys.stdout.flush()
