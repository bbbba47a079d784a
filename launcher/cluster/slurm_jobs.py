"""What Slurm says of jobs: the answers of scontrol and sacct, read into `JobState`."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster import runs

Run = Callable[..., subprocess.CompletedProcess[str]]


def ask(words: Sequence[str], run: Run = subprocess.run, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. Raises ValueError if it is not installed or does not answer."""
    if run is subprocess.run and shutil.which(words[0]) is None:
        raise ValueError(
            f"{words[0]} is not on PATH: Slurm's commands are on a cluster's login nodes (try: module load slurm). "
            "loldu submit --dry-run prints the script without Slurm; loldu launch runs on hosts over ssh"
        )
    try:
        return run(list(words), capture_output=True, text=True, timeout=120, **options)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{words[0]} gave no answer in 120 s: check Slurm's controller with scontrol ping") from None


@dataclass(frozen=True)
class JobState:
    """The state of a job, as Slurm reports it."""

    job_id: str
    state: str  # PENDING, RUNNING, COMPLETED, FAILED …; UNKNOWN: Slurm forgets jobs some minutes after their end
    reason: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def alive(self) -> bool:
        return self.state not in ENDED


ENDED = {
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED",
    "PREEMPTED", "UNKNOWN",
}  # fmt: skip


def job_states(asked: Sequence[tuple[Mapping[str, Any], str | None]], run: Run = subprocess.run) -> list[JobState]:
    """The states of jobs in the given order; each is asked as (job.json, array task or None for the whole job).

    Asks scontrol once for all jobs, then accounting (if the site has it) once for those that scontrol has forgotten.
    """
    found: dict[int, JobState] = {}
    for cluster in dict.fromkeys(known.get("cluster") or "" for known, _ in asked):
        where = ["-M", cluster] if cluster else []
        left = {
            at: (known["job_id"], task)
            for at, (known, task) in enumerate(asked)
            if (known.get("cluster") or "") == cluster
        }
        one = [job + (f"_{task}" if task is not None else "") for job, task in left.values()] if len(left) == 1 else []
        answer = ask(["scontrol", *where, "-o", "show", "job", *one], run)
        _sort_in(found, left, parse_scontrol(answer.stdout) if answer.returncode == 0 else [])
        if left and (run is not subprocess.run or shutil.which("sacct")):
            jobs = ",".join(dict.fromkeys(job for job, _ in left.values()))
            answer = ask(["sacct", *where, "-n", "-P", "-X", "-j", jobs, "-o", "JobID,State,NodeList,Restarts"], run)
            _sort_in(found, left, parse_sacct(answer.stdout) if answer.returncode == 0 else [])
        for at, (job, task) in left.items():
            job_id = job + (f"_{task}" if task is not None else "")
            found[at] = JobState(job_id, "UNKNOWN", "Slurm has forgotten it")
    return [found[at] for at in range(len(asked))]


def _sort_in(found: dict[int, JobState], left: dict[int, tuple[str, str | None]], states: Sequence[JobState]) -> None:
    """Move the jobs that have a state from left to found; a running task stands for its whole array."""
    by_job: dict[str, list[JobState]] = {}
    for state in states:
        by_job.setdefault(state.job_id.partition("_")[0], []).append(state)
    for at, (job, task) in list(left.items()):
        mine = [state for state in by_job.get(job, []) if task is None or _holds(state.job_id.partition("_")[2], task)]
        if mine:
            found[at] = next((state for state in mine if state.alive), mine[0])
            del left[at]


def _holds(tasks: str, task: str) -> bool:
    """Whether Slurm's list of array tasks, `3`, `0-4,7%2` or `0-8:2`, has this task. No list means the whole job."""
    if tasks == "":
        return True
    for part in tasks.strip("[]").partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part, re.ASCII):
            first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            if first <= int(task) <= last and (int(task) - first) % max(step, 1) == 0:
                return True
    return False


def job_state(known: Mapping[str, Any], run: Run = subprocess.run, task: str | None = None) -> JobState | None:
    """The state of the job of a job.json; None if it is empty."""
    return job_states([(known, task)], run)[0] if known else None


def parse_scontrol(text: str) -> list[JobState]:
    """Parse `scontrol -o show job`: one line of Name=value words for each job or array task.

    Other users choose the names of their jobs, which may look like further fields: the name is skipped.
    """
    found = []
    for line in text.split("\n"):
        line = re.sub(r"\sJobName=.*\sUserId=", " UserId=", line)
        fields = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line)[::-1])  # a name's first value counts
        if {"JobId", "JobState"} <= fields.keys():
            task = fields.get("ArrayTaskId")
            job_id = f"{fields['ArrayJobId']}_{task}" if task and "ArrayJobId" in fields else fields["JobId"]
            told = {name: value for name, value in fields.items() if value not in ("None", "(null)")}
            reason, nodes, restarts = told.get("Reason", ""), told.get("NodeList", ""), _whole(told.get("Restarts"))
            found.append(JobState(job_id, fields["JobState"], reason, nodes, restarts))
    return found


def parse_sacct(text: str) -> list[JobState]:
    """Parse `sacct -n -P -X -o JobID,State,NodeList,Restarts`; a state may name a user: CANCELLED by 1000."""
    found = []
    for line in text.splitlines():
        job_id, state, nodes, *rest = [*line.split("|"), "", ""]
        if state:
            state, *_ = state.split() or [""]
            found.append(JobState(job_id, state, "", nodes.replace("None assigned", ""), _whole(rest[0])))
    return found


def _whole(text: str | None) -> int:
    return int(text) if text and re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0


def task_of(folder: Path) -> tuple[Path, str | None]:
    """The folder with job.json, and the task number if folder is one run of an array."""
    if not (folder / "job.json").exists() and (match := re.fullmatch(r"task-(\d+)", folder.name)):
        return folder.parent, match[1]
    return folder, None


def state_of(folder: Path, run: Run = subprocess.run) -> JobState | None:
    """The state of the job that runs in folder; None if Slurm did not start it."""
    top, task = task_of(folder)
    return job_state(runs.job_of(top), run, task)
