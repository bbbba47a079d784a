"""What a tokenizer's file may make of a text: how much longer its normalizer makes it, and how large its ids are.

It comes with the model, and runs before any other limit counts. Known tokenizers write a mark before a text and one
character for another; the accelerated library runs them without a limit that could be set, so a normalizer that
multiplies a text is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MOST_TIMES, MOST_BEFORE = 16.0, 256  # the length of a text, and characters before it
MOST_ID = 1 << 24  # the library lists all numbers up to the largest id when it writes its settings


class TooMuch(ValueError):
    """A tokenizer that multiplies texts, or numbers its tokens as no embedding does."""


def check_normalizer(tokenizer: Any, folder: Path) -> None:
    """Raises TooMuch if a text can become more than MOST_TIMES as long, or get more than MOST_BEFORE in front."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return
    times, before = growth(json.loads(normalizer.__getstate__()))
    if times > MOST_TIMES or before > MOST_BEFORE:
        what = f"{before:,.0f} characters before each text" if before > MOST_BEFORE else f"{times:,.0f} of a character"
        raise TooMuch(
            f"{folder / 'tokenizer.json'}: its normalizer can make {what}, where tokenizers need at most "
            f"{MOST_BEFORE if before > MOST_BEFORE else MOST_TIMES:,.0f}: get the model from a source you trust"
        )


def check_largest_id(tokenizer: Any, folder: Path) -> None:
    """Raises TooMuch for an id above MOST_ID."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    ids = {} if backend is None else backend.get_vocab()
    if (largest := max(ids.values(), default=0)) > MOST_ID:
        raise TooMuch(
            f"{folder / 'tokenizer.json'}: a token has the id {largest:,}, although there are {len(ids):,} tokens: get "
            "the model from a source you trust"
        )


def growth(part: Any) -> tuple[float, float]:
    """How many times as long a text can become, and how many characters it gets in front, from a normalizer's JSON."""
    if part["type"] == "Sequence":
        times, before = 1.0, 0.0
        for each in part["normalizers"]:
            by, more = growth(each)
            times, before = times * by, before * by + more
        return times, before
    if part["type"] == "Prepend":
        return 1.0, float(len(part["prepend"]))
    if part["type"] != "Replace":
        return 1.0, 0.0
    written, (kind, pattern) = len(part["content"]), next(iter(part["pattern"].items()))
    if _matches_nothing(pattern) if kind == "Regex" else not pattern:  # it is written between all characters
        return 1.0 + written, float(written)
    return max(1.0, written / (1 if kind == "Regex" else len(pattern))), 0.0


def _matches_nothing(pattern: str) -> bool:
    """Whether a regular expression matches an empty place, as far as Python's dialect has it."""
    try:
        return any(not match.group() for match in re.compile(pattern).finditer("a b"))
    except re.error:
        return False
