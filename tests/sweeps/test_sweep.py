"""`loldu sweep`: which runs there are, which remain, what is compared, and what ends it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import cli
from launcher.config import as_dict
from launcher.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, STOPPED
from launcher.reports import commands as report_commands
from launcher.sweeps import child, grid, results
from launcher.sweeps.check import settings_of

WRITE_REPORT = report_commands.write_report
REPO = Path(__file__).resolve().parents[2]
NUMBERS = ",".join(map(str, range(1, 3001)))
RECIPE = "llama2_alpaca_loldu"


def sweep(*words):
    return cli.main(["sweep", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([RECIPE], "the following arguments are required: --vary"),
        (["--vary", "rank=4,8", RECIPE], "the recipe or file comes first: loldu sweep RECIPE --vary"),
        ([RECIPE, "--vary"], "--vary is empty: give OPTION=VALUE,VALUE"),
        ([RECIPE, "--vary", "rank"], "--vary expects OPTION=VALUE,VALUE (such as learning-rate=1e-3,3e-3), got 'rank'"),
        ([RECIPE, "--vary", "rank="], "--vary rank=: there is no value"),
        ([RECIPE, "--vary", "rank=4,,8"], "--vary rank=4,,8: a value is empty"),
        ([RECIPE, "--vary", "rank=4,8,4"], "--vary rank=4,8,4: the value 4 is given twice"),
        ([RECIPE, "--vary", "rank=4", "rank=8"], "--vary names rank twice"),
        ([RECIPE, "--vary", "output=a,b"], "--vary output: the sweep names the folders"),
        ([RECIPE, "--vary", "rnk=4,8"], "unknown option --rnk; did you mean --rank?"),
        ([RECIPE, "--vary", "rank=4,x"], "--rank: expected a whole number, got 'x'"),
        ([RECIPE, "--vary", "rank=4,8", "--max-step", "3"], "unknown option --max-step; did you mean --max-steps?"),
        ([RECIPE, "--vary", "rank=4,8", "--rank", "2"], "--rank is both varied and given: leave one out"),
        ([RECIPE, "--vary", "learning-rate=1e-3,0.001"], "learning-rate=1e-3 and learning-rate=0.001 are the same run"),
        ([RECIPE, "--vary", "seed=1,2", "--seeds", "2"], "--seeds and --vary seed=... both set the seed"),
        ([RECIPE, "--vary", "rank=4,8", "--seeds", "1000000000"], "--seeds must be at most 1,000, got 1,000,000,000"),
        (
            [RECIPE, "--vary", f"seed={NUMBERS}", f"rank={NUMBERS}"],
            "--vary gives 9,000,000 runs (3,000 of seed x 3,000 of rank), at most 1,000 make a sweep: vary less",
        ),
        ([RECIPE, "--vary", "rank=4,8", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (
            [RECIPE, "--vary", "method=loldu,losvd"],
            "method=losvd: unknown --method losvd; there are, the nearest first",
        ),
        ([RECIPE, "--vary", "options=energy=0.9"], "options=energy=0.9: unknown option energy of method loldu"),
        ([RECIPE, "--vary", "batch-size=3", "--processes", "2"], "batch-size=3: "),
        (["nothing", "--vary", "rank=4,8"], "there is no recipe or file nothing"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(words, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    code = sweep(*words)

    out, error = capfd.readouterr()
    assert (code, out) == (MISTAKE, "")
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_combination_is_a_run_with_a_name_and_options_that_train_accepts():
    vary = grid.read_vary(["method=loldu,lora", "packing=true,false", "targets=all-linear,q_proj v_proj"])

    found = grid.variants(vary)

    assert len({variant.name for variant in found}) == 8
    last = found[-1]
    assert last.name == "method=lora,packing=false,targets=q_proj_v_proj"
    assert last.options == ("--method=lora", "--no-packing", "--targets", "q_proj", "v_proj")


def test_commas_inside_brackets_belong_to_a_value():
    assert grid.read_vary(["options=token_indices=[5,6],scale=2"]) == {"options": ("token_indices=[5,6]", "scale=2")}


def test_a_long_name_is_cut_and_stays_different():
    long = {"model": "/a/" + "x" * 300}

    assert len(grid.folder_name(long)) <= grid.NAME_LENGTH + 9
    assert grid.folder_name(long) != grid.folder_name({"model": "/a/" + "x" * 301})


class Trainings:
    """Stands in for the processes of a sweep: writes the folder of a finished run, with a loss for each run."""

    def __init__(self, losses, codes=None, held_out=lambda name: "of all"):
        self.losses, self.codes, self.started, self.held_out = losses, codes or {}, [], held_out

    def __call__(self, words, log, lock, stop, watch):
        options = words[words.index("train") + 2 :]
        folder = Path(next(word for word in options if word.startswith("--output=")).partition("=")[2])
        self.started.append(folder.name)
        log.write_text("starting\nerror: the reason\n")
        watch()
        if code := self.codes.get(folder.name, 0):
            return code
        _, settings = settings_of(RECIPE, (), options)
        (folder / "adapter").mkdir(parents=True)
        resolved = {"steps": 2, "trained": 10}
        (folder / "config.json").write_text(json.dumps({"config": as_dict(settings.config), "resolved": resolved}))
        events = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
        events.append({"step": 2, "eval_loss": self.losses[folder.name], "held_out": self.held_out(folder.name)})
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        (folder / "state").write_text("finished\n")
        return DONE


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report_commands, "write_report", lambda runs, out, first: out)  # drawing takes seconds

    def use(losses, **codes):
        made = Trainings(losses, **codes)
        monkeypatch.setattr(child, "train", made)
        return made

    return use


GRID = ["--vary", "method=loldu,lora", "learning-rate=1e-3,1e-2", "--tiny", "--output", "sweep"]
LOSSES = {
    "method=loldu,learning-rate=1e-3": 2.9,
    "method=loldu,learning-rate=1e-2": 2.4,
    "method=lora,learning-rate=1e-3": 2.1,
    "method=lora,learning-rate=1e-2": 2.2,
}


def test_runs_are_trained_in_turn_and_compared(trainings, tmp_path, capfd, monkeypatch):
    made = trainings(LOSSES)
    monkeypatch.setattr(report_commands, "write_report", WRITE_REPORT)

    code = sweep(RECIPE, *GRID)

    out, error = capfd.readouterr()
    table = [line.split("\t") for line in out.splitlines()[:5]]
    assert code == DONE
    assert made.started == list(LOSSES)
    assert table[0] == ["method", "learning-rate", "trained", "held-out loss", "seconds"]
    assert [row[3] for row in table[1:]] == ["2.1000", "2.2000", "2.4000", "2.9000"]
    assert f"loldu train {RECIPE} --tiny --method=lora --learning-rate=1e-3\n" in out
    assert "best: method=lora learning-rate=1e-3, held-out loss 2.1000" in error
    assert "learning-rate 1e-3 is the lowest value tried" in error
    assert json.loads((tmp_path / "sweep" / "results.json").read_text())["best"]["method"] == "lora"
    assert (tmp_path / "sweep" / "report" / "sweep.png").stat().st_size > 1000
    assert "<h2>Sweep</h2>" in (tmp_path / "sweep" / "report.html").read_text()


def test_a_finished_run_is_not_repeated_also_when_values_are_added(trainings, capfd):
    trainings(LOSSES)
    sweep(RECIPE, *GRID)
    again = trainings({"method=svft,learning-rate=1e-3": 2.0, "method=svft,learning-rate=1e-2": 2.0})

    code = sweep(RECIPE, "--vary", "method=loldu,lora,svft", *GRID[2:])

    assert code == DONE
    assert again.started == ["method=svft,learning-rate=1e-3", "method=svft,learning-rate=1e-2"]
    assert "4 of 6 runs have finished already" in capfd.readouterr().err


@pytest.mark.parametrize("code", [STOPPED, INTERRUPTED])
def test_a_stopped_run_ends_the_sweep_and_the_same_command_continues_with_it(code, trainings, capfd):
    second = "method=loldu,learning-rate=1e-2"
    trainings(LOSSES, codes={second: code})

    first = sweep(RECIPE, *GRID)

    assert first == code
    assert "stopped; the same command resumes the sweep" in capfd.readouterr().err
    rest = trainings(LOSSES)
    assert sweep(RECIPE, *GRID) == DONE
    assert rest.started == list(LOSSES)[1:]


def test_a_failed_run_is_named_with_its_error_and_the_others_are_trained(trainings, capfd):
    failing = "method=loldu,learning-rate=1e-2"
    made = trainings(LOSSES, codes={failing: FAILED})

    code = sweep(RECIPE, *GRID)

    out, error = capfd.readouterr()
    assert code == FAILED
    assert made.started == list(LOSSES)
    assert "[2 of 4] method=loldu learning-rate=1e-2: failed: the reason (sweep/logs/" in error
    assert "loldu\t1e-2\t\tnot finished" in out
    assert "best so far: method=lora" in error


def test_nothing_else_starts_if_the_first_run_is_refused(trainings):
    made = trainings(LOSSES, codes={next(iter(LOSSES)): MISTAKE})

    assert sweep(RECIPE, *GRID) == MISTAKE
    assert len(made.started) == 1


def test_finished_runs_of_other_settings_are_refused_by_name(trainings, capfd):
    trainings(LOSSES)
    sweep(RECIPE, *GRID)
    capfd.readouterr()

    code = sweep(RECIPE, *GRID, "--max-steps", "7")

    assert code == MISTAKE
    assert "finished with other settings (--max-steps was 500, now 7)" in capfd.readouterr().err


def test_a_folder_of_something_else_is_left_alone(trainings, tmp_path, capfd):
    trainings(LOSSES)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.tex").write_text("")

    assert sweep(RECIPE, *GRID) == MISTAKE
    assert "sweep holds other files and is not a sweep: give another --output" in capfd.readouterr().err


@pytest.mark.parametrize("name", [".lock", "logs", "logs/method=loldu.log"])
@pytest.mark.parametrize("make", [Path.symlink_to, lambda place, target: os.mkfifo(place)], ids=["link", "FIFO"])
def test_a_link_or_a_fifo_in_place_of_its_own_files_is_refused(name, make, tmp_path, monkeypatch, capfd):
    """It would be written through, cut to nothing, or waited at for ever."""
    monkeypatch.chdir(tmp_path)
    target = tmp_path / ("years" if name == "logs" else "thesis.tex")
    target.mkdir() if name == "logs" else target.write_text("years of work")
    place = tmp_path / "sweep" / name
    place.parent.mkdir(parents=True)
    (tmp_path / "sweep" / "results.json").write_text("{}")
    make(place, target)

    code = cli.main(["sweep", RECIPE, "--vary", "method=loldu", "--tiny", "--output", "sweep"])

    assert code == MISTAKE
    assert f"cannot write {place.name}" in capfd.readouterr().err
    assert list(target.iterdir()) == [] if name == "logs" else target.read_text() == "years of work"


def test_damaged_and_hostile_files_of_runs_are_runs_that_have_not_finished(tmp_path):
    for name in ("state", "events.jsonl", "config.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "adapter").mkdir()

    assert (results.is_finished(tmp_path), child.progress(tmp_path)) == (False, (0, 0))
    assert child.last_error(tmp_path / "state") == ""


def test_seeds_are_averaged_and_a_rival_within_their_deviation_is_named(trainings, capfd):
    made = trainings({"rank=4,seed=42": 2.0, "rank=4,seed=43": 2.4, "rank=8,seed=42": 2.2, "rank=8,seed=43": 2.3})

    code = sweep(RECIPE, "--vary", "rank=4,8", "--seeds", "2", "--tiny", "--output", "sweep")

    out, error = capfd.readouterr()
    assert code == DONE
    assert made.started == ["rank=4,seed=42", "rank=4,seed=43", "rank=8,seed=42", "rank=8,seed=43"]
    assert "4\t10\t2.2000 ± 0.2828\t0\t2 of 2" in out
    assert "rank=8 is within the deviation over seeds: 2.2500" in error


def test_a_value_at_an_edge_is_named_once_another_value_has_finished(trainings, capfd):
    rates = [GRID[0], "method=lora", *GRID[2:]]
    trainings(LOSSES, codes={"method=lora,learning-rate=1e-2": FAILED})
    sweep(RECIPE, *rates)
    alone = capfd.readouterr().err
    trainings(LOSSES)

    sweep(RECIPE, *rates)

    assert "best so far: method=lora" in alone
    assert "value tried" not in alone
    assert "learning-rate 1e-3 is the lowest value tried" in capfd.readouterr().err


def test_a_run_whose_last_held_out_loss_is_not_finite_is_never_the_best(tmp_path):
    """Its loss before the last steps was the lowest of all."""
    planned = grid.variants({"learning-rate": ("1", "2"), "seed": ("1", "2")})
    for variant, losses in zip(planned, ([3.0, 2.0], [3.0, 2.2], [0.5, math.nan], [0.5, 0.6]), strict=True):
        folder = tmp_path / variant.name
        (folder / "adapter").mkdir(parents=True)
        (folder / "state").write_text("finished\n")
        (folder / "config.json").write_text(json.dumps({"config": {"adapter": {"method": "lora"}}}))
        lines = [json.dumps({"step": step, "eval_loss": loss}) for step, loss in enumerate(losses)]
        (folder / "events.jsonl").write_text("\n".join(lines))

    found, kind = results.rows(tmp_path, planned)

    assert [row.values["learning-rate"] for row in found] == ["1", "2"]
    assert results.best(found).loss == pytest.approx(2.1)
    assert [line[2] for line in results.table(found, kind)[1]] == ["2.1000 ± 0.1414", "not finite"]
    assert results.as_json(found, kind)["rows"][1]["loss"] is None
    assert not [remark for remark in results.remarks(found) if "within the deviation" in remark]


def test_losses_on_other_samples_have_no_best(trainings, tmp_path, capfd):
    trainings({"max-length=64": 2.0, "max-length=128": 1.9}, held_out=lambda name: name)

    code = sweep(RECIPE, "--vary", "max-length=128,64", "--tiny", "--output", "sweep")

    out, error = capfd.readouterr()
    assert code == DONE
    assert [line.partition("\t")[0] for line in out.splitlines()[1:]] == ["128", "64"]  # as given: not by loss
    assert "note: there is no best combination: a varied option changes what the loss is measured on" in error
    assert "best:" not in error
    assert "value tried" not in error
    assert json.loads((tmp_path / "sweep" / "results.json").read_text())["best"] is None


def test_samples_that_each_seed_draws_are_compared_seed_by_seed(trainings, capfd):
    losses = {"rank=4,seed=42": 2.0, "rank=4,seed=43": 2.4, "rank=8,seed=42": 2.2, "rank=8,seed=43": 2.9}
    trainings(losses, held_out=lambda name: name.partition("seed=")[2])

    sweep(RECIPE, "--vary", "rank=4,8", "--seeds", "2", "--tiny", "--output", "sweep")

    assert "best: rank=4" in capfd.readouterr().err


def test_without_held_out_records_rows_have_the_training_loss(trainings, tmp_path):
    trainings(LOSSES)
    sweep(RECIPE, *GRID)
    for name in LOSSES:
        events = tmp_path / "sweep" / name / "events.jsonl"
        events.write_text("".join(line + "\n" for line in events.read_text().splitlines() if "eval" not in line))

    rows, kind = results.rows(tmp_path / "sweep", grid.variants(grid.read_vary(GRID[1:3])))

    assert kind == "training loss"
    assert {row.loss for row in rows} == {2.0}
    assert results.best(rows) is not None

    for number, name in enumerate(LOSSES):
        config = tmp_path / "sweep" / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"identity": {"data": str(number % 2)}}))
    rows, _ = results.rows(tmp_path / "sweep", grid.variants(grid.read_vary(GRID[1:3])))

    assert results.best(rows) is None  # other samples, or another loss of them


def test_control_characters_of_a_folders_name_do_not_reach_the_terminal(trainings, tmp_path, capfd):
    assert sweep(RECIPE, *GRID, "--output", str(tmp_path / "\x1b[2J"), "--dry-run") == 0

    out, error = capfd.readouterr()
    assert "\x1b" not in out + error
    assert r"\x1b[2J" in out


def test_a_dry_run_prints_the_commands_and_makes_nothing(trainings, tmp_path, capfd):
    code = sweep(RECIPE, *GRID, "--dry-run")

    out = capfd.readouterr().out.splitlines()
    assert code == DONE
    assert len(out) == 4
    assert out[0].startswith(f"loldu train {RECIPE} --tiny --method=loldu --learning-rate=1e-3 --output=sweep/method")
    assert not list(tmp_path.iterdir())


def wait_for(condition, timeout_s=240):
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_signal_that_comes_when_the_run_has_just_ended_stops_the_sweep_alone():
    """Its process is gone already, which `wait`, interrupted by the signal, has not recorded yet."""
    ended = subprocess.Popen(["true"], process_group=0)
    os.waitpid(ended.pid, 0)
    stop = child.Stop()
    stop.child = SimpleNamespace(pid=ended.pid, poll=lambda: None)

    stop(signal.SIGTERM, None)

    assert stop.requested


def test_a_run_whose_sweep_died_before_it_began_does_not_begin(tmp_path):
    other = subprocess.Popen(["true"])
    other.wait()
    words = [sys.executable, "-c", child.END_WITH_SWEEP, str(other.pid), sys.executable, "-c", "print('trained')"]

    done = subprocess.run(words, capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


@pytest.mark.slow
def test_a_killed_sweep_loses_no_finished_run_and_resumes_the_one_in_progress(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "launcher",
        "sweep",
        RECIPE,
        "--vary",
        "method=loldu,lora",
        "--tiny",
        "--rank",
        "4",
    ]
    command += ["--max-steps", "30", "--save-every", "1", "--eval-records", "8", "--no-exact-match", "--no-report"]
    command += ["--show-samples", "0", "--output", "sweep"]
    first, second = tmp_path / "sweep" / "method=loldu", tmp_path / "sweep" / "method=lora"
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(second.glob("checkpoints/step-*/COMPLETE")) or killed.poll() is not None)

    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file()}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == DONE, done.stderr
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file()} == before
    steps = [json.loads(line) for line in (second / "events.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 31))
    log = (tmp_path / "sweep" / "logs" / "method=lora.log").read_text()
    assert log.count("starting llama2_alpaca_loldu") == 2
    assert "resum" in log
    assert "best: method=loldu" in done.stderr  # at this learning rate
