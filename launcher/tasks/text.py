"""Plain text: the model learns to predict every token (continued pretraining). Selected by --task text.

Each text is enclosed by the tokenizer's start and end tokens, unless it has them itself. A text of more than
--max-length tokens becomes several samples, each beginning with the last token of the one before: every token is
predicted exactly once. To limit memory, a very long text is tokenised in parts, with a warning, because tokens where
two parts meet may differ.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig

from launcher.config import Config, DataConfig
from launcher.data import records
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.crew import ALONE, Crew
from launcher.data.encoded import CHARACTERS_AT_ONCE, DataReport, Encoded, Encodes, Part, Tally, encoded, groups
from launcher.data.files import each_row
from launcher.data.stored import store_splits, stored_splits
from launcher.data.templates import Template, lacking
from launcher.data.token_cache import encode_once, encoded_before
from launcher.tasks.base import NextToken, Sampled, Samples, Task, sampled
from launcher.tasks.evaluation import Evaluation

CHARACTERS = 2_000_000  # at most these are tokenised for a plan


class TextReport(DataReport):
    """Counts of texts and tokens."""

    def __str__(self) -> str:
        samples = f"{self.kept:,} samples of at most {self.max_length} tokens"
        return f"{self.records:,} texts, {samples}, {self.tokens:,} tokens, {self.loss_share:.1%} carry loss"


class TextEncoder:
    """All tokens of texts; a sample's first token carries no loss."""

    report_type: type[DataReport] = TextReport

    def __init__(self, first: records.Record, tokenizer: Any, config: DataConfig):
        self.tokenizer, self.max_length = tokenizer, config.max_length
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.head, self.tail = ([] if token is None else [token] for token in ends)

    @classmethod
    def key(cls, first: records.Record, tokenizer: Any, config: DataConfig) -> list[Any]:
        return [
            f"{cls.__module__}.{cls.__qualname__}",
            CHARACTERS_AT_ONCE,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        ]

    def part(self, rows: Sequence[records.Record]) -> Part:
        ids, counts, loss = array("i"), array("q"), bytearray()
        texts, split = [row["text"] for row in rows], sum(len(row["text"]) > CHARACTERS_AT_ONCE for row in rows)
        for tokens in itertools.chain.from_iterable(
            self._tokens(texts[group]) for group in groups(list(map(len, texts)))
        ):
            head, tail = lacking(tokens, self.head, self.tail)
            whole = array("i", head) + tokens + array("i", tail)
            for at in range(0, max(len(whole) - 1, 0), self.max_length - 1):
                part = whole[at : at + self.max_length]
                ids.extend(part)
                counts.append(len(part))
                loss += b"\0" + b"\1" * (len(part) - 1)
        lengths = np.array(counts, dtype=np.int64)
        tally = Tally(
            samples=len(rows), kept=len(lengths), tokens=len(ids), target_tokens=len(ids) - len(lengths), split=split
        )
        masks = np.frombuffer(loss, dtype=np.bool_)
        return Part(lengths, lengths - 1, np.array(ids, dtype=np.int32), masks, tally)

    def _tokens(self, texts: list[str]) -> Iterator[array]:
        """The tokens of some short texts, or of one that may be long, which is tokenised in parts."""
        if len(texts) > 1:
            found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            yield from (array("i", ids) for ids in found)
            return
        whole = array("i")
        for text in parts_of(texts[0]):
            whole.extend(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        yield whole

    def report(self, tallies: Iterable[Tally], count: int) -> DataReport:
        total = Tally()
        for tally in tallies:
            total.add(tally)
        if not total.kept:
            raise ValueError("every text is a single token, which leaves none to predict: give longer texts")
        note = (
            f"{total.split:,} of {count:,} texts are longer than {CHARACTERS_AT_ONCE:,} characters and tokenised in "
            "parts that end at a line break or a blank: a token there may differ from those of the whole text"
        )
        return TextReport(
            count, total.kept, 0, 0, total.tokens, total.target_tokens, self.max_length, (note,) if total.split else ()
        )


class Text(NextToken):
    """Next-token prediction of all tokens."""

    encoder: type[Encodes] = TextEncoder

    def check(self, config: Config, adapter: PeftConfig | None) -> None:
        data = config.data
        if data.exact_match or config.run.show_samples:
            raise ValueError("--task text has no questions: leave --exact-match and --show-samples out")
        column_of(data.columns)

    def read(self, config: Config, tokenizer: Any, cache: Path) -> Samples:
        return self.read_together(config, tokenizer, cache, ALONE)

    def read_together(self, config: Config, tokenizer: Any, cache: Path, crew: Crew) -> Samples:
        data = config.data
        each = partial(each_text, column=column_of(data.columns), on_bad_record=data.on_bad_record)
        with crew.folder(cache) as work:
            crew.work("reading", 0, lambda tick: store_splits(data, work, tick, each) if crew.leads else None)
            train, held_out = crew.comm.each("data", lambda: stored_splits(work))
            tokens = partial(encode_once, tokenizer=tokenizer, config=data, folder=cache, crew=crew, kind=self.encoder)
            return Samples(train=tokens(train), held_out=tokens(held_out) if held_out else None)

    def splits(self, data: DataConfig) -> tuple[list[records.Record], list[records.Record]]:
        load = partial(load_texts, column=column_of(data.columns), on_bad_record=data.on_bad_record)
        return records.load_splits(data.data, data.eval_data, data.eval_records, load, fewer=data.fewer_eval_records)

    def encode(
        self, rows: Sequence[records.Record], tokenizer: Any, data: DataConfig, template: Template | None = None
    ) -> Encoded:
        return encoded(self.encoder(rows[0], tokenizer, data), rows)

    def sample(self, config: Config, tokenizer: Any, cache: Path, most: int) -> Sampled:
        train, _ = self.splits(config.data)
        before = encoded_before(train, tokenizer, config.data, cache, self.encoder)
        if before is None and sum(len(row["text"]) for row in train[:most]) > CHARACTERS:
            return self._sample_of_long(train, tokenizer, config.data)
        return sampled(train, most, lambda some: self.encode(some, tokenizer, config.data), before)

    def assumed(self, config: Config, base: Path, count: int) -> Encoded:
        plain = super().assumed(config, base, count)
        loss = torch.arange(len(plain.ids)) % config.data.max_length > 0
        return replace(plain, loss=loss, targets=plain.offsets.diff() - 1)

    def _sample_of_long(self, rows: Sequence[records.Record], tokenizer: Any, data: DataConfig) -> Sampled:
        """The samples of the first CHARACTERS: a .txt file is one text, however long."""
        some: list[records.Record] = []
        left = CHARACTERS
        for row in rows:
            some.append({"text": row["text"][:left]})
            left -= len(some[-1]["text"])
            if not left:
                break
        samples = self.encode(some, tokenizer, data)
        every = sum(len(row["text"]) for row in rows)
        how = f"the first {CHARACTERS:,} of {every:,} characters, tokenised now"
        return Sampled(samples, round(len(samples) * every / CHARACTERS), how)

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        result = super().evaluate(evaluation)
        return result | {"perplexity": math.exp(min(result["eval_loss"], 700.0))}  # e^710 exceeds float64


TASK: Task = Text()


def parts_of(text: str, most: int = CHARACTERS_AT_ONCE) -> Iterator[str]:
    """The text in parts of at most this many characters, which end at a line break, else a blank, else anywhere."""
    start = 0
    while len(text) - start > most:
        cut = next((at + 1 for mark in "\n " if (at := text.rfind(mark, start, start + most)) >= start), start + most)
        yield text[start:cut]
        start = cut
    yield text[start:]


def column_of(columns: tuple[str, ...]) -> str:
    """The column of the texts, from `--columns text=COLUMN`. Raises ValueError for other names."""
    name, _, column = (columns or ("text=text",))[0].partition("=")
    if len(columns) > 1 or name != "text" or not column:
        raise ValueError(f"--task text reads one column, --columns text=COLUMN; got --columns {' '.join(columns)}")
    return column


def load_texts(source: str, **how: Any) -> list[records.Record]:
    """What `each_text` reads, in memory."""
    return list(each_text(source, **how))


def each_text(
    source: str, *, option: str = "--data", column: str = "text", on_bad_record: Any = "error"
) -> Iterator[records.Record]:
    """The rows of a source as {text}. Raises ValueError for rows without a text in this column, or with skip warns."""
    bad, count = BadRecords(on_bad_record), 0
    for index, row in enumerate(each_row(source, option)):
        count += 1
        where = f"record {index} of {source}"
        try:
            if not isinstance(row, dict):
                raise BadRecord("no object", f"{where} is a {type(row).__name__}, expected an object with {column!r}")
            if column not in row:
                raise BadRecord(
                    f"no {column!r}",
                    f"{where} has no {column!r} (its columns: {', '.join(map(str, row))}): give --columns text=COLUMN",
                )
            text = records.text_of(row, column, where)
            if not text.strip():
                raise BadRecord("an empty text", f"{where}: {column!r} is empty")
            yield {"text": text}
        except BadRecord as error:
            bad.add(error)
    if not count:
        raise ValueError(f"{option} {source} holds no rows; expected rows with {column!r}, or a .txt file")
    records.warn(bad.tell(f"{option} {source}", count))
