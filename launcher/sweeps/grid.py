"""The runs of a sweep: every combination of the varied options. Pure: words in, words out."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

from launcher.config import Config

OWN = {"output": "the sweep names the folders", "tiny": "give --tiny to all runs", "resume": "a sweep always resumes"}
MOST_RUNS = 1000  # as in a job array of Slurm by default
NAME_LENGTH = 120  # of a run's folder; a longer name is cut and gets a digest
COMMA = re.compile(r",(?![^\[\]]*\]|[^{}]*\})")  # outside of brackets, which hold JSON


class Variant(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    values: dict[str, str]  # option -> value, as typed
    options: tuple[str, ...]  # for the command line


def read_vary(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values of each option, from words such as learning-rate=1e-3,3e-3.

    Raises ValueError for a word of another form, an option that cannot be varied, or a value given twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().removeprefix("--").replace("_", "-")
        if not equals or not name:
            raise ValueError(f"--vary expects OPTION=VALUE,VALUE (such as learning-rate=1e-3,3e-3), got {word!r}")
        if name in OWN:
            raise ValueError(f"--vary {name}: {OWN[name]}; leave it out")
        if name in found:
            raise ValueError(f"--vary names {name} twice: give all of its values at once ({name}=A,B)")
        values = tuple(value.strip() for value in COMMA.split(text))
        if not all(values):
            raise ValueError(f"--vary {word}: {'there is no value' if not text.strip() else 'a value is empty'}")
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"--vary {word}: the value {twice[0]} is given twice")
        found[name] = values
    if not found:
        raise ValueError("--vary is empty: give OPTION=VALUE,VALUE, such as --vary learning-rate=1e-3,3e-3")
    return found


def variants(vary: Mapping[str, Sequence[str]]) -> list[Variant]:
    """Every combination of the values, the last option varying fastest. Raises ValueError for too many, and for equal
    folder names."""
    if (count := math.prod(len(values) for values in vary.values())) > MOST_RUNS:
        by_option = " x ".join(f"{len(values):,} of {name}" for name, values in vary.items())
        raise ValueError(f"--vary gives {count:,} runs ({by_option}), at most {MOST_RUNS:,} make a sweep: vary less")
    made = []
    for chosen in itertools.product(*vary.values()):
        values = dict(zip(vary, chosen, strict=True))
        made.append(Variant(folder_name(values), values, as_options(values)))
    names: dict[str, Variant] = {}
    for variant in made:
        if (other := names.setdefault(variant.name.lower(), variant)) is not variant:  # some file systems ignore case
            raise ValueError(f"{shown(variant.values)} and {shown(other.values)} would share the folder {variant.name}")
    return made


def as_options(values: Mapping[str, str]) -> tuple[str, ...]:
    """The words of a command line: --method lora --no-packing. A value with spaces is several words."""
    switches = {name.replace("_", "-") for name in _boolean_settings()}
    words: list[str] = []
    for name, value in values.items():
        if name in switches and value.lower() in ("true", "false"):
            words.append(f"--{name}" if value.lower() == "true" else f"--no-{name}")
        else:
            parts = shlex.split(value) if " " in value else [value]
            words += [f"--{name}={parts[0]}"] if len(parts) == 1 else [f"--{name}", *parts]
    return tuple(words)


def folder_name(values: Mapping[str, str]) -> str:
    """A folder's name that shows the values, such as method=lora,learning-rate=1e-3."""
    name = ",".join(f"{option}={re.sub(r'[^A-Za-z0-9.+=-]+', '_', value)}" for option, value in values.items())
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[:NAME_LENGTH]}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"


def shown(values: Mapping[str, str]) -> str:
    """The values for a reader: method=lora learning-rate=1e-3."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def without(values: Mapping[str, str], name: str) -> dict[str, str]:
    """The values but one."""
    return {option: value for option, value in values.items() if option != name}


def _boolean_settings() -> set[str]:
    hints: dict[str, Any] = get_type_hints(Config)
    return {field.name for part in hints.values() for field in fields(part) if get_type_hints(part)[field.name] is bool}
