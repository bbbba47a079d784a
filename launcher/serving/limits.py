"""What a client may ask of the server, and the gate that checks it before a request is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import os
import socket
import stat
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.files import read_text, user_path
from launcher.serving.errors import Refused

log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

KEY_VARIABLE = "LOLDU_API_KEY"
FEWEST_KEY_CHARACTERS = 16
BODY_S = 30.0  # to send a request's body
OPEN_PATHS = ("/health", "/", "/page.js", "/page.css")  # without a key: they reveal nothing about the models


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask of the server."""

    max_tokens: int = 2048
    """Maximum number of tokens in an answer, and the number if a chat request gives none."""
    max_request_kb: int = 1024
    """Maximum size of a request's body, in KB."""
    queue: int = 256
    """Maximum number of requests that wait for their first token; more get status 429."""
    request_timeout_s: float = 600.0
    """Maximum time for one request, waiting included, in seconds."""
    drain_s: float = 30.0
    """Time for running answers after SIGTERM or Ctrl-C, in seconds."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_request_kb", "queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1, got {getattr(self, name)}")
        if not (0 < self.request_timeout_s < math.inf and 0 <= self.drain_s < math.inf):
            raise ValueError(
                f"--request-timeout-s is above 0 and --drain-s at least 0, got {self.request_timeout_s:g} and "
                f"{self.drain_s:g}"
            )


def read_keys(key: str | None, file: str | None) -> tuple[str, ...]:
    """The API keys: the given one, those of a file (one a line), or that of the environment. Raises ValueError."""
    if key is not None and file is not None:
        raise ValueError("--api-key and --api-key-file cannot be combined: give one of them")
    if file is not None:
        try:
            lines = read_text(user_path(file)).splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--api-key-file {file} cannot be read ({error}): give a text file, a key a line"
            ) from None
        _warn_if_others_can_read(user_path(file))
        keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
        if not keys:
            raise ValueError(f"--api-key-file {file} holds no key: write one a line")
    else:
        key = key if key is not None else os.environ.get(KEY_VARIABLE)
        keys = () if key is None else (key,)
    for each in keys:  # never shown
        if len(each) < FEWEST_KEY_CHARACTERS or not each.isascii() or not each.isprintable() or " " in each:
            raise ValueError(
                f"an API key has at least {FEWEST_KEY_CHARACTERS} ASCII characters without blanks, and a given one is "
                f"{len(each)} long: make one with  openssl rand -hex 24"
            )
    return keys


def _warn_if_others_can_read(file: Path) -> None:
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        log.warning("other users of this machine can access %s (mode %03o): chmod 600 %s", file, mode, file)


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address. Raises ValueError for a host without one."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} is no address of this machine ({error}): give 127.0.0.1 or 0.0.0.0") from None
    return all(ipaddress.ip_address(str(place[4][0]).partition("%")[0]).is_loopback for place in found)


class Gate:
    """Passes requests on that may be read: right key, right host, a body that is JSON and not too large.

    state is the reason why no request is accepted now ("loading", "stopping"), or is empty.
    """

    def __init__(
        self, app: App, *, keys: Sequence[str], hosts: Sequence[str] | None, max_bytes: int, state: Callable[[], str],
        answered: Callable[[str, int], None],
    ):  # fmt: skip
        self.app, self.keys, self.hosts, self.max_bytes = app, [key.encode() for key in keys], hosts, max_bytes
        self.state, self.answered = state, answered

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            self._check(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await self._body(scope, receive)
                receive = _replay(body, receive)
        except Refused as refused:
            self.answered("refused", refused.status)
            await send_error(send, refused)
            return
        status = 499  # if the client leaves before the answer begins

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        finally:
            route = scope.get("route")  # set by the router; an unknown path must not create a metric
            self.answered(getattr(route, "path", "unknown"), status)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and _without_port(host) not in self.hosts:
            # A web page can make its own name mean 127.0.0.1, and then read the answers (DNS rebinding).
            raise Refused(403, f"the Host header {host!r:.100} is not this server: use {' or '.join(self.hosts[:2])}")
        if scope["path"] in OPEN_PATHS:
            return
        if self.keys and not self._knows_key(headers.get(b"authorization", b"")):
            raise Refused(401, "a valid API key is needed: send the header  Authorization: Bearer KEY",
                          code="invalid_api_key", headers={"www-authenticate": "Bearer"})  # fmt: skip
        if state := self.state():
            raise Refused(503, f"the server is {state}: try again later", code=state, headers={"retry-after": "5"})

    def _knows_key(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        same = [hmac.compare_digest(key.strip(), known) for known in self.keys]  # all, so that none is faster
        return scheme.lower() == b"bearer" and any(same)

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        headers = {name.lower(): value for name, value in scope["headers"]}
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":  # a web page of another site cannot send this type unasked
            raise Refused(415, "the body must be JSON: send the header  Content-Type: application/json")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refused(415, "compressed bodies are not read: send the JSON as it is")
        length = headers.get(b"content-length", b"0")
        body = bytearray()
        if not length.isdigit() or int(length[:20]) <= self.max_bytes:
            try:
                async with asyncio.timeout(BODY_S):
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise Refused(499, "the client left")
                        body += message.get("body", b"")
                        if len(body) > self.max_bytes:
                            break
                        if not message.get("more_body"):
                            return bytes(body)
            except TimeoutError:
                raise Refused(
                    408, f"the body did not arrive within {BODY_S:g} s", headers={"connection": "close"}
                ) from None
        raise Refused(413, f"the body is larger than {self.max_bytes:,} bytes, which --max-request-kb sets: shorten "
                      "the prompt", headers={"connection": "close"})  # fmt: skip


def _without_port(host: str) -> str:
    return host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that hands the whole body out, then what comes after it."""
    done = False

    async def again() -> Message:
        nonlocal done
        if done:
            return await receive()
        done = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def send_error(send: Send, refused: Refused) -> None:
    """Answer with an error, as ASGI messages."""
    body = json.dumps(refused.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | refused.headers
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
