"""The loop of a conversation in the terminal or from a pipe, for any source of answers. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from launcher.text import printable

Messages = list[dict[str, str]]
Turn = Callable[[str, Messages, str | None], Messages]  # question, messages before, system prompt -> messages after
HELP = (
    "/reset clears the conversation, /system TEXT sets the system prompt, /quit or Ctrl-D exits, Ctrl-C stops an answer"
)


def converse(
    turn: Turn,
    *,
    lines: TextIO,
    system: str | None,
    without_turns: str | None = None,
    more: Mapping[str, tuple[str, Callable[[str], bool]]] | None = None,
) -> None:
    """Ask for each line that the user types.

    without_turns: name of a template that holds one question alone. more: commands by name, each with its help and
    what it does; if that returns true, the conversation starts again.
    """
    more = more or {}
    known = ", ".join([*(f"{name} {about}" for name, (about, _) in more.items()), HELP])
    note(known)
    if without_turns is not None:
        note(f"template {without_turns} has no turns: each line is a separate instruction")
    history: Messages = []
    for line in typed(lines):
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/help":
            note(known)
        elif command == "/reset":
            history = []
            note("(conversation cleared)")
        elif command == "/system" and without_turns is None:
            system, history = rest.strip() or None, []
            note(f"(system prompt {'set' if system else 'removed'}; conversation cleared)")
        elif command == "/system":
            note(f"template {without_turns} has no system prompt: put the text into the question")
        elif command in more:
            history = [] if more[command][1](rest.strip()) else history
        elif command.startswith("/"):
            note(f"unknown command {command}: {known}")
        elif command:
            history = turn(line.strip(), history, system)


def note(text: str) -> None:
    """Print to standard error: standard output carries only answers."""
    print(printable(text), file=sys.stderr, flush=True)


def typed(lines: TextIO) -> Iterator[str]:
    """The user's lines until Ctrl-D or the end of a pipe. Ctrl-C at the prompt discards the line."""
    interactive = lines is sys.stdin and lines.isatty()
    if interactive:
        import readline  # noqa: F401 (gives input() a history and line editing)
    while True:
        try:
            line = input("> ") + "\n" if interactive else lines.readline()
        except EOFError:
            note("")
            line = ""
        except KeyboardInterrupt:
            note("\n(/quit or Ctrl-D exits)")
            continue
        if not line:
            return
        yield line
