"""Samples of a micro-batch in one row, without padding, the beginning that they share only once.

A chat template's system prompt, or the fixed words before an instruction, are the same tokens in every sample. No
token sees later ones, so what a model computes for them is the same as well: once is enough.

Shapes: B samples, N tokens of the longest, T tokens in the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from launcher.data.batches import NO_LOSS
from launcher.data.encoded import Encoded


def join(encoded: Encoded, rows: Sequence[int]) -> dict[str, Any]:
    """Arguments of the model's forward: input_ids, labels, position_ids (1, T), a mask (1, 1, 1, 1) which stands in for
    one that transformers would make, and `samples`, which `launcher.models.joined` reads:

    rows (B, N): the place in T of each sample's tokens, shared ones first, padding included; places (T,): where each
    token of the row is in the flat (B, N).
    """
    spans = [slice(*encoded.offsets[row : row + 2].tolist()) for row in rows]
    shared = shared_beginning([encoded.ids[span] for span in spans], [encoded.loss[span] for span in spans])
    first = slice(spans[0].start, spans[0].start + shared)
    parts = [first, *(slice(span.start + shared, span.stop) for span in spans)]
    ids = torch.cat([encoded.ids[part] for part in parts]).long()
    loss = torch.cat([encoded.loss[part] for part in parts])
    lengths = torch.tensor([span.stop - span.start for span in spans])
    steps = torch.arange(int(lengths.max()))
    starts = (lengths - shared).cumsum(0) - lengths + shared  # of a sample, if its shared tokens stood before its own
    own = (steps >= shared) & (steps < lengths[:, None])
    places = torch.where(own, starts[:, None] + steps, torch.where(steps < shared, steps, 0))
    return {
        "input_ids": ids[None],
        "labels": torch.where(loss, ids, NO_LOSS)[None],
        "position_ids": torch.cat([steps[:shared], steps.expand(len(rows), -1)[own]])[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "samples": {"rows": places, "places": torch.cat([steps[:shared], own.flatten().nonzero()[:, 0]])},
    }


def shared_beginning(ids: Sequence[Tensor], loss: Sequence[Tensor]) -> int:
    """Tokens with which all samples begin. At least one more without loss follows them in each, since the last shared
    token can predict only one."""
    if len(ids) < 2:
        return 0
    most = min(int(part.int().argmax()) if part.any() else len(part) for part in loss) - 1
    most = max(0, min(most, min(map(len, ids)) - 1))
    equal = (torch.stack([part[:most] for part in ids]) == ids[0][:most]).all(0)
    return int(equal.int().cumprod(0).sum())
