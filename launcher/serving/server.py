"""Run the server: listen, load the model meanwhile, follow the folders, drain on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from launcher.exit_codes import DONE, FAILED
from launcher.serving.answers import TokenTexts
from launcher.serving.app import create_app
from launcher.serving.catalogue import Catalogue, Served, watch
from launcher.serving.limits import Limits, is_local
from launcher.serving.prompts import base_template
from launcher.serving.requests import Engine
from launcher.serving.service import Models, Service

log = logging.getLogger(__name__)
STOPS = (signal.SIGTERM, signal.SIGINT)
LATE_S = 2.0  # for cancelled answers to inform their clients
MOST_CONNECTIONS = 4096
OTHER_FILES = 128  # open files that are not connections
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises ValueError if it is not available."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port lies between 0 (any free one) and 65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} is no address of this machine ({error}): give 127.0.0.1 or 0.0.0.0") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        remedy = "give another --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "give another --host"
        raise ValueError(f"cannot listen at {host} port {port}: {error.strerror}; {remedy}") from None
    return listening


def most_connections() -> int:
    """Raise this process's limit of open files as far as it may; the connections that fit beside files and threads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + OTHER_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft := allowed, hard))
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, soft - OTHER_FILES))


def run(
    make_engine: Callable[[], tuple[Engine, Path]],
    *,
    folders: Sequence[Path],
    host: str,
    port: int,
    keys: Sequence[str],
    limits: Limits,
    template: str | None = None,
    watch_s: float = 2.0,
    log_requests: bool = True,
) -> int:
    """Serve until a signal; returns the exit code. Raises ValueError for faults in the model's files.

    make_engine: loads the model; returns the engine and the base's folder. It runs while /health answers 503 already.
    """
    if not keys and not is_local(host):
        raise ValueError(
            f"--host {host} lets other machines in: give --api-key-file FILE with a key that they must know "
            "(openssl rand -hex 24 > FILE), or leave --host at 127.0.0.1"
        )
    listening = listen(host, port)
    service = Service(limits, log_requests=log_requests)
    hosts = None if keys else tuple(dict.fromkeys((host.lower(), *LOCAL_NAMES)))
    config = uvicorn.Config(
        create_app(service, keys=keys, hosts=hosts), log_config=None, log_level="error", access_log=False,
        server_header=False, ws="none", lifespan="off", limit_concurrency=most_connections(),
        timeout_graceful_shutdown=int(limits.drain_s + LATE_S) + 1,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"
    return asyncio.run(
        _Run(service, uvicorn.Server(config), url).serve(make_engine, listening, folders, template, watch_s)
    )


class _Run:
    """A running server: the HTTP server on the event loop, and threads that load the model and watch the folders."""

    def __init__(self, service: Service, server: uvicorn.Server, url: str):
        self.service, self.server, self.url = service, server, url
        self.stopped = threading.Event()
        self.cut = 0  # answers that did not end in time
        self.failure: BaseException | None = None
        self.draining: asyncio.Task[None] | None = None

    async def serve(
        self,
        make_engine: Callable[[], tuple[Engine, Path]],
        listening: socket.socket,
        folders: Sequence[Path],
        template: str | None,
        watch_s: float,
    ) -> int:
        loop = asyncio.get_running_loop()
        for each in STOPS:
            loop.add_signal_handler(each, self.signalled)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment] # ours, above

        def load() -> None:
            try:
                models, loaded_s = load_models(make_engine, folders, template)
            except BaseException as error:
                self.failure = error
                loop.call_soon_threadsafe(setattr, self.server, "should_exit", True)
                return
            loop.call_soon_threadsafe(self.ready, models, loaded_s)
            if folders and watch_s:
                watch(models.catalogue, self.stopped.wait, watch_s)

        thread = threading.Thread(target=load, name="adapters", daemon=True)
        thread.start()
        await self.server.serve(sockets=[listening])
        self.stopped.set()
        if self.failure is not None:
            raise self.failure
        if self.service.models is not None:
            await asyncio.to_thread(self.service.models.engine.stop, 0.0)
            self.service.models.prompts.shutdown(wait=False, cancel_futures=True)
        if self.draining is not None:  # a repeated signal must not kill what has ended well, while Python shuts down
            for each in STOPS:
                loop.remove_signal_handler(each)
                signal.signal(each, signal.SIG_IGN)
        log.info("stopped%s", f"; {self.cut} answers were cut short" if self.cut else "")
        return FAILED if self.cut else DONE

    def ready(self, models: Models, loaded_s: float) -> None:
        self.service.models = models
        base, count = models.catalogue.base.name, len(models.catalogue.adapters)
        log.info("serving %s and %d adapters (loaded in %.1f s) at %s", base, count, loaded_s, self.url)

    def signalled(self) -> None:
        """The first signal stops new requests and waits for the running ones, the second one ends them."""
        if self.draining is None:
            self.service.stopping = True
            running, drain_s = len(self.service.active), self.service.limits.drain_s
            more = f": {running} answers have {drain_s:g} s to end (a second signal ends them now)" if running else ""
            log.info("stopping%s", more)
            self.draining = asyncio.get_running_loop().create_task(self.drain())
        else:
            self.end()
            self.server.force_exit = True

    async def drain(self) -> None:
        """Wait for the running answers, then let the HTTP server close. It still answers meanwhile, with 503."""
        deadline = asyncio.get_running_loop().time() + self.service.limits.drain_s
        while self.service.active and not self.server.force_exit:
            if asyncio.get_running_loop().time() > deadline:
                self.end()
                await asyncio.sleep(LATE_S / 2)
                break
            await asyncio.sleep(0.05)
        self.server.should_exit = True

    def end(self) -> None:
        if self.service.models is not None:
            self.cut += self.service.cut()


def load_models(
    make_engine: Callable[[], tuple[Engine, Path]], folders: Sequence[Path], template: str | None
) -> tuple[Models, float]:
    """The base and its adapters, and the seconds that loading the adapters took.

    Raises ValueError for a base that does not load.
    """
    engine, folder = make_engine()
    engine.start()
    own = base_template(template, folder, engine.tokenizer)
    log.info("prompt template of the base: %s", own.name)
    base = Served(engine.base_id, engine.base_id, own, int(folder.stat().st_mtime))
    catalogue = Catalogue(engine, folders, base)
    began = time.monotonic()
    catalogue.refresh(first=True)
    return Models(engine, catalogue, TokenTexts(engine.tokenizer)), time.monotonic() - began


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Our log lines, and warnings of libraries, on standard error with a time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours: Any = logging.getLogger("launcher.serving")
    before = ours.level
    logging.getLogger().addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        ours.setLevel(before)
