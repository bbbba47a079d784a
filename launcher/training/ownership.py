"""One run folder, one owner at a time, on any file system: no locks, no trust in clocks of other machines.

The owner is the highest numbered `.owner-000001`, `.owner-000002`, ... in the folder, unless it is marked as released.
A claim is made under the next number by a hard link, which exactly one of several starts can make. The highest one is
never removed, so a start that was slow finds it and withdraws. The owner touches its file every HEARTBEAT_S.

An owner on this machine is dead when its process is. One on another machine is dead when its file was not touched while
it was watched for WATCH_S, or at once when it is an earlier start of this Slurm job. An owner that was suspended finds
the higher claim when it continues, and ends without writing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from launcher.files import disk_errors, replacing
from launcher.owner import NAME, Owner, highest, machine, read_claim, started

HEARTBEAT_S = 10.0
WATCH_S = 35.0


class Ownership:
    """This process's claim on a run folder; none until `claim` is called."""

    def __init__(self, environ: Mapping[str, str] = os.environ):
        self.environ = environ
        self.file: Path | None = None
        self._seen = 0.0  # when the claim was last found to be the highest
        self._ended = threading.Event()

    def claim(self, folder: Path) -> None:
        """Become the owner of the folder. Raises ValueError naming its owner if another start owns it."""
        mine = _this_process(self.environ)
        while True:
            number, last = highest(folder)
            if last is not None and (other := _living_owner(last, mine)):
                raise ValueError(
                    f"{folder} is in use by another start of this run ({other}): wait until it ends, stop it with "
                    f"loldu cancel, or give another --output"
                )
            wanted = folder / f".owner-{number + 1:06d}"
            with disk_errors("the run's owner", folder, "give another --output"):
                if not _create(wanted, json.dumps(asdict(mine))):
                    continue  # another start was faster: look again
            if highest(folder)[0] == number + 1:
                break
            wanted.unlink(missing_ok=True)  # this start was slow: look again
        for file in folder.glob(".owner-*"):
            if (found := NAME.match(file.name)) and int(found[1]) <= number:
                file.unlink(missing_ok=True)
        self.file, self._seen, self._ended = wanted, time.monotonic(), threading.Event()
        threading.Thread(target=self._beat, args=(self._ended,), name="owner", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether another start has taken the folder over."""
        return self._seen < 0

    def check(self) -> None:
        """Raises ValueError if another start has taken the folder over, as it may from a suspended process."""
        if self.file is not None and time.monotonic() - self._seen > WATCH_S / 2:
            self._look()
        if self.lost and self.file is not None:
            raise ValueError(
                f"another start took over {self.file.parent} while this one did not run: this one ends, and writes "
                "nothing more"
            )

    def release(self) -> None:
        """Give the folder up; raises nothing."""
        self._ended.set()
        file, self.file = self.file, None
        if file is None or self.lost:
            return
        with suppress(OSError, ValueError):
            owner = read_claim(file)
            if owner is not None:
                with replacing(file, durable=False) as temporary:
                    temporary.write_text(json.dumps(asdict(replace(owner, released=True))))

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_S):
            self._look()

    def _look(self) -> None:
        """Touch the claim if it is still the highest; else note that it is lost."""
        file = self.file
        if file is None or self.lost:
            return
        with suppress(OSError):  # a file server that is unavailable for a while
            if highest(file.parent)[1] != file:
                self._seen = -1.0
                return
            os.utime(file)
            self._seen = time.monotonic()


def _create(file: Path, text: str) -> bool:
    """Make a file with this text; False if there is one of that name. All at once: nobody reads half a file."""
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, file)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            with suppress(FileExistsError), open(file, "x") as opened:
                opened.write(text)
                return True
            return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _living_owner(file: Path, mine: Owner) -> str | None:
    """Who holds this claim, in words; None if nobody does."""
    owner = read_claim(file)
    if owner is not None:
        if owner.released:
            return None
        if owner.machine == mine.machine:
            dead = owner.pid == mine.pid or started(owner.pid) != owner.started
            return None if dead else str(owner)
        if mine.job and owner.job == mine.job and owner.restarts < mine.restarts:
            return None
    before, end = _touched(file), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(HEARTBEAT_S / 20)
        if (now := _touched(file)) != before:
            return None if now is None else str(owner or "its process number is not readable")
    return None


def _touched(file: Path) -> int | None:
    """When a file was last touched, queried again from a network file system by opening it; None if it is gone."""
    try:
        with open(file, "rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return None


def _this_process(environ: Mapping[str, str]) -> Owner:
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return Owner(
        host=socket.gethostname(),
        machine=machine(),
        pid=os.getpid(),
        started=started(os.getpid()) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        job=environ.get("SLURM_JOB_ID", ""),
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )
