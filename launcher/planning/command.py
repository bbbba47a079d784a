"""`loldu plan RECIPE [options]`: what a run will take, and which way to run it fits."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.config import Config, data_name
from launcher.exit_codes import DONE, MISTAKE
from launcher.files import user_path
from launcher.options import Misread
from launcher.packages import without_bitsandbytes

PLAN = """usage: loldu plan RECIPE|FILE [options]

Predict what a run takes, from the model's config.json and file headers alone: memory of each process, cache, bytes
sent, seconds; for every sharding and precision, with a command for one that fits. Nothing is trained and no GPU is
needed. The options are those of loldu train RECIPE, and

  --gpus COUNTxMEMORY|NAME  GPUs of each machine: 8x80GB, 4xA100-80GB, 1xH100 (default: this machine's GPUs, or its CPU)
  --nodes N                 machines (default: 1)
  --processes N             processes on this machine's CPU, without --gpus (default: 1)
  --json                    print JSON alone on standard output; peak_bytes is that of a process of the run as asked"""
OWN = {"--gpus": str, "--nodes": int, "--processes": int}


def plan(arguments: Sequence[str]) -> int:
    """`loldu plan`; returns the exit code."""
    from launcher.start import guarded, instead_of_training, train

    if not arguments or {"-h", "--help"} & set(arguments[:1]):
        print(PLAN)
        return DONE if arguments else MISTAKE
    asked: dict[str, Any] = {}
    rest: list[str] = []
    if code := guarded(lambda: rest.extend(_split(arguments, asked))):
        return code

    def act(config: Config, name: str, instead: Any = None, **_: Any) -> int:
        with without_bitsandbytes():
            return _act(config, instead, rest, asked)

    with _uncollected(), instead_of_training(act):
        return train(rest)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which takes a fifth of this short command: its imports make a million objects."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _split(arguments: Sequence[str], asked: dict[str, Any]) -> list[str]:
    """The words that belong to the recipe; the plan's own options go into asked. Raises Misread."""
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--json" and not equals:
            asked["json"] = True
        elif flag in OWN:
            text = value if equals else next(words, "")
            if not text or text.startswith("--"):
                raise Misread(f"{flag}: expected one value (loldu plan --help)")
            try:
                asked[flag.removeprefix("--")] = OWN[flag](text)
            except ValueError:
                raise Misread(f"{flag}: expected a whole number, got {text!r} (loldu plan --help)") from None
        else:
            rest.append(word)
    if {"gpus", "processes"} <= asked.keys():
        raise Misread("--processes counts processes of a CPU: leave it out with --gpus 8x80GB, which has a count")
    return rest


def _act(config: Config, instead: Any, words: Sequence[str], asked: dict[str, Any]) -> int:
    from launcher.planning.machines import parse
    from launcher.planning.predict import predict
    from launcher.planning.show import as_json, show
    from launcher.tasks.choose import task_of
    from launcher.training.run import quiet_libraries

    quiet_libraries()
    if (task := task_of(config)).unplanned is not None:
        raise ValueError(
            f"loldu plan does not predict {task.unplanned}: loldu train with the same options and --max-steps 1 prints "
            "the memory that a step takes"
        )
    extra: list[str] = []
    folder = _folder(config)
    if folder is None and instead is not None:
        own = config.model.model
        note = f"{own} is not here: this plans the embedded model, which the recipe would train instead"
        print(f"{note}. To plan {own}: hf download {own} config.json, or --model DIR", file=sys.stderr)
        config, extra = instead(), ["--tiny"]
        folder = _folder(config)
    if folder is None:
        raise ValueError(
            f"--model {config.model.model} is neither a folder here nor in the hub cache: give a folder with at least "
            f"the model's config.json (hf download {config.model.model} config.json)"
        )
    machines = parse(asked.get("gpus"), asked.get("nodes", 1), asked.get("processes", 1))
    found = predict(config, folder, machines)
    line = command(found, [*words, *extra])
    if asked.get("json"):
        print(as_json(found, line))
    else:
        show(found, line, data_name(config.data.data))
    return DONE


def _folder(config: Config) -> Path | None:
    """The folder with the base's config.json; its weights may be missing."""
    from adapters.checkpoint_files import local_folder

    named = user_path(config.model.model)
    folder = named if named.is_dir() else local_folder(config.model.model)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def command(found: Any, words: Sequence[str]) -> str | None:
    """The line that starts the recommended way; None if nothing fits."""
    way, machines = found.recommended(), found.machines
    if way is None:
        return None
    options = list(words[1:])
    for flag, value, before in (
        ("--sharding", way.sharding, found.config.run.sharding),
        ("--quantize", way.quantize, found.config.model.quantize),
        ("--dtype", way.dtype, found.resolved.dtype),
    ):
        if value != before and not (flag == "--sharding" and before is None and value == found.resolved.sharding):
            options += [flag, value]
    if way.checkpointing != found.config.model.gradient_checkpointing:
        options.append("--gradient-checkpointing" if way.checkpointing else "--no-gradient-checkpointing")
    recipe = words[0]
    if machines.nodes > 1:
        start = ["loldu", "submit", recipe, "--nodes", str(machines.nodes)]
        return shlex.join([*start, "--gpus-per-node", str(machines.local), "--", *options])
    if machines.local > 1:
        start = ["torchrun", "--standalone", "--nproc-per-node", str(machines.local), "-m", "launcher", "train"]
        return shlex.join([*start, recipe, *options])
    return shlex.join(["loldu", "train", recipe, *options])
