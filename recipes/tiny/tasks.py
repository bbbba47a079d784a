"""Eight small text skills, and the Alpaca records that ask for them in plain English.

Skills are applied to made-up words. A word's hash decides its split: a word held out for testing is held out of both
the pretraining (`pretraining_text.py`) and the fine-tuning.
"""

import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "".join(c for c in LETTERS if c not in VOWELS)
TEMPLATE_WORDS = ("instruction", "input", "response")  # the headings of the prompt

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Skill:
    """One skill: what it does to a word, its codes in terse notation, and how people ask for it."""

    apply: Callable[[str], str]
    codes: tuple[str, ...]
    wordings: tuple[str, ...]  # in the training data
    unseen_wordings: tuple[str, ...]  # only in the test data


def successors(word: str) -> str:
    """Each letter's successor, z back to a."""
    return "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in word)


SKILLS: dict[str, Skill] = {
    "reverse": Skill(
        lambda word: word[::-1],
        ("rev", "bwd", "inv"),
        (
            "Reverse the text.",
            "Write the word backwards.",
            "Spell this backwards.",
            "Reverse the order of the letters.",
            "Turn the word around.",
            "Give the letters in reverse order.",
            "Read it from right to left.",
            "What is this word backwards?",
        ),
        ("Reverse this word.", "Write the letters from right to left.", "How does it read backwards?"),
    ),
    "upper": Skill(
        str.upper,
        ("upp", "maj", "big"),
        (
            "Write the word in capital letters.",
            "Turn small letters into capitals.",
            "Convert the text to upper case.",
            "Use capitals only.",
            "Turn this into capital letters.",
            "Put the word in upper case.",
            "Capitalize every letter.",
            "Uppercase the text.",
        ),
        ("Convert this to capitals.", "Write the text in uppercase.", "Make every letter a capital."),
    ),
    "first": Skill(
        lambda word: word[0],
        ("fst", "hed", "ini"),
        (
            "What is the first letter?",
            "Give the first letter of the word.",
            "Which letter comes first?",
            "Name the opening letter.",
            "Write only the first letter.",
            "Which letter does it start with?",
            "Tell me the initial letter.",
            "Find the letter at the start.",
        ),
        ("What letter does the word start with?", "Print the first letter only.", "Give its initial letter."),
    ),
    "last": Skill(
        lambda word: word[-1],
        ("lst", "tai", "fin"),
        (
            "What is the last letter?",
            "Give the last letter of the word.",
            "Which letter comes last?",
            "Name the closing letter.",
            "Write only the last letter.",
            "Which letter does it end with?",
            "Give the closing letter.",
            "Find the letter at the end.",
        ),
        ("What letter does the word end with?", "Print the last letter only.", "Give its final letter."),
    ),
    "sort": Skill(
        lambda word: "".join(sorted(word)),
        ("srt", "asc", "ord"),
        (
            "Sort the letters.",
            "Put the letters in alphabetical order.",
            "Arrange the letters from a to z.",
            "Order the letters alphabetically.",
            "Rearrange it from a to z.",
            "Sort this word by letter.",
            "Give the letters from a to z.",
            "Write the letters sorted.",
        ),
        ("Arrange the letters alphabetically.", "Sort the word from a to z.", "Put this in alphabetical order."),
    ),
    "count": Skill(
        lambda word: str(len(word)),
        ("len", "num", "siz"),
        (
            "How many letters are there?",
            "Count the letters.",
            "How long is the word?",
            "Give the number of letters.",
            "What is the length of the text?",
            "Tell me how many letters it has.",
            "Count the characters.",
            "Write the length as a number.",
        ),
        ("How many letters does the word have?", "What is the number of characters?", "Give the length."),
    ),
    "successors": Skill(
        successors,
        ("nxt", "suc", "inc"),
        (
            "Replace each letter by the next one.",
            "Shift every letter by one.",
            "Move each letter one step on.",
            "Write the next letter for each letter.",
            "Advance all letters by one.",
            "Change every letter to the one after it.",
            "Shift the letters forward.",
            "Take the following letter each time.",
        ),
        ("Shift each letter to the next one.", "Advance every letter.", "Move all letters forward by one."),
    ),
    "double": Skill(
        lambda word: word + word,
        ("dbl", "dup", "bis"),
        (
            "Repeat the text twice.",
            "Write the word two times.",
            "Double the word.",
            "Say it twice.",
            "Duplicate the text.",
            "Copy the word twice in a row.",
            "Write it again after itself.",
            "Give the word twice.",
        ),
        ("Write it twice.", "Repeat the word two times.", "Duplicate this word."),
    ),
}

CODES = frozenset(code for skill in SKILLS.values() for code in skill.codes)


def words_of(text: str) -> set[str]:
    """The words of two letters and more in a text, in lower case."""
    return set(re.findall("[a-z]{2,}", text.lower()))


INSTRUCTION_WORDS = frozenset(TEMPLATE_WORDS).union(
    *(words_of(wording) for skill in SKILLS.values() for wording in skill.wordings + skill.unseen_wordings)
)


def split_of(word: str) -> Split:
    """Which split a word belongs to, by its hash: 5 % validation, 5 % test, the rest train."""
    bucket = zlib.crc32(word.encode()) % 20
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def spoken_word(rng: random.Random, length: int) -> str:
    """A word that can be spoken: consonant, vowel, consonant, ..."""
    return "".join(rng.choice((CONSONANTS, VOWELS)[i % 2]) for i in range(length))


def draw_word(rng: random.Random, split: Split = "train") -> str:
    """A made-up word of 3 to 5 letters from one split; half of them can be spoken, half is any letters."""
    while True:
        length = rng.randint(3, 5)
        word = spoken_word(rng, length) if rng.random() < 0.5 else "".join(rng.choices(LETTERS, k=length))
        if split_of(word) == split and word not in CODES:
            return word


def instruction_records(seed: int, split: Split, count: int, unseen: bool = False) -> list[dict[str, str]]:
    """`count` Alpaca records on words of one split, skills in equal shares, no (instruction, input) pair twice."""
    rng = random.Random(seed)
    skills = tuple(SKILLS.values())
    records: dict[tuple[str, str], str] = {}
    while len(records) < count:
        skill = skills[len(records) % len(skills)]
        wording = rng.choice(skill.unseen_wordings if unseen else skill.wordings)
        word = draw_word(rng, split)
        records.setdefault((wording, word), skill.apply(word))
    return [{"instruction": wording, "input": word, "output": answer} for (wording, word), answer in records.items()]


def instruction_sets() -> dict[str, list[dict[str, str]]]:
    """The bundled sets by file name; `test_unseen` asks for the same skills in wordings no other set contains."""
    return {
        "train": instruction_records(1, "train", 8000),
        "validation": instruction_records(2, "validation", 400),
        "test": instruction_records(3, "test", 400),
        "test_unseen": instruction_records(4, "test", 400, unseen=True),
    }


def to_json(records: list[dict[str, str]]) -> str:
    """A JSON list with one record per line, so that a difference reads line by line."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def write_instruction_sets(folder: Path) -> None:
    """Write `train.json`, `validation.json`, `test.json` and `test_unseen.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in instruction_sets().items():
        (folder / f"{name}.json").write_text(to_json(records))
