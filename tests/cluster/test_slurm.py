"""Jobs on a real Slurm of two nodes: the curve of one process, every way to be interrupted, every mistake's end."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_cluster import COUNT, HELD, RECIPE, losses, said

pytestmark = pytest.mark.slow


def count(cluster, run, *options, submit=(), **others):
    """Submit the counting recipe; the job's id."""
    words = ("submit", COUNT, *submit, "--", f"--output={run}", *options)
    return cluster.loldu(*words, **others).stdout.split()[1].rstrip(":")


def starts(run):
    """How often the batch script began."""
    file = run / "events"
    return file.read_text().count(" start ") if file.exists() else 0


def state(run):
    file = Path(run) / "state"
    return file.read_text().strip() if file.exists() else ""


def test_two_nodes_give_the_curve_of_one_process(cluster, one_process, tmp_path):
    """Sums in another order: 5e-6 in float32 (measured 1e-6)."""
    expected, options = one_process
    run = tmp_path / 'a run\'s 100%j "folder" $(id)'

    job = cluster.submit(run, options, "--nodes=2")
    final = cluster.ended(job)

    assert final == "COMPLETED", said(run)
    torch.testing.assert_close(losses(run), expected, atol=5e-6, rtol=0)
    assert {path.name for path in run.glob("logs/rank*")} == {"rank0@node1.log", "rank1@node2.log"}
    assert "device: cpu, 2 processes" in cluster.loldu("logs", run, "--rank=0", "--lines=100").stdout
    assert (run / f"slurm-{job}.log").exists()


@pytest.mark.parametrize("starter", ["torchrun", "accelerate"])
def test_torchrun_or_accelerate_may_start_the_processes_of_a_node(cluster, tmp_path, starter):
    run = tmp_path / "run"
    job = count(cluster, run, "--steps=3", submit=["--nodes=2", "--processes-per-node=2", f"--starter={starter}"])

    final = cluster.ended(job)

    assert final == "COMPLETED", said(run)
    assert "rank 0 of 4 begins" in (run / "logs" / "node0@node1.log").read_text()
    assert len(losses(run)) == 3


def test_a_preempted_run_saves_comes_back_and_has_the_same_curve(cluster, one_process, tmp_path):
    """A job of the urgent partition takes both nodes: Slurm warns the batch script, which asks the run to save."""
    expected, options = one_process
    run = tmp_path / "run"
    job = cluster.submit(run, options, "--nodes=2", "--partition=main", recipe=HELD)
    cluster.at_step(run, 3)

    cluster.run("sbatch", "-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.until(lambda: starts(run) == 2, lambda: f"the second start: {said(run)}")
    final = cluster.ended(job)

    assert final == "COMPLETED", said(run)
    told = (run / "events").read_text()
    assert told.index("USR2") < told.index("state=stopped warned=1")
    assert "resuming from" in (run / "logs" / "rank0@node1.log").read_text()
    torch.testing.assert_close(losses(run), expected, atol=5e-6, rtol=0)


def test_a_warning_to_a_job_that_is_only_starting_is_not_lost(cluster, tmp_path):
    """The batch script asks through the control file before there is a run to read it."""
    run = tmp_path / "run"
    job = count(cluster, run, "--steps=200")
    cluster.until(lambda: (run / "logs" / "attempt").exists(), "the batch script")

    cluster.run("scancel", "--batch", "--signal=USR2", job)
    cluster.until(lambda: starts(run) == 2, lambda: f"the second start: {said(run)}")

    assert cluster.ended(job) == "COMPLETED", said(run)
    assert len(losses(run)) == 200


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, tmp_path):
    """Even if it was just warned, and would have asked to be requeued."""
    run = tmp_path / "run"
    job = count(cluster, run, "--steps=500", submit=["--nodes=2"])
    cluster.at_step(run, 2)

    cluster.run("scancel", "--batch", "--signal=USR2", job)
    cluster.loldu("cancel", run)
    final = cluster.ended(job)  # a requeued one would be pending: its batch script is gone, nobody asks any more

    assert final == "CANCELLED"
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert state(run) == "stopped", said(run)
    assert starts(run) == 1
    again = cluster.loldu("cancel", run, check=False)
    assert again.returncode == 2
    assert f"job {job} is not running: Slurm says CANCELLED" in again.stderr


def test_a_finished_run_submitted_again_stays_finished_and_a_crash_at_its_start_is_none_of_that(cluster, tmp_path):
    run = tmp_path / "run"
    assert cluster.ended(count(cluster, run, "--steps=2")) == "COMPLETED", said(run)

    again = cluster.ended(count(cluster, run, "--steps=2"))
    crashed = cluster.ended(count(cluster, run, "--steps=4", "--fail-rank=0"))

    assert (again, crashed) == ("COMPLETED", "FAILED"), said(run)
    assert len(losses(run)) == 2


def test_a_rank_that_crashes_ends_the_job_and_is_named_with_its_error(cluster, tmp_path):
    run = tmp_path / "run"
    job = count(cluster, run, "--steps=500", "--fail-rank=1", submit=["--nodes=2"])

    final = cluster.ended(job)

    assert final == "FAILED"
    log = (run / f"slurm-{job}.log").read_text()
    assert "rank 1 on node2 ended with exit code 1" in log
    assert "RuntimeError: the disk of rank 1 is on fire" in log
    assert starts(run) == 1


def test_one_task_of_an_array_comes_back_alone(cluster, tmp_path):
    """The last task carries the array's own job id: a requeue of that id would restart all of them."""
    array = tmp_path / "array.txt"
    array.write_text("--steps=3  # the first run\n\n--steps=200\n")
    words = ["submit", COUNT, f"--array={array}", "--name", "two runs", "--", "--seconds=0.2"]
    job = cluster.loldu(*words, cwd=tmp_path).stdout.split()[1].rstrip(":")
    first, last = (tmp_path / "runs" / "two-runs" / f"task-{task}" for task in (0, 1))
    cluster.at_step(last, 1)

    cluster.run("scancel", "--batch", "--signal=USR2", f"{job}_1")
    cluster.until(lambda: state(first) == state(last) == "finished", lambda: f"both ends: {said(first)} {said(last)}")

    assert (starts(first), starts(last)) == (1, 2)
    assert (len(losses(first)), len(losses(last))) == (3, 200)
    rows = json.loads(cluster.loldu("status", "--json", "two runs", cwd=tmp_path).stdout)
    assert [row["run"] for row in rows] == ["two-runs/task-0", "two-runs/task-1"]


def test_a_job_submitted_from_a_job_is_its_own(cluster, tmp_path):
    """The outer job's SLURM_NTASKS and an SBATCH_TIMELIMIT of the shell would both override the script."""
    run = tmp_path / "run"
    words = [sys.executable, "-c", "from loldu import main; raise SystemExit(main())", "submit", str(COUNT), "--time=7"]
    inner = shlex.join([*words, "--nodes=2", "--", f"--output={run}", "--steps=3"])
    outer = tmp_path / "outer.sh"
    outer.write_text(f"#!/bin/bash\nexport SBATCH_TIMELIMIT=1 SBATCH_ACCOUNT=nobody RANK=3 WORLD_SIZE=4\n{inner}\n")
    log = tmp_path / "outer.log"

    there = {"PYTHONPATH": str(RECIPE.parents[1])}
    cluster.run("sbatch", "-n", "3", f"--output={log}", outer, environ=there)
    cluster.until(lambda: state(run) == "finished", f"the inner job: {log.read_text() if log.exists() else ''}")

    known = json.loads((run / "job.json").read_text())
    assert cluster.job(known["job_id"])["TimeLimit"] == "00:07:00"
    assert "rank 0 of 2 begins" in (run / "logs" / "rank0@node1.log").read_text()


def test_a_crash_loop_stops(cluster, crash_loop):
    """Somebody requeues a job that saves nothing, again and again: the fourth start gives up."""
    run, job = crash_loop

    final = cluster.ended(job)

    assert final == "FAILED"
    assert starts(run) == 4
    assert "3 starts saved no new step" in (run / f"slurm-{job}.log").read_text()


def test_a_taken_port_and_differing_code_end_clearly(cluster, tmp_path):
    taken, differ = tmp_path / "taken", tmp_path / "differ"
    holder = (
        f"{sys.executable} -c 'import socket, time; s = socket.create_server((\"\", 23456)); time.sleep(600)' &\n"
        f"until {sys.executable} -c 'import socket; socket.create_connection((\"127.0.0.1\", 23456))'\n"
        "do sleep 0.1; done"
    )
    entry = tmp_path / "python"  # an interpreter that is another one on node2
    entry.write_text(f"#!/bin/bash\n[ $(hostname) = node1 ] || exec {sys.base_prefix}/bin/python3 \"$@\"\n"
                     f"exec {sys.executable} \"$@\"\n")  # fmt: skip
    entry.chmod(0o755)

    first = count(cluster, taken, submit=["--nodes=2", "--port=23456", f"--setup={holder}"])
    second = count(cluster, differ, submit=["--nodes=2", f"--python={entry}"])

    assert (cluster.ended(first), cluster.ended(second)) == ("FAILED", "FAILED")
    log = (taken / f"slurm-{first}.log").read_text()
    assert "port 23456 on node1 cannot be opened (Address already in use)" in log, said(taken)
    assert "node2 differs from the first node: " in (differ / f"slurm-{second}.log").read_text()


def test_an_error_of_sbatch_is_shown_unchanged(cluster, tmp_path):
    refused = cluster.loldu("submit", COUNT, "--partition=nowhere", "--", f"--output={tmp_path / 'run'}", check=False)
    too_many = cluster.loldu("submit", COUNT, "--nodes=9", "--", f"--output={tmp_path / 'run'}", check=False)

    assert refused.returncode == too_many.returncode == 2
    assert "sbatch refused the job: " in refused.stderr
    assert "invalid partition specified: nowhere" in refused.stderr
    assert "Requested node configuration is not available" in too_many.stderr


def test_a_second_submission_of_a_living_run_is_refused(cluster, tmp_path):
    run = tmp_path / "run"
    job = count(cluster, run, "--steps=500", submit=["--sbatch=--hold"])

    second = cluster.loldu("submit", COUNT, "--", f"--output={run}", check=False)
    cluster.loldu("cancel", job, cwd=tmp_path, check=False)
    cluster.loldu("cancel", run)

    assert second.returncode == 2
    assert f"job {job} of {run} is PENDING" in second.stderr


def test_status_speaks_without_accounting_and_after_slurm_has_forgotten(cluster, tmp_path):
    run = tmp_path / "run"
    assert cluster.ended(count(cluster, run, "--steps=2")) == "COMPLETED"
    assert "accounting" in subprocess.run(["sacct"], env=cluster.environ, capture_output=True, text=True).stderr
    remembered = json.loads(cluster.loldu("status", "--json", run).stdout)[0]
    (run / "job.json").write_text(json.dumps(json.loads((run / "job.json").read_text()) | {"job_id": "999999"}))

    forgotten = json.loads(cluster.loldu("status", "--json", run).stdout)[0]

    assert (remembered["slurm"], remembered["state"], remembered["step"]) == ("COMPLETED", "finished", 2)
    assert (forgotten["slurm"], forgotten["state"], forgotten["step"]) == ("UNKNOWN", "finished", 2)
