"""`loldu chat --server URL`: a conversation with a model that a server with OpenAI's API has. Imports no torch."""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TextIO
from urllib.parse import urlsplit

from launcher.config import nearest
from launcher.files import read_text, user_path
from launcher.inference.conversation import Messages, converse, note
from launcher.inference.options import Answering
from launcher.text import one_line, printable

KEY_VARIABLE = "LOLDU_API_KEY"
TIMEOUT_S = 120.0  # without a byte: a server that works sends one every 15 s
SENT = ("max_tokens", "temperature", "top_p", "seed")  # the options that a request has fields for
LOCAL = ("localhost", "127.0.0.1", "::1")


class ServerError(ValueError):
    """What a server answered instead of a result; code is OpenAI's."""

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


class Server:
    """Requests to one server. Redirects are not followed: they could carry the key elsewhere."""

    def __init__(self, url: str, key: str | None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"--server {url} is no address ({error}): give http://HOST:PORT") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError(f"--server {url} is no address: give http://HOST:PORT")
        if key and parts.scheme == "http" and host not in LOCAL:
            note(f"warning: the API key is sent to {host} unencrypted; https protects it")
        self.kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.host, self.port, self.key = host, port, key
        self.url, self.path = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/").removesuffix("/v1")

    @contextmanager
    def ask(self, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """The response to GET, or to POST with a body. Raises ServerError."""
        connection = self.kind(self.host, self.port, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request("GET" if data is None else "POST", self.path + path, data, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _error(self.url, response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url} does not answer ({error or type(error).__name__}): is it running?") from None
        finally:
            connection.close()

    def models(self) -> list[str]:
        """The ids of its models."""
        with self.ask("/v1/models") as response:
            try:
                return [str(model["id"]) for model in json.loads(response.read())["data"]]
            except (ValueError, KeyError, TypeError):
                raise ServerError(f"{self.url} lists no models: it is no server with OpenAI's API") from None

    def stream(self, body: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed chat. Raises ServerError."""
        with self.ask("/v1/chat/completions", {**body, "stream": True}) as response:
            for line in response:
                text = line.decode(errors="replace").strip()
                if text == "data: [DONE]":
                    return
                if not text.startswith("data: "):
                    continue
                try:
                    event = json.loads(text.removeprefix("data: "))
                except ValueError:
                    raise ServerError(f"{self.url} sent an event that is not JSON") from None
                if not isinstance(event, dict):
                    raise ServerError(f"{self.url} sent an event that is no object")
                if (error := event.get("error")) is not None:
                    known = error if isinstance(error, dict) else {"message": error}
                    raise ServerError(str(known.get("message")), known.get("code"))
                yield event
        raise ServerError(f"{self.url} ended before the answer did")


def chat_with_server(
    url: str,
    model: str | None,
    how: Answering,
    *,
    system: str | None = None,
    api_key_file: str | None = None,
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Chat with a model of a server; `loldu chat --server` (commands.py) describes the arguments."""
    defaults = Answering()
    for field in fields(how):
        if field.name not in SENT and getattr(how, field.name) != getattr(defaults, field.name):
            raise ValueError(f"--{field.name.replace('_', '-')} is the server's to choose: leave it out with --server")
    server = Server(url, _key(api_key_file))
    models = server.models()
    if not models:
        raise ValueError(f"{server.url} serves no model")
    if model is not None and model not in models:
        raise ValueError(f"{server.url} does not serve {model}; {nearest(model, set(models[:1000]))}")
    chosen = [model or models[0]]
    others = f"one of {len(models):,} models" if len(models) > 1 else "its only model"
    note(f"{server.url}: {chosen[0]}, {others}")
    # without --max-tokens an answer may be as long as the server allows
    sent = {name: getattr(how, name) for name in SENT if name != "max_tokens" or how.max_tokens != defaults.max_tokens}

    def switch(name: str) -> bool:
        if name not in (known := server.models()):
            note(f"there is no model {name!r}; {nearest(name, set(known[:1000]))}")
            return False
        chosen[0] = name
        note(f"(model {name}; conversation cleared)")
        return True

    def turn(question: str, history: Messages, system: str | None) -> Messages:
        return _turn(server, {"model": chosen[0], **sent}, question, history, system, out or sys.stdout)

    converse(turn, lines=lines or sys.stdin, system=system, more={"/model": ("ID switches to another model", switch)})


def _turn(
    server: Server, fields: dict[str, Any], question: str, history: Messages, system: str | None, out: TextIO
) -> Messages:
    """Answer one question. Returns the conversation with it, or unchanged if there is no answer."""
    asked = [*history, {"role": "user", "content": question}]
    first: Messages = [{"role": "system", "content": system}] if system else []
    text, finish, dropped = "", None, False
    while True:
        try:
            for event in server.stream({**fields, "messages": first + asked}):
                choice = (event.get("choices") or [{}])[0]
                new = (choice.get("delta") or {}).get("content") or ""
                finish, text = choice.get("finish_reason") or finish, text + new
                print(printable(new), end="", file=out, flush=True)
        except KeyboardInterrupt:
            finish = "interrupted"
        except ServerError as error:
            if error.code == "context_length_exceeded" and len(asked) > 2:
                asked, dropped = asked[2:], True
                continue
            if text:
                print(file=out, flush=True)
            note(str(error))
            return history
        break
    print(file=out, flush=True)
    if dropped:
        note("(the conversation no longer fits the context: its oldest part is dropped)")
    if finish == "interrupted":
        note("(stopped)")
    elif finish == "length":
        note("(stopped: the answer has reached the maximum number of tokens)")
    return [*asked, {"role": "assistant", "content": text}] if text.strip() else history


def _key(file: str | None) -> str | None:
    """The key of a file (its first line), or of the environment."""
    if file is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        lines = [line.strip() for line in read_text(user_path(file)).splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--api-key-file {file} cannot be read ({error}): give a text file with the key") from None
    key = next((line for line in lines if line and not line.startswith("#")), None)
    if key is None or not key.isascii():
        raise ValueError(f"--api-key-file {file} holds no key: write it on a line of its own")
    return key


def _error(url: str, response: http.client.HTTPResponse) -> ServerError:
    try:
        error = json.loads(response.read(1 << 20))["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ServerError(f"{url} answered with status {response.status} {one_line(response.reason or '', 100)}")
    if response.status == 401:
        message += f" (--api-key-file FILE, or the variable {KEY_VARIABLE})"
    return ServerError(message, code)
