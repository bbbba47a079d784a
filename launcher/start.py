"""Start a run: from a recipe's functions, or as `loldu train` does from a recipe's name or a file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config import Config, DataConfig
from launcher.config_file import read_config
from launcher.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, Failed
from launcher.optimizers import OPTIMIZERS
from launcher.options import Misread, parse_config
from launcher.packages import without_bitsandbytes
from launcher.processes import print_error
from launcher.recipes import find_recipe, recipe_names, run_name, run_python
from launcher.text import expected, one_line, printable

log = logging.getLogger(__name__)
OF_A_TASK = {  # what recipes set for their own data
    "run": ("show_samples", "eval_every"),
    "data": ("exact_match", "prompt_template", "text_columns", "image_column", "columns", "eval_data"),
}

TRAIN = """usage: loldu train RECIPE|FILE [options]

Train with the settings of a recipe or file. Options that follow replace them: loldu train RECIPE --help lists all.

RECIPE|FILE is one of
  NAME                    a recipe of this project (below)
  FILE.py                 a recipe of your own, as for python FILE.py
  FILE.yaml, FILE.json    settings by name, in the sections model, data, adapter, optimizer, run
  runs/NAME/config.json   the settings of an earlier run, to repeat it in a new folder

Recipes:
{recipes}

Several processes: torchrun --nproc-per-node 8 -m launcher train RECIPE, or accelerate launch -m launcher train RECIPE;
several machines: loldu launch, loldu submit"""


def train(arguments: Sequence[str]) -> int:
    """`loldu train RECIPE|FILE [options]`; returns the exit code of the run."""
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(TRAIN.format(recipes="\n".join(f"  {name}" for name in recipe_names())))
        return DONE if arguments else MISTAKE
    given, options = arguments[0], arguments[1:]
    prog = f"loldu train {given}"
    found: list[Path] = []

    def find() -> None:
        if given.startswith("-"):
            raise Misread(f"the recipe or file comes first: loldu train RECIPE {given} ... (loldu train --help)")
        found.append(find_recipe(given))

    if code := guarded(find):
        return code
    if found[0].suffix == ".py":
        return run_python(found[0], options, prog)
    return guarded(lambda: _start(_parse(read_config(found[0]), options, prog), run_name(found[0])))


def run_recipe(
    name: str,
    default: Callable[[], Config],
    tiny: Callable[[], Config] | None,
    arguments: Sequence[str],
    prog: str | None = None,
    **callbacks: Callable[..., None],
) -> int:
    """Run a recipe with these options; prog is what the user typed before them.

    If the recipe's own base model or data are not available, tiny takes their place and a banner reports it. A model or
    dataset that the user names is never substituted.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Config):
        tiny: bool = False
        """Train the small model that comes with the project on the data beside it: minutes on a CPU, no network."""

    def read(config: Config) -> Options:
        parsed = _parse(Options(**vars(config)), arguments, prog or f"recipes/{name}.py")
        return _for_other_data(parsed, config.data, {word.partition("=")[0] for word in arguments})

    def plain(options: Options) -> Config:
        config = Config(**{part: value for part, value in vars(options).items() if part != "tiny"})
        if any(word.partition("=")[0] == "--eval-records" for word in arguments):
            return config
        return replace(config, data=replace(config.data, fewer_eval_records=True))

    def act() -> int:
        options = read(tiny() if tiny and "--tiny" in arguments else default())
        if options.tiny and tiny is None:
            raise Misread("this recipe has no embedded model: give --model DIR --data FILE --eval-data FILE")
        named = any(word.partition("=")[0] in ("--model", "--data", "--tiny") for word in arguments)
        instead = None if named or tiny is None else lambda: plain(read(tiny()))
        return _start(plain(options), name, instead=instead, **callbacks)

    return guarded(act)


def _parse(config: Any, arguments: Sequence[str], prog: str) -> Any:
    """The config with these options. A new --method drops the replaced method's options, with a warning; a new --task
    what the recipe sets for its own."""
    parsed = parse_config(config, arguments, prog)
    words = {word.partition("=")[0].replace("_", "-") for word in arguments}
    if parsed.data.task != config.data.task:
        parsed = _for_another_task(parsed, words)
    foreign = config.adapter.options if parsed.adapter.method != config.adapter.method else ()
    if not foreign or "--options" in words:
        return parsed
    _warn("--options %s belongs to %s: left out", " ".join(foreign), config.adapter.method)
    return replace(parsed, adapter=replace(parsed.adapter, options=()))


def _warn(text: str, *values: Any) -> None:
    """Log a warning, once for all processes."""
    if _is_main():
        log.warning(text, *values)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _for_another_task(config: Any, words: set[str]) -> Any:
    """The config without the settings that a recipe has for its own task, except those given on the command line."""
    default, dropped = Config(), []
    parts = {"data": config.data, "run": config.run}
    for part, names in OF_A_TASK.items():
        for name in names:
            own, usual, option = getattr(parts[part], name), getattr(getattr(default, part), name), _option(name)
            if own != usual and option not in words:
                dropped.append(option)
                parts[part] = replace(parts[part], **{name: usual})
    if dropped:
        _warn("left out, as the recipe has them for another task than %s: %s", config.data.task, ", ".join(dropped))
    return replace(config, **parts)


def _for_other_data(config: Any, recipe: DataConfig, words: set[str]) -> Any:
    """The config without the recipe's --eval-data if that is a split of its own dataset and --data names another."""
    own = recipe.eval_data
    if own is None or not own.startswith(f"{recipe.data}:") or "--data" not in words or "--eval-data" in words:
        return config
    _warn(
        "--data replaces the recipe's dataset, so its --eval-data %s is left out: give --eval-data FILE, or "
        "--eval-records N to hold out records of --data",
        own,
    )
    return replace(config, data=replace(config.data, eval_data=None))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_instead: ContextVar[Callable[..., int] | None] = ContextVar("instead of training", default=None)


@contextmanager
def instead_of_training(act: Callable[..., int]) -> Iterator[None]:
    """While this lasts, act(config, name, **settings) is called where a run would start; settings as `run` has them."""
    token = _instead.set(act)
    try:
        yield
    finally:
        _instead.reset(token)


def _start(config: Config, name: str, **settings: Any) -> int:
    if (act := _instead.get()) is not None:
        return act(config, name, **settings)
    if _is_main():  # torch and transformers take seconds to import
        with suppress(OSError, ValueError):  # a closed terminal does not end the run
            print(f"starting {name}", flush=True)
    needed = config.model.quantize != "none" or OPTIMIZERS[config.optimizer.optimizer].package == "bitsandbytes"
    with nullcontext() if needed else without_bitsandbytes():
        from launcher.training.run import run

        return run(config, name, **settings)


def guarded(act: Callable[[], Any]) -> int:
    """Call act; a ValueError, which is the user's mistake, and an error of a file become one line and exit code 2. None
    means success."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_advertisement)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # we log and show progress ourselves
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = lambda message, *_: print(f"warning: {printable(str(message))}", file=sys.stderr)
    try:
        try:
            result = act()
        except BaseException as error:  # also a panic of a library in Rust
            if (found := expected(error)) is error:
                raise
            raise found from None
    except ValueError as error:
        print_error(error, _is_main(), shared=isinstance(error, Misread) or _connected())
        return MISTAKE
    except OSError as error:
        if error.filename is None:  # of no file, such as a closed terminal
            raise
        print(f"error: {error.strerror}: {one_line(str(error.filename), limit=200)}", file=sys.stderr)
        return MISTAKE
    except Failed as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return result if isinstance(result, int) else DONE


def _no_advertisement(record: logging.LogRecord) -> bool:
    """Lower a warning about an optional package, which bitsandbytes logs even if nothing is quantised, to debug."""
    if record.getMessage().startswith("Failed to load CPU gemm_4bit_forward"):
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(record.levelno)


def _connected() -> bool:
    """Whether the processes of a run are connected: they then raise the same error."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()
