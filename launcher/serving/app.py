"""The HTTP API: which path does what. `create_app` gives an ASGI application for a Service."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from launcher.serving.answers import Answer, Piece
from launcher.serving.catalogue import Served
from launcher.serving.errors import Refused, unknown_model
from launcher.serving.limits import App, Gate
from launcher.serving.protocol import Asked, read_adapter, read_chat, read_completion
from launcher.serving.service import Service, as_model

log = logging.getLogger(__name__)
UNREAD_S = 5.0  # for a client to read the end of its stream, after the time for the request
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
PAGE_TYPES = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}


def create_app(service: Service, *, keys: Sequence[str] = (), hosts: Sequence[str] | None = None) -> App:
    """The application. keys: API keys, one of which a request needs. hosts: the Host headers that are accepted."""
    app = FastAPI(title="loldu serve", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    _open_routes(app, service)
    _model_routes(app, service)
    _adapter_routes(app, service)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown_path(request: Request, error: HTTPException) -> Response:
        path, allowed = request.url.path[:100], (error.headers or {}).get("Allow", "")
        said = {404: f"there is no path {path!r}", 405: f"{request.method} is not allowed on {path!r}: use {allowed}"}
        message = said.get(error.status_code, f"{request.method} {path!r} is refused")
        return await refused(request, Refused(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, Refused(500, "the server failed on this request: its log has the reason"))

    return Gate(
        app, keys=keys, hosts=hosts, max_bytes=service.limits.max_request_kb * 1024, state=service.state,
        answered=service.metrics.answered,
    )  # fmt: skip


def _open_routes(app: FastAPI, service: Service) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"])  # load balancers ask by HEAD
    async def health() -> Response:
        state = service.state()
        return JSONResponse({"status": state or "ok"}, 503 if state else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = service.metrics.text(service.numbers(), service.ready.engine.stats())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    for path, name in (("/", "page.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _page(name), methods=["GET", "HEAD"], include_in_schema=False)


def _page(name: str) -> Callable[[], Response]:
    content = (files("launcher.serving") / "page" / name).read_bytes()
    return lambda: Response(content, headers=PAGE_HEADERS, media_type=PAGE_TYPES[name])


def _model_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Any:
        catalogue = service.ready.catalogue
        adapters = sorted(catalogue.adapters.values(), key=lambda served: served.name)
        return {
            "object": "list",
            "data": [as_model(served, catalogue.base.name) for served in [catalogue.base, *adapters]],
        }

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        catalogue = service.ready.catalogue
        served = catalogue.find(name)
        if served is None:
            raise unknown_model(name, known=len(catalogue.adapters))
        return as_model(served, catalogue.base.name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, read_chat(await request.body()))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(service, request, read_completion(await request.body()))


def _adapter_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/adapters")
    async def adapters() -> Any:
        catalogue = service.ready.catalogue
        return {
            "object": "list",
            "data": [as_model(served, catalogue.base.name) for _, served in sorted(catalogue.adapters.items())],
            "failed": {name: failure.reason for name, failure in sorted(catalogue.failures.items())},
        }

    @app.post("/v1/adapters")
    async def load(request: Request) -> Response:
        name, catalogue = read_adapter(await request.body()), service.ready.catalogue
        served, anew = await asyncio.to_thread(catalogue.load, name)
        return JSONResponse(as_model(served, catalogue.base.name), 201 if anew else 200)

    @app.delete("/v1/adapters/{name:path}")
    async def unload(name: str) -> Any:
        await asyncio.to_thread(service.ready.catalogue.unload, name)
        return {"id": name, "object": "adapter", "deleted": True}


async def _answer(service: Service, request: Request, asked: Asked) -> Response:
    answer, served = await service.begin(asked)
    if asked.stream:
        return EventStream(service, answer, served)
    return await _unless_gone(request, service, answer, served)


async def _unless_gone(request: Request, service: Service, answer: Answer, served: Served) -> Response:
    """The whole answer as JSON; if the client leaves first, the answer is cancelled."""

    async def collect() -> list[Piece]:
        async with aclosing(service.pieces(answer)) as pieces:
            return [piece async for piece in pieces]

    status = 499
    work, gone = asyncio.create_task(collect()), asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=status)  # nobody reads it
        pieces = work.result()
        status = 200
        return JSONResponse(answer.whole(pieces), headers={"x-request-id": answer.id})
    except Refused as refused:
        status = refused.status
        raise
    finally:
        work.cancel()
        gone.cancel()
        service.end(answer, served, status)


class EventStream(Response):
    """The answer as server-sent events. If the client leaves, or does not read in time, the answer is cancelled."""

    def __init__(self, service: Service, answer: Answer, served: Served):
        self.service, self.answer, self.served = service, answer, served
        headers = {"x-request-id": answer.id, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(status_code=200, headers=headers, media_type="text/event-stream")

    def init_headers(self, headers: Any = None) -> None:
        super().init_headers(headers)
        self.raw_headers = [each for each in self.raw_headers if each[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.status = 499
        work, gone = asyncio.create_task(self._send(send)), asyncio.create_task(_disconnected(receive))
        try:
            left_s = self.service.limits.request_timeout_s + UNREAD_S - (time.monotonic() - self.answer.began)
            await asyncio.wait({work, gone}, timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except OSError:  # the connection broke while it was written to
            pass
        finally:
            work.cancel()
            gone.cancel()
            self.service.end(self.answer, self.served, self.status)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[str, None]:
        answer = self.answer
        try:
            if answer.asked.chat:
                yield _event(answer.chunk(Piece(), first=True))
            async with aclosing(self.service.pieces(answer)) as pieces:
                async for piece in pieces:
                    yield _event(answer.chunk(piece)) if piece != Piece() else ": waiting\n\n"
            if answer.asked.include_usage:
                yield _event(answer.last_chunk())
            self.status = 200
            yield "data: [DONE]\n\n"
        except Refused as refused:
            self.status = refused.status
            yield _event(refused.body())


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
