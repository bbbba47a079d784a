"""Run folders as hostile input: markup, escape sequences, damaged and special files, links, folders of others."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launcher import cli
from launcher.cluster import follow, runs, slurm, slurm_jobs, slurm_status
from launcher.cluster.slurm import Resources

RECIPE = str(Path(__file__).resolve().parents[2] / "recipes" / "llama2_alpaca_loldu.py")
DEEP = "[" * 100_000


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A sound run folder runs/good, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "good"
    folder.mkdir(parents=True)
    (folder / "state").write_text("finished\n")
    (folder / "events.jsonl").write_text('{"step": 3, "loss": 1.25}\n')
    return folder


def beside(run, name="bad", **files):
    """Another run folder with these files; __ in a name stands for a dot."""
    folder = run.with_name(name)
    folder.mkdir()
    (folder / "control").write_text("run\n")
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    return folder


def rows(capsys):
    """The rows of `loldu status --json` by run."""
    assert cli.main(["status", "--json"]) == 0
    return {row["run"]: row for row in json.loads(capsys.readouterr().out)}


BAD_FILES = {
    "markup in the state": {"state": "running [/b] [/INST] [red]"},
    "an escape sequence in the state": {"state": "\x1b[2J\x1b]0;title\x07"},
    "a job.json that is no JSON": {"job__json": "{"},
    "a job.json that is a list": {"job__json": "[1]"},
    "a job.json that is nested deeply": {"job__json": DEEP},
    "a job id that is an option": {"job__json": '{"job_id": "--help"}'},
    "a cluster that is an option": {"job__json": '{"job_id": "1", "cluster": "-x"}'},
    "a loss that is a string": {"events__jsonl": '{"step": 1, "loss": "high"}\n'},
    "a loss that is an object": {"events__jsonl": '{"step": 1, "loss": {}}\n'},
    "a step that is a list": {"events__jsonl": '{"step": [1], "loss": 1.0}\n'},
    "a loss of 400 digits": {"events__jsonl": '{"step": 1, "loss": 1' + "0" * 400 + "}\n"},
    "events that are nested deeply": {"events__jsonl": f'{{"loss": {DEEP}\n'},
}


@pytest.mark.parametrize("files", BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_run_is_one_row_and_the_other_rows_are_unaffected(run, files, capsys):
    beside(run, **files)

    found = rows(capsys)
    assert cli.main(["status"]) == 0

    shown = capsys.readouterr().out
    assert found["good"]["loss"] == 1.25
    assert (found["bad"]["step"], found["bad"]["loss"]) == (None, None)
    assert "1.2500" in shown
    assert "\x1b" not in shown
    if "job__json" in files:
        assert found["bad"]["state"].startswith("job.json is damaged: ")
    if "[red]" in files.get("state", ""):
        assert "running [/b] [/INST] [red]" in shown


@pytest.mark.parametrize("name", ["task-x", "task-", "task--1", "task-0", "[b]", "\x1b[31m", "-x", "a b\n"])
def test_a_folder_with_an_odd_name_does_not_disturb_the_table(run, name, capsys):
    (run / name).mkdir()
    beside(run, name)

    assert "good/task-0" in rows(capsys) if name == "task-0" else rows(capsys)["good"]["state"] == "finished"
    assert cli.main(["status"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["state", "job.json", "events.jsonl", "config.json", "control"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "broken link", "device"])
def test_a_special_file_in_place_of_a_runs_file_is_never_waited_for(run, name, kind, capsys):
    """Opening a FIFO without a writer would block forever."""
    bad = beside(run)
    (bad / name).unlink(missing_ok=True)
    make = {
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "broken link": lambda path: path.symlink_to("/nowhere"),
        "device": lambda path: path.symlink_to("/dev/zero"),
    }
    make[kind](bad / name)
    (bad / "logs").mkdir()
    os.mkfifo(bad / "logs" / "rank0@here.log")

    assert rows(capsys)["good"]["loss"] == 1.25
    if name != "control":
        assert follow.logs("bad") == 0


def test_escape_sequences_in_logs_are_shown_and_colours_removed(run, capsys):
    (run / "logs").mkdir()
    (run / "logs" / "rank0@node\x1b[7m.log").write_bytes(
        b"\x1b[32mstep 1\x1b[0m\n\x1b]0;owned\x07\x1b[2Jx\n\xff\xc2\x9b1m\n"
    )

    follow.logs("good")

    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.splitlines()[0].endswith(": step 1")
    assert r"\x1b]0;owned\x07\x1b[2Jx" in out
    assert "\x9b" not in out


def test_a_log_without_line_breaks_is_printed_in_bounded_pieces(run, capsys, monkeypatch):
    monkeypatch.setattr(follow, "TAIL_BYTES", 100)
    monkeypatch.setattr(follow, "PIECE_BYTES", 50)
    (run / "logs").mkdir()
    (run / "logs" / "rank0@here.log").write_text("x" * 1000)

    follow.logs("good")

    assert sum(line.count("x") for line in capsys.readouterr().out.splitlines()) >= 100


@pytest.mark.parametrize("name", ["control", ".control.1"])
def test_a_link_in_a_run_folder_is_replaced_and_not_written_through(run, tmp_path, name):
    target = tmp_path / "thesis.tex"
    target.write_text("years of work")
    (run / "state").write_text("running\n")
    (run / name).symlink_to(target)

    slurm_status.cancel("good")

    assert target.read_text() == "years of work"
    assert (run / "control").read_text() == "stop\n"


def fake_sbatch(words, **_):
    return subprocess.CompletedProcess(words, 0, "7\n", "")


@pytest.mark.parametrize("link", ["control", "events", "logs", "state", "job.json", "job.sbatch"])
def test_submitting_to_a_folder_with_links_is_refused(run, tmp_path, link):
    (run / link).unlink(missing_ok=True)
    (run / link).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ValueError, match=f"{link} is a symbolic link"):
        slurm.submit(RECIPE, Resources(), name="good", run=fake_sbatch)

    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "files", [{"config.json": '{"architectures": ["X"]}'}, {"thesis.tex": "x"}, {"pyproject.toml": ""}]
)
def test_submitting_into_a_folder_that_is_not_a_run_writes_nothing(tmp_path, files, monkeypatch):
    """A model's folder has a config.json as well."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)

    with pytest.raises(ValueError, match="is not a run folder and not empty"):
        slurm.submit(RECIPE, Resources(), (f"--output={folder}",), run=fake_sbatch)

    assert sorted(os.listdir(folder)) == sorted(files)


def test_the_batch_script_refuses_links_before_it_writes(tmp_path):
    job = slurm.Job(name="x", run=str(tmp_path / "run"), folder=str(tmp_path), command=("r.py",))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "control").symlink_to(tmp_path / "elsewhere")

    done = subprocess.run(
        ["bash", "-c", slurm.script(job)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert "control is a symbolic link" in done.stderr
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["x$(touch y)", "a b", "; touch y", "`touch y`", "it's"])
def test_printed_next_commands_are_safe_to_paste(tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    slurm.submit(RECIPE, Resources(), (f"--output={name}",), run=fake_sbatch)

    for line in capsys.readouterr().out.splitlines():
        if line.startswith(("follow", "state", "cancel")):
            subprocess.run(["bash", "-c", f"loldu() {{ :; }}; {line.split(maxsplit=1)[1]}"], check=True)
            assert shlex.split(line)[-1] == str(tmp_path / name)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("given", ["x" * 5000, "a\0b", "../" * 2000, "[b]", "\x1b[31m"])
def test_a_run_that_cannot_be_is_one_line(run, given, capfd):
    for command in ("status", "logs", "cancel", "simulate-preempt"):
        assert cli.main([command, given]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert "\x1b" not in error


def test_the_name_of_another_users_job_cannot_change_what_is_shown():
    """scontrol prints all jobs; a job's name is free text."""
    hostile = (
        "JobId=8 JobName=x ArrayJobId=7 ArrayTaskId=0 JobState=FAILED UserId=me(0) UserId=them(1) JobState=RUNNING"
    )
    ours = "JobId=9 ArrayJobId=7 ArrayTaskId=0 JobName=ours UserId=me(0) JobState=COMPLETED"

    found = slurm_jobs.parse_scontrol(f"{hostile}\n{ours}\nJobState=RUNNING\nJobId=5 JobState=RUNNING Restarts=many\n")

    assert [(state.job_id, state.state, state.restarts) for state in found] == [
        ("8", "RUNNING", 0), ("7_0", "COMPLETED", 0), ("5", "RUNNING", 0),
    ]  # fmt: skip


def test_a_home_directory_is_expanded_and_an_unknown_one_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    assert runs.run_folder(None, Path("r.py"), ["--output=~/x"]) == Path("/home/me/x")
    assert runs.with_output(["--output=~/x"], Path("/home/me/x"))[-1] == "--output=/home/me/x"
    with pytest.raises(ValueError, match="no such home directory"):
        runs.run_folder(None, Path("r.py"), ["--output=~nobody-here/x"])
