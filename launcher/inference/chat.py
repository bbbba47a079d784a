"""`loldu chat`: a conversation with a model in the terminal, or with lines from a pipe."""

from __future__ import annotations

import sys
from typing import Any, TextIO

import torch

from launcher.data.templates import Template, conversation_ids, prompt_ids
from launcher.inference.conversation import Messages, converse, note
from launcher.inference.generate import choose_template
from launcher.inference.load import load
from launcher.inference.options import Answering
from launcher.inference.sources import find
from launcher.models.files import context_length
from launcher.models.generation import Sampling, stream
from launcher.text import printable


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
    torch.manual_seed(how.seed)

    def turn(question: str, history: Messages, system: str | None) -> Messages:
        return _turn(question, history, system, loaded, tokenizer, template, sampling, out)

    converse(turn, lines=lines or sys.stdin, system=system, without_turns=None if turns else template.name)


def fit(
    history: Messages, system: str | None, template: Template, tokenizer: Any, room: int
) -> tuple[list[int], Messages]:
    """Token ids of the conversation, and the messages they hold. Drops the oldest question and answer until it fits.

    room is in tokens. The last question always stays, even if it does not fit.
    """
    first: Messages = [{"role": "system", "content": system}] if system else []
    while True:
        ids = conversation_ids(first + history, template, tokenizer)
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
                note("(the conversation no longer fits the context: its oldest part is dropped)")
            asked = kept
        answered = stream(model, tokenizer, ids, sampling, write)
    except ValueError as error:
        note(str(error))
        return history
    write("\n")
    if answered.interrupted:
        note("(stopped)")
    elif not answered.complete:
        note(f"(stopped after {len(answered.ids)} tokens)")
    return [*asked, {"role": "assistant", "content": answered.text}] if answered.text.strip() else history
