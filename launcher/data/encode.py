"""From checked records to the tensors of a step: token ids and loss masks, sample order, packing, batches.

Everything after `encode` is a pure function of small numbers (seed, step, lengths), so every rank computes the same
plan without talking to the others. A "row" is what batch_size counts: one sample, or with packing several together.

Shapes: S samples, T tokens of all samples together, B rows of a micro-batch, N tokens of its longest row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launcher.config import DataConfig
from launcher.data.records import Record
from launcher.data.templates import frame, load_template, pieces

CHUNK = 1000  # records tokenised at once: enough to keep a fast tokenizer busy, little memory


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

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> list[int]:
        return self.offsets.diff().tolist()

    def digest(self) -> str:
        """sha256 of tokens, masks and borders: equal for equal data on every machine."""
        sha = hashlib.sha256()
        for tensor in (self.ids, self.loss, self.offsets):
            sha.update(tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<"), copy=False).tobytes())
        return sha.hexdigest()


def encode(records: Sequence[Record], tokenizer: Any, config: DataConfig) -> Encoded:
    """Tokenise bos + prompt + answer + eos (a chat template writes its own marks).

    Prompt and answer are tokenised apart: the border of the loss is exact, and generation starts from the same ids.
    A sample over max_length loses the end of its answer; one with no token of an answer left is dropped. Both are
    counted. Raises ValueError when nothing is left to learn.
    """
    assert records
    template = load_template(config.prompt_template, tokenizer, conversations="messages" in records[0])
    head, tail = frame(template, tokenizer)
    ids, loss, offsets, targets = array("i"), bytearray(), [0], []
    truncated, shortest = 0, None
    for start in range(0, len(records), CHUNK):
        samples = [pieces(record, template, tokenizer) for record in records[start : start + CHUNK]]
        texts = [text for sample in samples for text, _ in sample]
        tokens = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        for number, sample in enumerate(samples, start):
            sample_ids, answers = list(head), [False] * len(head)
            for _, is_answer in sample:
                piece = next(tokens)
                sample_ids += piece
                answers += [is_answer] * len(piece)
            sample_ids += tail
            answers += [True] * len(tail)
            answers[0] = False  # nothing stands before the first token to predict it from
            if True not in answers:
                raise ValueError(
                    f"sample {number} has no token of an answer, although its text has one: "
                    "look at the {% generation %} blocks of the chat template"
                )
            needed = answers.index(True) + 1
            if needed > config.max_length:
                shortest = min(needed, shortest or needed)
                continue
            truncated += len(sample_ids) > config.max_length
            del sample_ids[config.max_length :], answers[config.max_length :]
            if config.loss_on == "all":
                answers = [False] + [True] * (len(answers) - 1)
            ids.extend(sample_ids)
            loss.extend(answers)
            offsets.append(len(ids))
            targets.append(sum(answers))
    if not targets:
        raise ValueError(
            f"no sample is left: the prompt alone of all {len(records)} records fills --max-length {config.max_length}"
            f"; the shortest needs --max-length {shortest} for the first token of its answer"
        )
    dropped = len(records) - len(targets)
    report = DataReport(len(records), len(targets), truncated, dropped, len(ids), sum(targets), config.max_length)
    return Encoded(
        ids=torch.from_numpy(np.frombuffer(ids, dtype=np.int32)),
        loss=torch.from_numpy(np.frombuffer(loss, dtype=np.bool_)),
        offsets=torch.tensor(offsets),
        targets=torch.tensor(targets),
        report=report,
    )
