"""Scores with standard errors. Plain arithmetic over what each sample gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Score = dict[str, float]  # value, stderr, n


def mean(values: Sequence[float]) -> Score:
    """The mean, and its standard error from the sample's variance (n - 1), as lm-evaluation-harness computes it."""
    n = len(values)
    middle = sum(values) / n
    spread = sum((value - middle) ** 2 for value in values)
    return {"value": middle, "stderr": math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan, "n": n}


def ratio(parts: Sequence[tuple[float, float]]) -> Score:
    """Sum of the first / sum of the second numbers (loss per token), and its standard error over the samples."""
    n, below = len(parts), sum(part[1] for part in parts)
    value = sum(part[0] for part in parts) / below
    spread = sum((a - value * b) ** 2 for a, b in parts)
    return {"value": value, "stderr": math.sqrt(spread * n / (n - 1)) / below if n > 1 else math.nan, "n": n}


def plain(value: Any) -> Any:
    """JSON data: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
