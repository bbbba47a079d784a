"""From checked records to the tensors of a step: token ids and loss masks, sample order, packing, batches.

Everything after `encode` is a pure function of small numbers (seed, step, lengths), so every rank computes the same
plan without talking to the others. A "row" is what batch_size counts: one sample, or with packing several together.

Shapes: S samples, T tokens of all samples together, B rows of a micro-batch, N tokens of its longest row.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from launcher.config import DataConfig
from launcher.training.records import Record
from launcher.training.templates import frame, load_template, pieces

NO_LOSS = -100  # torch's cross_entropy and transformers leave this label out
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


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order (count,) in which an epoch visits the rows: the same on every rank, machine and device."""
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7]  # seed + epoch would repeat other seeds' epochs
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(mixed, "big")))


_recent_order = lru_cache(maxsize=2)(epoch_order)  # a batch touches one epoch, or two at a border


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> list[int]:
    """The rows of global batch `step` (0, 1, ...); batches run on over the end of an epoch, so none is short."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_recent_order(seed, place // count, count)[place % count]) for place in places]


def check_batch(batch_size: int, world_size: int) -> int:
    """Rows of one process in a global batch. Raises ValueError when the batch cannot be shared out evenly."""
    if batch_size % world_size:
        low = batch_size // world_size * world_size
        choices = f"{low} or {low + world_size}" if low else str(world_size)
        raise ValueError(
            f"--batch-size {batch_size} / {world_size} processes = {batch_size / world_size:.2f} samples each, "
            f"not a whole number: give --batch-size {choices}, or another number of processes"
        )
    return batch_size // world_size


def share(rows: Sequence[Any], rank: int, world_size: int) -> Sequence[Any]:
    """This rank's contiguous part. Lengths differ by one at most: in evaluation, where the count need not divide."""
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    return rows[rank * len(rows) // world_size : (rank + 1) * len(rows) // world_size]


def pack(lengths: Sequence[int], order: Iterable[int], max_length: int) -> list[list[int]]:
    """Rows of samples that fit max_length together, filled greedily in `order`: the fullest open row that has room.

    At most 64 rows stay open, so the work grows with the number of samples alone. Packed once per run, then whole rows
    are shuffled each epoch: so the number of rows, and with it the number of steps, is known before the first one.
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # open row -> tokens left
    for sample in map(int, order):
        length = lengths[sample]
        assert length <= max_length, f"sample {sample} has {length} tokens, a row {max_length}"
        fitting = [row for row, left in room.items() if left >= length]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
        else:
            if len(room) == 64:
                del room[min(room, key=lambda row: room[row])]
            row = len(rows)
            rows.append([])
            room[row] = max_length
        rows[row].append(sample)
        room[row] -= length
    return rows


def target_tokens(encoded: Encoded, rows: Sequence[int] | Sequence[Sequence[int]]) -> int:
    """Tokens of these samples, or packed rows, that carry loss after the causal shift.

    Every rank knows the whole plan, so each can divide its loss by the global batch's number without asking the others.
    """
    return int(encoded.targets[torch.tensor(list(_flat(rows)), dtype=torch.int64)].sum())


def collate(
    encoded: Encoded,
    rows: Sequence[int] | Sequence[Sequence[int]],
    *,
    pad_id: int,
    packing: bool = False,
    attention: Literal["sdpa", "flash"] = "sdpa",
    multiple_of: int = 1,
) -> dict[str, Any]:
    """Arguments of the model's forward for a micro-batch: of samples, or with packing of rows from `pack`.

    Unpacked: input_ids, labels, position_ids, attention_mask, all (B, N), padded on the right to a multiple_of.
    Packed for SDPA: the same with attention_mask (B, 1, N, N) bool: a token sees its own sample up to itself.
    Packed for flash: all rows flattened to (1, tokens), no padding, no mask, and the borders as cu_seq_lens_* (int32),
    max_length_* as transformers' flash attention takes them. The labels stand unshifted; the model shifts them.
    Call the model with use_cache=False: a cache would count the positions again.
    """
    # transformers' eager attention would add a bool mask to the scores (True = +1) and hide nothing.
    assert attention in ("sdpa", "flash"), f"packing has no mask for {attention} attention"
    packed: Any = rows if packing else [[sample] for sample in rows]
    if packing and attention == "flash":
        packed, multiple_of = [list(_flat(rows))], 1
    spans = [[slice(*encoded.offsets[sample : sample + 2].tolist()) for sample in row] for row in packed]
    longest = max(sum(span.stop - span.start for span in row) for row in spans)
    size = (len(spans), -(-longest // multiple_of) * multiple_of)
    input_ids = torch.full(size, pad_id)
    labels = torch.full(size, NO_LOSS)
    position_ids = torch.zeros(size, dtype=torch.int64)
    sample_of = torch.full(size, -1)  # which sample of its row a token belongs to; -1: padding
    for b, row in enumerate(spans):
        end = 0
        for number, span in enumerate(row):
            begin, end = end, end + span.stop - span.start
            input_ids[b, begin:end] = encoded.ids[span]
            labels[b, begin:end] = torch.where(encoded.loss[span], encoded.ids[span].long(), NO_LOSS)
            position_ids[b, begin:end] = torch.arange(end - begin)
            sample_of[b, begin:end] = number
    batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    if not packing:
        batch["attention_mask"] = (sample_of >= 0).long()
    elif attention == "sdpa":
        # Padding may look at earlier padding: a row of the mask with nothing in it is NaN in some kernels.
        same_sample = sample_of[:, :, None] == sample_of[:, None, :]
        batch["attention_mask"] = same_sample.tril()[:, None]
    else:
        lengths = [span.stop - span.start for span in spans[0]]
        borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        batch |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return batch


def _flat(rows: Sequence[int] | Sequence[Sequence[int]]) -> Iterable[int]:
    for row in rows:
        if isinstance(row, int):
            yield row
        else:
            yield from row
