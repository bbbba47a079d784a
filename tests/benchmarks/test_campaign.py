"""Processes that share a campaign: a run is made once, and one that is in progress is left to its process."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))  # whose scripts import each other by name

from campaign import Campaign, Study  # noqa: E402

TAKE_AND_WAIT = """
import sys
sys.path[:0] = sys.argv[1:4]
from test_campaign import campaign_in
with open(sys.argv[4] + "/runs.lock", "w") as held:
    print(campaign_in(sys.argv[4]).take((), held.fileno())["rate"], flush=True)
    sys.stdin.read()
"""


def what(model, task, method, rate, seed, split):
    return {"model": model, "task": task, "method": method, "rate": rate, "seed": seed, "split": split}


def measure(row, work):
    return {**row, "loss": abs(row["rate"] - 3e-3), "cpu_s": 1.0, "process": os.getpid()}


def campaign_in(folder):
    """Of one method whose best learning rate is 3e-3 of 1e-3, 3e-3 and 1e-2."""
    results = Path(folder) / "runs.json"
    study = Study(results, {"a": {"rate": 3e-3}}, (("a", "m", "t"),), what, measure, lambda *_: None, seeds=(1, 2))
    return Campaign(study, Path(folder))


def runs_in(folder):
    return [(run["rate"], run["seed"]) for run in json.loads((folder / "runs.json").read_text())["runs"]]


def test_a_campaign_searches_then_tests_and_makes_no_run_twice(tmp_path, capsys):
    campaign_in(tmp_path).run_all()
    campaign_in(tmp_path).run_all()

    assert runs_in(tmp_path) == [(1e-3, 0), (3e-3, 0), (1e-2, 0), (3e-3, 1), (3e-3, 2)]


def test_each_run_has_a_process_of_its_own(tmp_path):
    campaign_in(tmp_path).run_all()

    processes = [run["process"] for run in json.loads((tmp_path / "runs.json").read_text())["runs"]]
    assert len({*processes, os.getpid()}) == len(processes) + 1


def test_a_run_that_another_process_is_at_is_left_to_it_until_it_ends(tmp_path):
    paths = [str(REPO), str(REPO / "benchmarks"), str(Path(__file__).parent)]
    other = subprocess.Popen(
        [sys.executable, "-c", TAKE_AND_WAIT, *paths, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert float(other.stdout.readline()) == 1e-3

    campaign_in(tmp_path).run_all()
    while_it_runs = runs_in(tmp_path)
    other.communicate()
    campaign_in(tmp_path).run_all()

    assert while_it_runs == [(3e-3, 0), (1e-2, 0)]  # the search has no best value yet
    assert runs_in(tmp_path) == [*while_it_runs, (1e-3, 0), (3e-3, 1), (3e-3, 2)]
