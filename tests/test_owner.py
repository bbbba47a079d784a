"""A run that was killed is not shown as running, and none is called dead that may live."""

import json
import os
import subprocess
import sys
import time

import pytest

from launcher import cli, owner
from launcher.owner import INTERRUPTED, highest, present_state
from launcher.reports.read import NotBegun, read_run
from launcher.training.ownership import Ownership

CLAIM = """
import sys, time
from pathlib import Path
from launcher.training.ownership import Ownership
Ownership().claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def killed(tmp_path):
    """The folder of a run whose process was killed."""
    process = subprocess.Popen([sys.executable, "-c", CLAIM, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    (tmp_path / "state").write_text("running\n")
    assert present_state(tmp_path) == "running"
    process.kill()
    process.wait()
    return tmp_path


def test_a_killed_run_is_interrupted_on_its_own_machine(killed, capsys):
    assert present_state(killed) == INTERRUPTED
    with pytest.raises(NotBegun, match="did not train a step: its process has ended"):
        read_run(killed)
    assert cli.main(["cancel", str(killed)]) == 2
    assert "is not running: its state is interrupted" in capsys.readouterr().err


def test_on_another_machine_a_run_is_never_called_dead(killed, monkeypatch):
    monkeypatch.setattr(owner, "machine", lambda: "elsewhere")
    assert present_state(killed) == "running"  # it was touched a moment ago

    for file in (highest(killed)[1], killed / "state"):
        os.utime(file, (0, time.time() - 3600))

    assert present_state(killed).startswith("no sign of life since 2")


def test_a_living_process_that_does_not_touch_its_claim_is_not_called_dead(tmp_path):
    """It is suspended, or this folder is a copy of the one that it trains in."""
    mine = Ownership()
    mine.claim(tmp_path)
    (tmp_path / "state").write_text("running\n")
    assert present_state(tmp_path) == "running"

    for file in (mine.file, tmp_path / "state"):
        os.utime(file, (0, time.time() - 3600))

    assert present_state(tmp_path).startswith("no sign of life since 2")
    mine.release()
    assert present_state(tmp_path) == INTERRUPTED  # it gave the folder up, and could not write its state


def test_a_damaged_claim_tells_nothing(tmp_path):
    (tmp_path / "state").write_text("running\n")
    claim = {"host": "a", "machine": owner.machine(), "pid": "\0", "started": "1", "since": "2026"}
    (tmp_path / ".owner-000001").write_text(json.dumps(claim))

    assert present_state(tmp_path) == "running"  # it was written a moment ago


def test_other_states_are_as_they_are_written(tmp_path):
    assert present_state(tmp_path) == ""
    for state in ("stopped", "finished", "failed"):
        (tmp_path / "state").write_text(f"{state}\n")
        assert present_state(tmp_path) == state
