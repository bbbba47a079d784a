"""Runs in processes of their own: several agree, and signals, kills and time limits lose nothing."""

import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import HELD, RECIPE, finish, flags, start
from small_runs import events, losses, with_run

import adapters  # noqa: F401 (registers LoLDU)
from launcher.training.run import run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_curve_of_one(small, processes, tmp_path):
    """20 steps in float32, samples joined by fours or, on 4 processes, by twos: sums in another order, 5e-6 (measured
    1e-6)."""
    small = replace(small, optimizer=replace(small.optimizer, batch_size=8, micro_batch_size=4, max_steps=20))
    run(small, "test")
    many = with_run(small, output=str(tmp_path / "many"), cache=str(tmp_path / "cache2"))

    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--main_process_port",
        "0",
    ]
    code, out = finish(start([*launch, str(RECIPE), *flags(many)], ACCELERATE_USE_CPU="true"))

    assert code == 0, out
    torch.testing.assert_close(losses(many), losses(small), atol=5e-6, rtol=0)
    assert [e["step"] for e in events(many)] == [e["step"] for e in events(small)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_saves_and_the_next_start_resumes_exactly(small, number, tmp_path):
    small = replace(with_run(small, save_every=0), optimizer=replace(small.optimizer, max_steps=20))
    whole = with_run(small, output=str(tmp_path / "whole"))
    run(whole, "test")

    process = start([sys.executable, str(HELD), *flags(small)], HELD_AFTER="6")
    file, deadline = Path(small.run.output) / "events.jsonl", time.monotonic() + 60
    while not (file.exists() and file.read_text().count("loss") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    code, out = finish(process)

    assert code == 75, out
    assert "To resume, run the same command again" in out
    assert (file.parent / "state").read_text().strip() == "stopped"
    assert len(losses(small)) < 20
    assert run(small, "test") == 0
    assert events(small) == events(whole)
    assert (file.parent / "state").read_text().strip() == "finished"


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_saved(small, tmp_path):
    small = replace(with_run(small, save_every=3), optimizer=replace(small.optimizer, max_steps=20))
    whole = with_run(small, output=str(tmp_path / "whole"))
    run(whole, "test")

    for wanted in (4, 17):
        process = start([sys.executable, str(HELD), *flags(small)], HELD_AFTER=str(wanted))
        file, deadline = Path(small.run.output) / "events.jsonl", time.monotonic() + 60
        while not (file.exists() and f'"step": {wanted}' in file.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        finish(process)

    assert run(small, "test") == 0
    assert events(small) == events(whole)


@pytest.mark.slow
def test_the_time_limit_stops_by_itself(small):
    small = replace(with_run(small, max_seconds=6.0), optimizer=replace(small.optimizer, max_steps=100_000))

    code, out = finish(start([sys.executable, str(RECIPE), *flags(small), "--max-seconds=12"]))

    assert code == 75, out
    assert "stopped by its time limit" in out
