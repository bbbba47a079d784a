"""Progress of long work, one way for all commands: a bar on a terminal, lines with the time left in a log file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from launcher.text import one_line

Unit = Literal["", "bytes"]
LINE_EVERY_S = 5.0  # between two lines in a log file at first; later a twentieth of the time so far, up to
LINE_EVERY_S_AT_MOST = 60.0
LOOK_EVERY_S = 0.5


class Show(Protocol):
    """Shows how much is done, with a note beside it. `of` replaces the total, which may be unknown (0) until then."""

    def __call__(self, done: int, note: str = "", of: int | None = None) -> None: ...


def silent(done: int, note: str = "", of: int | None = None) -> None:
    """A Show that shows nothing."""


class Bars:
    """The progress bars of one console. A bar inside another's block is shown below it on a terminal."""

    def __init__(self, console: Console):
        self.console = console
        self._live: Progress | None = None

    @contextmanager
    def bar(
        self, what: str, total: int = 0, done: int = 0, *, unit: Unit = "", brief: bool = False
    ) -> Iterator[Callable[..., None]]:
        """A bar as a `Show`. With a total of 0 nothing is shown until `of` gives it; if the first call does, the time
        that is left follows from the calls after it.

        brief: for work that is often over at once. Its bar disappears at the end, and a log file gets no line of what
        takes less than LINE_EVERY_S.
        """
        if not self.console.is_terminal:
            yield _Lines(self.console, what, total, done, unit, brief)
            return
        if self._live is not None:
            with self._task(self._live, what, total, done, unit, brief) as show:
                yield show
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[counts]} {task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, expand=True) as self._live:
            try:
                with self._task(self._live, what, total, done, unit, brief) as show:
                    yield show
            finally:
                self._live = None

    @contextmanager
    def _task(
        self, live: Progress, what: str, total: int, done: int, unit: Unit, brief: bool
    ) -> Iterator[Callable[..., None]]:
        task = live.add_task(
            what, total=total or None, completed=done, note="", counts=counts(done, total, unit), visible=total > 0
        )

        def show(done: int, note: str = "", of: int | None = None) -> None:
            nonlocal total
            total = of or total
            live.update(
                task,
                completed=done,
                total=total or None,  # a pulse
                visible=True,
                note=one_line(note),
                counts=counts(done, total, unit),
            )

        try:
            yield show
        finally:
            if brief:
                live.remove_task(task)


@contextmanager
def growth(show: Callable[..., None], folder: Path, total: int) -> Iterator[None]:
    """Show the bytes of the files in a folder while the block writes them: for libraries that report no progress."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_EVERY_S):
            with suppress(OSError):
                show(min(total, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())))

    watcher = threading.Thread(target=look, name="growth", daemon=True)
    watcher.start()
    try:
        yield
        ended.set()
        watcher.join()
        show(total)
    finally:
        ended.set()
        watcher.join()


class _Lines:
    """Progress as lines: one from time to time, and one at the end."""

    def __init__(self, console: Console, what: str, total: int, done: int, unit: Unit, brief: bool):
        self.console, self.what, self.total, self.unit, self.brief = console, what, total, unit, brief
        self.first = self.shown = done
        self.started = self.since = self.last = time.monotonic()
        self.begun = total > 0  # whether the work is that of this bar, from its first number on

    def __call__(self, done: int, note: str = "", of: int | None = None) -> None:
        now, self.total = time.monotonic(), of or self.total
        so_far = now - self.started
        pause_s = max(LINE_EVERY_S, min(so_far / 20, LINE_EVERY_S_AT_MOST))
        if (self.total and not self.begun) or done < self.first:  # before that was other work: time counts from here
            self.first, self.since = done, now
        self.begun |= done != self.shown
        at_end = done >= self.total > 0 and not (self.brief and so_far < LINE_EVERY_S)
        if done == self.shown or not (at_end or now - self.last > pause_s):
            return
        self.shown, self.last = done, now
        left = ""
        if self.first < done < self.total:
            left = f", {duration((now - self.since) / (done - self.first) * (self.total - done))} left"
        text = f"{self.what} {counts(done, self.total, self.unit)} {one_line(note)}".rstrip() + left
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def counts(done: int, total: int, unit: Unit = "") -> str:
    """`3/10`, or `1.2/4.0 GB`; without the total if it is not known."""
    if unit == "bytes":
        for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if max(done, total) >= size:
                return (f"{done / size:.1f}/{total / size:.1f}" if total else f"{done / size:.1f}") + f" {name}"
        return f"{done}/{total} B" if total else f"{done} B"
    return f"{done}/{total}" if total else f"{done}"


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
