"""`loldu simulate-preempt` on live runs: those that come back, those that cannot."""

import subprocess
import sys

import pytest
from real_cluster import COUNT, RECIPE, losses, read_losses, said

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["warning", "requeue"])
def test_a_run_that_keeps_the_contract_survives(cluster, tmp_path, how):
    run = tmp_path / "run"
    job = cluster.loldu("submit", COUNT, "--", f"--output={run}", "--steps=40").stdout.split()[1].rstrip(":")
    cluster.at_step(run, 2)

    done = cluster.loldu("simulate-preempt", run, f"--how={how}", check=False, timeout_s=180)

    assert done.returncode == 0, done.stdout + done.stderr + said(run)
    assert "it survived" in done.stdout
    assert cluster.ended(job) == "COMPLETED"
    assert len(losses(run)) == 40


def test_a_run_that_may_not_come_back_is_told_apart(cluster, tmp_path):
    run = tmp_path / "run"
    cluster.loldu("submit", COUNT, "--max-restarts=0", "--", f"--output={run}", "--steps=500")
    cluster.at_step(run, 2)

    done = cluster.loldu("simulate-preempt", run, check=False, timeout_s=180)

    assert done.returncode == 1
    assert "it did not come back: Slurm says FAILED" in done.stderr


def test_a_run_outside_slurm_saves_and_is_not_promised_more(cluster, tmp_path):
    run = tmp_path / "run"
    words = [sys.executable, COUNT, f"--output={run}", "--steps=500"]
    process = subprocess.Popen(words, env=cluster.environ | {"PYTHONPATH": str(RECIPE.parents[1])})
    cluster.until(lambda: len(read_losses(run)) > 1, "the first steps")

    done = cluster.loldu("simulate-preempt", run)

    assert process.wait(30) == 75
    assert "nothing restarts a run outside Slurm" in done.stdout
    again = cluster.loldu("simulate-preempt", run, check=False)
    assert again.returncode == 2
    assert "its state is stopped" in again.stderr
