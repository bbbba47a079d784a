"""The GPU suite's own logic, without a GPU: sections in separate processes, and their steps on tiny shapes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from launching import REPO

from benchmarks import gpu_measuring, gpu_sections, gpu_suite

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
def test_a_section_that_fails_or_hangs_is_reported_with_what_it_had_found(then, status, tmp_path):
    found = gpu_suite.run_apart([sys.executable, "-c", WRITES + then], 5, tmp_path / "part")

    assert (found["status"], found["found"]) == (status, {"first": 1})
    assert found.get("last_words", "out of memory") == "out of memory" + ("\n" if then else "")
    assert found["seconds"] < 20


def test_what_is_found_is_told_before_the_section_ends(tmp_path):
    """So that a suite that is cut off has written its results so far."""
    told = []

    gpu_suite.run_apart([sys.executable, "-c", WRITES + "time.sleep(30)"], 8, tmp_path / "part", told.append)

    assert told[0]["found"] == {"first": 1}
    assert told[0]["status"] == "running"


def test_nothing_that_a_section_started_outlives_it(tmp_path):
    """Not even in a session of its own, as torchrun starts its workers."""
    pid = tmp_path / "pid"
    starts = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'], start_new_session=True); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(100)"
    )

    gpu_suite.run_apart([sys.executable, "-c", starts], 5, tmp_path / "part")

    left = [each for each in psutil.process_iter() if each.pid == int(pid.read_text())]
    assert [each.status() for each in left] in ([], [psutil.STATUS_ZOMBIE])


def test_every_section_is_at_most_two_minutes():
    assert set(gpu_suite.BUDGET_S) == set(gpu_suite.SECTIONS)
    assert max(gpu_suite.BUDGET_S.values()) <= 120
    assert next(iter(gpu_suite.BUDGET_S)) == "bf16"  # ours against LoRA: what a first GPU is for
    assert max(gpu_suite.BUDGET_S[name] for name in ("runs", "tests")) > gpu_sections.LIMIT_S
    assert gpu_suite.SECONDS < 600


def test_sections_that_no_time_is_left_for_are_named(tmp_path, monkeypatch, capsys):
    command = [
        "gpu_suite.py",
        "--rehearse",
        "--sections",
        "layer",
        "--seconds",
        "1",
        "--output",
        str(tmp_path / "a.json"),
    ]
    monkeypatch.setattr(sys, "argv", command)

    assert gpu_suite.main() == 1

    assert "layer: not begun: 1 s are over" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["sections"]["layer"]["found"] == {}


def test_the_suite_runs_every_file_with_tests_that_need_a_gpu():
    files = [file for file in (REPO / "tests").rglob("test_*.py") if file.name != Path(__file__).name]
    marked = {str(file.relative_to(REPO)) for file in files if "pytest.mark.gpu" in file.read_text()}

    assert marked == set(gpu_sections.GPU_TESTS)


VERBOSE = """tests/a.py::test_one[x y] PASSED [ 33%]
tests/a.py::test_two SKIPPED (needs the shared data) [ 66%]
"""


def test_tests_that_all_skip_are_no_success():
    assert gpu_sections.passed(VERBOSE, whole=True) == {"passed": 1, "skipped": 1}
    assert gpu_sections.passed(VERBOSE, whole=False)["stopped"] == "before the last test"

    for text, words in (
        (VERBOSE.replace("PASSED", "SKIPPED"), "skip without it"),
        (VERBOSE + "tests/a.py::test_three FAILED [100%]\n", "bad: tests/a.py::test_three"),
        (VERBOSE + "ERROR tests/b.py - ModuleNotFoundError: No module named 'b'\n", "bad: tests/b.py"),
    ):
        with pytest.raises(ValueError, match=words):
            gpu_sections.passed(text, whole=True)


def test_a_package_that_is_missing_is_named_and_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "NEEDS", {"layer": ("no_such_package", "torch")})
    monkeypatch.setattr(gpu_suite, "run_apart", lambda *given: {"status": "done", "seconds": 1.0, "found": {}})
    output = tmp_path / "a.json"
    command = ["gpu_suite.py", "--rehearse", "--sections", "layer,factors", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--logs", str(tmp_path / "logs")])

    assert gpu_suite.main() == 1

    found = {name: part["status"] for name, part in json.loads(output.read_text())["sections"].items()}
    assert found == {"layer": "not measured: no_such_package not installed", "factors": "done"}
    assert "layer: not measured: no_such_package not installed" in capsys.readouterr().out
    assert (tmp_path / "logs").is_dir()
    assert not (tmp_path / "a").exists()


def test_a_run_that_hangs_is_ended_and_the_others_are_reported(monkeypatch):
    """With stand-ins for the processes: each has written its losses, hangs, or has died without a word."""
    killed = []

    class Process:
        def __init__(self, command, stdout, **how):
            self.folder = Path(command[command.index("--output") + 1])
            if self.folder.name not in ("hangs", "dies"):
                self.folder.mkdir()
                (self.folder / "events.jsonl").write_text(json.dumps({"loss": 2.5}))

        def wait(self, timeout):
            if self.folder.name == "hangs":
                raise subprocess.TimeoutExpired("the recipe", timeout)
            return 9 if self.folder.name == "dies" else 0

        def kill(self):
            killed.append(self.folder.name)

    runs = {"hangs": ("", ""), "dies": ("", ""), "late": ("", "hangs"), "float32": ("", ""), "fsdp2": ("", "float32")}
    monkeypatch.setattr(gpu_sections, "RUNS", runs)
    monkeypatch.setattr(gpu_sections.subprocess, "Popen", Process)
    found = {}

    for name, step in gpu_sections.short_runs(replace(gpu_measuring.REHEARSAL, device="cuda")):
        try:
            found[name] = step()["loss"]
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    assert killed == ["hangs"]
    assert found == {
        "hangs": "TimeoutError: not ended after 90 s: its log is empty",
        "dies": "RuntimeError: exit code 9: its log is empty",
        "late": "ValueError: its loss is 2.500000; hangs, whose losses it must have, failed",
        "float32": 2.5,
        "fsdp2": 2.5,
    }


def test_ours_is_compared_with_the_faster_lora():
    def measured(tokens_per_s, peak_bytes):
        return {"tokens_per_s": tokens_per_s, "peak_bytes": peak_bytes}

    found = {"loldu-64": measured(120.0, 90), "lora-64": measured(60.0, 120), "lora_bf16-64": measured(100.0, 100)}

    assert gpu_suite.against_lora(found) == {"64": {"tokens_per_s_of_lora": 1.2, "peak_memory_of_lora": 0.9}}


def test_the_lora_of_the_baseline_has_adapters_in_both_precisions():
    plan = replace(gpu_measuring.REHEARSAL, layers=1)
    dtypes = {}
    for method in gpu_measuring.LORA:
        model = gpu_measuring.adapted(gpu_measuring.base_model(plan, 1), method, 4)
        dtypes[method] = {str(p.dtype) for p in model.parameters() if p.requires_grad}

    assert dtypes == {"lora": {"torch.float32"}, "lora_bf16": {"torch.bfloat16"}}


@pytest.mark.parametrize("name", ["parity", "bf16", "nf4", "layer", "factors", "attention"])
def test_every_step_of_a_section_runs_on_tiny_shapes(name, tmp_path):
    gpu_suite.run_here(name, gpu_measuring.REHEARSAL, tmp_path / "part.json")

    found = json.loads((tmp_path / "part.json").read_text())
    assert len(found) >= 3
    assert not [key for key, result in found.items() if "error" in result]


def test_a_failing_step_is_named_and_the_next_one_runs(tmp_path, monkeypatch):
    steps = {"bad": lambda: 1 / 0, "good": lambda: {"ms": 2.0}}
    monkeypatch.setitem(gpu_suite.SECTIONS, "layer", lambda plan: iter(steps.items()))

    with pytest.raises(SystemExit, match="1"):
        gpu_suite.run_here("layer", gpu_measuring.REHEARSAL, tmp_path / "part.json")

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


@pytest.mark.slow  # 60 s: the compiler, a collection of tests, two runs
def test_the_whole_command_rehearses(tmp_path):
    command = [sys.executable, "benchmarks/gpu_suite.py", "--rehearse", "--sections", "compile,tests,runs"]

    found = gpu_suite.run_apart(command, 700, tmp_path / "part")

    assert found["status"] == "done", found["last_words"]
    assert [section["status"] for section in found["found"]["sections"].values()] == ["done"] * 3
