"""The `loldu` command, and the public names of the project: `from loldu import LoLDUConfig, recipe`.

Another project on PyPI is called adapters too, and Python imports whichever it finds first. No other is called loldu:
this module checks that `adapters` and `launcher` are the ones beside it before it imports them.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters import (
        AdaLoRAConfig,
        ALLoRAConfig,
        DSEEConfig,
        FLoRAConfig,
        IncreLoRAConfig,
        LoLDUConfig,
        LoLDUXSConfig,
        LoRASBConfig,
        LoRAXSConfig,
        SaRAConfig,
        SVFitConfig,
        SVFTConfig,
    )  # fmt: skip
    from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

HERE = Path(__file__).resolve().parent
METHODS = (
    "ALLoRAConfig", "AdaLoRAConfig", "DSEEConfig", "FLoRAConfig", "IncreLoRAConfig", "LoLDUConfig", "LoLDUXSConfig",
    "LoRASBConfig", "LoRAXSConfig", "SVFTConfig", "SVFitConfig", "SaRAConfig",
)  # fmt: skip
SETTINGS = ("AdapterConfig", "Config", "DataConfig", "ModelConfig", "OptimizerConfig", "RunConfig")

__all__ = [  # noqa: RUF022 (adapters, settings, functions)
    "ALLoRAConfig", "AdaLoRAConfig", "DSEEConfig", "FLoRAConfig", "IncreLoRAConfig", "LoLDUConfig", "LoLDUXSConfig",
    "LoRASBConfig", "LoRAXSConfig", "SVFTConfig", "SVFitConfig", "SaRAConfig",
    "AdapterConfig", "Config", "DataConfig", "ModelConfig", "OptimizerConfig", "RunConfig",
    "main", "recipe",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and PEFT take seconds, which `loldu --help` must not."""
    module = "adapters" if name in METHODS else "launcher.config" if name in SETTINGS else None
    if module is None:
        raise AttributeError(f"module loldu has no attribute {name}")
    check_packages()
    return getattr(import_module(module), name)


def check_packages(find: Callable[[str], Any] = find_spec) -> None:
    """Exit with one clear error if Python finds other packages named adapters or launcher. Imports neither."""
    for name in ("adapters", "launcher"):
        spec = find(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != HERE / name:
            print(
                f"error: Python finds {found or 'nothing'} for the package {name}, expected {HERE / name}. Another "
                f"project may have that name: pip uninstall {name}, then install this project again (pip install -e .)",
                file=sys.stderr,
            )
            raise SystemExit(2)


def main() -> int:
    """The `loldu` command."""
    check_packages()
    from launcher.cli import main as command

    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as in `loldu --help | head -1`; Python would flush once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    gc.freeze()  # the interpreter would search a million objects of torch and transformers for cycles as it ends: 1 s
    return code


def recipe(name: str, default: Any, tiny: Any, **callbacks: Any) -> int:
    """Run a recipe with the options of the command line; default and tiny are functions that return a Config.

    callbacks are on_step and on_evaluation, as `launcher.training.loop.Callbacks` describes them.
    """
    check_packages()
    from launcher.start import run_recipe

    return run_recipe(name, default, tiny, sys.argv[1:], prog=sys.argv[0], **callbacks)
