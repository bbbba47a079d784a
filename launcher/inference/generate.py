"""`loldu generate`: answer a prompt, or every record of a file, as text or as JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TextIO

import torch
from rich.console import Console

from launcher.data.records import Record, load_records, question
from launcher.data.templates import (
    Template,
    answer_text,
    check_template,
    expected_text,
    load_template,
    prompt_ids,
    render_prompt,
)
from launcher.files import user_path
from launcher.inference.load import load
from launcher.inference.options import Answering, Drawing
from launcher.inference.pictures import Drawn, draw, find_drawn
from launcher.inference.sources import Source, find
from launcher.models.files import context_length
from launcher.models.generation import Answer, Sampling, answer, room, stream
from launcher.progress import Bars, Show, silent
from launcher.text import json_line, printable

CHUNK = 512  # records per batch of JSON lines


def generate(
    model: str,
    how: Answering = Answering(),  # noqa: B008 (frozen)
    *,
    prompt: str | None = None,
    prompt_file: str | None = None,
    input: str = "",
    data: str | None = None,
    limit: int = 0,
    json: bool = False,
    drawing: Drawing = Drawing(),  # noqa: B008 (frozen)
    out: TextIO | None = None,
) -> list[Answer]:
    """Answer a prompt, or every record of a file; `loldu generate` (commands.py) describes the arguments.

    Answers go to out (standard output by default), everything else to standard error.
    """
    out = out or sys.stdout
    if (drawn := find_drawn(model, how.base)) is not None:
        _draw(drawn, how, drawing, prompt=prompt, prompt_file=prompt_file, data=data, json=json)
        return []
    if drawing.prompts:
        raise ValueError(f"--prompts is for models that draw pictures, and {model} writes text: give --prompt TEXT")
    sampling = Sampling(max_tokens=how.max_tokens, temperature=how.temperature, top_p=how.top_p)
    if limit < 0:
        raise ValueError(f"--limit must be at least 0 (all records), got {limit}")
    if data is None and limit:
        raise ValueError(f"--limit {limit} counts the records of --data FILE: give --data FILE as well")
    records = _asked(prompt, prompt_file, input, data, limit)
    source = find(model, adapter=how.adapter, base=how.base, trust_remote_code=how.trust_remote_code)
    loaded, tokenizer = load(source, dtype=how.dtype, device=how.device, quantize=how.quantize)
    template = choose_template(how.prompt_template, source, tokenizer, conversations="messages" in records[0])
    torch.manual_seed(how.seed)
    answers: list[Answer] = []
    for answered in _shown(records, loaded, tokenizer, template, sampling, json=json, out=out):
        record = records[len(answers)]
        answers.append(answered)
        if json:
            line: dict[str, Any] = {"prompt": render_prompt(record, template, tokenizer), "answer": answered.text}
            line |= {"tokens": len(answered.ids), "complete": answered.complete}
            if data is not None:
                line |= {"index": len(answers) - 1, "expected": expected_text(record, template, tokenizer)}
                line["match"] = answer_text(answered.text) == line["expected"]
            print(json_line(line), file=out, flush=True)
        elif data is not None:
            print(f"expected: {printable(expected_text(record, template, tokenizer))}\n", file=out, flush=True)
        if answered.interrupted:
            raise KeyboardInterrupt
    if data is not None:
        right = sum(
            answer_text(answered.text) == expected_text(record, template, tokenizer)
            for answered, record in zip(answers, records, strict=True)
        )
        _note(f"{right} of {len(records)} answers match exactly")
        if full := sum(not each.ids and not each.complete for each in answers):
            _note(f"{full} prompts fill the model's context ({context_length(loaded)} tokens) and have no answer")
    elif not answers[0].complete:
        _note(f"(stopped after {len(answers[0].ids)} tokens: --max-tokens {how.max_tokens}, or the context is full)")
    return answers


def _draw(
    drawn: Drawn, how: Answering, drawing: Drawing, *, prompt: str | None, prompt_file: str | None, data: str | None,
    json: bool,
) -> None:  # fmt: skip
    """Pictures instead of answers. Raises ValueError for options that only answers have."""
    for option, value in {"prompt-file": prompt_file, "data": data, "adapter": how.adapter}.items():
        if value is not None:
            raise ValueError(f"--{option} is for models that write text: give --prompts TEXT ... to draw pictures")
    if prompt is not None:
        drawing = replace(drawing, prompts=(prompt, *drawing.prompts))
    if not drawing.prompts:
        raise ValueError("this model draws pictures: give --prompts TEXT ...")
    draw(drawn, drawing, seed=how.seed, dtype=how.dtype, device=how.device, as_json=json)


def _note(text: str) -> None:
    """Print to standard error: standard output carries only answers, for pipes."""
    print(printable(text), file=sys.stderr, flush=True)


def choose_template(
    setting: str | None,
    source: Source,
    tokenizer: Any,
    *,
    conversations: bool,
    say: Callable[[str], None] = _note,
) -> Template:
    """The requested template, else the run's, else the model's chat template, else alpaca. Says which it chose."""
    if setting is not None:
        return load_template(setting, tokenizer, conversations=conversations)
    if source.saved_template is not None:
        template, why = check_template(source.saved_template, conversations=conversations), "saved with the model"
    elif source.template is not None:
        template, why = load_template(source.template, tokenizer, conversations=conversations), "the run's"
    elif tokenizer.chat_template:
        template, why = load_template("chat", tokenizer, conversations=conversations), "the model's chat template"
    else:
        template = load_template("auto", tokenizer, conversations=conversations)
        why = "the model has no chat template; --prompt-template none sends the bare prompt"
    say(f"prompt template: {template.name} ({why})")
    return template


def _asked(prompt: str | None, prompt_file: str | None, input: str, data: str | None, limit: int) -> list[Record]:
    """The records to answer. Raises ValueError if there is no prompt, or more than one source of prompts."""
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--data": data}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} cannot be combined: give one of them")
    if data is not None:
        if input:
            raise ValueError("--input belongs to --prompt, and the records of --data have their own: leave it out")
        records = load_records(data)
        return records[:limit] if limit else records
    if prompt is None and prompt_file in (None, "-"):
        if sys.stdin.isatty():
            raise ValueError(
                "there is no prompt: give --prompt TEXT, --prompt-file FILE or --data FILE, or pipe a prompt in"
            )
        prompt = sys.stdin.read()
    elif prompt_file is not None:
        try:
            prompt = user_path(prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--prompt-file {prompt_file} cannot be read ({error}): give a text file in UTF-8"
            ) from None
    assert prompt is not None
    if not prompt.strip():
        raise ValueError("the prompt is empty: give --prompt TEXT")
    return [{"instruction": prompt.rstrip("\n"), "input": input, "output": ""}]


def _shown(records: list[Record], *how: Any, json: bool, out: TextIO) -> Iterator[Answer]:
    """Answers, with a bar on standard error if nobody reads them meanwhile in a terminal."""
    if not json or len(records) == 1 or out.isatty():
        yield from _answers(records, *how, json=json, out=out, show=silent)
        return
    with Bars(Console(stderr=True)).bar("answers", len(records)) as show:
        yield from _answers(records, *how, json=json, out=out, show=show)


def _answers(
    records: list[Record],
    model: Any,
    tokenizer: Any,
    template: Template,
    sampling: Sampling,
    *,
    json: bool,
    out: TextIO,
    show: Show,
) -> Iterator[Answer]:
    """Answer each record in order. Text is streamed to out; for JSON, greedy answers are generated in batches."""

    def write(text: str) -> None:
        if not json:
            print(printable(text), end="", file=out, flush=True)

    if json and sampling.temperature == 0 and len(records) > 1:
        context = room(model)
        for start in range(0, len(records), CHUNK):
            prompts = [prompt_ids(record, template, tokenizer) for record in records[start : start + CHUNK]]
            made = answer(
                model, tokenizer, prompts, sampling.max_tokens,
                answered=lambda count, start=start: show(start + count, of=len(records)),  # type: ignore[misc]
            )  # fmt: skip
            for prompt, ids in zip(prompts, made, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                full = len(ids) >= min(sampling.max_tokens, context - len(prompt))
                yield Answer(text=text, ids=ids, complete=not full)
        return
    for index, record in enumerate(records):
        if len(records) > 1 and not json:
            print(f"[{index + 1} of {len(records)}] {printable(question(record))}\nanswer:   ", end="", file=out)
        answered = stream(model, tokenizer, prompt_ids(record, template, tokenizer), sampling, write)
        show(index + 1)
        write("\n")
        yield answered
