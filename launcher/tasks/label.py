"""Sequence classification in the form of GLUE: each row has one or two columns of text, and a label.

A label is a class (a whole number or a name), or a number with a fraction to predict (regression, as in STS-B). A CSV
file holds text alone: there, labels that can all be read as numbers are numbers. The model's own head and loss are
used. A checkpoint without a head gets a new one, drawn from the seed, trained whole and saved beside the adapter
(`modules_to_save`).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor

from launcher.config import Config, DataConfig
from launcher.data import records
from launcher.data.crew import ALONE, Crew
from launcher.data.encoded import DataReport, Encoded, Part, Tally, encoded, groups
from launcher.data.files import holds_csv
from launcher.data.limits import check_length
from launcher.data.token_cache import encode_once
from launcher.tasks import label_images
from launcher.tasks.base import Batch, Layout, Sampled, Samples, Task, sampled
from launcher.tasks.classifier import Classifier
from launcher.tasks.labels import CLASSES, CLASSES_ASSUMED, Labels, head_settings, save_classes

log = logging.getLogger(__name__)
MOST = 1e300  # of a number to predict


@dataclass(frozen=True)
class LabelReport(DataReport):
    """Counts of rows and tokens."""

    classes: int = 0  # 0: numbers are predicted

    def __str__(self) -> str:
        what = f"{self.classes} classes" if self.classes else "numbers"
        line = f"{self.kept:,} rows labelled with {what}, {self.tokens:,} tokens"
        return line + (f"; {self.truncated:,} cut at {self.max_length} tokens" if self.truncated else "")


@dataclass(frozen=True, eq=False)
class Labelled(Encoded):
    """Samples as in `Encoded`, each with one label. Each sample counts as one target."""

    classes: Labels
    labels: Tensor  # (S,) int64 indices into classes, or float32 for regression
    segments: Tensor | None  # (T,) int32: first or second text, for models with token types

    def digest(self) -> str:
        return hashlib.sha256(super().digest().encode() + self.labels.numpy().tobytes()).hexdigest()


class Label(Classifier):
    """Sequence classification, or regression with one output."""

    peft_type = "SEQ_CLS"

    def wants(self, config: Config) -> bool:
        return bool(config.data.text_columns) or config.data.image_column is not None

    def variant(self, config: Config) -> Task:
        return self if config.data.image_column is None else label_images.TASK

    def check(self, config: Config, adapter: PeftConfig | None) -> None:
        if not config.data.text_columns:
            raise ValueError(
                "--task label needs what to classify: give --text-columns COLUMN for texts, --image-column COLUMN for "
                "images (of a folder, --image-column image)"
            )
        if config.data.packing or config.data.exact_match:
            raise ValueError("--text-columns asks for labels: leave --packing and --exact-match out")
        if config.run.show_samples:
            raise ValueError("--text-columns asks for labels, not for answers to show: leave --show-samples out")
        if getattr(adapter, "factors_from_gradients", False):
            raise ValueError(
                f"--method {config.adapter.method} takes gradients before training, when the new head of "
                "--text-columns is still random: choose another method"
            )

    def read(self, config: Config, tokenizer: Any, cache: Path) -> Samples:
        return self.read_together(config, tokenizer, cache, ALONE)

    def read_together(self, config: Config, tokenizer: Any, cache: Path, crew: Crew) -> Samples:
        rows, held_rows, classes = crew.comm.each("data", lambda: load_splits(config.data))
        if crew.leads:
            records.warn_of_overlap(*(map(records.as_bytes, some) for some in (rows, held_rows)))
        tokens = partial(encode_once, tokenizer=tokenizer, config=config.data, folder=cache, crew=crew)

        def labelled(rows: Sequence[records.Record]) -> Labelled:
            texts = [{"texts": row["texts"]} for row in rows]
            segments = tokens(texts, kind=SegmentEncoder) if has_segments(tokenizer) else None
            return with_labels(tokens(texts, kind=LabelEncoder), segments, rows, classes)

        return Samples(train=labelled(rows), held_out=labelled(held_rows) if held_rows else None)

    def sample(self, config: Config, tokenizer: Any, cache: Path, most: int) -> Sampled:
        rows, _, classes = load_splits(config.data)  # the head's size follows from the labels of all rows
        return sampled(rows, most, lambda some: encode(some, classes, tokenizer, config.data))

    def assumed(self, config: Config, base: Path, count: int) -> Encoded:
        plain = super().assumed(config, base, count)
        return Labelled(
            plain.ids, torch.zeros_like(plain.loss), plain.offsets, torch.ones_like(plain.targets), plain.report,
            tuple(map(str, range(CLASSES_ASSUMED))), torch.arange(count) % CLASSES_ASSUMED, segments=None,
        )  # fmt: skip

    def head(self, train: Encoded, tokenizer: Any) -> dict[str, Any]:
        assert isinstance(train, Labelled)
        return head_settings(train.classes, tokenizer.pad_token_id if tokenizer else 0)  # a plan may lack one

    def collate(self, data: Encoded, rows: Sequence[int], layout: Layout) -> Batch:
        assert isinstance(data, Labelled)
        return collate(data, rows, layout.pad_id)

    def add_files(self, samples: Samples, tokenizer: Any, folder: Path) -> None:
        super().add_files(samples, tokenizer, folder)
        assert isinstance(samples.train, Labelled)
        save_classes(samples.train.classes, folder)

    def next_steps(self, config: Config, output: Path, saved: Path) -> list[str]:
        adapted = "" if config.adapter.method == "full" else ", then peft.PeftModel.from_pretrained"
        given = "--text " + " ".join("TEXT" for _ in config.data.text_columns)
        return [
            f"Name the class of a text: loldu predict {shlex.quote(str(output))} {given}",
            f"Load it with transformers.AutoModelForSequenceClassification{adapted}; its classes are in "
            f"{saved / CLASSES}.",
        ]


TASK: Task = Label()


def load_splits(config: DataConfig) -> tuple[list[records.Record], list[records.Record], Labels]:
    """Training and held-out rows {texts, label}, and the classes of the training rows.

    Raises ValueError naming the row for a missing column, a text or label of another kind, an unlabelled row and a
    held-out label that training does not know.
    """
    load = partial(_load, columns=config.text_columns, label=config.label_column)
    train, held_out = records.load_splits(
        config.data, config.eval_data, config.eval_records, load, fewer=config.fewer_eval_records
    )
    labels = _classes(train)
    _check_labelled(held_out, numbers=not labels)
    for row in held_out:
        if (_name(row["label"]) not in labels) if labels else not isinstance(row["label"], (int, float)):
            known = ", ".join(labels) or "numbers"
            raise ValueError(f"{row['where']} has the label {row['label']!r}, the training rows have: {known}")
    return train, held_out, labels


class LabelEncoder:
    """Each row as the tokenizer joins one text or two; above max_length, the longer text loses its end."""

    report_type: type[DataReport] = LabelReport
    output = "input_ids"  # of the tokenizer

    def __init__(self, first: records.Record, tokenizer: Any, config: DataConfig):
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "this tokenizer has no padding token, which classification needs: set pad_token in its files"
            )
        self.tokenizer = copy.deepcopy(tokenizer)  # truncation changes its settings, of which the cache's key is made
        self.max_length = config.max_length

    @classmethod
    def key(cls, first: records.Record, tokenizer: Any, config: DataConfig) -> list[Any]:
        return [f"{cls.__module__}.{cls.__qualname__}", tokenizer.truncation_side]

    def part(self, rows: Sequence[records.Record]) -> Part:
        made: list[list[int]] = []
        cut = 0
        for group in groups([sum(map(len, row["texts"])) for row in rows]):
            texts = [list(column) for column in zip(*(row["texts"] for row in rows[group]), strict=True)]
            found = self.tokenizer(*texts, verbose=False)
            longer = sum(len(ids) > self.max_length for ids in found["input_ids"])
            if longer:
                found = self.tokenizer(*texts, truncation=True, max_length=self.max_length, verbose=False)
            made, cut = made + found[self.output], cut + longer
        lengths = np.array([len(ids) for ids in made], dtype=np.int64)
        ids = np.fromiter(itertools.chain.from_iterable(made), dtype=np.int32, count=int(lengths.sum()))
        tally = Tally(samples=len(rows), kept=len(rows), tokens=len(ids), target_tokens=len(rows), truncated=cut)
        return Part(lengths, np.ones_like(lengths), ids, np.zeros(len(ids), dtype=np.bool_), tally)

    def report(self, tallies: Iterable[Tally], count: int) -> DataReport:
        total = Tally()
        for tally in tallies:
            total.add(tally)
        return LabelReport(count, count, total.truncated, 0, total.tokens, count, self.max_length)


class SegmentEncoder(LabelEncoder):
    """Of each token, in place of its id: whether it belongs to the first or the second text."""

    output = "token_type_ids"


def has_segments(tokenizer: Any) -> bool:
    """Whether the model is told which text a token belongs to."""
    return "token_type_ids" in tokenizer.model_input_names


def encode(rows: Sequence[records.Record], labels: Labels, tokenizer: Any, config: DataConfig) -> Labelled:
    """Tokenise and label the rows, all in memory."""
    kinds = (LabelEncoder, SegmentEncoder) if has_segments(tokenizer) else (LabelEncoder,)
    tokens, *segments = (encoded(kind(rows[0], tokenizer, config), rows) for kind in kinds)
    return with_labels(tokens, segments[0] if segments else None, rows, labels)


def with_labels(tokens: Encoded, segments: Encoded | None, rows: Sequence[records.Record], labels: Labels) -> Labelled:
    """The rows' tokens with their labels."""
    if labels:
        places = {name: place for place, name in enumerate(labels)}
        answers = torch.tensor([places[_name(row["label"])] for row in rows])
    else:
        answers = torch.tensor([float(row["label"]) for row in rows])
    assert isinstance(tokens.report, LabelReport)
    return Labelled(
        ids=tokens.ids, loss=tokens.loss, offsets=tokens.offsets, targets=tokens.targets,
        report=replace(tokens.report, classes=len(labels)), known_digest=tokens.known_digest, classes=labels,
        labels=answers, segments=None if segments is None else segments.ids,
    )  # fmt: skip


def collate(data: Labelled, rows: Sequence[int], pad_id: int) -> dict[str, Tensor]:
    """Arguments of the model's forward: input_ids, attention_mask (B, N) padded on the right, labels (B,)."""
    spans = [slice(*data.offsets[row : row + 2].tolist()) for row in rows]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = [data.ids[span].long() for span in spans]
    batch = {
        "input_ids": pad(ids, padding_value=pad_id),
        "attention_mask": pad([torch.ones_like(part) for part in ids]),
        "labels": data.labels[torch.tensor(rows)],
    }
    if data.segments is not None:
        batch["token_type_ids"] = pad([data.segments[span].long() for span in spans])
    return batch


def _load(source: str, *, option: str = "--data", columns: Sequence[str], label: str) -> list[records.Record]:
    rows = records.load_rows(source, option)
    if not rows:
        raise ValueError(f"{option} {source} holds no rows")
    found = []
    numbers = _numbers_in_text([row.get(label) if isinstance(row, dict) else None for row in rows], source, option)
    for index, row in enumerate(rows):
        where = f"record {index} of {source}"
        if not isinstance(row, dict):
            raise ValueError(
                f"{where} is a {type(row).__name__}, expected an object with {', '.join(columns)}, {label}"
            )
        texts = [check_length(records.text_of(row, column, where), f"{where}: its {column!r}") for column in columns]
        value = row.get(label) if numbers is None else numbers[index]
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            there = f"the {type(value).__name__} {value!r:.40}" if label in row else f"its columns: {', '.join(row)}"
            raise ValueError(f"{where}: {label!r} is a class (whole number or name) or a number, got {there}")
        if not isinstance(value, str) and not -MOST < value < MOST:
            raise ValueError(f"{where} has the label {value!r:.40}, no number to learn: leave the record out")
        if not any(text.strip() for text in texts):
            raise ValueError(f"{where} has no text in {' or '.join(map(repr, columns))}: leave the record out")
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{where} has an empty {label!r}: give it a label, or leave the record out")
        found.append({"texts": texts, "label": value, "where": where})
    return found


def _numbers_in_text(labels: Sequence[Any], source: str, option: str) -> list[float] | None:
    """The labels of a CSV file as numbers, if all can be read as such; None if labels are used unchanged.

    Raises ValueError if numbers with a fraction are mixed with other text, or in quotes in a file that has types: each
    would become a separate class.
    """
    if not labels or not all(isinstance(label, str) for label in labels):
        return None
    read = [_number(label) for label in labels]
    fractions = [label for label, number in zip(labels, read, strict=True) if isinstance(number, float)]
    numbers = [number for number in read if number is not None]
    csv = holds_csv(source)
    if len(numbers) == len(labels) and csv:
        return [float(number) for number in numbers] if fractions else numbers
    if not fractions or 2 * len(numbers) < len(labels):
        return None
    if len(numbers) == len(labels):
        raise ValueError(f"{option} {source} has numbers as text ({fractions[0]!r}) for labels: write them unquoted")
    odd = read.index(None)
    raise ValueError(
        f"{option} {source} has numbers for labels ({fractions[0]}, ...), but record {odd} has {labels[odd]!r}: give "
        "it a number, or leave the record out"
    )


def _number(text: str) -> int | float | None:
    """What a text can be read as: a whole number, a number with a fraction, or neither (NaN and infinity too)."""
    if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _classes(rows: Sequence[records.Record]) -> Labels:
    kinds = {type(row["label"]) for row in rows}
    numbers = kinds in ({float}, {float, int})
    _check_labelled(rows, numbers=numbers)
    if numbers:
        if all(float(row["label"]).is_integer() and row["label"] >= 0 for row in rows):
            log.warning(
                "all labels are whole numbers written with a fraction (%s, ...), so numbers are predicted: for classes "
                "write them without (%d, ...)",
                float(rows[0]["label"]), int(rows[0]["label"]),
            )  # fmt: skip
        return ()
    if len(kinds) > 1:
        first = type(rows[0]["label"])
        other = next(row for row in rows if type(row["label"]) is not first)
        raise ValueError(f"{other['where']} has the label {other['label']!r}, record 0 has {rows[0]['label']!r}")
    values = sorted({row["label"] for row in rows})
    blank = [name for name in values if isinstance(name, str) and name.strip() != name and name.strip() in values]
    if blank:
        raise ValueError(
            f"the training rows have the labels {blank[0]!r} and {blank[0].strip()!r}, which would be two classes: "
            "take the blanks out of them"
        )
    if len(values) < 2:
        raise ValueError(f"all {len(rows)} training rows have the label {values[0]!r}: give data with at least two")
    if kinds == {int} and values != list(range(len(values))):
        raise ValueError(
            f"classes are numbered from 0 without gaps, the training rows have {values[:20]}: number them so, or give "
            "them names"
        )
    return tuple(map(_name, values))


def _check_labelled(rows: Sequence[records.Record], *, numbers: bool) -> None:
    """Raises ValueError for negative classes, and for numbers that are all -1, which marks test splits."""
    negative = [row for row in rows if isinstance(row["label"], (int, float)) and row["label"] < 0]
    if negative and (not numbers or all(row["label"] == -1 for row in rows)):
        row = negative[0]
        raise ValueError(
            f"{row['where']} has the label {row['label']}: it is unlabelled, as test splits are; give another split "
            f"(classes are whole numbers from 0; numbers to predict have a fraction, as {float(row['label'])} has)"
        )


def _name(label: Any) -> str:
    return str(label)
