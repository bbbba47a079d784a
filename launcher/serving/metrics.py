"""Counts of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
COUNTERS = {"tokens", "forward_passes", "tokens_read"}  # of the engine: they only grow
Labels = tuple[tuple[str, str], ...]


@dataclass
class Histogram:
    """How many values are at or below each limit."""

    limits: tuple[float, ...] = SECONDS
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[next((i for i, limit in enumerate(self.limits) if value <= limit), len(self.limits))] += 1
        self.total += value


@dataclass
class Metrics:
    """What the HTTP side counts; the engine adds its own numbers."""

    responses: Counter[Labels] = field(default_factory=Counter)  # by path and status
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    duration: Histogram = field(default_factory=Histogram)

    def answered(self, path: str, status: int) -> None:
        self.responses[("path", path), ("status", str(status))] += 1

    def text(self, now: Mapping[str, float], engine: Mapping[str, float]) -> str:
        """The page of /metrics. now: gauges of the HTTP side; engine: the engine's stats."""
        lines = [*_head("loldu_http_responses_total", "counter", "Responses by path and status; 499: the client left.")]
        lines += [f"loldu_http_responses_total{_braces(labels)} {n}" for labels, n in sorted(self.responses.items())]
        for name, value in (("prompt", self.prompt_tokens), ("completion", self.completion_tokens)):
            lines += _head(f"loldu_{name}_tokens_total", "counter", f"Tokens of {name}s.")
            lines.append(f"loldu_{name}_tokens_total {value}")
        for name, help, values in (
            ("loldu_first_token_seconds", "From a request to its first token.", self.first_token),
            ("loldu_answer_seconds", "From a request to the end of its answer.", self.duration),
        ):
            lines += _histogram(name, help, values)
        for begin, about, numbers in (
            ("loldu", "Now, as the HTTP server counts.", now),
            ("loldu_engine", "As the engine counts.", engine),
        ):
            for name, number in numbers.items():
                kind = "counter" if begin == "loldu_engine" and name in COUNTERS else "gauge"
                lines += [*_head(f"{begin}_{name}", kind, about), f"{begin}_{name} {float(number):.15g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, help: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _braces(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}"


def _histogram(name: str, help: str, values: Histogram) -> Iterator[str]:
    yield from _head(name, "histogram", help)
    below = 0
    for limit, count in zip((*values.limits, float("inf")), values.counts, strict=True):
        below += count
        yield f'{name}_bucket{{le="{"+Inf" if limit == float("inf") else f"{limit:g}"}"}} {below}'
    yield f"{name}_sum {values.total:.6f}"
    yield f"{name}_count {below}"
