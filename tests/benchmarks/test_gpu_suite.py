"""The GPU suite's own logic, without a GPU: sections in processes of their own, and their steps on tiny shapes."""

import json
import sys

import pytest

from benchmarks import gpu_suite

# A section's command: writes what it has found to the file after --output, then does the rest.
WRITES = "import sys, time; open(sys.argv[sys.argv.index('--output') + 1], 'w').write('{\"first\": 1}'); "


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("", "done"),
        ("print('out of memory'); sys.exit(3)", "failed, exit code 3"),
        ("print('out of memory', flush=True); time.sleep(60)", "stopped after its 5 s"),
    ],
)
def test_a_section_that_fails_or_hangs_is_reported_with_what_it_had_found(then, status):
    found = gpu_suite.run_apart([sys.executable, "-c", WRITES + then], budget_s=5)

    assert (found["status"], found["found"]) == (status, {"first": 1})
    assert found.get("last_words", "out of memory") == "out of memory" + ("\n" if then else "")
    assert found["seconds"] < 20


def test_the_budgets_leave_the_suite_under_eight_minutes():
    assert set(gpu_suite.BUDGET_S) == set(gpu_suite.SECTIONS)
    assert sum(gpu_suite.BUDGET_S.values()) < 480


@pytest.mark.parametrize("name", ["bf16", "nf4", "layer", "factors", "attention"])
def test_every_step_of_a_section_runs_on_tiny_shapes(name, tmp_path):
    gpu_suite.run_here(name, gpu_suite.REHEARSAL, tmp_path / "part.json")

    found = json.loads((tmp_path / "part.json").read_text())
    assert len(found) >= 3
    assert not [key for key, result in found.items() if "error" in result]


def test_a_failing_step_is_named_and_the_next_one_runs(tmp_path, monkeypatch):
    steps = {"bad": lambda: 1 / 0, "good": lambda: {"ms": 2.0}}
    monkeypatch.setitem(gpu_suite.SECTIONS, "layer", lambda plan: iter(steps.items()))

    with pytest.raises(SystemExit, match="1"):
        gpu_suite.run_here("layer", gpu_suite.REHEARSAL, tmp_path / "part.json")

    found = json.loads((tmp_path / "part.json").read_text())
    assert found == {"bad": {"error": "ZeroDivisionError: division by zero"}, "good": {"ms": 2.0}}


def test_the_report_says_which_goals_hold():
    def measured(tokens_per_s, peak_bytes):
        return {"tokens_per_s": tokens_per_s, "peak_bytes": peak_bytes}

    found = {"loldu-64": measured(120.0, 90), "lora-64": measured(100.0, 100)}
    section = {"status": "done", "seconds": 1.0, "found": found}
    result = {"device": "d", "versions": {"torch": "t"}, "commit": "c", "sections": {"bf16": section}}

    text = gpu_suite.report(result)

    assert "tokens per s of lora 1.200, goal >= 1.15: holds" in text
    assert "peak memory of lora 0.900, goal <= 0.85: MISSED" in text


@pytest.mark.slow  # 40 s: the compiler, and a collection of all tests
def test_the_whole_command_rehearses(tmp_path):
    command = [sys.executable, "benchmarks/gpu_suite.py", "--rehearse", "--sections", "compile,tests"]

    found = gpu_suite.run_apart(command, budget_s=700)

    assert found["status"] == "done", found["last_words"]
    assert [section["status"] for section in found["found"]["sections"].values()] == ["done", "done"]
