"""One call of `loldu eval`: load, evaluate each task with and without the adapter, show, write."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.base import start_in_base
from launcher.data.bad_records import BadRecord
from launcher.data.records import load_records, load_rows
from launcher.data.templates import Template, answer_text, expected_text, prompt_ids
from launcher.evaluation import harness
from launcher.evaluation.choices import Choice, read_choices
from launcher.evaluation.likelihood import Scorer, choice_scores, encoded
from launcher.evaluation.measured import measured, notes
from launcher.evaluation.scores import Score, mean, plain, ratio
from launcher.files import alone, digest, disk_errors, read_json, user_path, write_atomically
from launcher.inference.generate import choose_template
from launcher.inference.load import choose_device, load
from launcher.inference.options import Quantize
from launcher.inference.sources import Source, find
from launcher.models.files import has_tokenizer, load_tokenizer, recorded_run
from launcher.models.generation import answer, room
from launcher.models.same_tokenizer import BaseTokenizer
from launcher.processes import SLOW_S, Communicator, Ranks, connect
from launcher.progress import Bars
from launcher.text import printable

Scores = dict[str, Score]
ANSWERS = 64  # generated between two moves of the bar
MOST_BYTES = 64 << 20  # of a file of results
WHOLE_TASK_S = 24 * 3600.0  # thousands of questions or long answers take hours; the other processes wait


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of the command, which describes them."""

    model: str
    tasks: tuple[str, ...]
    limit: int = 0
    json: bool = False
    adapter: str | None = None
    base: str | None = None
    compare: bool = True
    prompt_template: str | None = None
    max_tokens: int = 64
    out: str | None = None
    dtype: str = "auto"
    quantize: Quantize = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model and what its tasks need."""

    model: Any
    scorer: Scorer
    tokenizer: Any
    source: Source
    comm: Communicator
    bars: Bars
    said: set[str] = field(default_factory=set)  # notes that were printed already
    settings: dict[str, Any] = field(default_factory=dict)  # of the task at hand, which change its scores


def run(asked: Asked) -> dict[str, Any]:
    """Evaluate; returns what is written as JSON. Raises ValueError for mistakes, on all processes."""
    if not asked.tasks:
        raise ValueError("--tasks is empty: give files of records, or names of tasks")
    if asked.limit < 0 or asked.max_tokens < 0:
        raise ValueError(f"--limit and --max-tokens are at least 0, got {asked.limit} and {asked.max_tokens}")
    for task in asked.tasks:
        if not user_path(task).is_file() or Path(task).suffix in (".yaml", ".yml"):
            harness.check_trust(task, asked.trust_remote_code)
            harness.check(task)
            harness.task_name(task)
    source = find(asked.model, adapter=asked.adapter, base=asked.base, trust_remote_code=asked.trust_remote_code)
    comm = connect(Ranks.from_environment())
    try:
        return _run(asked, source, comm)
    finally:
        if comm.ranks.world_size > 1:
            torch.distributed.destroy_process_group()


def _run(asked: Asked, source: Source, comm: Communicator) -> dict[str, Any]:
    ranks = comm.ranks
    file = user_path(asked.out) if asked.out else _run_file(source)
    before = {} if file is None else comm.from_main("the results", lambda: _ready(file))
    names = _names(asked.tasks, before)
    device = choose_device(asked.device)
    if device == "cuda" and ranks.world_size > 1:
        device = f"cuda:{ranks.local_rank}"
    model, tokenizer = comm.each(
        "model", lambda: load(source, dtype=asked.dtype, device=device, quantize=asked.quantize), SLOW_S
    )  # fmt: skip
    console = Console(stderr=True, quiet=not ranks.is_main)
    loaded = Loaded(
        model=model.eval(), scorer=Scorer(model, tokenizer), tokenizer=tokenizer, source=source, comm=comm,
        bars=Bars(console),
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    other_base = bool(asked.base or asked.adapter)
    on = comm.from_main(
        "the weights' digest",
        lambda: measured(source, model, asked.quantize, other_base=other_base),
        SLOW_S,
    )
    for task, name in names.items():
        loaded.settings.clear()
        result = _task(asked, loaded, task, name)
        found[name] = {
            "task": task, "limit": asked.limit or None, "measured": {**on, **loaded.settings}, **result,
        }  # fmt: skip
        if file is not None:  # after each task: a later one may fail
            comm.from_main("the results", partial(_write, file, found))
    if ranks.is_main:
        for note in notes(before, found):
            _say(loaded, note)
        shown = plain({"model": asked.model, "tasks": found})
        if asked.json:
            print(json.dumps(shown, indent=2))
        else:
            _show(found, file)
    return found


def _names(tasks: Sequence[str], before: dict[str, Any]) -> dict[str, str]:
    """The name of each task in the results: of a file its stem, or the path if another file has that stem already."""
    places = {task: user_path(task).resolve() if user_path(task).is_file() else None for task in tasks}
    names: dict[str, str] = {}
    for task, place in places.items():
        stem = task if place is None else Path(task).stem
        earlier = before.get(stem)
        known = str(earlier["task"]) if isinstance(earlier, dict) and "task" in earlier else task
        others = {user_path(known).resolve(), *(each for each in places.values() if each and each.stem == stem)}
        asked_too = any(other == stem and at is None for other, at in places.items())  # a task of the harness
        names[task] = stem if place is None or (others == {place} and not asked_too) else task
    return names


def _run_file(source: Source) -> Path | None:
    """eval.json of the run that the model comes from."""
    place = (source.adapter or source.base).parent
    return place / "eval.json" if recorded_run(place) is not None else None


def _ready(file: Path) -> dict[str, Any]:
    """What `_before` returns, once the file is known to be one that can be written: the tasks may take hours."""
    before = _before(file)
    with disk_errors("the results", file, "give another file with --out"):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    return before


def _before(file: Path) -> dict[str, Any]:
    """The results that the file has, by task. Raises ValueError if it is damaged, rather than lose them."""
    try:
        found = read_json(file, MOST_BYTES)
        if not isinstance(found, dict) or not isinstance(tasks := found.get("tasks", {}), dict):
            raise ValueError("it holds no results")
        return tasks
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{file} cannot be read as a file of results ({reason}): remove it, or give another one with --out"
        ) from None


def _write(file: Path, found: dict[str, Any]) -> None:
    """Add the results to those that the file has of other tasks, one process after another."""
    with disk_errors("the results", file, "give another file with --out"), alone(file.parent):
        whole = {"tasks": {**_before(file), **found}}
        write_atomically(file, json.dumps(plain(whole), indent=2) + "\n")


def _task(asked: Asked, loaded: Loaded, task: str, shown_as: str) -> dict[str, Any]:
    """The scores of the model, and of its base if it has an adapter."""
    path = user_path(task)
    if not path.is_file() or path.suffix in (".yaml", ".yml"):
        measure = _harness(asked, loaded, task)
    else:
        rows = loaded.comm.each("tasks", lambda: load_rows(str(path), "--tasks "))
        loaded.settings["records"] = digest(path)
        questions = loaded.comm.each("tasks", lambda: read_choices(rows, str(path)))
        measure = _choices(asked, loaded, questions) if questions else _records(asked, loaded, path)
    scores: dict[str, Any] = {}
    for name, way in _ways(asked, loaded):
        with way:
            scores[name] = measure(f"{shown_as}, {name}")
    return {"scores": scores}


def _ways(asked: Asked, loaded: Loaded) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    """The model's name and what switches to it."""
    if loaded.source.adapter is None:
        yield "model", nullcontext()
        return
    start = start_in_base(loaded.model.peft_config["default"])
    if asked.compare and start:
        _say(loaded, f"the base is left out: init_lora_weights={start} changes its weights; evaluate it alone")
    elif asked.compare and (other := _other_tokenizer(loaded)):
        _say(loaded, f"the base is left out: the adapter has a tokenizer of its own ({other}); evaluate the base alone")
    elif asked.compare:
        yield "base", loaded.model.disable_adapter()
    yield "adapter", nullcontext()


def _other_tokenizer(loaded: Loaded) -> str | None:
    """How the adapter's tokenizer differs from its base's, in words; None if it does not."""
    source = loaded.source
    if source.adapter is None or source.tokenizer != source.adapter or not has_tokenizer(source.base):
        return None
    base = load_tokenizer(source.base, trust_remote_code=source.trust_remote_code)
    return BaseTokenizer(base).difference(source.adapter)


Measure = Callable[[str], Scores]  # called with what the progress is labelled with


def _shared(loaded: Loaded, count: int) -> list[int]:
    ranks = loaded.comm.ranks
    return list(range(count))[ranks.rank :: ranks.world_size]


@contextmanager
def _progress(loaded: Loaded, what: str, of: int) -> Iterator[Callable[[int], None]]:
    """A bar of the samples that all processes have done, as a function of how many this one has done."""
    store, before = loaded.comm.store, 0
    key = loaded.comm.from_main("a name for the work", lambda: f"loldu/evaluated/{uuid.uuid4().hex}")
    with loaded.bars.bar(what, of) as bar:

        def tick(done: int) -> None:
            nonlocal before
            bar(done if store is None else store.add(key, done - before))
            before = done

        yield tick
        bar(of)


def _gathered(loaded: Loaded, mine: list[Any]) -> list[Any]:
    """What each process found, in the order of the samples that `_shared` dealt out."""
    parts = loaded.comm.gather("scores", mine, WHOLE_TASK_S)
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(map(len, parts)))]


def _template(asked: Asked, loaded: Loaded, *, conversations: bool) -> Template:
    """The template; the first process prints it, once for all tasks."""

    template = choose_template(
        asked.prompt_template, loaded.source, loaded.tokenizer, conversations=conversations, say=partial(_say, loaded)
    )
    loaded.settings["prompt_template"] = template.name
    return template


def _say(loaded: Loaded, text: str) -> None:
    """Print a note once."""
    if text not in loaded.said:
        loaded.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        loaded.said.add(text)


def _choices(asked: Asked, loaded: Loaded, questions: Sequence[Choice]) -> Measure:
    some = questions[: asked.limit or len(questions)]
    template = _template(asked, loaded, conversations=False)

    def measure(what: str) -> Scores:
        mine = _shared(loaded, len(some))
        with _progress(loaded, what, len(some)) as tick:
            found = _gathered(loaded, choice_scores(loaded.scorer, loaded.tokenizer, template, some, mine, tick))
        right = [each for each in found if each is not None]
        if not right:
            raise ValueError(f"none of {len(found)} questions fits the model's context")
        scores = {"acc": mean([each[0] for each in right]), "acc_norm": mean([each[1] for each in right])}
        return scores if len(right) == len(found) else {**scores, "left_out": _count(len(found) - len(right))}

    return measure


def _count(number: int) -> Score:
    return {"value": number, "stderr": math.nan, "n": number}


def _records(asked: Asked, loaded: Loaded, file: Path) -> Measure:
    records: list[Any] = loaded.comm.each("tasks", lambda: list(load_records(str(file), option="--tasks ")))
    records = records[: asked.limit or len(records)]
    chat = "messages" in records[0]
    template = _template(asked, loaded, conversations=chat)
    with loaded.bars.bar(f"tokenising {file.name}", len(records), brief=True) as bar:
        data = loaded.comm.each("tasks", lambda: encoded(records, loaded.tokenizer, loaded.model, template, bar))
    if asked.max_tokens:
        loaded.settings["max_tokens"] = asked.max_tokens
    asked_for: list[tuple[list[int], str]] = []
    for record in records if asked.max_tokens else ():
        with suppress(BadRecord):
            expected = expected_text(record, template, loaded.tokenizer)
            ids = prompt_ids(record, template, loaded.tokenizer)
            if len(ids) < room(loaded.model):  # else it has no answer, right or wrong
                asked_for.append((ids, expected))

    def measure(what: str) -> Scores:
        mine = _shared(loaded, len(data))
        with _progress(loaded, what, len(data)) as tick:
            losses = _gathered(loaded, [list(each) for each in loaded.scorer.sample_losses(data, mine, tick)])
        scores = {"loss": ratio(losses)}
        if asked_for:
            mine = _shared(loaded, len(asked_for))
            right: list[float] = []
            with _progress(loaded, f"{what}, answers", len(asked_for)) as tick:
                for start in range(0, len(mine), ANSWERS):
                    part = [asked_for[place] for place in mine[start : start + ANSWERS]]
                    made = answer(loaded.model, loaded.tokenizer, [ids for ids, _ in part], max_tokens=asked.max_tokens)
                    texts = [answer_text(loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]
                    right += [float(text == wanted) for text, (_, wanted) in zip(texts, part, strict=True)]
                    tick(len(right))
                matches = _gathered(loaded, right)
            scores["exact_match"] = mean(matches)
        counts = {"truncated": data.report.truncated, "left_out": data.report.dropped}
        return scores | {name: _count(count) for name, count in counts.items() if count}

    return measure


def _harness(asked: Asked, loaded: Loaded, task: str) -> Measure:
    """A task of lm-evaluation-harness, which runs on the first process alone; the others get its scores."""

    given = "" if asked.prompt_template is None else f" (--prompt-template {asked.prompt_template} is for files)"
    _say(loaded, f"{task}: prompts as lm-evaluation-harness writes them, without a prompt or chat template{given}")

    def act() -> Scores:
        with redirect_stdout(sys.stderr):
            return harness.evaluate(task, loaded.model, loaded.tokenizer, limit=asked.limit)

    def measure(what: str) -> Scores:
        return loaded.comm.from_main("task", act, WHOLE_TASK_S)

    return measure


def _show(found: dict[str, dict[str, Any]], file: Path | None) -> None:
    table = Table()
    names = list(dict.fromkeys(name for task in found.values() for name in task["scores"]))
    for name in ("task", "metric", *names, "samples"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, result in found.items():
        metrics = dict.fromkeys(metric for scores in result["scores"].values() for metric in scores)
        for metric in metrics:
            given = [result["scores"].get(name, {}).get(metric) for name in names]
            count = next((f"{each['n']:,.0f}" for each in given if each), "")
            table.add_row(Text(printable(task)), Text(printable(metric)), *map(shown, given), count)
    console = Console(highlight=False)
    console.print(table)
    if file is not None:
        console.print(Text(printable(f"saved {file}")), soft_wrap=True)


def shown(score: Score | None) -> str:
    """0.8125 ± 0.0101; a count as it is."""
    if score is None:
        return ""
    if isinstance(score["value"], int):
        return f"{score['value']:,}"
    error = score["stderr"]
    return f"{score['value']:.4f}" + (f" ± {error:.4f}" if error == error and error is not None else "")
