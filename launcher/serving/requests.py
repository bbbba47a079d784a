"""What the HTTP side and the engine exchange: plain data, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen; temperature 0 takes the most likely one."""

    max_tokens: int
    temperature: float = 0
    top_p: float = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()  # an answer ends before the first of these texts
    logprobs: int | None = None  # also return the log-probability of each token and of this many most likely ones


@dataclass(frozen=True)
class Request:
    """One prompt for one model; model is the base's id or an adapter's name."""

    id: str
    model: str
    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    text: str  # new since the token before; characters that need a later token are held back
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens with their log-probabilities
    finish: Finish | None = None  # set on the last token
    error: str | None = None  # set if finish is "error"


class Engine(Protocol):
    """Answers requests for a base and its adapters, many at a time."""

    base_id: str
    context_length: int
    tokenizer: Any

    def start(self) -> None: ...

    def stop(self, drain_s: float) -> None:
        """Stop after running requests have ended; those that still run after drain_s seconds are cancelled."""

    def models(self) -> list[str]:
        """The base's id, then the adapters' names."""

    def add_adapter(self, name: str, folder: Path) -> None:
        """Raises ValueError, with the reason, for a folder that is not an adapter of this base."""

    def remove_adapter(self, name: str) -> None:
        """Its running requests end with finish "error". Raises KeyError for an unknown name."""

    def submit(self, request: Request, emit: Callable[[Token], None]) -> None:
        """Answer a request: emit is called for each token, from the engine's thread; the last has finish set.

        Raises KeyError for an unknown model, ValueError for a prompt that is too long.
        """

    def cancel(self, request_id: str) -> None:
        """End a request with finish "cancelled"; nothing happens if it has ended."""

    def stats(self) -> Mapping[str, float]:
        """Counts and sizes now: waiting, running, tokens, forward_passes, cache_blocks_used, ..."""
