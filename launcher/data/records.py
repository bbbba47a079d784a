"""Read samples from files or the hub, check every one of them, and hold some out.

What comes out has one kind a run (`forms`): questions with one answer, or conversations.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from launcher.config import DataConfig
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.files import FORMS, load_rows, source_of
from launcher.data.forms import Record, as_conversation, kind_of, mapping_of, records_of, text_of

__all__ = [
    "Record",
    "answer",
    "load_records",
    "load_rows",
    "load_splits",
    "question",
    "split",
    "splits_of",
    "text_of",
    "warn",
]
log = logging.getLogger(__name__)
SPLIT_SEED = 20240  # not the training seed: every run on a file holds out the same records
Sources = str | Sequence[str]


def splits_of(config: DataConfig) -> tuple[list[Record], list[Record]]:
    """Training and held-out records of a run, of one kind."""

    def load(source: str, *, option: str) -> list[Record]:
        return load_records(source, option=option, columns=config.columns, on_bad_record=config.on_bad_record)

    train, held_out = load_splits(
        config.data, config.eval_data, config.eval_records, load, fewer=config.fewer_eval_records
    )
    if any("messages" in record for records in (train, held_out) for record in records):
        return [as_conversation(record) for record in train], [as_conversation(record) for record in held_out]
    return train, held_out


def load_splits(
    data: Sources,
    eval_data: str | None,
    eval_records: int,
    load: Callable[..., list[Record]] | None = None,
    *,
    fewer: bool = False,
) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; of a separate eval_data, eval_records (0: all) are taken.

    Of several sources, each FILE or FILE:WEIGHT, a weight below 1 is the share of the records that is used, and one
    above 1 says how often each training record is used. Held-out records are never used for training.
    fewer: where eval_records would leave none to train on, hold out a tenth and warn; otherwise that is a ValueError.
    """
    load = load or load_records
    found = [_weighted(text, load) for text in ([data] if isinstance(data, str) else data)]
    records = [record for some, _ in found for record in some]
    if eval_data is not None:
        held_out = load(eval_data, option="--eval-data")
        if 0 < eval_records < len(held_out):
            held_out = split(held_out, eval_records)[1]
        chosen = set()
    else:
        if fewer and eval_records >= len(records) > 1:
            share = max(1, len(records) // 10)
            log.warning(
                "held out are %d of the %d records, since the recipe's %d would leave none to train on: "
                "--eval-records N gives another number",
                share,
                len(records),
                eval_records,
            )
            eval_records = share
        chosen = _held_out(len(records), eval_records)
        held_out = [record for i, record in enumerate(records) if i in chosen]
    train: list[Record] = []
    start = 0
    for some, weight in found:
        kept = [record for i, record in enumerate(some, start) if i not in chosen]
        train += _repeated(kept, weight)
        start += len(some)
    return train, held_out


def split(records: list[Record], eval_records: int) -> tuple[list[Record], list[Record]]:
    """(training, held out), both in the file's order; which is which depends on the two counts alone."""
    held_out = _held_out(len(records), eval_records)
    return (
        [record for i, record in enumerate(records) if i not in held_out],
        [record for i, record in enumerate(records) if i in held_out],
    )


def load_records(
    source: str,
    *,
    option: str = "--data",
    columns: tuple[str, ...] = (),
    on_bad_record: Literal["error", "skip"] = "error",
) -> list[Record]:
    """Every record of a file, a folder, or a hub dataset's train split, checked, in order.

    A record whose answer is empty is left out with a warning that names it: the published Alpaca has some.
    columns: as in DataConfig. Raises ValueError for bad records, with the first ten and the count of each kind of
    fault, or with skip logs the same and leaves them out.
    """
    mapping = mapping_of(columns)
    rows = load_rows(source, option)
    if not rows:
        raise ValueError(f"{option} {source} holds no records; expected {FORMS}")
    bad, ignored, empty, records = BadRecords(on_bad_record), Counter[str](), list[int](), list[Record]()
    kind: str | None = None
    for index, row in enumerate(rows):
        where = f"record {index} of {source}"
        try:
            this = kind_of(row, mapping, where)
            kind = kind or this
            if this != kind:
                raise BadRecord(
                    "another kind of record",
                    f"{where} has the column {this!r}, but the records before it have {kind!r}: one file holds one "
                    "kind of record",
                )
            for record, answered in records_of(row, kind, where, mapping, ignored):
                if answered:
                    records.append(record)
                else:
                    empty.append(index)
        except BadRecord as error:
            bad.add(error)
    warn(bad.tell(f"{option} {source}", len(rows)))
    if empty:
        some = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        if not records:
            raise ValueError(f"{option} {source}: every record's answer is empty (records {some})")
        log.warning(
            "%s: %d of %d records have an empty answer and are left out: %s", source, len(empty), len(rows), some
        )
    for name, count in sorted(ignored.items()):
        log.warning("%s: %r carries meaning in some formats and is not used here: %d times", source, name, count)
    if any("messages" in record for record in records):  # Alpaca records with a system or a history are conversations
        return [as_conversation(record) for record in records]
    return records


def warn(text: str | None) -> None:
    """Log what `BadRecords.tell` returns."""
    if text is not None:
        log.warning("%s", text)


def answer(record: Record) -> str:
    """The text the model should write: of a conversation, its last turn."""
    return record["messages"][-1]["content"] if "messages" in record else record["output"]


def question(record: Record) -> str:
    """The text that is shown as the question: of a conversation, the turn before its last answer."""
    asked = record["instruction"] if "instruction" in record else record["messages"][-2]["content"]
    return f"{asked}\n{record['input']}" if record.get("input") else asked


def _weighted(text: str, load: Callable[..., list[Record]]) -> tuple[list[Record], float]:
    """The records of a source that are used, and how often each one is."""
    source = source_of(text)
    records = load(source.name, option="--data")
    if source.weight == 1:
        return records, 1.0
    used = _sample(records, source.weight) if source.weight < 1 else records
    log.info("%s: %d of %d records, weight %g", source.name, len(used), len(records), source.weight)
    return used, max(source.weight, 1.0)


def _sample(records: list[Record], share: float) -> list[Record]:
    """A share of the records, at least one, in their order."""
    count = max(1, round(share * len(records)))
    chosen = set(_order(len(records))[:count])
    return [record for i, record in enumerate(records) if i in chosen]


def _repeated(records: list[Record], weight: float) -> list[Record]:
    whole = int(weight)
    rest = _sample(records, weight - whole) if weight > whole and records else []
    return records * whole + rest


def _held_out(count: int, eval_records: int) -> set[int]:
    if eval_records >= count > 0:
        raise ValueError(
            f"--eval-records {eval_records} of {count} records leaves none to train on: "
            f"give at most {count - 1}, or a file of their own with --eval-data FILE"
        )
    return set(_order(count)[:eval_records])


def _order(count: int) -> list[Any]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
