"""When one of several ranks fails, the first line names it and the cause, and no other rank is named."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from communicators import together
from launching import RECIPE, start

from launcher.processes import agreed
from launcher.training import ending

LOST = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1234, in gloo")


def end(capsys, errors):
    """What ranks with these errors print; a rank without one was killed."""

    def fail(comm):
        error = errors[comm.ranks.rank]
        if error is not None:
            ending.post(error, comm)
            return ending.tell(error, comm)

    told = together(len(errors), fail)
    assert not any(isinstance(each, Exception) for each in told), told
    return capsys.readouterr().err.splitlines(), told


def causes(errors):
    """Why the run ended, as each rank would write it."""

    def fail(comm):
        error = errors[comm.ranks.rank]
        if error is not None:
            ending.post(error, comm)
            ending.tell(error, comm)
            return ending.cause(error, comm)

    return together(len(errors), fail)


def test_the_cause_for_the_folder_is_that_of_the_rank_that_ended_first(capsys):
    assert causes([LOST, ValueError("no such file"), LOST])[0] == "rank 1: no such file"
    assert causes([LOST, None]) == ["rank 1 ended without a word, as when killed or out of memory", None]
    assert causes([KeyError("x"), LOST])[0] == "KeyError: 'x'"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ending, "PATIENCE_S", 0.5)


@pytest.mark.parametrize("error", [ValueError("no such file"), OSError(5, "Input/output error"), KeyError("x")])
def test_a_rank_with_an_error_of_its_own_is_named_by_all(capsys, error):
    lines, told = end(capsys, [LOST, error, LOST])

    text = ending.text_of(error)
    assert f"error: rank 1: {text}" in lines
    assert f"error: rank 0 ends, because rank 1 failed: {text}" in lines
    assert len(lines) == 3
    assert [own for own, _ in told] == [False, True, False]


def test_a_rank_that_was_killed_is_named_by_the_first_that_is_left(capsys):
    lines, told = end(capsys, [None, LOST, LOST])

    assert lines[0].startswith("error: rank 0 ended without a word, as when killed or out of memory: look at the log")
    assert told[1] == (False, True)  # so rank 1 marks the folder


def test_an_error_that_all_ranks_have_is_printed_once(capsys):
    lines, _ = end(capsys, [agreed(ValueError("rank 1: no")), agreed(ValueError("no"))])
    alike, _ = end(capsys, [ValueError("3 weights"), ValueError("3 weights")])

    assert lines == ["error: rank 1: no"]
    assert alike[0] == "error: 3 weights"
    assert "error: rank" not in "".join(alike)


def test_without_the_store_rank_0_is_named(capsys, monkeypatch):
    """It keeps the store if no launcher does."""

    def gone(*_):
        raise dist.DistNetworkError("recvValue failed")

    def fail(comm):
        monkeypatch.setattr(type(comm.store), "check", gone, raising=False)
        return ending.tell(LOST, comm) if comm.ranks.rank else None

    class Store:
        """A store whose process has ended."""

        check = get = set = gone

    together(2, fail, store=Store())

    assert capsys.readouterr().err.startswith("error: rank 0 ended without a word")


def test_a_signal_ends_a_start_whose_other_ranks_never_come(tmp_path):
    """It waits for them in C++, where no Python handler runs."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], env=os.environ | {"PYTHONPATH": str(Path(RECIPE).parents[1])},
        stdout=subprocess.PIPE, text=True,
    ) as waiting:  # fmt: skip
        assert waiting.stdout.readline() == "waiting\n"
        time.sleep(0.5)

        waiting.terminate()

        assert waiting.communicate(timeout=60)[0] == "stopped by SIGTERM before all ranks were there: nothing to save\n"
        assert waiting.returncode == 0


WAITING = """
from datetime import timedelta
import torch.distributed as dist
from launcher.training import stop
stop.GRACE_S = 0.1
with stop.StopRequest() as request, request.at_once():
    print("waiting", flush=True)
    dist.TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=300), wait_for_workers=True)
"""


@pytest.mark.slow
def test_an_error_of_one_process_alone_is_the_first_line_and_marks_the_run(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(OWN.format(recipe=str(RECIPE)))
    words = ["--tiny", f"--output={tmp_path / 'run'}", f"--cache={tmp_path / 'cache'}", "--max-steps=4", "--no-report"]

    process = start([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", own, *words])
    out, _ = process.communicate(timeout=300)

    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: rank 1: a mistake of rank 1"
    assert out.index(errors[0]) < (out + "Traceback").index("Traceback")
    assert (tmp_path / "run" / "state").read_text() == "failed\n"


OWN = """
import runpy
from loldu import recipe

def on_step(training, event):
    if event["step"] == 2 and training.comm.ranks.rank == 1:
        raise ValueError("a mistake of rank 1")

found = runpy.run_path({recipe!r})
raise SystemExit(recipe("own", found["llama2_alpaca"], found["tiny"], on_step=on_step))
"""
