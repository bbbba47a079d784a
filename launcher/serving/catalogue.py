"""Which adapters are served: those of the given folders, followed while the server runs.

An adapter that is replaced is loaded under another name in the engine, so answers that have begun end with the old
one. An adapter is loaded when its files have stopped changing; one that does not load is tried again when they change.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from launcher.data.templates import Template
from launcher.serving.errors import Refused
from launcher.serving.folders import Found, State, look_up, scan
from launcher.serving.prompts import adapter_template
from launcher.serving.requests import Engine
from launcher.text import one_line

log = logging.getLogger(__name__)
SETTLED_NS = 2_000_000_000  # files that have not changed for so long are whole
RETRY_S = 30.0
MOST_BUSY = 0.05  # of the time, that the watching thread may look at the folders


@dataclass(frozen=True)
class Served:
    """A model as clients name it, and what it is in the engine."""

    name: str
    engine_name: str
    template: Template
    created: int  # seconds since 1970
    own_template: bool = False


@dataclass(frozen=True)
class Failure:
    """Why an adapter is not served, for this state of its files."""

    reason: str
    state: State | None
    tried_s: float


@dataclass
class Catalogue:
    """The base and its adapters. Changes take a lock; a look-up reads one dictionary and takes none."""

    engine: Engine
    roots: Sequence[Path]
    base: Served
    adapters: dict[str, Served] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    _states: dict[str, State] = field(default_factory=dict)  # of the files that were loaded
    _dismissed: dict[str, State] = field(default_factory=dict)  # unloaded by a client: not loaded again automatically
    _before: dict[str, Found] = field(default_factory=dict)  # of the scan before
    _running: Counter[str] = field(default_factory=Counter)  # requests by name in the engine
    _retired: set[str] = field(default_factory=set)  # in the engine until their last request ends
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _count: threading.Lock = field(default_factory=threading.Lock)
    _versions: count[int] = field(default_factory=lambda: count(2))
    _templates: dict[Template, Template] = field(default_factory=dict)  # thousands of adapters share a few
    _unreadable: bool = False

    def find(self, name: str) -> Served | None:
        return self.base if name == self.base.name else self.adapters.get(name)

    def refresh(self, *, first: bool = False, quick: bool = False) -> None:
        """Look at the folders: load what is new or changed, retire what is gone. first: at the server's start.

        quick: not at the files of loaded adapters, which are most of them.
        """
        with self._lock:
            loaded = {name: each for name, each in self._before.items() if each.state == self._states.get(name)}
            try:
                found, problems = scan(self.roots, loaded if quick else None)
            except OSError as error:
                if not self._unreadable:
                    log.warning("the adapters' folder cannot be read (%s): what is loaded stays served", error)
                self._unreadable = True
                return
            self._unreadable = False
            if self.base.name in found:
                problems[self.base.name] = f"{found.pop(self.base.name).folder} has the name of the base: rename it"
            for name, reason in problems.items():
                self._fail(name, reason, None)
            now_ns, now_s = time.time_ns(), time.monotonic()
            for name, adapter in found.items():
                if adapter.state in (self._states.get(name), self._dismissed.get(name)):
                    continue
                failure = self.failures.get(name)
                if failure and failure.state == adapter.state and now_s < failure.tried_s + RETRY_S:
                    continue
                old = first and now_ns - adapter.newest_ns > SETTLED_NS
                before = self._before.get(name)
                settled = old or (before is not None and before.state == adapter.state)
                if settled and self._try(adapter) is None and not first:
                    log.info("adapter %s is served", one_line(name))
            for name in [*self.adapters]:
                if name not in found and name not in self._before:  # twice: a rename can look like a removal
                    self._replace(name, None)
            for known in (self.failures, self._dismissed):
                for name in known.keys() - found.keys() - problems.keys():
                    known.pop(name)
            self._before = found

    def load(self, name: str) -> tuple[Served, bool]:
        """Load an adapter now, by its name; also returns whether it was newly loaded. Raises Refused (400, 404)."""
        with self._lock:
            if name == self.base.name:
                raise Refused(400, f"{name!r} is the base, which is always served", param="name")
            adapter = look_up(self.roots, name)
            if adapter.state == self._states.get(name):
                return self.adapters[name], False
            if reason := self._try(adapter):
                raise Refused(400, f"adapter {name!r} does not load: {reason}", code="adapter_not_loaded", param="name")
            return self.adapters[name], True

    def unload(self, name: str) -> None:
        """Stop serving an adapter now: its running answers end with an error. Raises Refused (400, 404)."""
        with self._lock:
            if name == self.base.name:
                raise Refused(400, f"{name!r} is the base, which is always served", param="name")
            with self._count:
                served = self.adapters.pop(name, None)
            if served is None:
                raise Refused(404, f"there is no adapter {name!r:.200} loaded", code="adapter_not_found", param="name")
            self._dismissed[name] = self._states.pop(name)
            self.engine.remove_adapter(served.engine_name)
            log.info("adapter %s was unloaded by a client", one_line(name))

    def begin(self, name: str) -> Served | None:
        """The model for a request that begins; `end` must be called after it."""
        with self._count:
            served = self.find(name)
            if served is not None:
                self._running[served.engine_name] += 1
            return served

    def end(self, served: Served) -> None:
        """A request has ended. The last one of a retired adapter frees it."""
        with self._count:
            self._running[served.engine_name] -= 1
            if self._running[served.engine_name] > 0:
                return
            del self._running[served.engine_name]
            free = served.engine_name in self._retired
            self._retired.discard(served.engine_name)
        if free:
            self.engine.remove_adapter(served.engine_name)

    def _try(self, adapter: Found) -> str | None:
        """Load an adapter; the reason if it does not load, and the one before stays."""
        name, replaced = adapter.name, self.adapters.get(adapter.name)
        engine_name = name if replaced is None and name not in self._retired else f"{name}//{next(self._versions)}"
        try:
            template = adapter_template(adapter.folder)
            self.engine.add_adapter(engine_name, adapter.folder)
        except ValueError as error:
            stays = "; the version before stays served" if replaced else ""
            self._fail(name, f"{error}{stays}", adapter.state)
            return str(error)
        own = self._templates.setdefault(template, template) if template else None
        served = Served(
            name, engine_name, own or self.base.template, adapter.newest_ns // 1_000_000_000, own is not None
        )
        self._replace(name, served)
        self._states[name] = adapter.state
        self.failures.pop(name, None)
        self._dismissed.pop(name, None)
        return None

    def _fail(self, name: str, reason: str, state: State | None) -> None:
        before = self.failures.get(name)
        if before is None or (before.reason, before.state) != (reason, state):
            log.warning("adapter %s is not loaded: %s", one_line(name), one_line(reason))
        self.failures[name] = Failure(reason, state, time.monotonic())

    def _replace(self, name: str, served: Served | None) -> None:
        """Serve another version of an adapter, or none. The engine keeps the one before until its requests end."""
        with self._count:
            before = self.adapters.get(name)
            if served is None:
                del self.adapters[name], self._states[name]
            else:
                self.adapters[name] = served
            if before is None:
                return
            waits = self._running[before.engine_name] > 0
            if waits:
                self._retired.add(before.engine_name)
        log.info("adapter %s was %s", one_line(name), "replaced" if served else "removed from its folder")
        if not waits:
            self.engine.remove_adapter(before.engine_name)


def watch(catalogue: Catalogue, stopped: Callable[[float], bool], every_s: float) -> None:
    """Refresh the catalogue until stopped(seconds to wait) is true. If looking at all files takes long, it is done less
    often; in between only new folders are looked at."""
    wait_s, whole_at = every_s, 0.0
    while not stopped(wait_s):
        began = time.monotonic()
        quick = began < whole_at
        try:
            catalogue.refresh(quick=quick)
        except Exception:  # a fault of ours must not end the watching
            log.exception("looking at the adapters' folders failed")
        ended = time.monotonic()
        rest_s = (ended - began) * (1 / MOST_BUSY - 1)
        if quick:
            wait_s = max(every_s, rest_s)
        else:
            wait_s, whole_at = every_s, ended + rest_s
