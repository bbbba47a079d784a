"""One run of a sweep in a separate process, which saves and stops when the sweep is asked to, or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from launcher.files import disk_errors, open_regular, open_to_append, parse_json, read_json
from launcher.shipped import PROJECT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
POLL_S = 0.5
# Starts the run in its place, which Linux sends TERM when the sweep dies (PR_SET_PDEATHSIG is 1, and survives exec).
END_WITH_SWEEP = """
import ctypes, os, sys
libc, sweep = ctypes.CDLL(None), int(sys.argv[1])
if hasattr(libc, "prctl"):
    libc.prctl(1, 15)
if os.getppid() != sweep:  # it died before this
    raise SystemExit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
TAIL_BYTES = 4096
LOG_BYTES = 1 << 20  # of the end of a log, in which the error is


class Stop:
    """Whether the sweep was asked to stop; passes signals on to the run in progress."""

    def __init__(self) -> None:
        self.requested = False
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.child is not None and self.child.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended, and `wait`, which this interrupts, has seen it
                os.killpg(self.child.pid, number)


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Handle Ctrl-C, TERM and USR2 as a run does, while this lasts."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(recipe: str, options: Sequence[str], processes: int = 1) -> list[str]:
    """The words that start a run, with torchrun for several processes."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*python, "-m", "launcher", "train", recipe, *options]


def train(words: Sequence[str], log: Path, lock: int, stop: Stop, watch: Callable[[], None]) -> int:
    """Run the command with its output in the log; returns its exit code. watch is called every POLL_S seconds.

    The run inherits the sweep's lock (a file descriptor), and keeps it if the sweep is killed: it then saves and stops,
    and a sweep that is started meanwhile waits for it.
    """
    paths = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}  # this launcher, not one in the folder

    with disk_errors(log.name, log.parent, "remove what is in its place, or give another --output"):
        descriptor = open_to_append(log)
    with os.fdopen(descriptor, "ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", END_WITH_SWEEP, str(os.getpid()), *words], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, pass_fds=[lock],
            process_group=0, env=environment,
        )  # fmt: skip
    stop.child = child
    if stop.requested:  # just before it could be passed on
        os.killpg(child.pid, signal.SIGTERM)
    try:
        while True:
            try:
                return child.wait(POLL_S)
            except subprocess.TimeoutExpired:
                watch()
    finally:
        stop.child = None


def progress(folder: Path) -> tuple[int, int]:
    """(step, steps) of a run, from the files that it writes; zeros before its first step."""
    try:
        with open_regular(folder / "events.jsonl") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(parse_json(lines[-1].decode())["step"]), int(read_json(folder / "config.json")["resolved"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return 0, 0


def last_error(log: Path) -> str:
    """The last line of a log, which is the error if the run failed."""
    try:
        with open_regular(log) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")
