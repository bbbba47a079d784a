"""Who owns a run folder, and whether the run there still runs. Imports no torch.

launcher/training/ownership.py makes the claims that are read here, and touches them while the run lives.
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.files import read_json, read_or_empty

NAME = re.compile(r"\.owner-(\d{6,})$")
MAX_BYTES = 4096
QUIET_S = 60.0  # six heartbeats of an owner
WRITTEN = ("state", "events.jsonl", "metrics.jsonl")  # by a run while it trains
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Owner:
    """Who started a run, where and when."""

    host: str
    machine: str  # this boot of it, and its process numbers: equal for processes that see each other
    pid: int
    started: str  # of the process, which reveals a reused process number
    since: str
    job: str = ""  # Slurm's
    restarts: int = 0
    released: bool = False

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def present_state(folder: Path) -> str:
    """What the `state` file holds; in place of `running`, which a killed run leaves, what is known.

    `interrupted`: the process that owned the folder has ended, which is seen only on its own machine, or it has given
    the folder up. `no sign of life since TIME`: it may run, on another machine or suspended, but neither its claim nor
    its files were touched for QUIET_S, by this machine's clock.
    """
    state = read_or_empty(folder / "state")
    if state != "running":
        return state
    try:
        claim = highest(folder)[1]
    except OSError:
        claim = None
    owner = None if claim is None else read_claim(claim)
    if owner is not None and (owner.released or (owner.machine == machine() and started(owner.pid) != owner.started)):
        return INTERRUPTED if read_or_empty(folder / "state") == state else present_state(folder)  # it ended meanwhile
    files = [folder / name for name in WRITTEN] + ([] if claim is None else [claim])
    last = max(map(_touched, files))
    if time.time() - last < QUIET_S:
        return state
    return f"no sign of life since {time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(last))}"


def _touched(file: Path) -> float:
    """When a file was last touched; 0 if it is gone. Opening it makes a network file system look again."""
    try:
        with open(file, "rb") as opened:
            return os.fstat(opened.fileno()).st_mtime
    except OSError:
        return 0.0


def highest(folder: Path) -> tuple[int, Path | None]:
    """The number and file of the last claim on a folder; 0 and None if there is none."""
    found = [(int(match[1]), file) for file in folder.iterdir() if (match := NAME.match(file.name))]
    return max(found, default=(0, None))


def read_claim(file: Path) -> Owner | None:
    """The owner in a claim; None if it is damaged, or not written yet."""
    try:
        owner = Owner(**read_json(file, MAX_BYTES))
        return owner if type(owner.pid) is int else None
    except (OSError, ValueError, TypeError):
        return None


def machine() -> str:
    """What processes share that see each other's process numbers: the host, its boot, the PID namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def started(pid: int) -> str | None:
    """When a process of this machine was started, in its own units; None if it has ended."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.parent.parent.joinpath("self").exists():  # no /proc: only whether it exists
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""
    try:
        fields = stat.read_text().rpartition(")")[2].split()  # the name before it may contain any character
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
