"""A sweep as a Slurm job array."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_a_sweep_is_one_array_whose_runs_are_compared_when_they_have_ended(cluster, tmp_path, one_process):
    _, options = one_process
    command = ["sweep", "llama2_alpaca_loldu", "--vary", "rank=4,8", "--output", tmp_path / "sweep"]
    command += ["--slurm", "--time=9", *(word for word in options if not word.startswith("--rank"))]

    submitted = cluster.loldu(*command)

    cluster.ended(submitted.stdout.split()[1].rstrip(":"))
    compared = cluster.loldu(*command)
    assert "2 of 2 runs submitted" in submitted.stderr
    assert "submitted" not in compared.stderr
    found = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert {row["values"]["rank"] for row in found["rows"]} == {"4", "8"}
    assert all(row["runs"] for row in found["rows"])
