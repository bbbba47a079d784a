"""Sequence classification in the form of GLUE: each row has one or two columns of text, and a label.

A label is a class, or a number to predict (regression, as in STS-B); label_rows.py reads them. The model's own head and
loss are used. A checkpoint without a head gets a new one, drawn from the seed, trained whole and saved beside the
adapter (`modules_to_save`).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
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
from launcher.data.token_cache import encode_once
from launcher.models.own_head import in_rows_order
from launcher.tasks import label_images
from launcher.tasks.base import Batch, Layout, Sampled, Samples, Task, sampled
from launcher.tasks.classifier import Classifier
from launcher.tasks.label_rows import label_name, load_splits
from launcher.tasks.labels import CLASSES, CLASSES_ASSUMED, Labels, head_settings, save_classes


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
        classes = in_rows_order(classes, config.model.model)
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
        answers = torch.tensor([places[label_name(row["label"])] for row in rows])
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
