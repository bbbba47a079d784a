"""Samples as tensors of token ids and loss masks, and what every encoder of records gives: parts, with their counts.

Shapes: S samples, T tokens of all samples together.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from launcher.config import DataConfig
from launcher.data.bad_records import SHOWN
from launcher.data.crew import Tick
from launcher.data.forms import Record
from launcher.progress import silent

log = logging.getLogger(__name__)
CHUNK = 1000  # records tokenised at once: enough to keep a fast tokenizer busy, little memory
IDS_AT_ONCE = 1 << 22
MOST_CLASSES = 1 << 22  # of a vocabulary whose tokens are counted in a table
CHARACTERS_AT_ONCE = 1 << 20  # that a tokenizer gets in one call; it takes up to 400 bytes of memory for each


@dataclass(frozen=True)
class DataReport:
    """What became of the records; tokens are counted after cutting."""

    records: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    target_tokens: int
    max_length: int
    notes: tuple[str, ...] = ()  # what a user should know of these samples, for the log

    def log(self) -> None:
        """Warn of what a user should know of these samples."""
        for note in self.notes:
            log.warning("%s", note)

    @property
    def loss_share(self) -> float:
        return self.target_tokens / max(self.tokens, 1)

    def __str__(self) -> str:
        line = f"{self.kept:,} of {self.records:,} records, {self.tokens:,} tokens, {self.loss_share:.1%} carry loss"
        if self.truncated:
            line += f"; {self.truncated:,} lost the end of their answer at {self.max_length} tokens"
        if self.dropped:
            line += f"; {self.dropped:,} dropped, their prompt alone fills {self.max_length} tokens"
        return line


@dataclass(frozen=True, eq=False)
class Encoded:
    """All samples end to end; sample i is tokens offsets[i]:offsets[i + 1]."""

    ids: Tensor  # (T,) int32
    loss: Tensor  # (T,) bool: this token is predicted and counted; never a sample's first token
    offsets: Tensor  # (S + 1,) int64
    targets: Tensor  # (S,) int64, tokens of each sample that carry loss
    report: DataReport
    known_digest: str | None = field(default=None, kw_only=True)  # of a file that was verified

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> list[int]:
        return self.offsets.diff().tolist()

    def digest(self) -> str:
        """sha256 of tokens, masks and borders: equal for equal data on every machine."""
        if self.known_digest is not None:
            return self.known_digest
        sha = hashlib.sha256()
        for tensor in (self.ids, self.loss, self.offsets):
            sha.update(little_endian(tensor.numpy()))
        return sha.hexdigest()

    def distinct_ids(self) -> Tensor:
        """The tokens that occur, ascending, int64."""
        seen = torch.zeros(0, dtype=torch.bool)
        if len(self.ids) and int(self.ids.max()) > MOST_CLASSES:  # ids with holes, which no table can count
            return self.ids.unique().long()
        for part in self.ids.split(IDS_AT_ONCE):
            here = torch.bincount(part) > 0
            short, long = sorted((seen, here), key=len)
            long[: len(short)] |= short
            seen = long
        return seen.nonzero().flatten()


def little_endian(numbers: np.ndarray) -> Any:
    """The bytes of an array, the same on every machine, without a copy if they are that already."""
    return np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("<")).view(np.uint8).data


def encoded(encoder: Encodes, records: Sequence[Record], tick: Tick = silent) -> Encoded:
    """What an encoder makes of these records, in memory. Raises its errors."""
    parts = []
    for start in range(0, len(records), CHUNK):
        parts.append(encoder.part(records[start : start + CHUNK]))
        tick(min(start + CHUNK, len(records)))
    report = encoder.report([part.tally for part in parts], len(records))
    report.log()
    lengths, targets, ids, loss = (torch.from_numpy(np.concatenate([part[i] for part in parts])) for i in (0, 1, 2, 3))
    return Encoded(
        ids=ids,
        loss=loss,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        targets=targets,
        report=report,
    )


@dataclass
class Tally:
    """Counts of some records, for the report and the log. JSON data."""

    samples: int = 0
    kept: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated: int = 0
    shortest: int | None = None  # tokens up to the first of the answer, of the samples that are dropped
    bad: list[str] = field(default_factory=list)  # the first records that the template refuses
    bad_kinds: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # what the chat template does not write
    split: int = 0  # conversations that became several samples
    last_characters: int = 0
    all_characters: int = 0
    answers: int = 0
    joined: int = 0  # answers that the tokenizer joins with their prompt
    first_joined: str = ""
    whole: int = 0  # answers of samples that were not cut
    endless: int = 0  # those that do not end in a token that stops generation
    first_endless: str = ""
    marked: int = 0  # prompts that have the marks of a template already
    first_mark: str = ""

    def add(self, later: Tally) -> None:
        """Add the counts of the records after these."""
        found = [shortest for shortest in (self.shortest, later.shortest) if shortest is not None]
        self.shortest = min(found, default=None)
        self.bad = (self.bad + later.bad)[:SHOWN]
        self.first_joined = self.first_joined or later.first_joined
        self.first_endless = self.first_endless or later.first_endless
        self.first_mark = self.first_mark or later.first_mark
        for name in ("bad_kinds", "left_out"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(later, name))))
        for name in (
            "samples", "kept", "tokens", "target_tokens", "truncated", "split", "last_characters", "all_characters",
            "answers", "joined", "whole", "endless", "marked",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(later, name))


class Part(NamedTuple):
    """The samples of some records, end to end."""

    lengths: np.ndarray  # (S,) int64
    targets: np.ndarray  # (S,) int64
    ids: np.ndarray  # (T,) int32
    loss: np.ndarray  # (T,) bool
    tally: Tally


class Encodes(Protocol):
    """Turns records into samples, part by part; the parts do not depend on each other."""

    report_type: type[DataReport]

    def __init__(self, first: Record, tokenizer: Any, config: DataConfig): ...

    @classmethod
    def key(cls, first: Record, tokenizer: Any, config: DataConfig) -> list[Any]:
        """What the tokens depend on beside the records, the tokenizer and max_length, loss_on and on_bad_record of
        config. JSON data."""
        ...

    def part(self, records: Sequence[Record]) -> Part:
        """The samples of these records."""
        ...

    def report(self, tallies: Iterable[Tally], records: int) -> DataReport:
        """The report of all parts, in order. Raises ValueError if nothing is left to learn."""
        ...


def groups(sizes: Sequence[int], most: int = CHARACTERS_AT_ONCE) -> Iterator[slice]:
    """Neighbours of at most this size together; one that is larger is alone."""
    start = total = 0
    for at, size in enumerate(sizes):
        if at > start and total + size > most:
            yield slice(start, at)
            start, total = at, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))
