"""The tokens of one request as they arrive from the engine: text without stop strings, and OpenAI's JSON from it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from launcher.serving.protocol import Asked
from launcher.serving.requests import Finish, Token


class Logprob(NamedTuple):
    """One token with its log-probability, and the most likely tokens in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    start: int  # where its text begins in the answer, in characters


@dataclass(frozen=True)
class Piece:
    """New text of an answer; finish is set on the last one. A piece without anything keeps a connection alive."""

    text: str = ""
    logprobs: tuple[Logprob, ...] = ()
    finish: Finish | None = None
    error: str | None = None


class TokenTexts:
    """The text of single tokens, blanks at their beginning included."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.anchor = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"][-1:]
        self.skipped = len(self._decode(self.anchor))
        self.special = frozenset(tokenizer.all_special_ids)
        self.known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self._decode([*self.anchor, token])[self.skipped :]
        return self.known[token]

    def _decode(self, tokens: Sequence[int]) -> str:
        # decode() drops the blank with which a SentencePiece text begins, so a token is decoded behind another one
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class StopText:
    """Cuts a growing text before the first stop string; text that may be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]):
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to be before any stop string."""
        if self.stopped:
            return ""
        self.held += text
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self.held = self.held[: min(found)], ""
            return certain
        keep = max((_overlap(self.held, stop) for stop in self.stop), default=0)
        certain, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return certain

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text are the beginning of stop."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


@dataclass
class Answer:
    """One answer that is being made: fed by `emit` from the engine's thread, read by `pieces` on the event loop."""

    id: str
    model: str
    asked: Asked
    prompt_tokens: int
    texts: TokenTexts
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    queue: asyncio.Queue[Token] = field(default_factory=asyncio.Queue)
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None  # seconds until the first token
    tokens: int = 0
    finish: Finish | None = None

    def emit(self, token: Token) -> None:
        with suppress(RuntimeError):  # the event loop has ended
            self.loop.call_soon_threadsafe(self._take, token)

    def _take(self, token: Token) -> None:
        if self.first_s is None:
            self.first_s = time.monotonic() - self.began
        self.queue.put_nowait(token)

    async def pieces(self, timeout_s: float, alive_s: float = 15.0) -> AsyncGenerator[Piece, None]:
        """The answer as it grows. After alive_s seconds without a token an empty piece; raises TimeoutError after
        timeout_s seconds in all."""
        deadline = self.began + timeout_s
        stopping, waiting, length = StopText(self.asked.stop), list[Logprob](), 0  # length: of all text so far
        shown = 0  # characters of the answer that were handed out
        while True:
            token = await self._next(min(alive_s, deadline - time.monotonic()))
            if token is None:
                if time.monotonic() >= deadline:
                    raise TimeoutError
                yield Piece()
                continue
            new = ""
            while token is not None:
                if token.finish not in ("cancelled", "error") and not stopping.stopped:
                    self.tokens += 1
                    if self.asked.logprobs is not None and token.logprob is not None and not self._ends(token):
                        top = tuple((self.texts(each), value) for each, value in token.top[: self.asked.logprobs])
                        waiting.append(Logprob(self.texts(token.id), token.logprob, top, length))
                    length += len(token.text)
                    new += stopping.push(token.text)
                if stopping.stopped or token.finish:
                    break
                token = None if self.queue.empty() else self.queue.get_nowait()
            finish = "stop" if stopping.stopped else token.finish if token else None
            if finish is not None:
                new += stopping.rest()
            shown += len(new)
            ready = [each for each in waiting if each.start < shown or (finish and not stopping.stopped)]
            waiting = waiting[len(ready) :]
            if new or finish is not None:
                self.finish = finish
                yield Piece(new, tuple(ready), finish, token.error if token else None)
            else:
                waiting = [*ready, *waiting]
            if finish is not None:
                return

    async def _next(self, timeout_s: float) -> Token | None:
        """The next token; None if none comes in time."""
        if not self.queue.empty():
            return self.queue.get_nowait()
        try:
            return await asyncio.wait_for(self.queue.get(), max(timeout_s, 0.0))
        except TimeoutError:
            return None

    def _ends(self, token: Token) -> bool:
        """Whether a token is the one with which the model ended the answer; it is not part of the text."""
        return token.finish == "stop" and (not token.text or token.id in self.texts.special)

    def usage(self) -> dict[str, int]:
        used = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens}
        return used | {"total_tokens": self.prompt_tokens + self.tokens}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The response to a request without streaming."""
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs([each for piece in pieces for each in piece.logprobs])
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": pieces[-1].finish}
        if self.asked.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return self._envelope(kind) | {"choices": [choice], "usage": self.usage()}

    def chunk(self, piece: Piece, *, first: bool = False) -> dict[str, Any]:
        """One event of a stream. first: the event that gives a chat's role."""
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": piece.finish}
        if self.asked.chat:
            delta = {"role": "assistant", "content": ""} if first else {"content": piece.text} if piece.text else {}
            choice["delta"] = delta
        else:
            choice["text"] = piece.text
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        usage = {"usage": None} if self.asked.include_usage else {}
        return self._envelope(kind) | {"choices": [choice]} | usage

    def last_chunk(self) -> dict[str, Any]:
        """The event after the answer with what it took."""
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return self._envelope(kind) | {"choices": [], "usage": self.usage()}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, found: Sequence[Logprob]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        if self.asked.chat:
            content = [
                _entry(each.text, each.logprob) | {"top_logprobs": [_entry(*other) for other in each.top]}
                for each in found
            ]
            return {"content": content, "refusal": None}
        tops: list[Mapping[str, float]] | None = [dict(each.top) for each in found] if self.asked.logprobs else None
        return {
            "tokens": [each.text for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": tops,
            "text_offset": [each.start for each in found],
        }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    whole = "\ufffd" not in text  # half a character has no text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
