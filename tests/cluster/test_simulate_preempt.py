"""`loldu simulate-preempt` on running jobs: some restart, some cannot."""

import subprocess
import sys

import pytest
from real_cluster import COUNT, RECIPE, losses, read_losses, said

pytestmark = pytest.mark.slow


def test_a_warned_run_survives(cluster, tmp_path):
    run = tmp_path / "run"
    job = cluster.loldu("submit", COUNT, "--", f"--output={run}", "--steps=200").stdout.split()[1].rstrip(":")
    cluster.at_step(run, 2)

    done = cluster.loldu("simulate-preempt", run, check=False, timeout_s=180)

    assert done.returncode == 0, done.stdout + done.stderr + said(run)
    assert "the run survived" in done.stdout
    assert cluster.ended(job) == "COMPLETED"
    assert len(losses(run)) == 200


def test_a_run_requeued_without_warning_survives_and_once_finished_is_left_alone(cluster, tmp_path):
    """The losses equal those of an uninterrupted run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    cluster.run(sys.executable, COUNT, f"--output={whole}", "--steps=200", "--seconds=0")
    job = cluster.loldu("submit", COUNT, "--", f"--output={run}", "--steps=200").stdout.split()[1].rstrip(":")
    cluster.at_step(run, 2)

    done = cluster.loldu("simulate-preempt", run, "--how=requeue", check=False, timeout_s=180)
    end = cluster.ended(job)
    written = (run / "events.jsonl").stat().st_mtime_ns
    cluster.run("scontrol", "requeue", job)
    cluster.until(lambda: "already finished" in (run / "events").read_text(), lambda: f"the third start: {said(run)}")

    assert done.returncode == 0, done.stdout + done.stderr + said(run)
    assert (end, cluster.ended(job)) == ("COMPLETED", "COMPLETED")
    assert losses(run) == losses(whole)
    assert (run / "events.jsonl").stat().st_mtime_ns == written


def test_a_run_that_may_not_restart_is_reported_and_ends_saved(cluster, tmp_path):
    run = tmp_path / "run"
    words = ["submit", COUNT, "--max-restarts=0", "--", f"--output={run}", "--steps=500"]
    job = cluster.loldu(*words).stdout.split()[1].rstrip(":")
    cluster.at_step(run, 2)

    done = cluster.loldu("simulate-preempt", run, check=False, timeout_s=180)

    assert done.returncode == 1
    assert "it did not restart: Slurm says FAILED" in done.stderr
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert (run / "state").read_text() == "stopped\n"


def test_a_run_outside_slurm_saves_and_is_not_restarted(cluster, tmp_path):
    run = tmp_path / "run"
    words = [sys.executable, COUNT, f"--output={run}", "--steps=500"]
    process = subprocess.Popen(words, env=cluster.environ | {"PYTHONPATH": str(RECIPE.parents[1])})
    cluster.until(lambda: len(read_losses(run)) > 1, "the first steps")

    done = cluster.loldu("simulate-preempt", run)

    assert process.wait(120) == 75
    assert "nothing restarts a run outside Slurm" in done.stdout
    again = cluster.loldu("simulate-preempt", run, check=False)
    assert again.returncode == 2
    assert "its state is stopped" in again.stderr
