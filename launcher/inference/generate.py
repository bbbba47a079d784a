"""`loldu generate`: answers to a prompt, or to every record of a file, as text or as JSON lines."""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from launcher.data.records import Record, load_records, question
from launcher.data.records import answer as expected_answer
from launcher.data.templates import Template, load_template, prompt_ids, render_prompt
from launcher.inference.sources import Quantize, Source, find, load
from launcher.models.files import context_length
from launcher.models.generation import Answer, Sampling, answer, stream

CHUNK = 512  # records answered between two writes of JSON lines


def generate(
    model: str,
    *,
    adapter: str | None = None,
    base: str | None = None,
    prompt: str | None = None,
    prompt_file: str | None = None,
    input: str = "",
    data: str | None = None,
    limit: int = 0,
    prompt_template: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    quantize: Quantize = "auto",
    device: str = "auto",
    json: bool = False,
    out: TextIO | None = None,
) -> list[Answer]:
    """Answer a prompt, or every record of a file.

    Args:
        model: A model (folder or hub name on this machine), an adapter folder, or a run folder (runs/NAME).
        adapter: Adapter or run folder to put on the model.
        base: Base model of an adapter or run given as the first argument, where its own is not to be found.
        prompt: The instruction. Without --prompt, --prompt-file and --data it is read from standard input.
        prompt_file: File with one instruction; - is standard input.
        input: Input that belongs to the instruction.
        data: JSON, JSONL or parquet file of records; each is answered and its own answer shown beside it.
        limit: Answer only the first so many records; 0: all.
        prompt_template: auto, short, alpaca, chat, a FILE with {instruction} and {input}, or none (the bare prompt).
            By default what the run recorded; without a run the model's chat template, or alpaca where it has none.
        max_tokens: Most tokens of an answer.
        temperature: 0: always the likeliest token; above: drawn at random, more evenly the higher it is.
        top_p: Draw from the likeliest tokens that have this probability together.
        seed: Of the drawing.
        dtype: auto (the run's, else the files' own), float32, bfloat16 or float16.
        quantize: Precision of the base: auto (as the run trained on it), none, int8, nf4 or fp4.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        json: One JSON object a line: prompt, answer, tokens, complete; with --data also index, expected and match.
        out: Where answers are written; standard output by default.
    """
    out = out or sys.stdout
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    if limit < 0:
        raise ValueError(f"--limit is at least 0 (all records), got {limit}")
    if data is None and limit:
        raise ValueError(f"--limit {limit} counts the records of --data FILE, which is missing")
    records = _asked(prompt, prompt_file, input, data, limit)
    source = find(model, adapter=adapter, base=base)
    loaded, tokenizer = load(source, dtype=dtype, device=device, quantize=quantize)
    template = choose_template(prompt_template, source, tokenizer, conversations="messages" in records[0])
    torch.manual_seed(seed)
    answers: list[Answer] = []
    for answered in _answers(records, loaded, tokenizer, template, sampling, json=json, out=out):
        record = records[len(answers)]
        answers.append(answered)
        if json:
            line: dict[str, Any] = {"prompt": render_prompt(record, template, tokenizer), "answer": answered.text}
            line |= {"tokens": len(answered.ids), "complete": answered.complete}
            if data is not None:
                line |= {"index": len(answers) - 1, "expected": expected_answer(record)}
                line["match"] = _matches(answered, record)
            print(json_text.dumps(line, ensure_ascii=False), file=out, flush=True)
        elif data is not None:
            print(f"expected: {expected_answer(record)}\n", file=out, flush=True)
        if answered.interrupted:
            raise KeyboardInterrupt
    if data is not None:
        right = sum(_matches(answered, record) for answered, record in zip(answers, records, strict=True))
        _say(f"{right} of {len(records)} answers match to the letter")
    elif not answers[0].complete:
        _say(f"(ended after {len(answers[0].ids)} tokens; --max-tokens {max_tokens})")
    return answers


def choose_template(setting: str | None, source: Source, tokenizer: Any, *, conversations: bool) -> Template:
    """The template asked for, else what the run recorded, else the model's own, else alpaca; says which it took."""
    if setting == "none":
        return Template("none", "{instruction}", "{instruction}")
    if setting is not None:
        return load_template(setting, tokenizer, conversations=conversations)
    if source.template is not None:
        template, why = load_template(source.template, tokenizer, conversations=conversations), "recorded by the run"
    elif tokenizer.chat_template:
        template, why = load_template("chat", tokenizer, conversations=conversations), "the model's own"
    else:
        template = load_template("auto", tokenizer, conversations=conversations)
        why = "the model has none of its own; --prompt-template none gives it the bare prompt"
    _say(f"prompt template: {template.name} ({why})")
    return template


def _say(text: str) -> None:
    """Standard output carries answers alone, for pipes."""
    print(text, file=sys.stderr, flush=True)


def _matches(answered: Answer, record: Record) -> bool:
    return answered.text.strip() == expected_answer(record).strip()


def _asked(prompt: str | None, prompt_file: str | None, input: str, data: str | None, limit: int) -> list[Record]:
    """The records to answer. Raises ValueError where there is no prompt, or more than one source of them."""
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--data": data}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
    if data is not None:
        if input:
            raise ValueError("--input belongs to --prompt; the records of --data have their own")
        records = load_records(data)
        return records[:limit] if limit else records
    if prompt is None and prompt_file in (None, "-"):
        if sys.stdin.isatty():
            raise ValueError(
                "nothing to answer: give --prompt TEXT, --prompt-file FILE, --data FILE, or pipe a prompt in"
            )
        prompt = sys.stdin.read()
    elif prompt_file is not None:
        try:
            prompt = Path(prompt_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--prompt-file {prompt_file} cannot be read ({error}): give a text file in UTF-8"
            ) from None
    assert prompt is not None
    if not prompt.strip():
        raise ValueError("the prompt is empty: give --prompt TEXT")
    return [{"instruction": prompt.rstrip("\n"), "input": input, "output": ""}]


def _answers(
    records: list[Record],
    model: Any,
    tokenizer: Any,
    template: Template,
    sampling: Sampling,
    *,
    json: bool,
    out: TextIO,
) -> Iterator[Answer]:
    """The answer to each record in order: streamed to out, or in silence for JSON, greedy ones then in batches."""

    def write(text: str) -> None:
        if not json:
            print(text, end="", file=out, flush=True)

    if json and sampling.temperature == 0 and len(records) > 1:
        context = context_length(model)
        for start in range(0, len(records), CHUNK):
            prompts = [prompt_ids(record, template, tokenizer) for record in records[start : start + CHUNK]]
            made = answer(model, tokenizer, prompts, sampling.max_tokens)
            for prompt, ids in zip(prompts, made, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                full = len(ids) >= min(sampling.max_tokens, context - len(prompt))
                yield Answer(text=text, ids=ids, complete=not full)
        return
    for index, record in enumerate(records):
        if len(records) > 1 and not json:
            print(f"[{index + 1} of {len(records)}] {question(record)}\nanswer:   ", end="", file=out)
        answered = stream(model, tokenizer, prompt_ids(record, template, tokenizer), sampling, write)
        write("\n")
        yield answered
