"""Requests to stop: signals, the run folder's control file, the time limit. A request only sets a flag.

A second signal of a kind ends the process at once, whatever it is doing: a second Ctrl-C, or a TERM, USR2 or HUP that
comes after QUIET_S without one. Schedulers repeat a signal every few seconds; that counts as one request, so that a
save in progress completes. A TERM after a USR2 (a warning, then the time limit) is not a second signal either.

The same holds until the process ends. A rank that heard of the request from another one may have saved before its own
signal comes, and a scheduler may repeat one: a process that has saved must not die of them and count as failed.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.exit_codes import DONE
from launcher.files import read_or_empty, write_atomically
from launcher.processes import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
LISTEN_S = 0.5  # how often a rank checks whether another was asked
ECHO_S = 0.5  # a terminal's Ctrl-C reaches a rank once more through its launcher
QUIET_S = 5.0
GRACE_S = 5.0  # for ranks that are just meeting; then they notice the request themselves


class StopRequest:
    """Whether this run was asked to stop, and by what. Use as a context manager around the whole run."""

    def __init__(self, max_seconds: float = 0.0):
        self.reason: str | None = None
        self.control: Path | None = None  # watched by rank 0 once the run folder is known
        self.store: Any = None  # set once there are other ranks: a request to one of them reaches all
        self._heard = 0.0
        self._deadline = time.monotonic() + max_seconds if max_seconds else None
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the run outlives its terminal
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        stays = set(SIGNALS) if self.store is not None else set()
        if self._first:  # a Ctrl-C is then for what a single process does next
            stays |= set(SIGNALS) - {signal.SIGINT}
        for number, handler in self._before.items():
            if number in stays:
                atexit.register(self._ignore, number)
            else:
                signal.signal(number, handler)
        if self.control is not None and read_or_empty(self.control) == "stop":
            with suppress(OSError):  # if this fails, the next start stops once more and logs it
                write_atomically(self.control, "run\n")

    def watch(self, control: Path) -> None:
        """Watch this file from now on. A stop request that it holds already is honoured, and removed at the end.

        So a request that comes while Python starts is not lost. The process that starts a new attempt clears the file.
        """
        if read_or_empty(control) != "stop":
            write_atomically(control, "run\n")  # a symbolic link is replaced, not followed
        self.control = control

    def request(self, reason: str) -> None:
        """Ask this run to save and stop; reason is shown to the user. The first request counts."""
        self.reason = self.reason or reason

    def asked(self) -> bool:
        """Whether to stop. Checks the clock, the control file and the other ranks as well."""
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "its time limit"
        if self.reason is None and self.control is not None and read_or_empty(self.control) == "stop":
            self.reason = "the control file"
        if self.store is not None and time.monotonic() - self._heard > LISTEN_S:
            self._heard = time.monotonic()
            if self.reason is not None:
                self.store.set("loldu/stop", self.reason)
            elif self.store.check(["loldu/stop"]):
                self.reason = self.store.get("loldu/stop").decode()
        return self.reason is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this block a signal ends the process within GRACE_S, although it waits for other ranks in C++.

        There no Python handler runs, but the interpreter still writes each signal's number to a pipe.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        over, before = threading.Event(), signal.set_wakeup_fd(writing)

        def listen() -> None:
            number = os.read(reading, 1)
            if number and not over.wait(GRACE_S):
                who = signal.Signals(number[0]).name
                print(f"stopped by {who} before all ranks were there: nothing to save", flush=True)
                os._exit(DONE)

        threading.Thread(target=listen, name="signals", daemon=True).start()
        try:
            yield
        finally:
            over.set()
            signal.set_wakeup_fd(before)
            os.close(writing)

    def before_training(self) -> None:
        """Raises Stopped if the run was asked to stop. For phases that have nothing to save."""
        if self.asked():
            raise Stopped(self.reason)

    def _ignore(self, number: int) -> None:
        """Ignore a signal while Python shuts down, where it would restore the default handlers of ours."""
        if signal.getsignal(number) == self._on_signal:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first, last = self._first.setdefault(number, now), self._last.get(number, now)
        self._last[number] = now
        if now - first > ECHO_S if number == signal.SIGINT else now - last > QUIET_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.request(signal.Signals(number).name)
