"""Read samples from a file or the hub, and check every one of them.

Two kinds come out, one kind a run:

    {"instruction": str, "input": str, "output": str}               an Alpaca record, input may be empty
    {"messages": [{"role": "system"|"user"|"assistant", "content": str}, ...]}    a conversation, last turn an answer

ShareGPT conversations ({conversations: [{from, value}]}) and seed tasks ({instruction, instances: [{input, output}]})
are turned into these. Local files are read here and not through `datasets`: its Arrow schema fills in missing columns
and hides the line a mistake stands on. Nothing local ever touches the network.
"""

from __future__ import annotations

import difflib
import gzip
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
Record = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")  # the first three also with .gz
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MESSAGE_ROLES = {role: role for role in ("system", "user", "assistant")}
FORMS = "{instruction, input, output}, {messages: [{role, content}]} or {conversations: [{from, value}]}"
SPLIT_SEED = 20240  # not the training seed: every run on a file holds out the same records


def load_splits(
    data: str, eval_data: str | None, eval_records: int, load: Callable[..., list[Record]] | None = None
) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; of a separate eval_data, eval_records (0: all) are taken."""
    load = load or load_records
    records = load(data)
    if eval_data is None:
        return split(records, eval_records)
    held_out = load(eval_data, option="--eval-data")
    return records, split(held_out, eval_records)[1] if 0 < eval_records < len(held_out) else held_out


def split(records: list[Record], eval_records: int) -> tuple[list[Record], list[Record]]:
    """(training, held out), both in the file's order; which is which depends on the two counts alone."""
    import torch

    if eval_records >= len(records) > 0:
        raise ValueError(
            f"--eval-records {eval_records} of {len(records)} records leaves none to train on: "
            f"give at most {len(records) - 1}, or a file of their own with --eval-data FILE"
        )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = set(order[:eval_records].tolist())
    return (
        [record for i, record in enumerate(records) if i not in held_out],
        [record for i, record in enumerate(records) if i in held_out],
    )


def load_records(source: str, *, option: str = "--data") -> list[Record]:
    """Every record of a JSON, JSONL or parquet file, or of a hub dataset's train split, checked, in order.

    A record whose answer is empty is left out with a warning that names it: the published Alpaca has some.
    Raises ValueError, naming the file and the line or the record's index, for anything else that is wrong.
    """
    rows = load_rows(source, option)
    if not rows:
        raise ValueError(f"{option} {source} holds no records; expected {FORMS}")
    records: list[Record] = []
    empty: list[int] = []
    kind = _kind(rows[0], f"record 0 of {source}")
    for index, row in enumerate(rows):
        where = f"record {index} of {source}"
        if (this := _kind(row, where)) != kind:
            raise ValueError(
                f"{where} has the column {this!r}, but record 0 has {kind!r}: one file holds one kind of record"
            )
        checked = _conversation(row, kind, where) if kind != "instruction" else _alpaca(row, where)
        for record in checked:
            if answer(record).strip():
                records.append(record)
            else:
                empty.append(index)
    if empty:
        some = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        if not records:
            raise ValueError(f"{option} {source}: every record's answer is empty (records {some})")
        log.warning(
            "%s: %d of %d records have an empty answer and are left out: %s", source, len(empty), len(rows), some
        )
    return records


def load_rows(source: str, option: str) -> list[Any]:
    """The rows of a file, or of a hub dataset NAME[:CONFIGURATION[:SPLIT]], unchecked."""
    return _read_file(Path(source).expanduser(), option) if _is_local(source) else _read_hub(source, option)


def answer(record: Record) -> str:
    """The text the model should say: of a conversation, its last turn."""
    return record["messages"][-1]["content"] if "messages" in record else record["output"]


def question(record: Record) -> str:
    """The text that is shown as the question: of a conversation, the turn before its last answer."""
    asked = record["instruction"] if "instruction" in record else record["messages"][-2]["content"]
    return f"{asked}\n{record['input']}" if record.get("input") else asked


def _is_local(source: str) -> bool:
    path = source.lower().removesuffix(".gz")
    return Path(source).expanduser().exists() or path.endswith(SUFFIXES) or source.startswith((".", "~", os.sep))


def _read_hub(name: str, option: str) -> list[Any]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}", name):
        raise ValueError(
            f"{option} {name!r} is neither a file nor the name of a hub dataset: "
            "give FILE.json, FILE.jsonl, FILE.parquet, or a name such as tatsu-lab/alpaca"
        )
    import datasets

    try:
        dataset, configuration, split = [*name.split(":"), None, None][:3]
        return datasets.load_dataset(dataset, configuration, split=split or "train").to_list()
    except Exception as error:  # the hub, its client and the network have many error classes with no common parent
        raise ValueError(
            f"{option} {name}: no such file here, and the hub dataset of that name cannot be read "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
            "for a local file give its path with the ending: FILE.json, FILE.jsonl or FILE.parquet"
        ) from error


def _read_file(path: Path, option: str) -> list[Any]:
    """The records of a local file, unchecked."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if not path.exists():
        names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "give FILE.json, FILE.jsonl or FILE.parquet"
        raise ValueError(f"{option} {path}: there is no such file; {hint}")
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.name.lower().removesuffix(".gz").endswith(SUFFIXES))
        raise ValueError(
            f"{option} {path} is a folder: give one of its files ({', '.join(inside[:5]) or 'it has none we can read'})"
        )
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{option} {path}: data is read from {', '.join(SUFFIXES)} (.gz too), not from {suffix or path}"
        )
    if suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise ValueError(f"{option} {path} is not a parquet file: {error}") from error
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except (OSError, EOFError) as error:
        raise ValueError(f"{option} {path} cannot be read: {error}") from error
    if not text.strip():
        raise ValueError(f"{option} {path} is empty; expected {FORMS}")
    if suffix == ".json":
        try:
            return _rows(json.loads(text), path, option)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data") or not text.lstrip().startswith("{"):
                raise ValueError(f"{option} {path}, line {error.lineno}, is not JSON: {error.msg}") from error
            # several objects one after the other: JSON lines under another ending
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a JSON string
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{option} {path}, line {number}, is not JSON: {error.msg} (one record a line is expected)"
                ) from error
    return rows


def _rows(data: Any, path: Path, option: str) -> list[Any]:
    """The list of records in a parsed JSON file: the file itself, or the one list of its object."""
    if isinstance(data, dict) and not data.keys() & {"instruction", "messages", "conversations"}:
        lists = [key for key, value in data.items() if isinstance(value, list)]
        key = lists[0] if len(lists) == 1 else "train" if "train" in lists else "data"
        if key not in lists:
            raise ValueError(
                f"{option} {path} is an object with {', '.join(map(repr, data)) or 'nothing in it'}: "
                "expected a list of records, or an object with one list (or lists named train or data)"
            )
        data = data[key]
    return data if isinstance(data, list) else [data]


def _kind(row: Any, where: str) -> str:
    """The column that tells what a record is."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, expected an object: {FORMS}")
    for column in ("messages", "conversations", "instruction"):
        if row.get(column) is not None:
            return column
    raise ValueError(
        f"{where} has no 'instruction' (its columns: {', '.join(map(str, row)) or 'none'}); expected {FORMS}"
    )


def _alpaca(row: Record, where: str) -> list[Record]:
    """One Alpaca record, or one for each of a seed task's instances."""
    instruction = text_of(row, "instruction", where)
    if row.get("output") is not None or "instances" not in row:
        return [
            {
                "instruction": instruction,
                "input": text_of(row, "input", where, ""),
                "output": text_of(row, "output", where),
            }
        ]
    if not isinstance(row["instances"], list) or not all(isinstance(one, dict) for one in row["instances"]):
        raise ValueError(f"{where}: 'instances' is a list of {{input, output}}, got {row['instances']!r:.60}")
    return [
        {"instruction": instruction, "input": text_of(one, "input", at, ""), "output": text_of(one, "output", at)}
        for i, one in enumerate(row["instances"])
        for at in [f"{where}, instance {i}"]
    ]


def _conversation(row: Record, column: str, where: str) -> list[Record]:
    """A conversation with system, user, assistant as roles and an answer at the end."""
    speaker, said, roles = (
        ("role", "content", MESSAGE_ROLES) if column == "messages" else ("from", "value", SHAREGPT_ROLES)
    )
    turns = row[column]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: {column!r} is a list of {{{speaker}, {said}}}, got {turns!r:.60}")
    messages = []
    for i, turn in enumerate(turns):
        role = text_of(turn, speaker, f"{where}, turn {i}")
        if role not in roles:
            raise ValueError(f"{where}, turn {i}: unknown role {role!r}, expected one of {', '.join(roles)}")
        messages.append({"role": roles[role], "content": text_of(turn, said, f"{where}, turn {i}")})
    asked = [message["role"] for message in messages]
    if "assistant" not in asked:
        raise ValueError(f"{where} has no assistant turn, so there is nothing to learn: leave the record out")
    if asked[-1] != "assistant":
        raise ValueError(f"{where} ends with a {asked[-1]} turn: the last turn is the assistant's; cut or answer it")
    if "user" not in asked[: asked.index("assistant")]:
        raise ValueError(f"{where} has an assistant turn before any user turn: cut it, or put the question before it")
    return [{"messages": messages}]


def text_of(row: Record, column: str, where: str, default: str | None = None) -> str:
    """The text in a column, default where there is none. Raises ValueError naming what is there instead."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"{where} has no {column!r} (its columns: {', '.join(map(str, row))})")
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} is a text, got the {type(value).__name__} {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {column!r} holds half a character ({value[error.start]!r}): repair the text"
        ) from error
    return value
