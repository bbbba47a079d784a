"""The processes of a run at work on its data: the first of each machine leads, and all of them share the long work.

While they work, every process follows the progress of the others and learns within seconds if one of them died, as in
factorization/watch.py.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from launcher.factorization import cache
from launcher.factorization.watch import BEAT_S, Watch
from launcher.processes import SLOW_S, Communicator, Ranks
from launcher.progress import silent

T = TypeVar("T")
Tick = Callable[[int], None]  # called with how much of this process's work is done; raises if the work must end


class _Left(Exception):
    """Another process failed or was stopped, so that the rest of the work is left."""


def _go_on() -> None:
    pass


@dataclass(frozen=True)
class Crew:
    """The processes, and what they show. All methods but `leads` and `claims` are called by all of them alike."""

    comm: Communicator
    bar: Callable[..., AbstractContextManager[Callable[..., None]]] = lambda *_, **__: nullcontext(silent)
    check: Callable[[], None] = _go_on  # raises Stopped if the run was asked to stop

    @property
    def leads(self) -> bool:
        """Whether this process is the first of its machine."""
        return self.comm.ranks.local_rank == 0

    def in_turn(self, what: str, do: Callable[[], T]) -> T:
        """What do returns. One process of each machine calls it first, so that the others find its work in a cache."""
        found: list[T] = []
        take: Callable[[], None] = lambda: found.append(do())  # noqa: E731
        for mine in (self.leads, not self.leads):
            self.comm.together(what, take if mine else _go_on, SLOW_S)
        return found[0]

    def led(self, what: str, do: Callable[[], Any]) -> list[Any]:
        """The results of do (JSON data) on the first process of each machine, in the machines' order, this one's first.

        If it fails on one, all processes raise and name it.
        """
        ranks = self.comm.ranks
        first = ranks.rank - ranks.local_rank
        answers = self.comm.together(what, lambda: [first, do() if self.leads else None], SLOW_S)
        by_machine = {at: answers[at][1] for at, _ in answers}
        return [by_machine.pop(first), *by_machine.values()]

    def work(self, what: str, total: int, do: Callable[[Tick], T], *, brief: bool = True) -> T:
        """Do this process's part of some work, and show the progress of all; total: of this process's part, or its
        estimate.

        do runs in a thread, so that this one can exchange heartbeats. If it fails on one process, or the run is asked
        to stop, the others end at their next tick; all then raise. Raises RuntimeError naming a process that died.
        """
        comm, done, leaving = self.comm, 0, threading.Event()
        outcome: list[T] = []
        failures: list[BaseException] = []

        def tick(so_far: int) -> None:
            nonlocal done
            done = so_far
            if comm.store is None:
                beat()
            if leaving.is_set():
                raise _Left

        def part() -> None:
            try:
                outcome.append(do(tick))
            except _Left:
                pass
            except BaseException as error:
                failures.append(error)
                watch.own["left"] = True

        def beat(*, finished: bool = False) -> bool:
            all_finished = watch.beat(done, what, finished=finished)
            if watch.left:
                leaving.set()
            if not leaving.is_set():
                try:
                    self.check()
                except Exception as error:
                    failures.append(error)
                    watch.own["left"] = True
                    leaving.set()
            return all_finished

        def report() -> None:
            if failures:
                raise failures[0]

        token = comm.from_main(f"a name for {what}", lambda: uuid.uuid4().hex, SLOW_S)
        with self.bar(what, total, brief=brief) as show:
            kept = "the data are read again"
            watch = Watch(comm, token, total, lambda done, total, _: show(done, of=total), kept)
            if comm.store is None:
                part()
                beat(finished=True)
            else:
                worker = threading.Thread(target=part, name=what, daemon=True)
                worker.start()
                try:
                    while worker.is_alive():
                        beat()
                        worker.join(BEAT_S)
                    while not beat(finished=True):
                        time.sleep(BEAT_S / 4)
                except BaseException:  # a process died: end this one's work, then raise
                    leaving.set()
                    worker.join(10 * BEAT_S)
                    raise
        comm.together(what, report, SLOW_S)
        return outcome[0]

    def claims(self, name: str, count: int) -> Iterator[int]:
        """Numbers below count, each of them taken by one process of this machine. name must be new for each such
        work."""
        if self.comm.store is None:
            yield from range(count)
            return
        for _ in itertools.count():
            taken = self.comm.store.add(f"loldu/claims/{name}", 1) - 1
            if taken >= count:
                return
            yield taken

    @contextmanager
    def folder(self, cached: Path) -> Iterator[Path]:
        """A new folder that the processes of this machine share: in a cache, or where temporary files are.

        Its files are removed at the end. What is mapped into memory until then stays mapped.
        """

        def make() -> str:
            try:
                return str(cache.working_folder(cached))
            except ValueError:
                return tempfile.mkdtemp(prefix="loldu-")

        made = Path(self.led("a folder for the data", make)[0])
        try:
            yield made
        finally:
            if self.leads:
                shutil.rmtree(made, ignore_errors=True)


ALONE = Crew(Communicator(Ranks()))
