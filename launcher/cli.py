"""The command line: parse, then call one function. Nothing heavy is imported before it is clear what for."""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import tyro

from launcher.config import Config, nearest
from launcher.exit_codes import DONE, INTERRUPTED, MISTAKE
from launcher.processes import say_mistake

FLAT = (tyro.conf.OmitArgPrefixes,)
PLAINLY: Mapping[str, str | Callable[[re.Match[str]], str]] = {  # how tyro says it: how we do
    r"no type matching .*>: ": "",
    r"invalid literal for int\(\) with base 10:": "expected a whole number, got",
    r"could not convert string to float:": "expected a number, got",
    r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.": lambda found: _choices(*found.groups()),
    r"Missing value for argument '(.*)'\. Expected \d+ values\.": r"\1 needs a value",
    r" \(required\)": "",
}
FOR_CALLERS = {"Console", "Communicator", "TextIO"}  # parameters of these types are no options


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
    "generate": Command("launcher.inference.commands:generate", "answer a prompt with a model, adapter or run"),
    "chat": Command("launcher.inference.commands:chat", "talk with a model, adapter or run"),
    "merge": Command("launcher.inference.commands:merge", "write base and adapter as one plain model"),
    "export-lora": Command("launcher.inference.commands:export_lora", "write an adapter as a LoRA for stock PEFT"),
    "report": Command("launcher.reports.commands:report", "write the HTML report of a run, or compare several"),
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
        return DONE if name else MISTAKE
    if name not in COMMANDS:
        print(f"error: there is no command loldu {name}; {nearest(name, set(COMMANDS))}", file=sys.stderr)
        return MISTAKE

    def act() -> Any:
        known = {}
        options = rest
        if name in ("submit", "launch"):  # the recipe's own options are handed on unread
            from launcher.cluster.commands import split_recipe_options

            options, known["recipe_options"] = split_recipe_options(name, rest)
        return parse(command(COMMANDS[name].target, known), options, f"loldu {name}")()

    return guarded(act)


def overview() -> str:
    """All commands, a line each."""
    lines = [f"  loldu {name:<16} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([HEAD, "", *lines, "", FOOT])


def command(target: str, known: Mapping[str, Any]) -> Callable[..., Any]:
    """The function of a command as tyro should see it: what must lead is positional, what callers pass is left out.

    known are arguments that are there already. Called with the others it gives the call, ready to be made.
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
            hint = Annotated[hint, tyro.conf.Positional, tyro.conf.arg(metavar=parameter.name.upper())]
        elif parameter.name == "cache_folder":
            hint = Annotated[hint, tyro.conf.arg(name="cache")]
        shown[parameter.name] = parameter.replace(annotation=hint)

    def call(*positional: Any, **options: Any) -> Callable[[], Any]:
        return partial(function, *positional, **known, **options)

    call.__signature__ = inspect.Signature(list(shown.values()))  # type: ignore[attr-defined]
    call.__annotations__ = {name: parameter.annotation for name, parameter in shown.items()}
    call.__doc__ = function.__doc__
    return call


class Misread(ValueError):
    """A mistake on the command line itself: every process of a run finds the same one."""


def parse(target: Callable[..., Any], arguments: Sequence[str], prog: str, **settings: Any) -> Any:
    """What tyro makes of the arguments. Raises Misread, one line, where tyro would draw a box and leave."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            found, unknown = tyro.cli(target, args=list(arguments), prog=prog, return_unknown_args=True, **settings)
    except SystemExit as left:
        if left.code != MISTAKE:  # --help
            raise
        raise Misread(_line(box.getvalue(), left, prog)) from None
    if options := [word for word in unknown if word.startswith("-")]:
        known = _options(target, prog, settings)
        raise Misread(f"unknown option {options[0]}; {nearest(options[0].partition('=')[0], known)} ({prog} --help)")
    if unknown:
        raise Misread(f"{' '.join(unknown)!r} belongs to no option ({prog} --help)")
    return found


def _line(box: str, left: SystemExit, prog: str) -> str:
    """What a box of tyro's says, without its frame and what stands below its first rule.

    What a check of launcher/config.py raised is taken as it was: the box breaks long words, and says no option's name.
    """
    lines = [line.strip(" │") for line in box.partition("│ ──")[0].splitlines() if line[:1] not in "╭╰"]
    said = " ".join(lines).strip().removeprefix("Error parsing ")
    cause: BaseException | None = left
    while cause is not None and not isinstance(cause, ValueError):
        cause = cause.__context__
    if cause is not None and not said.startswith("-"):
        return str(cause)
    for pattern, plainly in PLAINLY.items():
        said = re.sub(pattern, plainly, said)
    return f"{said} ({prog} --help)"


def _choices(given: str, option: str, expected: str) -> str:
    """tyro lists them in the order of a set, None among them."""
    choices = set(expected.replace("'", "").split(", ")) - {"None"}
    return f"{option} {given}: expected one of {', '.join(sorted(choices))}"


def _options(target: Callable[..., Any], prog: str, settings: Mapping[str, Any]) -> set[str]:
    """Every option of a command, as its help shows them."""
    shown = io.StringIO()
    try:
        with redirect_stdout(shown):
            tyro.cli(target, args=["--help"], prog=prog, **settings)
    except SystemExit:
        pass
    lines = re.findall(r"^[│ ]*(-.*?)(?:  |│|$)", shown.getvalue(), re.MULTILINE)
    return {option for line in lines for option in re.findall(r"--[a-z][a-z0-9-]*", line)}


def run_recipe(
    name: str,
    default: Callable[[], Config],
    tiny: Callable[[], Config] | None,
    arguments: Sequence[str],
    **callbacks: Callable[..., None],
) -> int:
    """Run a recipe. Its own base or data that cannot be had is replaced by the embedded default, said in a banner.

    What the user names is never replaced: an explicit --model or --data that is missing is an error, and so is
    everything that is missing where the recipe has no embedded default.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Config):
        tiny: bool = False
        """Run the small Llama and the instructions that come with the project: minutes on a CPU, no network."""

    def read(config: Config) -> Options:
        return parse(Options, arguments, f"recipes/{name}.py", default=Options(**vars(config)), config=FLAT)

    def plain(options: Options) -> Config:
        return Config(**{part: value for part, value in vars(options).items() if part != "tiny"})

    def act() -> int:
        options = read(tiny() if tiny and "--tiny" in arguments else default())
        if options.tiny and tiny is None:
            raise Misread("this recipe has no embedded model: give --model DIR --data FILE --eval-data FILE")
        named = any(word.partition("=")[0] in ("--model", "--data", "--tiny") for word in arguments)
        if options.model.quantize == "none":
            # PEFT imports bitsandbytes wherever it is installed, a quarter of the start-up. Here it counts as missing.
            sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
        from launcher.training.run import run

        instead = None if named or tiny is None else lambda: plain(read(tiny()))
        return run(plain(options), name, instead=instead, **callbacks)

    return guarded(act)


def guarded(act: Callable[[], Any]) -> int:
    """The user's mistakes become one line and exit code 2; a command that returns nothing has succeeded."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_advertisement)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # our own words and bars are enough
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        result = act()
    except ValueError as error:
        is_main = os.environ.get("RANK", "0") == "0"
        say_mistake(error, is_main, shared=isinstance(error, Misread) or _connected())
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    return result if isinstance(result, int) else DONE


def _no_advertisement(record: logging.LogRecord) -> bool:
    """PEFT imports bitsandbytes also where nothing is quantised, and that warns of an optional package: at debug."""
    if record.getMessage().startswith("Failed to load CPU gemm_4bit_forward"):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(record.levelno)


def _connected() -> bool:
    """Whether processes that were started together have found each other: they then raise the same error."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()
