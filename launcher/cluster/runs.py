"""Finds and reads run folders, and the recipe and run folder that a command line names.

A run folder holds `state` (running, stopped, finished, failed), `control` (run, stop), `events.jsonl` and
`checkpoints/step-000123/COMPLETE`. The cluster commands add `job.sbatch`, `job.json` (the job's id), `slurm-ID.log`,
`logs/` and `events` (the log of the batch script).
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.files import disk_errors, open_regular, parse_json, read_json, read_or_empty, user_path, write_atomically
from launcher.recipes import run_name
from launcher.run_folder import BEGUN
from launcher.text import one_line

RUNS = Path("runs")
STEP = re.compile(r"step-(\d{6,})", re.ASCII)
OUR_FILES = {*BEGUN, "events.jsonl"}
OUR_PATTERN = re.compile(r"slurm-.*|task-\d+|\..*\.(tmp|probe)", re.ASCII)


def safe_name(name: str) -> str:
    """The name reduced to letters, digits, dots, dashes and underscores, safe for folders, jobs and shells."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:100]
    if not safe:
        raise ValueError(f"--name {name!r} has no letters or digits: give a name such as --name alpaca-rank-64")
    return safe


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
    named = RUNS / safe_name(default_name(recipe) if name is None else name)
    folder = named if output is None else user_path(output)
    return Path(os.path.abspath(folder))


def default_name(recipe: Path) -> str:
    """RECIPE-TIME-XXXX: two starts within one second get two folders."""
    return f"{run_name(recipe)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def with_output(options: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The recipe's options including an absolute --output."""
    if option("--resume", options) == "never":
        raise ValueError(
            "--resume never would start over after each interruption: leave it out and give a new --name instead"
        )
    return (*options, *(() if option("--output", options) == str(folder) else (f"--output={folder}",)))


def write(file: Path, text: str) -> None:
    """Replace a small file, whole or not at all, and make its folder if there is none.

    A symbolic link is replaced, not followed. Raises ValueError naming the file if it cannot be written.
    """
    with disk_errors(file.name, file.parent, "check who owns the folder"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)


def check_folder(folder: Path) -> None:
    """Raises ValueError unless the folder is missing, empty or a run folder, and none of its files is a link.

    Otherwise submit and launch would write among the files of somebody else.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"cannot read {folder}: {error.strerror}; give another --output or --name") from error
    if links := [name for name in names if name in OUR_FILES and (folder / name).is_symlink()]:
        raise ValueError(f"{folder / links[0]} is a symbolic link: remove it, or give another --output or --name")
    foreign = [name for name in names if name not in OUR_FILES and not OUR_PATTERN.fullmatch(name)]
    if foreign and not is_run(folder):
        raise ValueError(f"{folder} is not a run folder and not empty: give another --output or --name")


def job_of(run: Path) -> dict[str, Any]:
    """The job.json that `loldu submit` wrote, with job_id and cluster as text; empty without one.

    Raises ValueError if it is damaged.
    """
    text, file = read_or_empty(run / "job.json"), run / "job.json"
    if not text:
        return {}
    try:
        known = parse_json(text)
    except ValueError:
        raise ValueError(f"{file} is damaged: it is not JSON") from None
    job_id, cluster = (known.get("job_id"), known.get("cluster") or "") if isinstance(known, dict) else (None, "")
    if not re.fullmatch(r"\d{1,20}", str(job_id), re.ASCII):
        raise ValueError(f"{file} is damaged: it has no job id")
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*|", str(cluster)):
        raise ValueError(f"{file} is damaged: its cluster is not a name")
    return {**known, "job_id": str(job_id), "cluster": str(cluster)}


def checkpoint_step(run: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    names = (path.parent.name for path in (run / "checkpoints").glob("step-*/COMPLETE"))
    return max((int(match[1]) for name in names if (match := STEP.fullmatch(name))), default=0)


def last_step(run: Path) -> dict[str, Any]:
    """The last training step in events.jsonl, {"step": 12, "loss": …}, or {}. Reads only the end of the file.

    Lines without numbers in step and loss are skipped: they are damaged, or still being written.
    """
    try:
        with open_regular(run / "events.jsonl") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and _is_number(event.get("step"), int) and _is_number(event.get("loss"), int, float):
            return event
    return {}


def _is_number(value: Any, *kinds: type) -> bool:
    return type(value) in kinds and (isinstance(value, float) or abs(value) < 1 << 63)


def is_run(folder: Path) -> bool:
    """Whether a run, or a cluster command, has written to this folder.

    A model's folder also has a config.json; that of a run records which run it is.
    """
    if any(os.path.exists(folder / name) for name in ("job.json", "state", "control")):
        return True
    try:
        recorded = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(recorded, dict) and {"config", "identity"} <= recorded.keys()


def tasks_of(folder: Path) -> list[Path]:
    """The folders task-0, task-1 … of an array, in the order of their numbers."""
    found = [path for path in folder.glob("task-*") if re.fullmatch(r"task-\d{1,9}", path.name, re.ASCII)]
    return sorted((path for path in found if os.path.isdir(path)), key=lambda path: int(path.name[5:]))


def all_runs(root: Path = RUNS) -> list[Path]:
    """The run folders under root, oldest first."""
    try:
        found = [path for path in root.iterdir() if os.path.isdir(path) and is_run(path)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"cannot read {root}: {error.strerror}") from error
    return sorted(found, key=lambda path: changed(path / "job.json") or changed(path))


def changed(path: Path) -> float:
    """When a file was last changed, as time.time(); 0 if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def find_run(given: str, root: Path = RUNS) -> Path:
    """The run folder for a name, a folder or a job id. Raises ValueError listing the runs in root."""
    for folder in (user_path(given), root / given, root / re.sub(r"[^A-Za-z0-9._-]+", "-", given).strip(".-")[:100]):
        if given and folder != root and os.path.isdir(folder) and is_run(folder):
            return Path(os.path.abspath(folder))
    base, _, task = given.partition("_")
    for folder in reversed(all_runs(root)) if base.isdigit() else ():
        try:
            job_id = job_of(folder).get("job_id")
        except ValueError:  # another run's file
            continue
        if job_id == base:
            part = folder / f"task-{task}"
            return Path(os.path.abspath(part if task and os.path.isdir(part) else folder))
    known = [one_line(path.name, limit=60) for path in all_runs(root)][-8:]
    raise ValueError(
        f"no run {given!r}: expected a run folder, a job id or a name in {root}/ ({', '.join(known) or 'empty'})"
    )
