"""A run folder has one owner at a time: of many starts at once one wins, and a dead owner's folder is free at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.training import ownership
from launcher.training.ownership import Ownership
from launcher.training.run import run

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "recipes" / "tiny"
START = """
import sys, time
from pathlib import Path
from launcher.training.ownership import Ownership
mine, folder = Ownership(), Path(sys.argv[1])
while not (folder / "go").exists():
    time.sleep(0.001)
try:
    mine.claim(folder)
except ValueError as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("owner", flush=True)
sys.stdin.read()
mine.release()
"""


def start(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", START, str(folder)], env=os.environ | {"PYTHONPATH": str(REPO)}, **pipes
    )


def test_of_twenty_starts_at_once_one_owns_the_folder_and_the_others_name_it(tmp_path):
    starts = [start(tmp_path) for _ in range(20)]
    time.sleep(1)
    (tmp_path / "go").touch()

    said = [process.stdout.readline() for process in starts]

    owners = [process for process, line in zip(starts, said, strict=True) if line == "owner\n"]
    assert len(owners) == 1
    assert sum(f"process {owners[0].pid} on " in line for line in said) == 19
    owners[0].communicate("")
    assert [process.wait() for process in starts].count(2) == 19
    Ownership().claim(tmp_path)  # it was released


def test_the_folder_of_a_killed_owner_is_free_at_once(tmp_path):
    """Also by twenty starts at once, which all find it dead."""
    (tmp_path / "go").touch()
    first = start(tmp_path)
    first.stdout.readline()
    first.kill()  # and not waited for: a zombie counts as dead
    (tmp_path / "go").unlink()

    starts = [start(tmp_path) for _ in range(20)]
    time.sleep(1)
    (tmp_path / "go").touch()
    said = [process.stdout.readline() for process in starts]

    assert said.count("owner\n") == 1
    for process in (first, *starts):
        process.communicate("")


def test_a_suspended_owner_on_this_machine_stays_the_owner(tmp_path):
    (tmp_path / "go").touch()
    first = start(tmp_path)
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)

    with pytest.raises(ValueError, match=rf"in use by another start of this run \(process {first.pid} on "):
        Ownership().claim(tmp_path)

    first.send_signal(signal.SIGCONT)
    first.communicate("")


@pytest.fixture
def other_machine(tmp_path, monkeypatch):
    """The owner of a folder on another machine, with quick heartbeats."""
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.1)
    here = ownership.machine()
    monkeypatch.setattr(ownership, "machine", lambda: "elsewhere")
    there = Ownership({"SLURM_JOB_ID": "7"})
    there.claim(tmp_path)
    monkeypatch.setattr(ownership, "machine", lambda: here)
    return there


def test_an_owner_elsewhere_that_shows_life_is_named_with_its_job(other_machine, tmp_path):
    with pytest.raises(ValueError, match="Slurm job 7, since 2"):
        Ownership().claim(tmp_path)


def test_an_owner_elsewhere_without_a_sign_of_life_is_replaced_and_finds_out(other_machine, tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "WATCH_S", 0.6)
    other_machine._ended.set()  # it was suspended
    [thread for thread in threading.enumerate() if thread.name == "owner"][-1].join()

    Ownership().claim(tmp_path)

    time.sleep(0.4)
    with pytest.raises(ValueError, match="another start took over"):
        other_machine.check()
    before = sorted(path.name for path in tmp_path.iterdir())
    other_machine.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_requeued_job_takes_over_from_its_earlier_start_at_once(other_machine, tmp_path, monkeypatch):
    again = Ownership({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    monkeypatch.setattr(ownership, "_touched", lambda file: pytest.fail("it watches for a sign of life"))

    again.claim(tmp_path)

    assert again.file.name == ".owner-000002"


def test_a_damaged_claim_that_nobody_touches_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(ownership, "WATCH_S", 0.3)
    (tmp_path / ".owner-000004").write_text('{"host": ')

    Ownership().claim(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == [".owner-000005"]


@pytest.fixture
def config(tmp_path):
    return Config(
        model=ModelConfig(model=str(TINY / "model")),
        data=DataConfig(data=str(TINY / "instructions" / "test.json"), prompt_template="short", max_length=64),
        adapter=AdapterConfig(rank=4),
        optimizer=OptimizerConfig(batch_size=2, max_steps=2),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache")),
    )


def test_a_second_run_on_an_owned_folder_exits_with_2_and_touches_nothing(config, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "go").touch()
    owner = start(folder)
    owner.stdout.readline()
    (folder / "go").unlink()
    (folder / "state").write_text("running\n")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    code = run(replace(config, run=replace(config.run, resume="never")), "test")

    assert code == 2
    assert f"in use by another start of this run (process {owner.pid} on " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    owner.communicate("")
    assert run(config, "test") == 0


def test_a_models_folder_is_no_run_folder(config, tmp_path, capsys):
    """It has a config.json too, and --resume never renamed it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))

    assert run(replace(config, run=replace(config.run, output=str(model), resume="never")), "test") == 2

    assert "is not a run folder and not empty" in capsys.readouterr().err
    assert [path.name for path in model.iterdir()] == ["config.json"]
