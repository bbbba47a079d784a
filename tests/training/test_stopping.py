"""Being asked to stop, in every phase: ranks agree, the state is saved, and the next start resumes exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import RECIPE, REPO, Runs, finish, flags, start

from launcher.engines import replicated
from launcher.factorization import share
from launcher.training import checkpoint, loop
from launcher.training import stop as stop_requests
from launcher.training.run import run
from launcher.training.stop import StopRequest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def runs(stories, alpaca_file, tmp_path):
    return Runs(tmp_path, stories, alpaca_file)


def evaluating(config):
    optimizer = replace(config.optimizer, max_steps=6)
    return replace(config, optimizer=optimizer, run=replace(config.run, eval_every=3, save_every=0))


# phase -> (where its work is done, which call of it)
PHASES = {
    "factoring": (share, "make", 3),
    "loading": (replicated, "build", 1),
    "evaluating at the start": (loop, "evaluate", 1),
    "training": (loop, "gradients", 2),
    "evaluating on the way": (loop, "evaluate", 2),
    "saving": (checkpoint, "save", 1),
    "evaluating at the end": (loop, "evaluate", 3),
}


@pytest.fixture(scope="module")
def whole(stories, alpaca_file, tmp_path_factory):
    """The uninterrupted run."""
    runs = Runs(tmp_path_factory.mktemp("whole"), stories, alpaca_file)
    runs.alone("whole", change=evaluating)
    return runs.events("whole")


QUICK = ("factoring", "evaluating on the way")


@pytest.mark.parametrize("phase", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PHASES])
def test_a_signal_in_any_phase_ends_the_run_and_the_next_start_resumes_exactly(runs, whole, phase, monkeypatch):
    config = runs.config("run", change=evaluating, cache=str(runs.folder / "cold"))
    if phase == "saving":
        config = replace(config, run=replace(config.run, save_every=2))
    module, name, wanted = PHASES[phase]
    work, calls = getattr(module, name), []

    def interrupted(*args, **options):
        calls.append(name)
        if len(calls) == wanted:
            os.kill(os.getpid(), signal.SIGUSR2)
        return work(*args, **options)

    monkeypatch.setattr(module, name, interrupted)
    code = run(config, "test")
    monkeypatch.undo()
    state = (runs.folder / "run" / "state").read_text()

    assert (code, state) == (75, "stopped\n")
    assert not (runs.folder / "run" / "adapter").exists()
    assert run(config, "test") == 0
    assert runs.events("run") == whole


def test_the_time_limit_holds_before_training_too(runs, capsys):
    assert run(runs.config("run", max_seconds=0.01), "test") == 75

    assert "stopped by its time limit before training began" in capsys.readouterr().out


def test_the_control_file_asks_like_a_signal(tmp_path):
    with StopRequest() as stop:
        control = tmp_path / "control"
        stop.watch(control)
        before = stop.asked()
        control.write_bytes(b"\xff")  # half written, or damaged
        damaged = stop.asked()
        control.write_text("stop\n")

        assert (before, damaged, stop.asked()) == (False, False, True)
        assert stop.reason == "the control file"


def test_a_control_file_that_is_a_link_is_replaced_and_not_followed(tmp_path):
    other, control = tmp_path / "other", tmp_path / "control"
    other.write_text("mine\n")
    control.symlink_to(other)

    with StopRequest() as stop:
        stop.watch(control)
        untouched = other.read_text()
        other.write_text("stop\n")
        control.unlink()
        control.symlink_to(other)

    assert untouched == "mine\n"
    assert other.read_text() == "stop\n"
    assert control.read_text() == "run\n"


def test_a_stop_that_was_written_while_the_run_was_starting_is_honoured_once(runs):
    (runs.folder / "run").mkdir()
    control = runs.folder / "run" / "control"
    control.write_text("stop\n")

    codes = [run(runs.config("run"), "test") for _ in range(2)]

    assert codes == [75, 0]
    assert control.read_text() == "run\n"


@pytest.mark.parametrize(("number", "again_s"), [(signal.SIGTERM, 4.9), (signal.SIGUSR2, 4.9), (signal.SIGINT, 0.1)])
def test_a_repeated_signal_is_one_request_and_a_second_one_ends_at_once(number, again_s, monkeypatch):
    """A scheduler that repeats itself does not end a save; a person who insists does."""
    kill, now, ended = os.kill, [0.0], []
    monkeypatch.setattr(stop_requests, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(stop_requests.os, "kill", lambda process, number: ended.append(number))

    with StopRequest() as stop:
        for _ in range(4):
            kill(os.getpid(), number)
            now[0] += again_s
        repeated = (stop.reason, list(ended))
        now[0] += 5.1
        kill(os.getpid(), number)
        handler = signal.getsignal(number)
        stop._first.clear()  # restores the handlers, as this process goes on

    assert repeated == (number.name, [])
    assert (ended, handler) == ([number], signal.SIG_DFL)


LATE = """
import builtins, os, signal, sys
sys.path.insert(0, sys.argv[1])
from launcher.training.stop import StopRequest

NUMBERS = signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP
class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), numbers=NUMBERS, write=os.write):
        write(1, b"late\\n")
        for number in numbers:
            kill(me, number)

builtins.late = Late()  # freed when Python shuts down, after the handlers in Python are gone
with StopRequest() as stop:
    SIGNALLED
for number in NUMBERS:
    os.kill(os.getpid(), number)
raise SystemExit(75)
"""


@pytest.mark.parametrize(
    ("signalled", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", 75),
        ("stop.store = 'of several ranks, another of which was signalled'", 75),
        ("pass", -signal.SIGTERM),  # a first signal, when nothing asked to stop: it ends the process as usual
    ],
)
def test_a_signal_that_comes_when_all_is_saved_does_not_make_the_process_fail(signalled, code):
    """Between the end of the run and that of the process, also while Python shuts down."""
    words = [sys.executable, "-c", LATE.replace("SIGNALLED", signalled), str(REPO)]

    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)

    assert (done.stdout, done.returncode) == ("late\n" if code == 75 else "", code)


def ranks_of(launcher):
    """The ranks' process ids under torchrun, in rank order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(line[5:]): int(child) for line in environment if line.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def wait_for_losses(file, count, process):
    deadline = time.monotonic() + 240
    while not file.exists() or file.read_text().count('"loss"') < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, finish(process)[1]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_one_rank_that_is_asked_stops_all_of_them(runs, sharding):
    """Slurm's warning may reach one rank only."""
    runs.base = replace(runs.base, optimizer=replace(runs.base.optimizer, max_steps=400))
    config = runs.config("run", sharding, save_every=0)
    process = start([*TORCHRUN, str(RECIPE), *flags(config)])
    wait_for_losses(runs.folder / "run" / "events.jsonl", 3, process)

    os.kill(ranks_of(process)[1], signal.SIGUSR2)
    code, out = finish(process)

    assert code == 0, out
    assert (runs.folder / "run" / "state").read_text() == "stopped\n"
    steps = [event["step"] for event in runs.events("run") if "loss" in event]
    assert [path.name for path in (runs.folder / "run" / "checkpoints").iterdir()] == [f"step-{steps[-1]:06d}"]
    assert "stopped by" in out


@pytest.mark.slow
def test_when_a_rank_is_killed_the_others_end_and_torchrun_names_it(runs):
    runs.base = replace(runs.base, optimizer=replace(runs.base.optimizer, max_steps=4000))
    process = start([*TORCHRUN, str(RECIPE), *flags(runs.config("run", "ddp"))])
    wait_for_losses(runs.folder / "run" / "events.jsonl", 3, process)

    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, out = finish(process, 90)

    assert code != 0
    assert "Signal 9 (SIGKILL)" in out
    assert checkpoint.newest(runs.folder / "run" / "checkpoints") is not None


@pytest.mark.slow
def test_kills_at_random_moments_a_full_disk_and_a_shared_cache_do_no_harm(stories, alpaca_file, tmp_path):
    """The seeded sample of the campaign in benchmarks/faults.py: 8 kills of one rank or all, in every phase."""
    campaign = [sys.executable, str(REPO / "benchmarks" / "faults.py"), f"--model={stories}", f"--data={alpaca_file}"]
    for part in ("kills", "disk", "cache"):
        result = tmp_path / f"{part}.json"

        code, out = finish(start([*campaign, "--kills=8", "--seed=1", f"--only={part}", f"--output={result}"]), 600)

        assert code == 0, out
        found = json.loads(result.read_text())[part]
        assert part != "kills" or (found["kills"], found["differing"]) == (8, 0)
