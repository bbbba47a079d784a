"""The `loldu` command: find the command's function, parse its options, call it. Imports nothing heavy before that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launcher.config import nearest
from launcher.exit_codes import DONE, MISTAKE
from launcher.options import parse_call
from launcher.start import guarded, train


class Command(NamedTuple):
    """A command's function, whose signature and docstring give the options and their help."""

    target: str  # module:function
    summary: str


HEAD = "Fine-tune large language models by training a small core between frozen factors of each weight."
FOOT = "Options of a command: loldu COMMAND --help"
COMMANDS: Mapping[str, Command] = {
    "train": Command("launcher.start:train", "train with a recipe or a file of settings"),
    "plan": Command("launcher.planning.command:plan", "predict memory, time and disk of a run, and what fits"),
    "sweep": Command("launcher.sweeps.commands:sweep", "train with several methods or settings and compare them"),
    "factorize": Command("launcher.factorization.commands:factorize", "compute and cache a model's factors"),
    "cache ls": Command("launcher.factorization.commands:cache_ls", "list the cached factors"),
    "cache verify": Command("launcher.factorization.commands:cache_verify", "verify every cached file"),
    "cache prune": Command("launcher.factorization.commands:cache_prune", "remove the least recently used factors"),
    "generate": Command("launcher.inference.commands:generate", "generate answers with a model, adapter or run"),
    "predict": Command("launcher.inference.commands:predict", "name the classes of texts or images with a classifier"),
    "eval": Command("launcher.evaluation.command:evaluate", "evaluate a model, adapter or run on files and tasks"),
    "chat": Command("launcher.inference.commands:chat", "chat with a model, adapter or run"),
    "serve": Command("launcher.serving.commands:serve", "serve a model and its adapters over HTTP, as OpenAI does"),
    "merge": Command("launcher.inference.commands:merge", "merge an adapter into its base model"),
    "export-lora": Command("launcher.inference.commands:export_lora", "convert an adapter to LoRA, for stock PEFT"),
    "report": Command("launcher.reports.commands:report", "write the HTML report of a run, or compare several"),
    "submit": Command("launcher.cluster.commands:submit", "train on Slurm"),
    "launch": Command("launcher.cluster.commands:launch", "train on the hosts of a hostfile, over ssh"),
    "status": Command("launcher.cluster.commands:status", "show the state of runs"),
    "logs": Command("launcher.cluster.commands:logs", "show a run's logs; -f follows them"),
    "cancel": Command("launcher.cluster.commands:cancel", "save and stop a run"),
    "doctor": Command("launcher.cluster.commands:doctor", "check this machine, a hostfile or a job's nodes"),
    "simulate-preempt": Command(
        "launcher.cluster.commands:simulate_preempt", "interrupt a live run and check that it resumes"
    ),
}


def main(arguments: Sequence[str]) -> int:
    """The `loldu` command; returns its exit code."""
    words = 2 if arguments[:1] == ["cache"] else 1
    name, rest = " ".join(arguments[:words]), list(arguments[words:])
    if name in ("", "-h", "--help"):
        print(overview())
        return DONE if name else MISTAKE
    if name == "train":
        return train(rest)
    if name == "plan":  # its options are the recipe's
        from launcher.planning.command import plan

        return plan(rest)
    if name not in COMMANDS:
        print(f"error: there is no command loldu {name}; {nearest(name, set(COMMANDS))}", file=sys.stderr)
        return MISTAKE

    def act() -> Any:
        known: dict[str, Any] = {}
        options = rest
        if name in ("submit", "launch"):  # the options of the recipe are passed on as they are
            from launcher.cluster.commands import split_recipe_options

            options, known["recipe_options"] = split_recipe_options(name, rest)
        elif name == "sweep":
            from launcher.sweeps.options import split_recipe_options as split

            options, known["recipe_options"] = split(rest)
        module, _, function = COMMANDS[name].target.partition(":")
        return parse_call(getattr(importlib.import_module(module), function), options, f"loldu {name}", known)()

    return guarded(act)


def overview() -> str:
    """All commands, a line each."""
    lines = [f"  loldu {name:<17} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([HEAD, "", *lines, "", FOOT])
