"""A real Slurm of two nodes on this machine, as tests and the preemption benchmark use it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LOCAL_CLUSTER = REPO.parent / "shared" / "slurm" / "local-cluster"
RECIPE = REPO / "recipes" / "llama2_alpaca_loldu.py"
HELD = REPO / "tests" / "held_recipe.py"
COUNT = Path(__file__).with_name("counting_recipe.py")
ENTRY = f"import sys; sys.path.insert(0, {str(REPO)!r}); from loldu import main; raise SystemExit(main())"
FINAL = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")


def why_not() -> str | None:
    """Why there can be no cluster on this machine."""
    if not LOCAL_CLUSTER.exists():
        return f"needs the script that brings up a local Slurm: no {LOCAL_CLUSTER}"
    if os.geteuid() != 0:
        return "needs root, for namespaces and Slurm's daemons"
    if not shutil.which("sbatch") and not shutil.which("apt-get"):
        return "needs Slurm: no sbatch here, and no apt-get to install it with"
    return None


class Cluster:
    """Slurm with node1 and node2; bring it up with `with Cluster(folder) as cluster`."""

    def __init__(self, folder: Path, nodes: int = 2, settings: tuple[str, ...] = ()):
        """settings are lines of slurm.conf, Name=value."""
        self.folder, self.nodes, self.settings = folder, nodes, settings
        self.environ = os.environ | {
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "ACCELERATE_USE_CPU": "true", "COLUMNS": "200", "PYTHONPATH": str(REPO),
        }  # fmt: skip

    def __enter__(self):
        """Also brings nodes back that a test has killed. Installs Slurm if it is missing."""
        sets = [word for line in self.settings for word in ("--set", line)]
        command = [LOCAL_CLUSTER, "up", str(self.nodes), self.folder, *sets]
        subprocess.run(command, check=True, timeout=900, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_):
        subprocess.run([LOCAL_CLUSTER, "down", self.folder], check=True, timeout=60)

    def run(self, *words, check=True, timeout_s=120, cwd=None, environ=None):
        """The output of a command, as text; with check, the test fails if the command does."""
        done = subprocess.run(
            [str(word) for word in words], env=self.environ | (environ or {}), cwd=cwd, capture_output=True, text=True,
            timeout=timeout_s,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def loldu(self, *words, **options):
        return self.run(sys.executable, "-c", ENTRY, *words, **options)

    def submit(self, run, options, *resources, recipe=RECIPE, **others):
        """Submit the recipe with run as its folder; the job's id."""
        out = self.loldu("submit", recipe, *resources, "--", *options, f"--output={run}", **others).stdout
        return out.split()[1].rstrip(":")

    def job(self, job_id):
        """scontrol's fields of a job."""
        text = self.run("scontrol", "-o", "show", "job", job_id).stdout.splitlines()[0]
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def until(self, condition, what, timeout_s=180):
        """Wait until condition() is true; generous, since the machine may be busy. what, or what(), names the condition
        in the error."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what() if callable(what) else what}"
            time.sleep(0.1)
        return value

    def ended(self, job_id, timeout_s=240):
        """Wait for the job's end; its last state."""
        return self.until(
            lambda: (state := self.job(job_id)["JobState"]) in FINAL and state, f"the end of job {job_id}", timeout_s
        )

    def at_step(self, run, step, timeout_s=240):
        """Wait until the run has trained this step."""

        def trained():
            assert not (run / "logs" / "failures").exists(), said(run)
            return len(read_losses(run)) >= step

        self.until(trained, lambda: f"step {step} of {run}: {said(run)}", timeout_s)

    def node_pid(self, node):
        """Process 1 of a node's namespaces, by its number here."""
        outer = (self.folder / "run" / f"{node}.pid").read_text().split()[0]
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])


def read_losses(run):
    """The losses so far; a line still being written is left out."""
    file = Path(run) / "events.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [event["loss"] for event in map(json.loads, lines) if "loss" in event]


def losses(run):
    """The loss of each step, each once and in order."""
    events = [json.loads(line) for line in (Path(run) / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
    return [event["loss"] for event in steps]


def said(run):
    """The output of a run's job and ranks, for the message of a failed test."""
    files = [*Path(run).glob("slurm-*.log"), *Path(run).glob("logs/*"), Path(run) / "events"]
    return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files if file.is_file())
