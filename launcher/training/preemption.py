"""Being asked to stop: signals, the run folder's control file, the time limit. Asking sets a flag and nothing else."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.ranks import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
LISTEN_S = 0.5  # how often a rank hears whether another was asked
AGAIN_S = 0.5  # the same signal later than this is a second one; launchers and Slurm repeat it sooner


class StopRequest:
    """Whether this run was asked to stop, and by what. Use as a context manager around the whole run."""

    def __init__(self, max_seconds: float = 0.0):
        self.reason: str | None = None
        self.control: Path | None = None  # set on rank 0 once the run folder is known
        self.store: Any = None  # set once there are other ranks: what one is asked, all hear
        self._heard = 0.0
        self._deadline = time.monotonic() + max_seconds if max_seconds else None
        self._first: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Looks at the clock and the control file as well, and listens to the other ranks."""
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "its time limit"
        if self.reason is None and self.control is not None and _read(self.control) == "stop":
            self.reason = "the control file"
        if self.store is not None and time.monotonic() - self._heard > LISTEN_S:
            self._heard = time.monotonic()
            if self.reason is not None:
                self.store.set("loldu/stop", self.reason)
            elif self.store.check(["loldu/stop"]):
                self.reason = self.store.get("loldu/stop").decode()
        return self.reason is not None

    def before_training(self) -> None:
        """Raises Stopped where the run was asked to stop; for phases that have nothing to save."""
        if self.asked():
            raise Stopped(self.reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first.setdefault(number, now) > AGAIN_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.reason = self.reason or signal.Signals(number).name


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
