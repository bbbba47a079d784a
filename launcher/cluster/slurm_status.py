"""`loldu status` and `loldu cancel`: the table of runs and their jobs, and a request to save and stop."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.cluster import runs
from launcher.cluster.slurm_jobs import JobState, Run, ask, job_states, state_of, task_of
from launcher.files import read_or_empty
from launcher.owner import INTERRUPTED, present_state
from launcher.text import one_line

COLUMNS = {  # of the status table: field -> heading
    "run": "run", "state": "state", "step": "step", "loss": "loss", "saved_step": "saved", "job": "job",
    "slurm": "Slurm", "nodes": "nodes", "restarts": "restarts",
}  # fmt: skip


def status(given: Sequence[str] = (), *, as_json: bool = False, run: Run = subprocess.run) -> int:
    """Print the state of the given runs, or of all runs in runs/. Returns an exit code.

    A damaged run is one row marked as damaged; the other rows are unaffected.
    """
    tops = [runs.find_run(one) for one in given] if given else runs.all_runs()
    folders = {folder: top for top in tops for folder in runs.tasks_of(top) or [top]}
    jobs, damaged = _jobs_of(list(folders))
    states = _states_for_a_table(jobs, run)
    rows: list[dict[str, Any]] = []
    for folder, top in folders.items():
        state, step = states.get(folder), runs.last_step(folder)
        rows.append(
            {
                "run": folder.name if folder == top else f"{top.name}/{folder.name}",
                "state": damaged.get(folder) or present_state(folder) or _before_its_start(state),
                "step": step.get("step"), "loss": step.get("loss"), "saved_step": runs.checkpoint_step(folder),
                "job": state.job_id if state else None, "slurm": state.state if state else None,
                "reason": state.reason if state else "", "nodes": state.nodes if state else "",
                "restarts": state.restarts if state else 0, "folder": str(folder),
            }
        )  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"no runs in {runs.RUNS}/: start one with loldu train, loldu launch or loldu submit")
    else:
        _print_table(rows)
    return 0


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS.values())
    for row in rows:
        known = row["slurm"] if row["slurm"] != "UNKNOWN" else ""
        reason = f"({row['reason']})" if row["reason"] else ""
        loss = f"{row['loss']:.4f}" if row["loss"] is not None else ""
        shown = {**row, "slurm": f"{known or ''} {reason}".strip(), "loss": loss}
        cells = ("" if shown[name] is None else str(shown[name]) for name in COLUMNS)
        table.add_row(*(one_line(cell, limit=80) for cell in cells))
    # What runs and users wrote is text: "[/b]" in a state is neither markup nor an error.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False, emoji=False)
    console.print(table)


def _jobs_of(folders: Sequence[Path]) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """The job.json of each run folder that Slurm started, and for each damaged one the reason."""
    jobs, damaged = {}, {}
    for folder in folders:
        try:
            if known := runs.job_of(task_of(folder)[0]):
                jobs[folder] = known
        except ValueError as error:
            damaged[folder] = str(error).rpartition("/")[2]
    return jobs, damaged


def _before_its_start(state: JobState | None) -> str:
    if state is None or state.alive:
        return "starting" if state is not None and state.state == "RUNNING" else "not started"
    return "unknown"


def _states_for_a_table(jobs: Mapping[Path, dict[str, Any]], run: Run) -> dict[Path, JobState]:
    """The state of each job. On a machine without Slurm the table still shows what the run folders hold."""
    try:
        states = job_states([(known, task_of(folder)[1]) for folder, known in jobs.items()], run) if jobs else []
    except ValueError:
        states = [JobState(known["job_id"], "UNKNOWN", "no answer from Slurm here") for known in jobs.values()]
    return dict(zip(jobs, states, strict=True))


def cancel(given: str, *, run: Run = subprocess.run) -> int:
    """Stop a run: through scancel for a Slurm job (it saves and is not requeued), else through the control file."""
    folder = runs.find_run(given)
    state = state_of(folder, run)
    if state is None:
        if read_or_empty(folder / "state") != "running" or present_state(folder) == INTERRUPTED:
            raise ValueError(f"{folder} is not running: its state is {present_state(folder) or 'not written'}")
        runs.write(folder / "control", "stop\n")
        print(
            f"asked {one_line(str(folder))} to save and stop; see when it has stopped with: "
            f"loldu status {shlex.quote(str(folder))}"
        )
        return 0
    if not state.alive:
        raise ValueError(f"job {state.job_id} is not running: Slurm says {state.state}")
    top, task = task_of(folder)
    known = runs.job_of(top)
    where = ["-M", known["cluster"]] if known.get("cluster") else []
    job_id = known["job_id"] + (f"_{task}" if task is not None else "")
    answer = ask(["scancel", *where, job_id], run)
    if answer.returncode:
        raise ValueError(f"scancel refused: {answer.stderr.strip()}")
    print(f"cancelled job {job_id}; it saves and is not requeued")
    return 0
