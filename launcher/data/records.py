"""Read samples from files or the hub, check every one of them, and hold some out.

All records of a run are of one kind (`forms`): questions with one answer, or conversations.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from launcher.config import DataConfig
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.files import FORMS, Source, each_row, load_rows, source_of
from launcher.data.forms import Record, as_conversation, kind_of, mapping_of, records_of, text_of, unused

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
T = TypeVar("T")


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
    """Training and held-out records, all in memory. See `chosen_places` for the arguments; load reads a source."""
    load = load or load_records
    sources = [source_of(text) for text in ([data] if isinstance(data, str) else data)]
    found = [load(source.name, option="--data") for source in sources]
    records = [record for some in found for record in some]
    others = None if eval_data is None else load(eval_data, option="--eval-data")
    train, held_out = chosen_places(
        [(source, len(some)) for source, some in zip(sources, found, strict=True)],
        eval_records,
        None if others is None else len(others),
        fewer=fewer,
    )
    return [records[i] for i in train], [(records if others is None else others)[i] for i in held_out]


def chosen_places(
    sources: Sequence[tuple[Source, int]], eval_records: int, others: int | None, *, fewer: bool = False
) -> tuple[list[int], list[int]]:
    """Which records train and which are held out, in order; each source comes with the number of its records.

    The training records are places in all sources one after the other, and so are the held-out ones; with `others`
    records of a separate file they are places in that file, eval_records of them (0: all). A weight below 1 is the
    share of a source's records that is used, one above 1 says how often each training record is used. Held-out records
    are never used for training. fewer: if eval_records would leave none to train on, hold out a tenth and warn;
    otherwise that is a ValueError.
    """
    used, first = [], 0
    for source, count in sources:
        places = list(range(first, first + count))
        if source.weight != 1:
            places = _sample(places, source.weight) if source.weight < 1 else places
            log.info("%s: %d of %d records, weight %g", source.name, len(places), count, source.weight)
        used.append((places, max(source.weight, 1.0)))
        first += count
    every = [place for places, _ in used for place in places]
    if others is not None:
        few = 0 < eval_records < others
        held_out, chosen = split(list(range(others)), eval_records)[1] if few else list(range(others)), set[int]()
    else:
        if fewer and eval_records >= len(every) > 1:
            share = max(1, len(every) // 10)
            log.warning(
                "held out are %d of the %d records, since the recipe's %d would leave none to train on: "
                "--eval-records N gives another number",
                share,
                len(every),
                eval_records,
            )
            eval_records = share
        held_out = split(every, eval_records)[1]
        chosen = set(held_out)
    train: list[int] = []
    for places, weight in used:
        train += _repeated([place for place in places if place not in chosen], weight)
    return train, held_out


def split(items: list[T], eval_records: int) -> tuple[list[T], list[T]]:
    """(training, held out), both in their order; which is which depends only on the two counts."""
    if eval_records >= len(items) > 0:
        raise ValueError(
            f"--eval-records {eval_records} of {len(items)} records leaves none to train on: "
            f"give at most {len(items) - 1}, or a file of their own with --eval-data FILE"
        )
    held_out = set(_order(len(items))[:eval_records])
    return (
        [item for i, item in enumerate(items) if i not in held_out],
        [item for i, item in enumerate(items) if i in held_out],
    )


def load_records(
    source: str,
    *,
    option: str = "--data",
    columns: tuple[str, ...] = (),
    on_bad_record: Literal["error", "skip"] = "error",
) -> list[Record]:
    """The records of `each_record`, all in memory; all conversations if any of them is one."""
    records = list(each_record(source, option=option, columns=columns, on_bad_record=on_bad_record))
    if any("messages" in record for record in records):  # Alpaca records with a system or a history are conversations
        return [as_conversation(record) for record in records]
    return records


def each_record(
    source: str,
    *,
    option: str = "--data",
    columns: tuple[str, ...] = (),
    on_bad_record: Literal["error", "skip"] = "error",
) -> Iterator[Record]:
    """Every record of a file, a folder, or a split of a hub dataset, checked, in order.

    A record whose answer is empty is left out with a warning that names it: the published Alpaca has some.
    columns: as in DataConfig. After the last record raises ValueError for bad ones, with the first ten and the count of
    each kind of fault, or with skip logs the same.
    """
    mapping = mapping_of(columns)
    bad, ignored = BadRecords(on_bad_record), Counter[str]()
    kind: str | None = None
    rows = kept = empty = 0
    first_empty: list[int] = []
    for index, row in enumerate(each_row(source, option)):
        rows += 1
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
            found = records_of(row, kind, where, mapping, ignored)
        except BadRecord as error:
            bad.add(error)
            continue
        for record, answered in found:
            if answered:
                kept += 1
                yield record
            else:
                empty += 1
                first_empty += [index] if len(first_empty) < 8 else []
    if not rows:
        raise ValueError(f"{option} {source} holds no records; expected {FORMS}")
    warn(bad.tell(f"{option} {source}", rows))
    if empty:
        some = ", ".join(map(str, first_empty)) + (", ..." if empty > len(first_empty) else "")
        if not kept:
            raise ValueError(f"{option} {source}: every record's answer is empty (records {some})")
        log.warning("%s: %d of %d records have an empty answer and are left out: %s", source, empty, rows, some)
    for text in unused(source, ignored):
        log.warning("%s", text)


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


def warn_of_overlap(train: Iterable[bytes], held_out: Iterable[bytes]) -> None:
    """Warn if records, each as bytes, are both trained and held out: copies of a record, or one file given twice."""
    held = Counter(map(hash, held_out))
    if both := sum(held[found] for found in {each for each in map(hash, train if held else ()) if each in held}):
        log.warning(
            "%s of %s held-out records are training records, too, so the evaluation is too good: take copies out of "
            "--data, or give other records with --eval-data FILE",
            f"{both:,}", f"{held.total():,}",
        )  # fmt: skip


def as_bytes(record: Record) -> bytes:
    """A record for `warn_of_overlap`, without the place that it came from."""
    return json.dumps({name: value for name, value in record.items() if name != "where"}, sort_keys=True).encode()


def _sample(items: list[T], share: float) -> list[T]:
    """A share of the items, at least one, in their order."""
    count = max(1, round(share * len(items)))
    chosen = set(_order(len(items))[:count])
    return [item for i, item in enumerate(items) if i in chosen]


def _repeated(items: list[T], weight: float) -> list[T]:
    whole = int(weight)
    rest = _sample(items, weight - whole) if weight > whole and items else []
    return items * whole + rest


def _order(count: int) -> list[Any]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
