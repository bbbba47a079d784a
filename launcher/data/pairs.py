"""Preference pairs in their public forms, each turned into two records of the same prompt.

    {"prompt": text or messages, "chosen": text or messages, "rejected": text or messages}
    {"chosen": messages, "rejected": messages}      whole conversations, which begin alike

With "input", "system" and "tools" as in instruction records, and columns of other names by --columns.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Literal

from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.files import load_rows
from launcher.data.forms import (
    MEDIA,
    NOT_HONOURED,
    REASONING,
    ROLES,
    SYSTEM,
    Record,
    as_conversation,
    input_of,
    records_of,
    turns_before,
    unused,
)

log = logging.getLogger(__name__)
NAMES = ("prompt", "chosen", "rejected", "input", "system", "tools")
USED = {"input", "context", "tools", "functions", "chat_template_kwargs", *SYSTEM}  # beside the prompt and its answers
REFUSED_OR_NAMED = {*MEDIA, *REASONING, "weight"} | (NOT_HONOURED - {"rejected", "margin"})
EXPECTED = "{prompt, chosen, rejected} as texts or messages, or {chosen, rejected} as whole conversations"


def mapping_of(columns: tuple[str, ...]) -> dict[str, str]:
    """{our field: column} of `--columns prompt=question chosen=good rejected=bad`. Raises ValueError."""
    found = dict(pair.partition("=")[::2] for pair in columns)
    if set(found) - {*NAMES} or not all(found.values()) or len(found) < len(columns):
        raise ValueError(
            f"--columns of --task prefer takes {', '.join(NAMES)}, each =COLUMN and once; got {' '.join(columns)}"
        )
    return found


def load_pairs(
    source: str,
    *,
    option: str = "--data",
    columns: tuple[str, ...] = (),
    on_bad_record: Literal["error", "skip"] = "error",
) -> list[Record]:
    """The pairs {chosen: record, rejected: record} of a source, checked, in order.

    Raises ValueError for bad records, with the first ten and the count of each kind of fault, or with skip logs them.
    """
    mapping, rows = mapping_of(columns), load_rows(source, option)
    if not rows:
        raise ValueError(f"{option} {source} holds no pairs; expected {EXPECTED}")
    bad, ignored, pairs = BadRecords(on_bad_record), Counter[str](), []
    repeated = 0
    for index, row in enumerate(rows):
        where = f"record {index} of {source}"
        try:
            pairs.append(pair_of(row, mapping, where, ignored))
            repeated += all(_repeats(record) for record in pairs[-1].values())
        except BadRecord as error:
            bad.add(error)
    if repeated:
        log.warning(
            "%s: in %d of %d pairs both answers begin with the whole prompt, which comes before them already: if that "
            "is not meant, take it out of the answers",
            source, repeated, len(rows),
        )  # fmt: skip
    if (left_out := bad.tell(f"{option} {source}", len(rows))) is not None:
        log.warning("%s", left_out)
    for text in unused(source, ignored):
        log.warning("%s", text)
    if any("messages" in record for pair in pairs for record in pair.values()):
        return [{name: as_conversation(record) for name, record in pair.items()} for pair in pairs]
    return pairs


def pair_of(row: Any, mapping: dict[str, str], where: str, ignored: Counter[str]) -> Record:
    """The records of both answers. Raises BadRecord naming the place."""
    if not isinstance(row, dict):
        raise BadRecord("no object", f"{where} is a {type(row).__name__}, expected {EXPECTED}")
    if missing := [column for column in mapping.values() if column not in row]:
        raise BadRecord(
            "a column of --columns is missing",
            f"{where} has no {missing[0]!r}, which --columns names (its columns: {', '.join(map(str, row))})",
        )
    row = row | {name: row[column] for name, column in mapping.items()}
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise BadRecord(
                f"no {name} answer",
                f"{where} has no {name!r} answer (its columns: {', '.join(map(str, row))}); expected {EXPECTED}, or "
                "other names by --columns prompt=COLUMN chosen=COLUMN rejected=COLUMN",
            )
    if row["chosen"] == row["rejected"]:
        raise BadRecord("equal answers", f"{where}: the chosen and the rejected answer are the same")
    prompt, chosen, rejected = _parts(row, where, ignored)
    rest = {name: row[name] for name in (USED | REFUSED_OR_NAMED) & row.keys() if row[name]}
    made = {}
    for name, answer, found in (("chosen", chosen, ignored), ("rejected", rejected, Counter[str]())):
        [(record, answered)] = records_of(
            {"prompt": prompt, "completion": answer, **rest}, "prompt", f"{where}, {name}", {}, found
        )
        if not answered:
            raise BadRecord(f"an empty {name} answer", f"{where}: the {name} answer is empty")
        made[name] = record
    return made


def _parts(row: Record, where: str, ignored: Counter[str]) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected): all texts, or all lists of messages, the answers without the prompt."""
    prompt = next((row[name] for name in ("prompt", "instruction", "conversations") if row.get(name) is not None), None)
    chosen, rejected = ([answer] if isinstance(answer, dict) else answer for answer in (row["chosen"], row["rejected"]))
    lists = [isinstance(answer, list) for answer in (chosen, rejected)]
    before = turns_before(row, where)
    if all(lists) and (prompt is None or (chosen[:1] == rejected[:1] and _said(chosen[0])[0] != "assistant")):
        count = next((i for i, both in enumerate(zip(chosen, rejected, strict=False)) if both[0] != both[1]), None)
        if not count:
            raise BadRecord(
                "conversations that do not begin alike",
                f"{where}: 'chosen' and 'rejected' are whole conversations, which must begin alike",
            )
        return before + _before(prompt, chosen[:count], where, ignored), chosen[count:], rejected[count:]
    if prompt is None:
        raise BadRecord(
            "no prompt",
            f"{where} has no 'prompt' (its columns: {', '.join(map(str, row))}): expected {EXPECTED}, or another name "
            "by --columns prompt=COLUMN",
        )
    if not isinstance(prompt, list) and (any(lists) or before):
        question = as_conversation({"instruction": prompt, "input": input_of(row, where, ignored)})
        prompt = question["messages"]
        for name in ("input", "context"):  # which are in the prompt now
            row.pop(name, None)
    if isinstance(prompt, list):
        prompt, chosen, rejected = before + prompt, *(_messages(answer) for answer in (chosen, rejected))
    return prompt, chosen, rejected


def _before(prompt: Any, begun: list[Any], where: str, ignored: Counter[str]) -> list[Any]:
    """The messages before the answers, of which whole conversations hold all or only the last ones."""
    if not isinstance(prompt, list):
        texts = [text for turn in begun if isinstance(text := _said(turn)[1], str)]
        if isinstance(prompt, str) and not any(prompt.strip() in text or text in prompt for text in texts):
            ignored["prompt"] += 1
        return begun
    given, there = [list(map(_said, turns)) for turns in (prompt, begun)]
    both = next(n for n in range(min(len(given), len(there)), -1, -1) if given[len(given) - n :] == there[:n])
    if not both and given and given[-1][0] == there[0][0] == "user":
        raise BadRecord(
            "a prompt that is not in the conversations",
            f"{where}: 'chosen' and 'rejected' are whole conversations, which begin with another question than "
            "'prompt': leave one of them out",
        )
    return prompt[: len(prompt) - both] + begun


def _messages(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _said(turn: Any) -> tuple[Any, Any]:
    """(role, content) of a message, under either of their names."""
    if not isinstance(turn, dict):
        return None, turn
    role = turn.get("role", turn.get("from"))
    return ROLES.get(role.lower(), role) if isinstance(role, str) else role, turn.get("content", turn.get("value"))


def _repeats(record: Record) -> bool:
    """Whether an answer begins with its whole prompt."""
    return bool(record.get("instruction")) and record["output"].startswith(record["instruction"])
