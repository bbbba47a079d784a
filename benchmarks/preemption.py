"""Ten interruptions of a real two-node training run on a local Slurm; each must end with the uninterrupted curve.

    python benchmarks/preemption.py                  # 10 to 20 minutes on two cores; root, for the local Slurm
    python benchmarks/preemption.py --only "node crash"

A run passes if it finished after at least one restart, events.jsonl has every step once, and each loss equals the
uninterrupted run's within 5e-6 (two processes add in another order than one). Writes results/preemption.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "cluster"))
from real_cluster import RECIPE, Cluster, losses, read_losses, said, why_not  # noqa: E402

DATA = REPO.parent / "shared" / "data"
OPTIONS = [
    f"--model={DATA / 'models' / 'stories260K'}", f"--data={DATA / 'instruction' / 'alpaca_5000.json'}",
    "--prompt-template=short", "--max-length=256", "--rank=16", "--targets", "all-linear", "--learning-rate=1e-3",
    "--batch-size=32", "--max-steps=20", "--save-every=2", "--dtype=float32", "--eval-records=20",
]  # fmt: skip
NO_USER_SIGNAL = ("SlurmctldParameters=",)  # the site sends TERM at a preemption, not the job's own --signal


@dataclass(frozen=True)
class Interruption:
    """One kind of interruption, and the cluster's settings for it."""

    name: str
    interrupt: Callable[[Cluster, str, Path], None]
    settings: tuple[str, ...] = ()
    grace_s: int = 20
    submit: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    at_step: int = 3


def urgent_job(cluster: Cluster, job: str, run: Path) -> None:
    """A job of the urgent partition takes all nodes."""
    words = ["--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
    cluster.run("sbatch", "-p", "urgent", f"-N{cluster.nodes}", *words)


def warning(cluster: Cluster, job: str, run: Path) -> None:
    print(cluster.loldu("simulate-preempt", run, timeout_s=900).stdout, end="")


def requeue(cluster: Cluster, job: str, run: Path) -> None:
    cluster.run("scontrol", "requeue", job)


def crash(node: str) -> Callable[[Cluster, str, Path], None]:
    def interrupt(cluster: Cluster, job: str, run: Path) -> None:
        os.kill(int((cluster.folder / "run" / f"{node}.pid").read_text().split()[0]), signal.SIGKILL)

    return interrupt


def wait(cluster: Cluster, job: str, run: Path) -> None:
    """Nothing to do: the time limit arrives."""


def starting(cluster: Cluster, job: str, run: Path) -> None:
    cluster.run("scancel", "--batch", "--signal=USR2", job)


PLAN = (
    Interruption("preempted, warned by the job's own signal", urgent_job),
    Interruption("preempted, TERM and 20 s of grace", urgent_job, NO_USER_SIGNAL),
    Interruption("preempted, no grace at all", urgent_job, NO_USER_SIGNAL, grace_s=0),
    Interruption("preempted, own signal but no grace", urgent_job, grace_s=0),
    Interruption("warned during start-up", starting, at_step=0),
    Interruption("warned ahead of its time limit", wait, submit=("--time=2", "--warning=90"),
                 options=("--max-steps=100",)),  # more than half a minute of steps
    Interruption("somebody else's requeue", requeue),
    Interruption("one array task, warned alone", warning, submit=("--array={array}",)),
    Interruption("node crash, the second node", crash("node2")),
    Interruption("node crash, the batch script's node", crash("node1")),
)  # fmt: skip


def uninterrupted(folder: Path, steps: str) -> list[float]:
    """The losses of one process."""
    run = folder / f"whole{steps}"
    cluster = Cluster(folder)
    cluster.run(sys.executable, RECIPE, *OPTIONS, *filter(None, [steps]), f"--cache={folder / 'cache'}",
                f"--output={run}", timeout_s=900)  # fmt: skip
    return losses(run)


def survive(cluster: Cluster, plan: Interruption, folder: Path, expected: list[float]) -> dict[str, Any]:
    """Submit, interrupt, wait for the end, compare."""
    cluster.run("scontrol", "update", "PartitionName=main", f"GraceTime={plan.grace_s}")
    array = folder / "array"
    array.write_text("--seed=42\n--seed=42\n")
    submit = [word.format(array=array) for word in plan.submit]
    options = [*OPTIONS, *plan.options, f"--cache={folder / 'cache'}"]
    name = "".join(letter if letter.isalnum() else "-" for letter in plan.name)
    words = ["submit", RECIPE, "--nodes=2", "--partition=main", f"--name={name}", *submit, "--", *options]
    job = cluster.loldu(*words, cwd=folder).stdout.split()[1].rstrip(":")
    run = folder / "runs" / name
    run, job = (run / "task-0", f"{job}_0") if submit and "--array" in submit[0] else (run, job)
    if plan.at_step:
        cluster.at_step(run, plan.at_step, 600)
    else:
        cluster.until(lambda: (run / "logs" / "attempt").exists(), "the batch script")
    before, began = len(read_losses(run)), time.monotonic()
    plan.interrupt(cluster, job, run)
    cluster.until(lambda: (run / "events").read_text().count(" start ") > 1, f"the second start: {said(run)}", 600)
    back = time.monotonic() - began
    cluster.until(lambda: (run / "state").exists() and (run / "state").read_text().strip() == "finished",
                  f"the end: {said(run)}", 600)  # fmt: skip
    found = losses(run)
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    log = next(run.glob("logs/rank0@*.log")).read_text()
    from_step = [line for line in log.splitlines() if "resuming from" in line][-1:]
    return {
        "interruption": plan.name, "survived": worst <= 5e-6, "steps": len(found), "interrupted_at_step": before,
        "back_after_s": round(back, 1), "worst_difference": worst, "went_on": " ".join(from_step)[-40:],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="only interruptions whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "preemption.json")
    chosen = parser.parse_args()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    plans = [plan for plan in PLAN if not chosen.only or chosen.only in plan.name]
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected = {steps: uninterrupted(folder, steps) for steps in {"".join(plan.options) for plan in plans}}
        for settings in dict.fromkeys(plan.settings for plan in plans):
            with Cluster(folder / f"slurm{len(settings)}", 3, settings) as cluster:
                for plan in (plan for plan in plans if plan.settings == settings):
                    cluster.__enter__()  # brings a crashed node back
                    results.append(survive(cluster, plan, folder, expected["".join(plan.options)]))
                    print(json.dumps(results[-1]), flush=True)
    survived = sum(result["survived"] for result in results)
    print(f"{survived} of {len(results)} survived")
    if not chosen.only:
        chosen.out.write_text(json.dumps({"survived": survived, "of": len(results), "runs": results}, indent=2) + "\n")
    return 0 if survived == len(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
