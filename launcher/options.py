"""Command-line options from a function's signature or a dataclass, by tyro, with errors of one line."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import tyro

from launcher.config import nearest
from launcher.exit_codes import MISTAKE

PLAINLY: Mapping[str, str | Callable[[re.Match[str]], str]] = {  # how tyro says it: how we do
    r"no type matching .*>: ": "",
    r"invalid literal for int\(\) with base 10:": "expected a whole number, got",
    r"could not convert string to float:": "expected a number, got",
    r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.": lambda found: _choices(*found.groups()),
    r"Missing value for argument '(.*)'\. Expected \d+ values\.": r"\1 needs a value",
    r" \(required\)": "",
}


class Misread(ValueError):
    """A mistake on the command line itself, which every process of a run finds alike."""


def parse(target: Callable[..., Any], arguments: Sequence[str], prog: str, **settings: Any) -> Any:
    """What tyro makes of the arguments. Raises Misread, one line, where tyro would draw a box and leave."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            found, unknown = tyro.cli(target, args=list(arguments), prog=prog, return_unknown_args=True, **settings)
    except SystemExit as left:
        if left.code != MISTAKE:  # --help
            raise
        raise Misread(_line(box.getvalue(), left, prog)) from None
    if options := [word for word in unknown if word.startswith("-")]:
        known = _options(target, prog, settings)
        raise Misread(f"unknown option {options[0]}; {nearest(options[0].partition('=')[0], known)} ({prog} --help)")
    if unknown:
        raise Misread(f"{' '.join(unknown)!r} belongs to no option ({prog} --help)")
    return found


def _line(box: str, left: SystemExit, prog: str) -> str:
    """What a box of tyro's says, without its frame and what stands below its first rule.

    What a check of launcher/config.py raised is taken as it was: the box breaks long words, and says no option's name.
    """
    lines = [line.strip(" │") for line in box.partition("│ ──")[0].splitlines() if line[:1] not in "╭╰"]
    said = " ".join(lines).strip().removeprefix("Error parsing ")
    cause: BaseException | None = left
    while cause is not None and not isinstance(cause, ValueError):
        cause = cause.__context__
    if cause is not None and not said.startswith("-"):
        return str(cause)
    for pattern, plainly in PLAINLY.items():
        said = re.sub(pattern, plainly, said)
    return f"{said} ({prog} --help)"


def _choices(given: str, option: str, expected: str) -> str:
    """tyro lists them in the order of a set, None among them."""
    choices = set(expected.replace("'", "").split(", ")) - {"None"}
    return f"{option} {given}: expected one of {', '.join(sorted(choices))}"


def _options(target: Callable[..., Any], prog: str, settings: Mapping[str, Any]) -> set[str]:
    """Every option of a command, as its help shows them."""
    shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            tyro.cli(target, args=["--help"], prog=prog, **settings)
    except SystemExit:
        pass
    lines = re.findall(r"^[│ ]*(-.*?)(?:  |│|$)", shown.getvalue(), re.MULTILINE)
    return {option for line in lines for option in re.findall(r"--[a-z][a-z0-9-]*", line)}
