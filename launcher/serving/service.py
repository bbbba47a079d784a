"""One request from its admission to its last token: the state that all requests share."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from launcher.data.templates import Template
from launcher.serving.answers import Answer, Piece, TokenTexts
from launcher.serving.catalogue import Catalogue, Served
from launcher.serving.errors import Refused, unknown_model
from launcher.serving.limits import Limits
from launcher.serving.metrics import Metrics
from launcher.serving.prompts import token_ids
from launcher.serving.protocol import Asked
from launcher.serving.requests import Engine, Request, Sampling
from launcher.text import one_line

log = logging.getLogger(__name__)


@dataclass
class Models:
    """What exists once the model is loaded."""

    engine: Engine
    catalogue: Catalogue
    texts: TokenTexts
    # One thread: a chat template is rendered under a limit for the whole process, and tokenizers share state.
    prompts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prompts"))


@dataclass
class Service:
    """The server's state; only the event loop changes it."""

    limits: Limits
    models: Models | None = None  # None while the model is loaded
    stopping: bool = False
    failed: str | None = None  # why the engine answers no more requests; /health shows it, for a restart
    log_requests: bool = True
    metrics: Metrics = field(default_factory=Metrics)
    active: dict[str, Answer] = field(default_factory=dict)  # by the request's id
    ended: deque[float] = field(default_factory=lambda: deque(maxlen=64))  # when the last answers ended

    def state(self) -> str:
        """Why no request is accepted now; empty if requests are."""
        if self.stopping or self.failed:
            return "stopping" if self.stopping else "failed"
        return "loading" if self.models is None else ""

    @property
    def ready(self) -> Models:
        assert self.models is not None, "the gate lets no request in before"
        return self.models

    @property
    def waiting(self) -> int:
        return sum(answer.first_s is None for answer in self.active.values())

    def numbers(self) -> Mapping[str, float]:
        """For /metrics."""
        catalogue = self.models.catalogue if self.models else None
        return {
            "requests_waiting": self.waiting,
            "requests_active": len(self.active),
            "adapters": len(catalogue.adapters) if catalogue else 0,
            "adapters_failed": len(catalogue.failures) if catalogue else 0,
            "ready": not self.state(),
        }

    async def begin(self, asked: Asked) -> tuple[Answer, Served]:
        """Admit a request and hand it to the engine; `end` must follow. Raises Refused (400, 404, 429)."""
        models = self.ready
        self._admit()
        served = models.catalogue.begin(asked.model)
        if served is None:
            raise unknown_model(asked.model, known=len(models.catalogue.adapters))
        answer = None
        try:
            request = await self._request(asked, served)
            self._admit()  # others may have come meanwhile
            answer = Answer(request.id, served.name, asked, len(request.prompt), models.texts)
            self.active[answer.id] = answer
            try:
                models.engine.submit(request, answer.emit)
            except KeyError:  # unloaded since
                raise unknown_model(asked.model, known=len(models.catalogue.adapters)) from None
            except ValueError as error:
                raise Refused(400, str(error)) from None
            except RuntimeError as error:  # its thread has ended
                self.failed = one_line(str(error), 300)
                log.error("no request can be answered any more: %s", self.failed)
                raise Refused(503, self.failed, code="failed") from None
            return answer, served
        except BaseException:
            if answer is not None:
                del self.active[answer.id]
            models.catalogue.end(served)
            raise

    async def pieces(self, answer: Answer) -> AsyncGenerator[Piece, None]:
        """The answer as it grows. Raises Refused if it fails (404, 500, 503) or takes too long (504)."""
        try:
            async for piece in answer.pieces(self.limits.request_timeout_s):
                if piece.finish == "cancelled":
                    raise Refused(503, "the server is stopping: send the request again later", code="stopping")
                if piece.finish == "error":
                    if self.ready.catalogue.find(answer.model) is None:
                        raise Refused(404, f"the model {answer.model!r} was removed while it answered",
                                      code="model_removed", param="model")  # fmt: skip
                    raise Refused(500, f"the answer failed: {one_line(piece.error or 'unknown error', 300)}")
                yield piece
        except TimeoutError:
            raise Refused(
                504, f"the answer took more than {self.limits.request_timeout_s:g} s, which --request-timeout-s sets",
                code="timeout",
            ) from None  # fmt: skip

    def end(self, answer: Answer, served: Served, status: int) -> None:
        """Free what a request held, whatever became of it."""
        del self.active[answer.id]
        models, seconds = self.ready, time.monotonic() - answer.began
        models.engine.cancel(answer.id)  # nothing happens if it has ended
        models.catalogue.end(served)
        self.ended.append(time.monotonic())
        self.metrics.prompt_tokens += answer.prompt_tokens
        self.metrics.completion_tokens += answer.tokens
        self.metrics.duration.add(seconds)
        if answer.first_s is not None:
            self.metrics.first_token.add(answer.first_s)
        if self.log_requests:
            log.info(
                "%s %s %d: %d + %d tokens, first after %s, %.2f s, %s", answer.id, one_line(answer.model), status,
                answer.prompt_tokens, answer.tokens, f"{answer.first_s:.2f} s" if answer.first_s else "-", seconds,
                answer.finish or "not finished",
            )  # fmt: skip

    def cut(self) -> int:
        """Cancel all answers, which then end with an error; how many there were."""
        for id in self.active:
            self.ready.engine.cancel(id)
        return len(self.active)

    def _admit(self) -> None:
        if self.waiting >= self.limits.queue:
            raise Refused(429, f"{self.waiting} requests wait already, and --queue allows {self.limits.queue}: try "
                          "again later", code="queue_full", headers={"retry-after": str(self._retry_s())})  # fmt: skip

    def _retry_s(self) -> int:
        """When to try again: the time in which a quarter of the queue was answered lately."""
        if len(self.ended) < 2:
            return 5
        each_s = (time.monotonic() - self.ended[0]) / len(self.ended)
        return min(max(math.ceil(each_s * self.limits.queue / 4), 1), 60)

    async def _request(self, asked: Asked, served: Served) -> Request:
        """The request as the engine takes it. Raises Refused (400)."""
        models, tokenizer = self.ready, self.ready.engine.tokenizer
        template: Template = served.template
        loop = asyncio.get_running_loop()
        ids: Sequence[int] = await loop.run_in_executor(models.prompts, token_ids, asked, template, tokenizer)
        sampling = Sampling(
            max_tokens=self._room(asked, len(ids)), temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed,
            stop=(), logprobs=asked.logprobs,
        )  # fmt: skip
        id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        return Request(id, served.engine_name, tuple(ids), sampling)

    def _room(self, asked: Asked, prompt: int) -> int:
        """The most tokens that the answer may have. Raises Refused if the prompt or the answer does not fit."""
        context, most = self.ready.engine.context_length, self.limits.max_tokens
        param = "messages" if asked.chat else "prompt"
        if prompt >= context:
            raise Refused(400, f"the prompt has {prompt:,} tokens with its template, and the model's context is "
                          f"{context:,}: shorten it", code="context_length_exceeded", param=param)  # fmt: skip
        if asked.max_tokens is None:
            return min(most, context - prompt)
        if asked.max_tokens > most:
            raise Refused(400, f"max_tokens {asked.max_tokens:,} is more than this server allows ({most:,}, which "
                          "--max-tokens sets)", param="max_tokens")  # fmt: skip
        if prompt + asked.max_tokens > context:
            raise Refused(
                400, f"prompt {prompt:,} + max_tokens {asked.max_tokens:,} = {prompt + asked.max_tokens:,} tokens, and "
                f"the model's context is {context:,}: give max_tokens of at most {context - prompt:,}",
                code="context_length_exceeded", param="max_tokens",
            )  # fmt: skip
        return asked.max_tokens


def as_model(served: Served, base: str) -> dict[str, Any]:
    """A model as /v1/models shows it."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "loldu",
        "parent": None if served.name == base else base,
        "template": served.template.name,
    }
