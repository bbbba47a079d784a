"""`loldu chat`: a conversation with a model in the terminal, or with lines from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TextIO

import torch

from launcher.data.templates import Template, prompt_ids
from launcher.inference.generate import choose_template
from launcher.inference.options import Answering
from launcher.inference.sources import find, load
from launcher.models.files import context_length
from launcher.models.generation import Sampling, stream
from launcher.text import printable

Messages = list[dict[str, str]]
HELP = (
    "/reset clears the conversation, /system TEXT sets the system prompt, /quit or Ctrl-D exits, Ctrl-C stops an answer"
)


def chat(
    model: str,
    how: Answering = Answering(),  # noqa: B008 (frozen)
    *,
    system: str | None = None,
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Chat with a model; `loldu chat` (commands.py) describes the arguments.

    lines is what the user types (standard input by default). Answers go to out (standard output by default), everything
    else to standard error.
    """
    out = out or sys.stdout
    sampling = Sampling(max_tokens=how.max_tokens, temperature=how.temperature, top_p=how.top_p)
    source = find(model, adapter=how.adapter, base=how.base, trust_remote_code=how.trust_remote_code)
    loaded, tokenizer = load(source, dtype=how.dtype, device=how.device, quantize=how.quantize)
    template = choose_template(how.prompt_template, source, tokenizer, conversations=False)
    turns = template.jinja is not None
    if system and not turns:
        raise ValueError(
            f"--system needs a chat template, and template {template.name} is none: put the text into the prompt"
        )
    _note(HELP)
    if not turns:
        _note(f"template {template.name} has no turns: each line is a separate instruction")
    torch.manual_seed(how.seed)
    history: Messages = []
    for line in _typed(lines or sys.stdin):
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            history = []
            _note("(conversation cleared)")
        elif command == "/system" and turns:
            system, history = rest.strip() or None, []
            _note(f"(system prompt {'set' if system else 'removed'}; conversation cleared)")
        elif command == "/system":
            _note(f"template {template.name} has no system prompt: put the text into the question")
        elif command.startswith("/"):
            _note(f"unknown command {command}: {HELP}")
        elif command:
            history = _turn(line.strip(), history, system, loaded, tokenizer, template, sampling, out)


def fit(
    history: Messages, system: str | None, template: Template, tokenizer: Any, room: int
) -> tuple[list[int], Messages]:
    """Token ids of the conversation, and the messages they hold. Drops the oldest question and answer until it fits.

    room is in tokens. The last question always stays, even if it does not fit.
    """
    first: Messages = [{"role": "system", "content": system}] if system else []
    while True:
        ids = prompt_ids({"messages": first + history}, template, tokenizer)
        if len(ids) <= room or len(history) <= 1:
            return ids, history
        history = history[2:]


def _turn(
    question: str,
    history: Messages,
    system: str | None,
    model: Any,
    tokenizer: Any,
    template: Template,
    sampling: Sampling,
    out: TextIO,
) -> Messages:
    """Answer one question. Returns the conversation with it, or unchanged if there is no answer."""

    def write(text: str) -> None:
        print(printable(text), end="", file=out, flush=True)

    asked = [*history, {"role": "user", "content": question}]
    try:
        if template.jinja is None:
            ids = prompt_ids({"instruction": question, "input": "", "output": ""}, template, tokenizer)
        else:
            context = context_length(model)
            ids, kept = fit(asked, system, template, tokenizer, context - min(sampling.max_tokens, context // 2))
            if len(kept) < len(asked):
                _note("(the conversation no longer fits the context: its oldest part is dropped)")
            asked = kept
        answered = stream(model, tokenizer, ids, sampling, write)
    except ValueError as error:
        _note(str(error))
        return history
    write("\n")
    if answered.interrupted:
        _note("(stopped)")
    elif not answered.complete:
        _note(f"(stopped after {len(answered.ids)} tokens)")
    return [*asked, {"role": "assistant", "content": answered.text}] if answered.text.strip() else history


def _note(text: str) -> None:
    """Print to standard error: standard output carries only answers."""
    print(printable(text), file=sys.stderr, flush=True)


def _typed(lines: TextIO) -> Iterator[str]:
    """The user's lines until Ctrl-D or the end of a pipe. Ctrl-C at the prompt discards the line."""
    interactive = lines is sys.stdin and lines.isatty()
    if interactive:
        import readline  # noqa: F401 (gives input() a history and line editing)
    while True:
        try:
            line = input("> ") + "\n" if interactive else lines.readline()
        except EOFError:
            _note("")
            line = ""
        except KeyboardInterrupt:
            _note("\n(/quit or Ctrl-D exits)")
            continue
        if not line:
            return
        yield line
