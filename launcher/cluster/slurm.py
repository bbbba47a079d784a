"""Slurm: the job script, a pure function, and the command that submits it.

Slurm's signals shape the script. The warning before a time limit or preemption goes only to the batch shell, which asks
rank 0 to stop through the run folder's control file. The job requeues itself only after a warning and never after TERM,
because `scontrol requeue` also restarts a cancelled job.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.cluster import runs
from launcher.cluster.slurm_jobs import Run, ask, job_state
from launcher.files import user_path
from launcher.recipes import find_recipe
from launcher.text import one_line

RANK_ENTRY = Path(__file__).resolve().with_name("rank.py")
STARTS_WITHOUT_A_STEP = 3
PLACE = ("time", "partition", "account", "qos", "constraint")  # settings that are sbatch options of the same name


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
