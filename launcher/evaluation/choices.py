"""Multiple choice: a question, its choices, and the log-likelihood that a model gives each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")
UNENCODABLE = re.compile("[\ud800-\udfff]")  # halves of characters, which JSON may hold and no tokenizer reads
CONTEXTS = ("input", "context", "passage")  # what a question is about
QUESTIONS, ANSWERS = ("question", "query", "prompt", "instruction"), ("answerKey", "answer", "gold", "label")


@dataclass(frozen=True)
class Choice:
    """One question."""

    question: dict[str, str]  # a record without its answer
    choices: tuple[str, ...]
    right: int

    def records(self) -> list[dict[str, str]]:
        """A record for each choice."""
        return [{**self.question, "output": choice} for choice in self.choices]


def read_choices(rows: Sequence[Any], source: str) -> list[Choice] | None:
    """The questions of a file; None if its first row is not a question with choices.

    Two forms: {question, choices, answer} with choices as a list, or as ARC has them ({"text": [...], "label": [...]}),
    an answer by place, label or text, and perhaps an input, context or passage; and instructions that end in
    `Answer format: a/b/c` with an `answer` among these. Raises ValueError naming a later row that is not one.
    """
    found = []
    for place, row in enumerate(rows):
        choice = _listed(row) or _formatted(row) if isinstance(row, Mapping) else None
        if choice is None and place == 0:
            return None
        if choice is not None and UNENCODABLE.search("".join([choice.question["instruction"], *choice.choices])):
            raise ValueError(f"record {place} of {source} holds half a character: repair the text")
        if choice is None:
            raise ValueError(
                f"record {place} of {source} is no multiple choice as the first one is: give question, choices and "
                "answer (its place from 0, its label or its text)"
            )
        found.append(choice)
    return found


def accuracy(choice: Choice, likelihoods: Sequence[float]) -> tuple[float, float]:
    """1 or 0: whether the likeliest choice is right; and with each likelihood divided by the choice's characters."""
    by_length = [value / max(len(text), 1) for value, text in zip(likelihoods, choice.choices, strict=True)]
    first, normed = (max(range(len(values)), key=values.__getitem__) for values in (list(likelihoods), by_length))
    return float(first == choice.right), float(normed == choice.right)


def _listed(row: Mapping[str, Any]) -> Choice | None:
    choices: Any = row.get("choices")
    labels = None
    if isinstance(choices, Mapping):
        choices, labels = choices.get("text"), choices.get("label")
    question = next((row[name] for name in QUESTIONS if isinstance(row.get(name), str)), None)
    answer = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
    if question is None or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        return None
    if isinstance(answer, bool) or len(choices) < 2:
        return None
    known = list(map(str, labels)) if isinstance(labels, list) else [chr(ord("A") + i) for i in range(len(choices))]
    if isinstance(answer, int) and not any(name.isdigit() for name in known):
        right = answer if 0 <= answer < len(choices) else None
    else:
        places = [names.index(str(answer)) for names in (known, choices) if str(answer) in names]
        right = places[0] if places else None
    if right is None:
        return None
    context = next((row[name] for name in CONTEXTS if isinstance(row.get(name), str)), "")
    return Choice({"instruction": question, "input": context}, tuple(choices), right)


def _formatted(row: Mapping[str, Any]) -> Choice | None:
    instruction, answer, output = (row.get(name) for name in ("instruction", "answer", "output"))
    if not (isinstance(instruction, str) and isinstance(answer, str) and isinstance(output, str)):
        return None
    names = found[1].split("/") if (found := FORMAT.search(instruction)) else []
    if answer not in names or answer not in output:
        return None
    before, _, after = output.rpartition(answer)
    choices = tuple(before + name + after for name in names)
    return Choice({"instruction": instruction, "input": str(row.get("input") or "")}, choices, names.index(answer))
