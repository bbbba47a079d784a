"""`loldu chat`: a talk with a model in the terminal, or with lines from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from rich.console import Console

from launcher.data.templates import Template, prompt_ids
from launcher.inference.generate import choose_template
from launcher.inference.sources import Quantize, find, load
from launcher.models.files import context_length
from launcher.models.generation import Sampling, stream

Messages = list[dict[str, str]]
HELP = "/reset forgets the talk, /system TEXT sets the model's role, /quit or Ctrl-D leaves; Ctrl-C stops an answer"


def chat(
    model: str,
    *,
    adapter: str | None = None,
    base: str | None = None,
    prompt_template: str | None = None,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    quantize: Quantize = "auto",
    device: str = "auto",
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Talk with a model.

    Args:
        model: A model (folder or hub name on this machine), an adapter folder, or a run folder (runs/NAME).
        adapter: Adapter or run folder to put on the model.
        base: Base model of an adapter or run given as the first argument, where its own is not to be found.
        prompt_template: auto, short, alpaca, chat, a FILE with {instruction} and {input}, or none (the bare prompt).
            By default what the run recorded; without a run the model's chat template, or alpaca where it has none.
        system: What the model is to be, before the first turn; needs a chat template.
        max_tokens: Most tokens of an answer.
        temperature: 0: always the likeliest token; above: drawn at random, more evenly the higher it is.
        top_p: Draw from the likeliest tokens that have this probability together.
        seed: Of the drawing.
        dtype: auto (the run's, else the files' own), float32, bfloat16 or float16.
        quantize: Precision of the base: auto (as the run trained on it), none, int8, nf4 or fp4.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        lines: What the user types; standard input by default.
        out: Where answers are written; standard output by default. Everything else goes to standard error.
    """
    out = out or sys.stdout
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    source = find(model, adapter=adapter, base=base)
    loaded, tokenizer = load(source, dtype=dtype, device=device, quantize=quantize)
    template = choose_template(prompt_template, source, tokenizer, conversations=False)
    turns = template.jinja is not None
    if system and not turns:
        raise ValueError(f"--system needs a chat template, {template.name} has no place for it: say it in the prompt")
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    notes.print(HELP, markup=False)
    if not turns:
        notes.print(f"each line is an instruction by itself: template {template.name} has no turns", markup=False)
    torch.manual_seed(seed)
    history: Messages = []
    for line in _typed(lines or sys.stdin, notes):
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            history = []
            notes.print("(forgotten)")
        elif command == "/system" and turns:
            system, history = rest.strip() or None, []
            notes.print("(set; the talk begins anew)" if system else "(none; the talk begins anew)")
        elif command == "/system":
            notes.print(f"the template {template.name} has no place for it: put it in the question", markup=False)
        elif command.startswith("/"):
            notes.print(f"unknown command {command}: {HELP}", markup=False)
        elif command:
            history = _turn(line.strip(), history, system, loaded, tokenizer, template, sampling, out, notes)


def fit(
    history: Messages, system: str | None, template: Template, tokenizer: Any, room: int
) -> tuple[list[int], Messages]:
    """Token ids of the talk, and what of it they hold: the oldest questions and answers go until room is enough.

    The last question always stays, whether it fits or not.
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
    notes: Console,
) -> Messages:
    """Answer one question; returns the talk with it, or as it was where there is no answer."""

    def write(text: str) -> None:
        print(text, end="", file=out, flush=True)

    asked = [*history, {"role": "user", "content": question}]
    try:
        if template.jinja is None:
            ids = prompt_ids({"instruction": question, "input": "", "output": ""}, template, tokenizer)
        else:
            context = context_length(model)
            ids, kept = fit(asked, system, template, tokenizer, context - min(sampling.max_tokens, context // 2))
            if len(kept) < len(asked):
                notes.print("(the oldest part of the talk no longer fits and is forgotten)")
            asked = kept
        answered = stream(model, tokenizer, ids, sampling, write)
    except ValueError as error:
        notes.print(str(error), markup=False)
        return history
    write("\n")
    if answered.interrupted:
        notes.print("(stopped)")
    elif not answered.complete:
        notes.print(f"(ended after {len(answered.ids)} tokens)")
    return [*asked, {"role": "assistant", "content": answered.text}] if answered.text.strip() else history


def _typed(lines: TextIO, notes: Console) -> Iterator[str]:
    """The user's lines until Ctrl-D or the end of a pipe. Ctrl-C at the prompt drops the line."""
    interactive = lines is sys.stdin and lines.isatty()
    if interactive:
        import readline  # noqa: F401 (gives input() a history and line editing)
    while True:
        try:
            line = input("> ") + "\n" if interactive else lines.readline()
        except EOFError:
            notes.print()
            line = ""
        except KeyboardInterrupt:
            notes.print("\n(/quit or Ctrl-D leaves)")
            continue
        if not line:
            return
        yield line
