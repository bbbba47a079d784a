"""What a run is started from: a recipe by its name, a Python file, or a YAML or JSON file of settings."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from launcher.config_file import SUFFIXES
from launcher.files import user_path
from launcher.shipped import recipes_folder


def recipe_names() -> list[str]:
    """The names that `loldu train NAME` accepts."""
    return sorted(path.stem for path in recipes_folder().glob("*.py") if path.stem != "__init__")


def find_recipe(given: str) -> Path:
    """The absolute path of a recipe or settings file. Raises ValueError listing the recipes."""
    named = recipes_folder() / f"{given}.py"
    for path in (user_path(given), named):
        if path.suffix in (".py", *SUFFIXES) and path.is_file() and (path != named or given in recipe_names()):
            return path.resolve()
    if Path(given).is_dir() and (Path(given) / "config.json").is_file():
        raise ValueError(f"{given} is a folder: give {Path(given) / 'config.json'} to repeat that run in a new folder")
    raise ValueError(
        f"there is no recipe or file {given}; give one of {', '.join(recipe_names())}, a Python file, or a YAML or "
        "JSON file of settings"
    )


def run_name(file: Path) -> str:
    """The name of a run with these settings: the file's, or that of the run which recorded them, without its time."""
    return re.sub(r"-\d{8}-\d{6}$", "", file.parent.name) if file.name == "config.json" else file.stem


def run_python(file: Path, options: Sequence[str], shown_as: str) -> int:
    """Run a recipe in this process as `python FILE OPTIONS` would; returns its exit code."""
    sys.path.insert(0, str(file.parent))
    sys.argv = [shown_as, *options]  # kept, unlike by runpy: it is the name in help and errors
    spec = spec_from_file_location("__main__", file)
    assert spec, file
    assert spec.loader, file
    before, module = sys.modules["__main__"], module_from_spec(spec)
    sys.modules["__main__"] = module
    try:
        spec.loader.exec_module(module)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except Exception as error:  # shown from the recipe's first line on, without how it was started
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != str(file):
            trace = trace.tb_next
        traceback.print_exception(error.with_traceback(trace))
        return 1
    finally:
        sys.modules["__main__"] = before
    return 0
