"""Limits on files and chat templates from other sources: seconds, memory and sizes, each to be raised by a variable.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from files and the network; time and
memory are limited here.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from launcher.data.bad_records import BadRecord

PREFIX = "LOLDU_"  # of the environment variables: LOLDU_TEMPLATE_SECONDS and so on


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a file or a template may take. Each is read from the environment, under its name in capitals."""

    template_seconds: float = 5.0  # to render one conversation
    template_bytes: int = 2**30  # of memory, beyond what the process has, while a conversation is rendered
    text_characters: int = 2**21  # of one text that is tokenised: a prompt with its answer, a rendered conversation
    read_bytes: int = 2**34  # of one data file
    read_ratio: int = 100  # times its own size, that a compressed data file may unpack to
    image_bytes: int = 2**28  # of the file of one image
    image_pixels: int = 2**26  # of one image, decoded

    def raised(self, name: str) -> str:
        """What to type to raise a limit, for error messages."""
        return f"the limit is {getattr(self, name):,}; raise it with {PREFIX}{name.upper()}"


@cache
def limits() -> Limits:
    """The limits of this process. Raises ValueError for a variable that is not a positive number."""
    found: dict[str, Any] = {}
    for field in fields(Limits):
        name = PREFIX + field.name.upper()
        if (text := os.environ.get(name)) is not None:
            kind = float if field.name == "template_seconds" else int
            try:
                found[field.name] = kind(text)
            except ValueError:
                raise ValueError(f"{name}={text} is not a number") from None
            if not 0 < found[field.name] < 2**62:
                raise ValueError(f"{name}={text} is not a positive number below 2**62")
    return Limits(**found)


class LimitExceeded(ValueError):
    """A file or a template that takes more than its limit."""


def check_length(text: str, whose: str) -> str:
    """The text. Raises BadRecord if it is too long to be tokenised at once; whose: the beginning of the message."""
    if len(text) > limits().text_characters:
        raise BadRecord(
            "a text that is too long", f"{whose} has {len(text):,} characters: {limits().raised('text_characters')}"
        )
    return text


class _TooSlow(BaseException):
    """Raised inside a template's code; no handler for Exception may catch it."""


class Clock:
    """Interrupts this thread's Python code when the time since the last `restart` is over."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.lock, self.ended, self.fired = threading.RLock(), threading.Event(), False
        self.thread_id = threading.get_ident()
        self.restart()

    def restart(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    def watch(self) -> None:
        """Run in a separate thread."""
        while not self.ended.wait(min(0.1, self.seconds / 4)):
            with self.lock:
                if not self.ended.is_set() and time.monotonic() > self.deadline:
                    self.fired = True
                    _interrupt(self.thread_id, _TooSlow)
                    return

    def stop(self) -> None:
        try:
            self._stop()
        except _TooSlow:  # it arrived here, when the work was done
            self._stop()

    def _stop(self) -> None:
        with self.lock:
            self.ended.set()
            if self.fired:
                _interrupt(self.thread_id, None)  # an interrupt that has not arrived yet must not arrive later


def _interrupt(thread_id: int, error: type[BaseException] | None) -> None:
    raised = ctypes.py_object(error) if error else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), raised)


@contextmanager
def bounded(what: str) -> Iterator[Clock]:
    """Limits of time and memory for the code inside, which calls `restart` between two conversations.

    Raises LimitExceeded. Memory is limited for the whole process meanwhile (RLIMIT_AS).
    """
    most = limits()
    clock = Clock(most.template_seconds)
    watcher = threading.Thread(target=clock.watch, daemon=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")  # Linux alone has it
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else None
    wanted = soft if used is None else used + most.template_bytes
    lowered = wanted != soft and (soft == resource.RLIM_INFINITY or wanted < soft)
    watcher.start()
    try:
        if lowered:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        yield clock
    except _TooSlow:
        raise LimitExceeded(
            f"{what} takes more than {most.template_seconds:g} seconds: {most.raised('template_seconds')}"
        ) from None
    except MemoryError:
        raise LimitExceeded(f"{what} takes too much memory: {most.raised('template_bytes')}") from None
    finally:
        clock.stop()
        if lowered:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        watcher.join()
