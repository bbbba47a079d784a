"""Loss on held-out records, for commands that must say what they cost."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from launcher.config import DataConfig
from launcher.data import batches, encode, records
from launcher.inference.sources import Source
from launcher.models.files import load_tokenizer

AT_MOST = 200  # records of a file that is given for this alone


def held_out(source: Source, file: str | None) -> tuple[encode.Encoded, Any]:
    """Encoded records that the run was not trained on, or those of a file, and the tokenizer.

    Raises ValueError where neither is there.
    """
    names = {field.name for field in fields(DataConfig)}
    settings = {name: value for name, value in (source.data or {}).items() if name in names}
    settings |= {"exact_match": False}  # which asks for held-out records by itself
    if file is not None:
        settings |= {"data": file, "eval_data": None}
        held = records.load_records(file)[:AT_MOST]
    elif settings.get("eval_records") or settings.get("eval_data"):
        config = DataConfig(**settings)
        held = records.load_splits(config.data, config.eval_data, config.eval_records)[1]
    else:
        known = "the run held no records out" if source.data else f"{source.adapter} lies in no run folder"
        raise ValueError(f"there is nothing to measure the loss on, since {known}: give --data FILE")
    tokenizer = load_tokenizer(source.tokenizer)
    return encode.encode(held, tokenizer, DataConfig(**settings)), tokenizer


@torch.no_grad()
def mean_loss(model: Any, encoded: encode.Encoded, tokenizer: Any, *, size: int = 16) -> float:
    """Loss per target token."""
    rows = sorted(range(len(encoded)), key=encoded.lengths.__getitem__)
    device, total = next(model.parameters()).device, 0.0
    for start in range(0, len(rows), size):
        batch = batches.collate(encoded, rows[start : start + size], pad_id=tokenizer.pad_token_id or 0)
        batch = {name: part.to(device) for name, part in batch.items()}
        total += float(model.eval()(**batch, num_items_in_batch=1, use_cache=False).loss)
    return total / batches.target_tokens(encoded, rows)
