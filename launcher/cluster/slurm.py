"""Slurm: the script of a job (a pure function), and the few commands that submit, watch and end it.

Who gets which signal decides the script's shape. A warning goes to the batch shell alone, which asks rank 0 through the
run folder's control file; the job puts itself back in the queue only after a warning, and never after TERM, since
`scontrol requeue` brings a cancelled job back to life.
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

RANK_ENTRY = Path(__file__).resolve().with_name("rank.py")
STARTS_WITHOUT_A_STEP = 3
PLACE = ("time", "partition", "account", "qos", "constraint")  # settings that are sbatch's own options
COLUMNS = {  # of the table of runs: heading by what it shows
    "run": "run", "state": "state", "step": "step", "loss": "loss", "saved_step": "saved", "job": "job",
    "slurm": "Slurm", "nodes": "nodes", "restarts": "restarts",
}  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks of Slurm, and how it comes back."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 0
    """GPUs on each node, one process per GPU; 0: no GPUs."""
    processes_per_node: int = 0
    """Processes on each node where there are no GPUs; 0: one."""
    cpus_per_task: int = 0
    """CPU cores for each process; 0: the site's default."""
    time: str | None = None
    """Time limit, as Slurm writes it: 30, 12:00:00 or 2-00:00:00. Without it the partition's default."""
    partition: str | None = None
    """Queue of the site; sinfo lists them."""
    account: str | None = None
    """Whom the time is charged to."""
    qos: str | None = None
    """Quality of service, where the site has several."""
    constraint: str | None = None
    """Features the nodes must have, such as "a100&nvlink"."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, each written with =: --sbatch=--mem=0 --sbatch=--exclusive"""
    srun: tuple[str, ...] = ()
    """Further options of the srun that starts the processes: --srun=--container-image=IMAGE"""
    setup: tuple[str, ...] = ()
    """Shell lines run before the start, as they are: --setup "module load cuda" """
    container: str | None = None
    """Command put before python, such as "apptainer exec --nv image.sif"."""
    python: str = sys.executable
    """Interpreter on the nodes; the one you type this with."""
    starter: Literal["srun", "torchrun", "accelerate"] = "srun"
    """Who starts the processes of a node: Slurm itself, one task for each; or one torchrun or accelerate launch."""
    warning: int = 300
    """Seconds before the time limit (or a preemption, where the site says so) at which the run saves and comes back:
    one step, one save and a minute."""
    max_restarts: int = 20
    """How often the job may come back."""
    host_suffix: str = ""
    """Put behind the first node's name where the fast network has names of its own, such as i in node07i."""
    port: int = 0
    """Port on the first node for the processes to meet; 0: from the job's id."""
    array: str | None = None
    """File with recipe options, one line for each run: an array job of them, each in a folder task-N of its own."""
    array_at_once: int = 0
    """How many runs of the array may go at the same time; 0: all."""

    def __post_init__(self) -> None:
        for name, low in (("nodes", 1), ("gpus_per_node", 0), ("processes_per_node", 0), ("cpus_per_task", 0),
                          ("warning", 1), ("max_restarts", 0), ("array_at_once", 0)):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} is at least {low}, got {getattr(self, name)}")
        if self.gpus_per_node and self.processes_per_node not in (0, self.gpus_per_node):
            raise ValueError(
                f"--processes-per-node {self.processes_per_node} with --gpus-per-node {self.gpus_per_node}: one "
                "process uses one GPU; leave --processes-per-node out"
            )
        if self.port and not 1024 <= self.port <= 65535:
            raise ValueError(f"--port lies in 1024 .. 65535, got {self.port}")
        for word in (*self.sbatch, *self.srun):
            if not word.startswith("-"):
                raise ValueError(f"--sbatch and --srun take options with their dashes, --sbatch=--mem=0, got {word!r}")
        for name in PLACE:
            if getattr(self, name) == "":
                raise ValueError(f"--{name} is empty: leave it out for the site's default")
        if not re.fullmatch(r"[A-Za-z0-9.-]*", self.host_suffix):
            raise ValueError(f"--host-suffix is part of a host's name, got {self.host_suffix!r}")

    @property
    def processes(self) -> int:
        """On each node."""
        return self.gpus_per_node or self.processes_per_node or 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything job.sbatch is made of."""

    name: str  # safe already
    run: str  # the run folder, absolute
    folder: str  # where the user typed the command: relative paths in the recipe's options start here
    command: tuple[str, ...]  # the recipe's file and its options
    tasks: tuple[tuple[str, ...], ...] = ()  # an array's further options for each of its runs
    resources: Resources = Resources()


def script(job: Job) -> str:
    """The text of job.sbatch. Raises ValueError for a value that cannot stand on an #SBATCH line."""
    if "\\" in job.run:  # it would turn off the % symbols of the log's path: the job then fails unrun, without a log
        raise ValueError(
            f"Slurm cannot write a log into {job.run}: a path without a backslash, please (--output, --name)"
        )
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
mkdir -p "$run/logs" || exit 1
note() { echo "$EPOCHREALTIME batch@$HOSTNAME $*" >>"$run/events"; }
state() { cat "$run/state" 2>/dev/null; }
outcome() { [ "$run/state" -nt "$run/logs/attempt" ] && state; }   # what this start wrote, not one before it
give_up() { echo "loldu: $*" >&2; note "gave up: $*"; exit 1; }
note "start job=$SLURM_JOB_ID restart=$restart nodes=$SLURM_JOB_NODELIST"

# Slurm may requeue what was already done, and a run that gains nothing is not started for ever.
[ "$restart" = 0 ] || [ "$(state)" != finished ] || { note "already finished"; exit 0; }
[ "$restart" -le @MAX_RESTARTS@ ] || give_up "came back @MAX_RESTARTS@ times (--max-restarts); submit again to go on"
newest=$(cd "$run/checkpoints" 2>/dev/null && printf '%s\n' step-*/COMPLETE | sort -V | tail -n 1)
[ "$restart" != 0 ] || : >"$run/logs/starts"
echo "from $newest" >>"$run/logs/starts"
[ "$(grep -cxF "from $newest" "$run/logs/starts")" -le @SAME@ ] ||
  give_up "@SAME@ starts gained no saved step: read $run/logs, or save more often (--save-every)"

# Time is nearly up, or somebody else's turn: save and come back. TERM (scancel, a requeue, the limit): outlive srun.
rm -f "$run/logs/failures"
echo run >"$run/control"
warned='' ended=''
trap 'warned=1; echo stop >"$run/control"; note "USR2: asked to stop"' USR2
trap 'ended=1; note TERM' TERM

@SETUP@@OPTIONS@
# What the nodes compare themselves with, and where the processes meet.
LOLDU_ATTEMPT=$SLURM_JOB_ID.$restart
echo "$LOLDU_ATTEMPT" >"$run/logs/attempt"
LOLDU_ENVIRONMENT=$(@PYTHON@ environment @RECIPE@) ||
  give_up "cannot start Python on $HOSTNAME: see above, and --setup, --python, --container"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)@SUFFIX@ || exit 1
MASTER_PORT=@PORT@
LOLDU_PER_NODE=@PER_NODE@
export LOLDU_ATTEMPT LOLDU_ENVIRONMENT LOLDU_PER_NODE MASTER_ADDR MASTER_PORT

@SRUN@ \
  @PYTHON@ @COMMAND@ &
srun=$!
while kill -0 $srun 2>/dev/null; do wait $srun; done    # a trap ends a wait early
wait $srun
rc=$?
note "srun rc=$rc state=$(outcome) warned=$warned ended=$ended"
[ ! -s "$run/logs/failures" ] || cat "$run/logs/failures" >&2

[ "$(outcome)" != finished ] || exit 0
id=$SLURM_JOB_ID                       # of an array's last task this is the whole array
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# A preemption may tell the ranks alone, by TERM: Slurm would take a job that then leaves in time for one that is done.
case $(scontrol -o show job "$id") in *" PreemptTime="[0-9]*) warned=1 ;; esac
if [ -n "$warned" ] && [ -z "$ended" ] && [ "$(outcome)" = stopped ] && [ "$restart" -lt @MAX_RESTARTS@ ]; then
  trap - USR2 TERM                     # a trapped TERM would sit out Slurm's time to kill
  scontrol requeue "$id" 2>>"$run/events"   # a harmless error where Slurm was first
  exit 0
fi
[ "$(outcome)" != stopped ] || exit 75   # stopped early and saved: submit again to go on
exit $rc
"""


def _part(found: re.Match[str], parts: Mapping[str, str]) -> str:
    """A part of the template; one that brings its own end of line, or is empty, takes the template's away."""
    text = parts[found[1]]
    ends = found[0].endswith("\n") and bool(text) and not text.endswith("\n")
    return text + ("\n" if ends else "")


def _options_of_tasks(tasks: Sequence[Sequence[str]]) -> str:
    if not tasks:
        return ""
    cases = [f"  {at}) options=({' '.join(map(shlex.quote, words))}) ;;" for at, words in enumerate(tasks)]
    return "\n".join(["case $SLURM_ARRAY_TASK_ID in", *cases, "esac", "", ""])


def directive(word: str) -> str:
    """One option as sbatch reads it on an #SBATCH line: it knows double quotes and backslashes, and no line's end."""
    if not word.isprintable():
        raise ValueError(f"{word!r} cannot stand in a Slurm job: it holds a line's end or an unprintable character")
    if re.fullmatch(r"[A-Za-z0-9_./:=@%,+^~-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the variables by which Slurm would read another job's settings, or the shell's, as ours.

    SBATCH_TIMELIMIT beats `#SBATCH --time`, and a job submitted from a job inherits its number of tasks.
    """
    kept = {"SLURM_CONF"}
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    return {
        name: value
        for name, value in environ.items()
        if name in kept or not (name.startswith(("SLURM_", "SBATCH_", "SRUN_", "LOLDU_")) or name in ours)
    }


def ask(words: Sequence[str], run: Run = subprocess.run, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. Raises ValueError where it is not installed."""
    if run is subprocess.run and shutil.which(words[0]) is None:
        raise ValueError(
            f"{words[0]} is not on PATH: Slurm's commands live on a cluster's login nodes (try: module load slurm). "
            "loldu submit --dry-run shows the script without Slurm, loldu launch starts hosts over ssh"
        )
    try:
        return run(list(words), capture_output=True, text=True, timeout=120, **options)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{words[0]} gave no answer in 120 s: is Slurm's controller up? Type: scontrol ping") from None


def read_tasks(file: Path) -> tuple[tuple[str, ...], ...]:
    """The recipe options of each run of an array: one line each; blank lines and # comments are skipped."""
    if not file.is_file():
        raise ValueError(f"--array {file}: no such file; expected recipe options, one line for each run")
    tasks = []
    for at, line in enumerate(file.read_text().splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"{file}, line {at}: {error}: {line.strip()}") from None
        if runs.option("--output", words) is not None:
            raise ValueError(f"{file}, line {at}: --output is made by the array: one folder task-N for each run")
        if words:
            tasks.append(tuple(words))
    if not tasks:
        raise ValueError(f"--array {file} holds no line of recipe options")
    return tuple(tasks)


def submit(
    recipe: str,
    resources: Resources,
    recipe_options: Sequence[str] = (),
    *,
    name: str | None = None,
    dry_run: bool = False,
    run: Run = subprocess.run,
) -> int:
    """Write RUN/job.sbatch and hand it to sbatch; with dry_run only print it. Returns an exit code."""
    file = runs.find_recipe(recipe)
    folder = runs.run_folder(name, file, recipe_options)
    tasks = read_tasks(Path(resources.array)) if resources.array else ()
    if tasks and runs.option("--output", recipe_options) is not None:
        raise ValueError("--output with --array: each run has its own folder; give the whole array's with --name")
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
    running = job_state(runs.job_of(folder), run) if folder.exists() else None
    if running is not None and running.alive:
        raise ValueError(
            f"{folder} belongs to job {running.job_id}, which is {running.state}: loldu logs -f {folder.name} follows "
            f"it, loldu cancel {folder.name} ends it; or give another --name"
        )
    runs.write(folder / "job.sbatch", text)
    (folder / "logs").mkdir(exist_ok=True)
    environ, words = clean_environment(os.environ), ["sbatch", "--parsable", str(folder / "job.sbatch")]
    for tried in (["sbatch", "--test-only", words[-1]], words):  # a request no node can meet would wait for ever
        answer = ask(tried, run, env=environ)
        if answer.returncode:
            raise ValueError(f"sbatch refused the job: {answer.stderr.strip() or answer.stdout.strip()}")
    job_id, _, cluster = answer.stdout.strip().partition(";")
    known = {
        "job_id": job_id, "cluster": cluster, "name": job.name, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": job.folder, "command": list(job.command), "tasks": [list(words) for words in tasks],
    }  # fmt: skip
    runs.write(folder / "job.json", json.dumps(known, indent=2) + "\n")
    shown = shlex.quote(folder.name if folder.parent == Path(os.path.abspath(runs.RUNS)) else str(folder))
    print(f"job {job_id}: {resources.nodes} x {resources.processes} processes{f', {len(tasks)} runs' if tasks else ''}")
    print(f"folder   {folder}\nscript   {folder / 'job.sbatch'}")
    print(f"follow   loldu logs -f {shown}\nstate    loldu status {shown}\nend      loldu cancel {shown}")
    return 0


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job."""

    job_id: str
    state: str  # PENDING, RUNNING, COMPLETED, FAILED …, or UNKNOWN: Slurm forgets a job minutes after its end
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
    """What Slurm says about jobs (each a job.json, and an array's task or None for all of it), in their order.

    One question however many: to scontrol while it remembers, then to accounting, where there is one, for the others.
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
            found[at] = JobState(job_id, "UNKNOWN", "forgotten")
    return [found[at] for at in range(len(asked))]


def _sort_in(found: dict[int, JobState], left: dict[int, tuple[str, str | None]], states: Sequence[JobState]) -> None:
    """Move what the states answer from left to found; of several tasks a living one speaks for the array."""
    by_job: dict[str, list[JobState]] = {}
    for state in states:
        by_job.setdefault(state.job_id.partition("_")[0], []).append(state)
    for at, (job, task) in list(left.items()):
        mine = [state for state in by_job.get(job, []) if task is None or _holds(state.job_id.partition("_")[2], task)]
        if mine:
            found[at] = next((state for state in mine if state.alive), mine[0])
            del left[at]


def _holds(tasks: str, task: str) -> bool:
    """Whether Slurm's list of array tasks, `3` or `0-4,7%2`, has this one. A job without tasks is all of them."""
    ends = [part.split("-") for part in tasks.strip("[]").partition("%")[0].split(",")]
    return tasks == "" or any(int(end[0]) <= int(task) <= int(end[-1]) for end in ends)


def job_state(known: Mapping[str, Any], run: Run = subprocess.run, task: str | None = None) -> JobState | None:
    """What Slurm says about the job of a job.json; None for an empty one."""
    return job_states([(known, task)], run)[0] if known else None


def parse_scontrol(text: str) -> list[JobState]:
    """`scontrol -o show job`: one line of Name=value words for each job or array task."""
    found = []
    for line in text.splitlines():
        fields = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", line)[::-1])  # a name's first value counts
        if "JobState" in fields:
            task = fields.get("ArrayTaskId")
            job_id = f"{fields['ArrayJobId']}_{task}" if task else fields["JobId"]
            told = {name: value for name, value in fields.items() if value not in ("None", "(null)")}
            reason, nodes, restarts = told.get("Reason", ""), told.get("NodeList", ""), int(told.get("Restarts", 0))
            found.append(JobState(job_id, fields["JobState"], reason, nodes, restarts))
    return found


def parse_sacct(text: str) -> list[JobState]:
    """`sacct -n -P -X -o JobID,State,NodeList,Restarts`; a state may say who: CANCELLED by 1000."""
    found = []
    for line in text.splitlines():
        job_id, state, nodes, *rest = [*line.split("|"), "", ""]
        if state:
            restarts = int(rest[0]) if rest[0].isdigit() else 0
            found.append(JobState(job_id, state.split()[0], "", nodes.replace("None assigned", ""), restarts))
    return found


def task_of(folder: Path) -> tuple[Path, str | None]:
    """The folder that holds job.json, and the array task where folder is one of its runs."""
    if not (folder / "job.json").exists() and (match := re.fullmatch(r"task-(\d+)", folder.name)):
        return folder.parent, match[1]
    return folder, None


def state_of(folder: Path, run: Run = subprocess.run) -> JobState | None:
    """What Slurm says about the run in folder; None where Slurm did not start it."""
    top, task = task_of(folder)
    return job_state(runs.job_of(top), run, task)


def status(given: Sequence[str] = (), *, as_json: bool = False, run: Run = subprocess.run) -> int:
    """Print how the named runs stand, or all of runs/. Returns an exit code."""
    folders = [runs.find_run(one) for one in given] if given else runs.all_runs()
    tops = {
        folder: top
        for top in folders
        for folder in sorted(top.glob("task-*"), key=lambda path: int(path.name[5:])) or [top]
    }
    rows: list[dict[str, Any]] = []
    for (folder, top), state in zip(tops.items(), _states_for_a_table(list(tops), run), strict=True):
        step = runs.last_step(folder)
        rows.append(
            {
                "run": folder.name if folder == top else f"{top.name}/{folder.name}",
                "state": runs.read(folder / "state") or _before_its_start(state),
                "step": step.get("step"), "loss": step.get("loss"), "saved_step": runs.checkpoint_step(folder),
                "job": state.job_id if state else None, "slurm": state.state if state else None,
                "reason": state.reason if state else "", "nodes": state.nodes if state else "",
                "restarts": state.restarts if state else 0, "folder": str(folder),
            }
        )  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"no runs in {runs.RUNS}/: loldu submit or loldu launch starts one")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS.values())
    for row in rows:
        known = row["slurm"] if row["slurm"] != "UNKNOWN" else ""
        reason = f"({row['reason']})" if row["reason"] else ""
        row["slurm"] = f"{known or ''} {reason}".strip()
        row["loss"] = f"{row['loss']:.4f}" if row["loss"] is not None else ""
        table.add_row(*("" if row[name] is None else str(row[name]) for name in COLUMNS))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _before_its_start(state: JobState | None) -> str:
    if state is None or state.alive:
        return "starting" if state is not None and state.state == "RUNNING" else "not started"
    return "unknown"


def _states_for_a_table(folders: Sequence[Path], run: Run) -> list[JobState | None]:
    """As state_of for each; a machine without Slurm can still show what the run folders say."""
    known = [(runs.job_of(top), task) for top, task in map(task_of, folders)]
    jobs = [job for job in known if job[0]]
    try:
        states = iter(job_states(jobs, run))
    except ValueError:
        states = iter(JobState(job["job_id"], "UNKNOWN", "no answer from Slurm here") for job, _ in jobs)
    return [next(states) if job else None for job, _ in known]


def cancel(given: str, *, run: Run = subprocess.run) -> int:
    """End a run: scancel for a job (it saves, and does not come back), the control file for any other."""
    folder = runs.find_run(given)
    state = state_of(folder, run)
    if state is None:
        if runs.read(folder / "state") != "running":
            raise ValueError(f"{folder} is not running: its state is {runs.read(folder / 'state') or 'not written'}")
        runs.write(folder / "control", "stop\n")
        print(f"asked {folder} to save and stop; loldu status {shlex.quote(str(folder))} tells when it has")
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
    print(f"cancelled job {job_id}; it saves and does not come back")
    return 0
