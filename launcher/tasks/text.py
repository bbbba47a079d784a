"""Plain text: the model learns to predict every token (continued pretraining). Selected by --task text.

Each text is enclosed by the tokenizer's start and end tokens. A text of more than --max-length tokens becomes several
samples, each beginning with the last token of the one before: every token is predicted exactly once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig

from launcher.config import Config, DataConfig
from launcher.data import records
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.encode import DataReport, Encoded
from launcher.data.templates import Template
from launcher.tasks.base import NextToken, Samples, Task
from launcher.tasks.evaluation import Evaluation

CHUNK = 1000  # texts tokenised at once


class Text(NextToken):
    """Next-token prediction of all tokens."""

    def check(self, config: Config, adapter: PeftConfig | None) -> None:
        data = config.data
        if data.exact_match or config.run.show_samples:
            raise ValueError("--task text has no questions: leave --exact-match and --show-samples out")
        column_of(data.columns)

    def read(self, config: Config, tokenizer: Any, cache: Path) -> Samples:
        train, held_out = self.splits(config.data)
        tokenise = partial(self.encode, tokenizer=tokenizer, data=config.data)
        return Samples(train=tokenise(train), held_out=tokenise(held_out) if held_out else None)

    def splits(self, data: DataConfig) -> tuple[list[records.Record], list[records.Record]]:
        load = partial(load_texts, column=column_of(data.columns), on_bad_record=data.on_bad_record)
        return records.load_splits(data.data, data.eval_data, data.eval_records, load, fewer=data.fewer_eval_records)

    def encode(
        self, rows: Sequence[records.Record], tokenizer: Any, data: DataConfig, template: Template | None = None
    ) -> Encoded:
        return encode(rows, tokenizer, data.max_length)

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        result = super().evaluate(evaluation)
        return result | {"perplexity": math.exp(min(result["eval_loss"], 700.0))}  # e^710 exceeds float64


TASK: Task = Text()


def column_of(columns: tuple[str, ...]) -> str:
    """The column of the texts, from `--columns text=COLUMN`. Raises ValueError for other names."""
    name, _, column = (columns or ("text=text",))[0].partition("=")
    if len(columns) > 1 or name != "text" or not column:
        raise ValueError(f"--task text reads one column, --columns text=COLUMN; got --columns {' '.join(columns)}")
    return column


def load_texts(
    source: str, *, option: str = "--data", column: str = "text", on_bad_record: Any = "error"
) -> list[records.Record]:
    """The rows of a source as {text}. Raises ValueError for rows without a text in this column, or with skip warns."""
    rows, bad, found = records.load_rows(source, option), BadRecords(on_bad_record), []
    if not rows:
        raise ValueError(f"{option} {source} holds no rows; expected rows with {column!r}, or a .txt file")
    for index, row in enumerate(rows):
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
            found.append({"text": text})
        except BadRecord as error:
            bad.add(error)
    records.warn(bad.tell(f"{option} {source}", len(rows)))
    return found


def encode(rows: Sequence[records.Record], tokenizer: Any, max_length: int) -> Encoded:
    """All samples end to end, each of at most max_length tokens; a sample's first token carries no loss."""
    frame = [[token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    head, tail = ([] if part == [None] else part for part in frame)
    ids, lengths = array("i"), array("q")
    for start in range(0, len(rows), CHUNK):
        texts = [row["text"] for row in rows[start : start + CHUNK]]
        for tokens in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            whole = head + tokens + tail
            for at in range(0, max(len(whole) - 1, 0), max_length - 1):
                part = whole[at : at + max_length]
                ids.extend(part)
                lengths.append(len(part))
    if not lengths:
        raise ValueError("every text is a single token, which leaves none to predict: give longer texts")
    counts = torch.tensor(lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    loss = torch.ones(len(ids), dtype=torch.bool)
    loss[offsets[:-1]] = False
    report = TextReport(len(rows), len(lengths), 0, 0, len(ids), int(loss.sum()), max_length)
    return Encoded(
        ids=torch.from_numpy(np.frombuffer(ids, dtype=np.int32)),
        loss=loss,
        offsets=offsets,
        targets=counts - 1,
        report=report,
    )


class TextReport(DataReport):
    """Counts of texts and tokens."""

    def __str__(self) -> str:
        samples = f"{self.kept:,} samples of at most {self.max_length} tokens"
        return f"{self.records:,} texts, {samples}, {self.tokens:,} tokens, {self.loss_share:.1%} carry loss"
