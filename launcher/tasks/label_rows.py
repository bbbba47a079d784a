"""Rows of labelled texts: read, checked one by one, held out, and the classes that their labels are.

A label is a class (a whole number or a name), or a number with a fraction to predict. A CSV file holds text alone:
there, labels that can all be read as numbers are numbers.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from launcher.config import DataConfig
from launcher.data import records
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.files import holds_csv
from launcher.data.limits import check_length
from launcher.tasks.labels import Labels

log = logging.getLogger(__name__)
MOST = 1e300  # of a number to predict
Rows = list[records.Record]  # {texts, label, where}


def load_splits(config: DataConfig) -> tuple[Rows, Rows, Labels]:
    """Training and held-out rows {texts, label, where}, and the classes of the training rows.

    Raises ValueError naming the rows with a missing column, a text or label of another kind, no label, or a held-out
    label that training does not know; with config.on_bad_record skip they are left out, and the log counts them.
    """
    sources = [config.data] if isinstance(config.data, str) else config.data
    options = {records.source_of(text).name: "--data" for text in sources}
    if config.eval_data is not None:
        options.setdefault(config.eval_data, "--eval-data")
    read = {name: _read(name, option, config) for name, option in options.items()}
    training = [read[name][0] for name, option in options.items() if option == "--data"]
    numbers = {type(row["label"]) for rows in training for row in rows} in ({float}, {float, int})
    usable = {name: _labelled(*read[name], options[name], name, numbers=numbers) for name in options}
    train, held_out = records.load_splits(
        config.data, config.eval_data, config.eval_records, lambda name, option: usable[name],
        fewer=config.fewer_eval_records,
    )  # fmt: skip
    labels = _classes(train)
    return train, _known(held_out, labels, BadRecords(config.on_bad_record)), labels


def label_name(label: Any) -> str:
    """The class of a label."""
    return str(label)


def _read(source: str, option: str, config: DataConfig) -> tuple[Rows, BadRecords, int]:
    """The rows that are whole, those that are not, and how many there are."""
    found: Rows = []
    bad, rows, label = BadRecords(config.on_bad_record), records.load_rows(source, option), config.label_column
    if not rows:
        raise ValueError(f"{option} {source} holds no rows")
    numbers = _numbers_in_text([row.get(label) if isinstance(row, dict) else None for row in rows], source, option)
    for index, row in enumerate(rows):
        where = f"record {index} of {source}"
        try:
            texts = _texts(row, (*config.text_columns, label), where)
            found.append({"texts": texts, "label": _label(row, label, where, numbers, index), "where": where})
        except BadRecord as error:
            bad.add(error)
    kinds = Counter(isinstance(row["label"], str) for row in found)
    usual = next((row for row in found if isinstance(row["label"], str) == kinds.most_common(1)[0][0]), None)
    same: Rows = []
    for row in found:
        if usual is not None and isinstance(row["label"], str) != isinstance(usual["label"], str):
            other = f"{usual['where'].partition(' of ')[0]} has {usual['label']!r}"
            bad.add(BadRecord("another kind of label", f"{row['where']} has the label {row['label']!r}, {other}"))
        else:
            same.append(row)
    return same, bad, len(rows)


def _texts(row: Any, columns: Sequence[str], where: str) -> list[str]:
    """The texts of a row; the last column is its label's. Raises BadRecord."""
    if not isinstance(row, dict):
        raise BadRecord("no object", f"{where} is a {type(row).__name__}, expected an object with {', '.join(columns)}")
    columns = columns[:-1]
    texts = [check_length(records.text_of(row, column, where), f"{where}: its {column!r}") for column in columns]
    if not any(text.strip() for text in texts):
        raise BadRecord("no text", f"{where} has no text in {' or '.join(map(repr, columns))}: leave the record out")
    return texts


def _label(row: records.Record, column: str, where: str, numbers: Sequence[Any] | None, index: int) -> Any:
    """The label of a row: of numbers if they are given. Raises BadRecord."""
    value = row.get(column)
    if isinstance(value, str) and not value.strip():
        raise BadRecord("an empty label", f"{where} has an empty {column!r}: give it a label, or leave the record out")
    if numbers is not None and (number := numbers[index]) is None:
        some = next(each for each in numbers if each is not None)
        raise BadRecord(
            "a label that is no number",
            f"{where.partition(' of ')[2]} has numbers for labels ({some}, ...), but {where.partition(' of ')[0]} has "
            f"{value!r}: give it a number, or leave the record out",
        )
    value = value if numbers is None else number
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        there = f"the {type(value).__name__} {value!r:.40}" if column in row else f"its columns: {', '.join(row)}"
        raise BadRecord(
            f"no {column!r}", f"{where}: {column!r} is a class (whole number or name) or a number, got {there}"
        )
    if not isinstance(value, str) and not -MOST < value < MOST:
        raise BadRecord(
            "no number to learn", f"{where} has the label {value!r:.40}, no number to learn: leave the record out"
        )
    return value


def _labelled(rows: Rows, bad: BadRecords, count: int, option: str, source: str, *, numbers: bool) -> Rows:
    """The rows with a label: -1 marks those of test splits, unless numbers are predicted and others occur."""
    values = [row["label"] for row in rows if not isinstance(row["label"], str)]
    kept: Rows = []
    for row in rows:
        value = row["label"]
        if isinstance(value, str) or value >= 0 or (numbers and set(values) != {-1}):
            kept.append(row)
            continue
        bad.add(
            BadRecord(
                "no label",
                f"{row['where']} has the label {value}: it is unlabelled, as test splits are; give another split "
                f"(classes are whole numbers from 0; numbers to predict have a fraction, as {float(value)} has)",
            )
        )
    records.warn(bad.tell(f"{option} {source}", count))
    return kept


def _known(held_out: Rows, labels: Labels, bad: BadRecords) -> Rows:
    """The held-out rows with labels that the training rows have."""
    kept: Rows = []
    for row in held_out:
        if (label_name(row["label"]) in labels) if labels else not isinstance(row["label"], str):
            kept.append(row)
            continue
        known = ", ".join(labels) or "numbers"
        bad.add(
            BadRecord(
                "a label that training does not have",
                f"{row['where']} has the label {row['label']!r}, the training rows have: {known}",
            )
        )
    records.warn(bad.tell("the held-out records", len(held_out)))
    return kept


def _numbers_in_text(labels: Sequence[Any], source: str, option: str) -> list[int | float | None] | None:
    """The labels of a CSV file as numbers, None for those that are not, if it has numbers for labels; None for another
    kind of labels, which are used unchanged.

    Raises ValueError if numbers with a fraction are in quotes in a file that has types: each would become a separate
    class.
    """
    texts = [label for label in labels if isinstance(label, str) and label.strip()]
    csv = holds_csv(source)
    if not texts or not (csv or len(texts) == len(labels)):
        return None
    read = [_number(label) if isinstance(label, str) else None for label in labels]
    numbers = [number for number in read if number is not None]
    fractions = [label for label, number in zip(labels, read, strict=True) if isinstance(number, float)]
    if csv and len(numbers) == len(texts):
        return [None if number is None else float(number) for number in read] if fractions else read
    if not fractions or 2 * len(numbers) < len(texts):
        return None
    if not csv:
        raise ValueError(f"{option} {source} has numbers as text ({fractions[0]!r}) for labels: write them unquoted")
    return [None if number is None else float(number) for number in read]


def _number(text: str) -> int | float | None:
    """What a text can be read as: a whole number, a number with a fraction, or neither (NaN and infinity too)."""
    if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _classes(rows: Rows) -> Labels:
    """The classes in their order; empty if the labels are numbers to predict."""
    kinds = {type(row["label"]) for row in rows}
    if kinds in ({float}, {float, int}):
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
    return tuple(map(label_name, values))
