"""Slurm: the job script (a pure function), and the commands that submit, watch and cancel jobs.

Slurm's signals shape the script. The warning before a time limit or preemption goes only to the batch shell, which asks
rank 0 to stop through the run folder's control file. The job requeues itself only after a warning and never after TERM,
because `scontrol requeue` also restarts a cancelled job.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.cluster import runs
from launcher.files import read_or_empty, user_path
from launcher.recipes import find_recipe
from launcher.text import one_line

RANK_ENTRY = Path(__file__).resolve().with_name("rank.py")
STARTS_WITHOUT_A_STEP = 3
PLACE = ("time", "partition", "account", "qos", "constraint")  # settings that are sbatch options of the same name
COLUMNS = {  # of the status table: field -> heading
    "run": "run", "state": "state", "step": "step", "loss": "loss", "saved_step": "saved", "job": "job",
    "slurm": "Slurm", "nodes": "nodes", "restarts": "restarts",
}  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources of a job, and how it restarts."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 0
    """GPUs on each node, with one process per GPU; 0: no GPUs."""
    processes_per_node: int = 0
    """Processes on each node if there are no GPUs; 0: one."""
    cpus_per_task: int = 0
    """CPU cores for each process; 0: the site's default."""
    time: str | None = None
    """Time limit in Slurm's notation: 30, 12:00:00 or 2-00:00:00; default: the limit of the partition."""
    partition: str | None = None
    """Partition (queue); sinfo lists them."""
    account: str | None = None
    """Account to which the time is charged."""
    qos: str | None = None
    """Quality of service, on sites that have several."""
    constraint: str | None = None
    """Features that the nodes must have, such as "a100&nvlink"."""
    sbatch: tuple[str, ...] = ()
    """Further options for sbatch, each written with =: --sbatch=--mem=0 --sbatch=--exclusive"""
    srun: tuple[str, ...] = ()
    """Further options for the srun that starts the processes: --srun=--container-image=IMAGE"""
    setup: tuple[str, ...] = ()
    """Shell lines to run before the processes start, copied unchanged: --setup "module load cuda" """
    container: str | None = None
    """Command to put before python, such as "apptainer exec --nv image.sif"."""
    python: str = sys.executable
    """Python interpreter on the nodes; default: the one that runs this command."""
    starter: Literal["srun", "torchrun", "accelerate"] = "srun"
    """What starts the processes of a node: srun with one task per process, or one torchrun or accelerate launch."""
    warning: int = 300
    """Seconds before the time limit (or before a preemption, if the site warns) when the run saves and is requeued.
    Allow for one step, one save and a minute."""
    max_restarts: int = 20
    """How often the job may restart."""
    host_suffix: str = ""
    """Suffix for the first node's name if the fast network has its own names, such as i in node07i."""
    port: int = 0
    """Port on the first node where the processes meet (MASTER_PORT); 0: computed from the job id."""
    array: str | None = None
    """File with recipe options, one run per line: submits an array job with one folder task-N for each run."""
    array_at_once: int = 0
    """How many runs of the array may run at the same time; 0: all."""

    def __post_init__(self) -> None:
        for name, low in (("nodes", 1), ("gpus_per_node", 0), ("processes_per_node", 0), ("cpus_per_task", 0),
                          ("warning", 1), ("max_restarts", 0), ("array_at_once", 0)):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        if self.gpus_per_node and self.processes_per_node not in (0, self.gpus_per_node):
            raise ValueError(
                f"--processes-per-node {self.processes_per_node} with --gpus-per-node {self.gpus_per_node}: one "
                "process uses one GPU; leave --processes-per-node out"
            )
        if self.port and not 1024 <= self.port <= 65535:
            raise ValueError(f"--port expects a number from 1024 to 65535, got {self.port}")
        for word in (*self.sbatch, *self.srun):
            if not word.startswith("-"):
                raise ValueError(f"--sbatch and --srun expect options with dashes, as --sbatch=--mem=0, got {word!r}")
        for name in ("python", "container"):
            if not (getattr(self, name) or "").isprintable():
                raise ValueError(f"--{name} contains a line break or an unprintable character: {getattr(self, name)!r}")
        for name in PLACE:
            if getattr(self, name) == "":
                raise ValueError(f"--{name} is empty: leave it out to use the site's default")
        if not re.fullmatch(r"[A-Za-z0-9.-]*", self.host_suffix):
            raise ValueError(f"--host-suffix expects part of a host name, got {self.host_suffix!r}")

    @property
    def processes(self) -> int:
        """On each node."""
        return self.gpus_per_node or self.processes_per_node or 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that goes into job.sbatch."""

    name: str  # as returned by safe_name
    run: str  # the run folder, absolute
    folder: str  # the user's working directory, to which relative paths in the recipe's options refer
    command: tuple[str, ...]  # the recipe's file and its options
    tasks: tuple[tuple[str, ...], ...] = ()  # further options for each run of an array
    resources: Resources = Resources()


def script(job: Job) -> str:
    """The text of job.sbatch. Raises ValueError for a value that an #SBATCH line cannot hold."""
    if (
        "\\" in job.run
    ):  # it disables the % symbols in the log's path, and the job fails before it starts, without a log
        raise ValueError(f"Slurm cannot write a log to {job.run}: give a path without a backslash (--output, --name)")
    want, shell = job.resources, shlex.quote
    per_node = 1 if want.starter != "srun" else want.processes
    shape = [f"--nodes={want.nodes}", f"--ntasks-per-node={per_node}"]
    shape += [f"--gpus-per-node={want.gpus_per_node}"] if want.gpus_per_node else []
    shape += [f"--cpus-per-task={want.cpus_per_task}"] if want.cpus_per_task else []
    place = [f"--{name}={getattr(want, name)}" for name in PLACE if getattr(want, name)]
    at_once = f"%{want.array_at_once}" if want.array_at_once else ""
    place += [f"--array=0-{len(job.tasks) - 1}{at_once}"] if job.tasks else []
    log = f"{job.run.replace('%', '%%')}/slurm-{'%A_%a' if job.tasks else '%j'}.log"
    keep = ["--requeue", f"--signal=B:USR2@{want.warning}", "--open-mode=append", f"--output={log}"]
    header = [[f"--job-name={job.name}", *shape], place, keep, *([word] for word in want.sbatch)]
    lines = ["#SBATCH " + " ".join(directive(word) for word in words) for words in header if words]

    run = shell(job.run) + ("/task-$SLURM_ARRAY_TASK_ID" if job.tasks else "")
    python = [*shlex.split(want.container or ""), want.python, str(RANK_ENTRY)]
    starter = f" --starter {want.starter}" if want.starter != "srun" else ""
    command = " ".join(map(shell, job.command)) + (' "${options[@]}" --output="$run"' if job.tasks else "")
    port = str(want.port or "$((20000 + SLURM_JOB_ID % 10000))")
    steps = [*shape[:1], f"--ntasks={want.nodes * per_node}", *shape[1:], *want.srun]
    srun = " ".join(["srun --export=ALL --kill-on-bad-exit=1 --wait=0", *map(shell, steps)])
    parts = {
        "HEADER": "\n".join(lines),
        "SETUP": "".join(f"{line}\n" for line in (SETUP, *want.setup, "set -u", "") if want.setup),
        "OPTIONS": _options_of_tasks(job.tasks),
        "FOLDER": shell(job.folder),
        "RUN": run,
        "MAX_RESTARTS": str(want.max_restarts),
        "SAME": str(STARTS_WITHOUT_A_STEP),
        "SUFFIX": want.host_suffix,
        "PORT": port,
        "PER_NODE": str(want.processes),
        "PYTHON": " ".join(map(shell, python)),
        "RECIPE": shell(job.command[0]),
        "SRUN": srun,
        "COMMAND": f'--run "$run" --log{starter} -- \\\n  {command}',
    }
    return re.sub(r"@([A-Z_]+)@\n?", lambda found: _part(found, parts), TEMPLATE)


SETUP = "set +u                                 # modules and virtual environments read unset variables"
TEMPLATE = r"""#!/bin/bash
@HEADER@

set -uo pipefail                       # not -e: `wait` returns more than 128 when a trap runs
cd @FOLDER@ || exit 1
run=@RUN@
restart=${SLURM_RESTART_COUNT:-0}
for file in control events logs state; do
  [ ! -L "$run/$file" ] || { echo "loldu: $run/$file is a symbolic link: remove it" >&2; exit 1; }
done
mkdir -p "$run/logs" || exit 1
note() { echo "$EPOCHREALTIME batch@$HOSTNAME $*" >>"$run/events"; }
state() { cat "$run/state" 2>/dev/null; }
outcome() { [ "$run/state" -nt "$run/logs/attempt" ] && state; }   # what this start wrote, not one before it
give_up() { echo "loldu: $*" >&2; note "gave up: $*"; exit 1; }
note "start job=$SLURM_JOB_ID restart=$restart nodes=$SLURM_JOB_NODELIST"

# Slurm may requeue a finished job. A job that makes no progress must not restart forever.
[ "$restart" = 0 ] || [ "$(state)" != finished ] || { note "already finished"; exit 0; }
[ "$restart" -le @MAX_RESTARTS@ ] || give_up "restarted @MAX_RESTARTS@ times (--max-restarts); submit again to resume"
newest=$(cd "$run/checkpoints" 2>/dev/null && printf '%s\n' step-*/COMPLETE | sort -V | tail -n 1)
[ "$restart" != 0 ] || : >"$run/logs/starts"
echo "from $newest" >>"$run/logs/starts"
[ "$(grep -cxF "from $newest" "$run/logs/starts")" -le @SAME@ ] ||
  give_up "@SAME@ starts saved no new step: read $run/logs, or save more often (--save-every)"

# USR2 (the time limit or a preemption is near): save and requeue. TERM (scancel, requeue, time limit): outlive srun.
rm -f "$run/logs/failures"
echo run >"$run/control"
warned='' ended=''
trap 'warned=1; echo stop >"$run/control"; note "USR2: asked to stop"' USR2
trap 'ended=1; note TERM' TERM

# The ranks prove to each other that they know this; made before any `set -x` of the setup lines could print it.
LOLDU_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

@SETUP@@OPTIONS@
# The environment that every node must have, and the address where the processes meet.
LOLDU_ATTEMPT=$SLURM_JOB_ID.$restart
echo "$LOLDU_ATTEMPT" >"$run/logs/attempt"
LOLDU_ENVIRONMENT=$(@PYTHON@ environment @RECIPE@) ||
  give_up "cannot start Python on $HOSTNAME: see above, and check --setup, --python and --container"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)@SUFFIX@ || exit 1
MASTER_PORT=@PORT@
LOLDU_PER_NODE=@PER_NODE@
export LOLDU_ATTEMPT LOLDU_ENVIRONMENT LOLDU_PER_NODE LOLDU_TOKEN MASTER_ADDR MASTER_PORT

@SRUN@ \
  @PYTHON@ @COMMAND@ &
srun=$!
while kill -0 $srun 2>/dev/null; do wait $srun; done    # a trap ends a wait early
wait $srun
rc=$?
note "srun rc=$rc state=$(outcome) warned=$warned ended=$ended"
[ ! -s "$run/logs/failures" ] || cat "$run/logs/failures" >&2

[ "$(outcome)" != finished ] || exit 0
# A rank that was killed could not write how it ended.
if [ "$rc" != 0 ] && [ -z "$ended" ] && [ "$(outcome)" = running ]; then echo failed >"$run/state"; fi
id=$SLURM_JOB_ID                       # in the last task of an array this is the id of the whole array
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# A preemption may send TERM to the ranks only. If they stop in time, Slurm takes the job for completed.
case $(scontrol -o show job "$id") in *" PreemptTime="[0-9]*) warned=1 ;; esac
if [ -n "$warned" ] && [ -z "$ended" ] && [ "$(outcome)" = stopped ] && [ "$restart" -lt @MAX_RESTARTS@ ]; then
  trap - USR2 TERM                     # with TERM trapped, Slurm would wait its whole KillWait
  scontrol requeue "$id" 2>>"$run/events"   # fails harmlessly if Slurm has requeued the job already
  exit 0
fi
[ "$(outcome)" != stopped ] || exit 75   # stopped early and saved: submit again to resume
exit $rc
"""


def _part(found: re.Match[str], parts: Mapping[str, str]) -> str:
    """A part of the template, without the template's newline if the part is empty or ends with its own."""
    text = parts[found[1]]
    ends = found[0].endswith("\n") and bool(text) and not text.endswith("\n")
    return text + ("\n" if ends else "")


def _options_of_tasks(tasks: Sequence[Sequence[str]]) -> str:
    if not tasks:
        return ""
    cases = [f"  {at}) options=({' '.join(map(shlex.quote, words))}) ;;" for at, words in enumerate(tasks)]
    return "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac", "", ""])


def directive(word: str) -> str:
    """One option quoted for an #SBATCH line, where sbatch knows double quotes and backslashes but no newlines."""
    if not word.isprintable():
        raise ValueError(f"a Slurm job cannot hold {word!r}: it contains a line break or an unprintable character")
    if re.fullmatch(r"[A-Za-z0-9_./:=@%,+^~-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that would carry settings of another job or of the shell into this job.

    SBATCH_TIMELIMIT overrides `#SBATCH --time`, and a job submitted from within a job inherits its number of tasks.
    """
    kept = {"SLURM_CONF"}
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    return {
        name: value
        for name, value in environ.items()
        if name in kept or not (name.startswith(("SLURM_", "SBATCH_", "SRUN_", "LOLDU_")) or name in ours)
    }


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


def read_tasks(file: Path) -> tuple[tuple[str, ...], ...]:
    """The recipe options of each run of an array, one line per run; blank lines and # comments are skipped."""
    if not file.is_file():
        raise ValueError(f"--array {file}: no such file; expected a file of recipe options, one line per run")
    tasks = []
    for at, line in enumerate(file.read_text().splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"{file}, line {at}: {error}: {line.strip()}") from None
        if runs.option("--output", words) is not None:
            raise ValueError(f"{file}, line {at}: an array sets --output itself, one folder task-N per run: remove it")
        if words:
            tasks.append(tuple(words))
    if not tasks:
        raise ValueError(f"--array {file} holds no recipe options")
    return tuple(tasks)


def submit(
    recipe: str,
    resources: Resources,
    recipe_options: Sequence[str] = (),
    *,
    name: str | None = None,
    folder: Path | None = None,
    dry_run: bool = False,
    run: Run = subprocess.run,
) -> int:
    """Write RUN/job.sbatch and submit it; with dry_run only print it. Returns an exit code.

    folder is RUN, absolute, if neither --name nor --output gives it.
    """
    file = find_recipe(recipe)
    folder = folder or runs.run_folder(name, file, recipe_options)
    tasks = read_tasks(user_path(resources.array)) if resources.array else ()
    if tasks and runs.option("--output", recipe_options) is not None:
        raise ValueError("--output cannot be used with --array: give a --name, and each run gets a folder task-N in it")
    options = tuple(recipe_options) if tasks else runs.with_output(recipe_options, folder)
    job = Job(
        name=runs.safe_name(folder.name), run=str(folder), folder=os.getcwd(), command=(str(file), *options),
        tasks=tasks, resources=resources,
    )  # fmt: skip
    text = script(job)
    if dry_run:
        print(text, end="")
        return 0
    ask(["sbatch", "--version"], run)
    runs.check_folder(folder)
    running = job_state(runs.job_of(folder), run)
    shown = shlex.quote(folder.name if folder.parent == Path(os.path.abspath(runs.RUNS)) else str(folder))
    if running is not None and running.alive:
        raise ValueError(
            f"job {running.job_id} of {folder} is {running.state}: follow it with loldu logs -f {shown}, "
            f"cancel it with loldu cancel {shown}, or give another --name"
        )
    runs.write(folder / "job.sbatch", text)
    try:
        (folder / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make {folder / 'logs'}: {error.strerror}") from error
    environ, words = clean_environment(os.environ), ["sbatch", "--parsable", str(folder / "job.sbatch")]
    for tried in (["sbatch", "--test-only", words[-1]], words):  # a request that no node can meet would pend forever
        answer = ask(tried, run, env=environ)
        if answer.returncode:
            raise ValueError(f"sbatch refused the job: {answer.stderr.strip() or answer.stdout.strip()}")
    job_id, _, cluster = answer.stdout.strip().partition(";")
    known = {
        "job_id": job_id, "cluster": cluster, "name": job.name, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": job.folder, "command": list(job.command), "tasks": [list(words) for words in tasks],
    }  # fmt: skip
    runs.write(folder / "job.json", json.dumps(known, indent=2) + "\n")
    print(f"job {job_id}: {resources.nodes} x {resources.processes} processes{f', {len(tasks)} runs' if tasks else ''}")
    print(f"folder   {one_line(str(folder))}\nscript   {one_line(str(folder / 'job.sbatch'))}")
    print(f"follow   loldu logs -f {shown}\nstate    loldu status {shown}\ncancel   loldu cancel {shown}")
    return 0


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
                "state": damaged.get(folder) or read_or_empty(folder / "state") or _before_its_start(state),
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
        if read_or_empty(folder / "state") != "running":
            raise ValueError(
                f"{folder} is not running: its state is {read_or_empty(folder / 'state') or 'not written'}"
            )
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
