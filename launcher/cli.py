"""The command line: parse, then call one function. Nothing heavy is imported before it is clear what for."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import tyro

from launcher.config import Config

MISTAKE = 2
FLAT = (tyro.conf.OmitArgPrefixes,)
FOR_CALLERS = {"Console", "Party", "TextIO"}  # parameters of these types are no options


class Command(NamedTuple):
    """Where a command's function is; its signature and docstring are the options and their help."""

    target: str  # module:function
    summary: str


HEAD = "Fine-tune large language models by training only the diagonal of a frozen matrix factorisation."
FOOT = "Options: loldu COMMAND --help. Training is started by a recipe: python recipes/NAME.py --help"
COMMANDS: Mapping[str, Command] = {
    "factorize": Command("launcher.factorization.commands:factorize", "make and cache the frozen factors of a model"),
    "cache ls": Command("launcher.factorization.commands:cache_ls", "list the cached factors"),
    "cache verify": Command("launcher.factorization.commands:cache_verify", "check every cached file"),
    "cache prune": Command("launcher.factorization.commands:cache_prune", "remove what was used longest ago"),
    "generate": Command("launcher.inference.generate:generate", "answer a prompt with a model, adapter or run"),
    "chat": Command("launcher.inference.chat:chat", "talk with a model, adapter or run"),
    "merge": Command("launcher.inference.merge:merge", "write base and adapter as one plain model"),
    "export-lora": Command("launcher.inference.export:export_lora", "write an adapter as a LoRA for stock PEFT"),
    "submit": Command("launcher.cluster.commands:submit", "run a recipe on Slurm"),
    "launch": Command("launcher.cluster.commands:launch", "run a recipe on the hosts of a file, over ssh"),
    "status": Command("launcher.cluster.commands:status", "how runs stand"),
    "logs": Command("launcher.cluster.commands:logs", "the ends of a run's logs; -f follows them"),
    "cancel": Command("launcher.cluster.commands:cancel", "ask a run to save and stop, for good"),
    "doctor": Command("launcher.cluster.commands:doctor", "check this machine, a file's hosts or a job's nodes"),
    "simulate-preempt": Command(
        "launcher.cluster.commands:simulate_preempt", "interrupt a live run; does it come back?"
    ),
}


def main(arguments: Sequence[str]) -> int:
    """The `loldu` command; returns its exit code."""
    words = 2 if arguments[:1] == ["cache"] else 1
    name, rest = " ".join(arguments[:words]), list(arguments[words:])
    if name in ("", "-h", "--help"):
        print(overview())
        return 0 if name else MISTAKE
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n\n{overview()}", file=sys.stderr)
        return MISTAKE
    known = {}
    if name in ("submit", "launch"):  # the recipe's own options are handed on unread
        from launcher.cluster.commands import split_recipe_options

        rest, known["recipe_options"] = split_recipe_options(name, rest)
    return guarded(lambda: tyro.cli(command(COMMANDS[name].target, known), args=rest, prog=f"loldu {name}"))


def overview() -> str:
    """All commands, a line each."""
    lines = [f"  loldu {name:<16} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([HEAD, "", *lines, "", FOOT])


def command(target: str, known: Mapping[str, Any]) -> Callable[..., Any]:
    """The function of a command as tyro should see it: what must lead is positional, what callers pass is left out.

    known are arguments that are there already.
    """
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    hints = get_type_hints(function, include_extras=True)
    shown = {}
    for parameter in inspect.signature(function).parameters.values():
        hint: Any = hints[parameter.name]
        if parameter.name in known or FOR_CALLERS & {getattr(part, "__name__", "") for part in get_args(hint)}:
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and parameter.default is inspect.Parameter.empty:
            hint = Annotated[hint, tyro.conf.Positional]
        elif parameter.name == "cache_folder":
            hint = Annotated[hint, tyro.conf.arg(name="cache")]
        shown[parameter.name] = parameter.replace(annotation=hint)

    def call(*positional: Any, **options: Any) -> Any:
        return function(*positional, **known, **options)

    call.__signature__ = inspect.Signature(list(shown.values()))  # type: ignore[attr-defined]
    call.__annotations__ = {name: parameter.annotation for name, parameter in shown.items()}
    call.__doc__ = function.__doc__
    return call


def run_recipe(name: str, default: Callable[[], Config], tiny: Callable[[], Config], arguments: Sequence[str]) -> int:
    """Run a recipe. Its own base or data that cannot be had is replaced by the embedded default, said in a banner.

    What the user names is never replaced: an explicit --model or --data that is missing is an error.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Config):
        tiny: bool = False
        """Run the small Llama and the instructions that come with the project: minutes on a CPU, no network."""

    def parse(config: Config) -> Options:
        return tyro.cli(
            Options, default=Options(**vars(config)), args=list(arguments), prog=f"recipes/{name}.py", config=FLAT
        )

    def act() -> int:
        options = parse(tiny() if "--tiny" in arguments else default())
        own = {flag for flag in ("--model", "--data") if any(a.split("=")[0] == flag for a in arguments)}
        if not options.tiny and not own:
            from launcher.availability import unavailable

            if reason := unavailable(options.model.model, options.data.data):
                text = (
                    f"{reason}: running the embedded default instead (--tiny). Name your own: --model DIR --data FILE"
                )
                if os.environ.get("RANK", "0") == "0":
                    print(f"{'=' * 80}\n{text}\n{'=' * 80}", flush=True)
                options = parse(tiny())
        from launcher.training.run import run

        parts = {part: value for part, value in vars(options).items() if part != "tiny"}
        return run(Config(**parts), name)

    return guarded(act)


def guarded(act: Callable[[], Any]) -> int:
    """The user's mistakes become one line and exit code 2; a command that returns nothing has succeeded."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advertises an optional package at import
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # our own words and bars are enough
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        result = act()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0
