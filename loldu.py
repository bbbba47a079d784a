"""The front door, under a name of our own: makes sure that `adapters` and `launcher` are this project's, then opens.

Another project on PyPI is called adapters too, and Python takes whichever it finds first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def check_packages(find: Callable[[str], Any] = find_spec) -> None:
    """Exit with one clear error where Python finds other packages of our names. Imports neither."""
    for name in ("adapters", "launcher"):
        spec = find(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != HERE / name:
            print(
                f"error: Python finds {found or 'nothing'} for the package {name}, expected {HERE / name}. Another "
                f"project may have that name: pip uninstall {name}, then in this project's folder: pip install -e .",
                file=sys.stderr,
            )
            raise SystemExit(2)


def main() -> int:
    """The `loldu` command."""
    check_packages()
    from launcher.cli import main as command

    return command(sys.argv[1:])


def recipe(name: str, default: Any, tiny: Any, **callbacks: Any) -> int:
    """Run a recipe with the options of the command line; default and tiny are functions that return a Config.

    callbacks are on_step and on_evaluation, as `launcher.training.loop.Callbacks` describes them.
    """
    check_packages()
    from launcher.start import run_recipe

    return run_recipe(name, default, tiny, sys.argv[1:], prog=sys.argv[0], **callbacks)
