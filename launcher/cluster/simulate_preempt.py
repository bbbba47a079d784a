"""`loldu simulate-preempt`: interrupt a running job as a cluster would, and watch whether it saves and resumes."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from launcher.cluster import runs, slurm_jobs
from launcher.files import read_or_empty

POLL_S = 0.5


def simulate(given: str, *, how: Literal["warning", "requeue"] = "warning", timeout_s: float = 900.0) -> int:
    """Returns 0 if the run saved, restarted and trained a new step; otherwise prints how far it got and returns 1."""
    folder = runs.find_run(given)
    state = slurm_jobs.state_of(folder)
    report = Report()
    before = int(runs.last_step(folder).get("step", 0))
    if state is None:
        return _without_slurm(folder, before, timeout_s, report)
    if state.state != "RUNNING":
        raise ValueError(f"job {state.job_id} is not running: Slurm says {state.state} {state.reason}".rstrip())
    if read_or_empty(folder / "state") != "running":
        raise ValueError(
            f"{folder} has not begun to train: try again when loldu status {shlex.quote(given)} shows steps"
        )
    restarts = state.restarts
    words = ["scancel", "--batch", "--signal=USR2"] if how == "warning" else ["scontrol", "requeue"]
    answer = slurm_jobs.ask([*words, state.job_id])
    if answer.returncode:
        raise ValueError(f"{words[0]} refused: {answer.stderr.strip()}")
    report.add(f"{shlex.join([*words, state.job_id])} at step {before}")
    deadline = time.monotonic() + timeout_s

    def now() -> slurm_jobs.JobState:
        found = slurm_jobs.state_of(folder)
        assert found is not None
        return found

    def stopped() -> bool:
        return read_or_empty(folder / "state") in ("stopped", "finished") or now().restarts > restarts

    if not _until(stopped, deadline):
        return report.fail(f"it did not stop within {timeout_s:.0f} s: does it read its control file at every step?")
    saved = runs.checkpoint_step(folder)
    if read_or_empty(folder / "state") == "finished":
        return report.fail("the run finished before it was interrupted: try a longer run")
    report.add(f"stopped, with step {saved} saved" if saved else "stopped, with nothing saved")
    if not _until(lambda: (now().restarts > restarts and now().state == "RUNNING") or not now().alive, deadline):
        return report.fail(f"it did not restart within {timeout_s:.0f} s: Slurm says {now().state} {now().reason}")
    if not now().alive and now().restarts == restarts:
        return report.fail(f"it did not restart: Slurm says {now().state}; see {folder / 'events'}")
    report.add(f"running again on {now().nodes}, restart {now().restarts}")
    target = max(before, saved)

    def further() -> bool:
        step = int(runs.last_step(folder).get("step", 0))
        return (read_or_empty(folder / "state") in ("running", "finished") and step > target) or not now().alive

    if not _until(further, deadline) or int(runs.last_step(folder).get("step", 0)) <= target:
        return report.fail(f"it restarted but trained no new step: loldu logs {shlex.quote(given)}")
    report.add(f"resumed from step {saved}; now at step {runs.last_step(folder)['step']}")
    lost = max(0, before - saved)
    print(
        f"the run survived: {lost} step{'s'[: lost != 1]} trained again, {report.seconds():.0f} s from the signal to a "
        "new step"
    )
    return 0


def _without_slurm(folder: Path, before: int, timeout_s: float, report: Report) -> int:
    """Interrupt a run outside Slurm through its control file; nothing restarts it."""
    if read_or_empty(folder / "state") != "running":
        raise ValueError(f"{folder} is not running: its state is {read_or_empty(folder / 'state') or 'not written'}")
    runs.write(folder / "control", "stop\n")
    report.add(f"wrote stop into {folder / 'control'} at step {before}")
    if not _until(lambda: read_or_empty(folder / "state") != "running", time.monotonic() + timeout_s):
        return report.fail(f"it did not stop within {timeout_s:.0f} s: does it read its control file at every step?")
    state, saved = read_or_empty(folder / "state"), runs.checkpoint_step(folder)
    if state != "stopped":
        return report.fail(f"its state is {state}, expected stopped")
    report.add(f"stopped, with step {saved} saved")
    print("the run saved; nothing restarts a run outside Slurm: the command that started it resumes it")
    return 0


def _until(condition: Callable[[], object], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


class Report:
    """Prints events with the seconds since the signal."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def add(self, text: str) -> None:
        print(f"{self.seconds():7.1f} s  {text}", flush=True)

    def fail(self, text: str) -> int:
        print(f"error: {text}", file=sys.stderr)
        return 1
