"""Finds and reads run folders, and the recipe and run folder that a command line names.

A run folder holds `state` (running, stopped, finished, failed), `control` (run, stop), `events.jsonl` and
`checkpoints/step-000123/COMPLETE`. The cluster commands add `job.sbatch`, `job.json` (the job's id), `slurm-ID.log`,
`logs/` and `events` (the log of the batch script).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.files import read_or_empty, write_atomically

RUNS = Path("runs")
PROJECT = Path(__file__).resolve().parents[2]
STEP = re.compile(r"step-(\d{6,})")


def safe_name(name: str) -> str:
    """The name reduced to letters, digits, dots, dashes and underscores, safe for folders, jobs and shells."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:100]
    if not safe:
        raise ValueError(f"--name {name!r} has no letters or digits: give a name such as --name alpaca-rank-64")
    return safe


def find_recipe(recipe: str) -> Path:
    """The file of a recipe, given as a path or as its name in recipes/. Raises ValueError listing the recipes."""
    for path in (Path(recipe), PROJECT / "recipes" / f"{recipe}.py"):
        if path.suffix == ".py" and path.is_file():
            return path.resolve()
    known = sorted(path.stem for path in (PROJECT / "recipes").glob("*.py"))
    raise ValueError(f"no recipe {recipe!r}: expected a Python file, or one of {', '.join(known) or 'recipes/*.py'}")


def option(name: str, options: Sequence[str]) -> str | None:
    """The value of an option among the recipe's options; the last one counts, as in the recipe itself."""
    value = None
    for at, word in enumerate(options):
        if word.startswith(f"{name}="):
            value = word.partition("=")[2]
        elif word == name and at + 1 < len(options):
            value = options[at + 1]
    return value


def run_folder(name: str | None, recipe: Path, options: Sequence[str]) -> Path:
    """The absolute path of the run folder: the recipe's --output, else runs/NAME, else runs/RECIPE-TIME."""
    output = option("--output", options)
    if output is not None and name is not None:
        raise ValueError(f"--name {name} and the recipe's --output {output} both set the run folder: give one of them")
    folder = Path(output) if output is not None else RUNS / safe_name(default_name(recipe) if name is None else name)
    return Path(os.path.abspath(folder))


def default_name(recipe: Path) -> str:
    return f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def with_output(options: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The recipe's options including --output."""
    if option("--resume", options) == "never":
        raise ValueError(
            "--resume never would start over after each interruption: leave it out and give a new --name instead"
        )
    return (*options, *(() if option("--output", options) is not None else (f"--output={folder}",)))


def write(file: Path, text: str) -> None:
    """Replace a small file, whole or not at all, and make its folder where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)


def job_of(run: Path) -> dict[str, Any]:
    """The job.json that `loldu submit` wrote; empty without one."""
    text = read_or_empty(run / "job.json")
    return json.loads(text) if text else {}


def checkpoint_step(run: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    names = (path.parent.name for path in (run / "checkpoints").glob("step-*/COMPLETE"))
    return max((int(match[1]) for name in names if (match := STEP.fullmatch(name))), default=0)


def last_step(run: Path) -> dict[str, Any]:
    """The last training step in events.jsonl, {"step": 12, "loss": …}, or {}. Reads only the end of the file."""
    try:
        with open(run / "events.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that is still being written
        if isinstance(event, dict) and "loss" in event:
            return event
    return {}


def is_run(folder: Path) -> bool:
    """Whether a run, or a cluster command, has written to this folder."""
    return any((folder / name).exists() for name in ("job.json", "state", "config.json", "control"))


def all_runs(root: Path = RUNS) -> list[Path]:
    """The run folders under root, oldest first."""
    found = [path for path in root.iterdir() if path.is_dir() and is_run(path)] if root.is_dir() else []
    return sorted(found, key=lambda path: (path / "job.json" if (path / "job.json").exists() else path).stat().st_mtime)


def find_run(given: str, root: Path = RUNS) -> Path:
    """The run folder for a name, a folder or a job id. Raises ValueError listing the runs in root."""
    for folder in (Path(given), root / given, root / re.sub(r"[^A-Za-z0-9._-]+", "-", given).strip(".-")[:100]):
        if given and folder != root and folder.is_dir() and is_run(folder):
            return Path(os.path.abspath(folder))
    base, _, task = given.partition("_")
    for folder in reversed(all_runs(root)) if base.isdigit() else ():
        if str(job_of(folder).get("job_id")) == base:
            part = folder / f"task-{task}"
            return Path(os.path.abspath(part if task and part.is_dir() else folder))
    known = [path.name for path in all_runs(root)][-8:]
    raise ValueError(
        f"no run {given!r}: expected a run folder, a job id or a name in {root}/ ({', '.join(known) or 'empty'})"
    )
