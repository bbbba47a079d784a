"""The order of samples, packing and the batches of a step: pure functions of small numbers, the same on every rank.

A "row" is what batch_size counts: one sample, or with packing several together.
Shapes: B rows of a micro-batch, N tokens of its longest row.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from launcher.data.encoded import Encoded

PackedAs = Literal["sdpa", "eager", "positions", "flash", "varlen", "joined"]  # how the rows of a batch are laid out
FLAT = ("flash", "varlen")  # packed rows of a micro-batch in one row, without padding
NO_LOSS = -100  # torch's cross_entropy and transformers leave this label out


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


def row_lengths(encoded: Encoded, rows: Sequence[int] | Sequence[Sequence[int]]) -> list[int]:
    """Tokens of each row, prompts included, padding not."""
    samples = [[row] if isinstance(row, int) else list(row) for row in rows]
    starts = torch.tensor([sample for row in samples for sample in row])
    lengths = iter((encoded.offsets[starts + 1] - encoded.offsets[starts]).tolist())
    return [sum(next(lengths) for _ in row) for row in samples]


def target_tokens(encoded: Encoded, rows: Sequence[int] | Sequence[Sequence[int]]) -> int:
    """Tokens of these samples, or packed rows, that carry loss after the causal shift.

    Every rank knows the whole plan, so each can divide its loss by the global batch's number without communication.
    """
    return int(encoded.targets[torch.tensor(list(_flat(rows)), dtype=torch.int64)].sum())


def collate(
    encoded: Encoded,
    rows: Sequence[int] | Sequence[Sequence[int]],
    *,
    pad_id: int,
    packing: bool = False,
    attention: PackedAs = "sdpa",
    windows: Mapping[str, int | None] | None = None,
    padding_mask: bool = True,
    multiple_of: int = 1,
) -> dict[str, Any]:
    """Arguments of the model's forward for a micro-batch: of samples, or with packing of rows from `pack`.

    Unpacked: input_ids, labels, position_ids, attention_mask, all (B, N), padded on the right to a multiple_of.
    Without padding_mask: no attention_mask, and padding counts on as a position: no token before it sees it.
    Packed for SDPA: the same with attention_mask (B, 1, N, N) bool: a token sees its own sample up to itself.
    Packed for eager: that mask as float32 numbers to add to the scores: 0 or the lowest of bfloat16.
    Packed with windows: such a mask for each type of layer, by name, which hides what is a window or more tokens back.
    Packed as positions: no mask; models that build their own see a border where position_ids start again.
    Packed for flash: all rows flattened to (1, tokens), no padding, no mask, and the borders as cu_seq_lens_* (int32),
    max_length_* as transformers' flash attention takes them.
    Packed for varlen: the same, and a mask (1, 1, 1, 1) instead of an unused one that transformers would make.
    The labels are unshifted; the model shifts them.
    Call the model with use_cache=False: a cache would count the positions again.
    """
    packed: Any = rows if packing else [[sample] for sample in rows]
    if packing and attention in FLAT:
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
    if not packing and not padding_mask:
        batch["position_ids"] = torch.arange(size[1]).expand(size).contiguous()
    elif not packing:
        batch["attention_mask"] = (sample_of >= 0).long()
    elif attention in ("sdpa", "eager"):
        # Padding may look at earlier padding: a row of the mask with nothing in it is NaN in some kernels.
        same_sample = sample_of[:, :, None] == sample_of[:, None, :]
        seen = same_sample.tril()[:, None]
        back = torch.arange(size[1])[:, None] - torch.arange(size[1])
        masks = {name: seen & (back < (window or size[1])) for name, window in (windows or {"": None}).items()}
        if attention == "eager":  # which adds the mask to the scores: a bool one (True = +1) would hide nothing
            masks = {name: torch.where(mask, 0.0, torch.finfo(torch.bfloat16).min) for name, mask in masks.items()}
        batch["attention_mask"] = masks if windows else masks[""]
    elif attention in FLAT:
        lengths = [span.stop - span.start for span in spans[0]]
        borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        batch |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        if attention == "varlen":
            batch["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return batch


def _flat(rows: Sequence[int] | Sequence[Sequence[int]]) -> Iterable[int]:
    for row in rows:
        if isinstance(row, int):
            yield row
        else:
            yield from row
