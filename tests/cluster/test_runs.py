"""Finding and reading run folders, and their merged logs."""

import json
import threading
import time

import pytest

from launcher.cluster import follow, runs


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder under runs/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first"
    (folder / "logs").mkdir(parents=True)
    (folder / "state").write_text("running\n")
    return folder


@pytest.mark.parametrize(
    ("given", "safe"),
    [("alpaca 64", "alpaca-64"), ("../../etc", "etc"), ("a/b\nc", "a-b-c"), ("--x", "x"), ("ü1", "1"),
     ("x" * 300, "x" * 100)],
)  # fmt: skip
def test_a_safe_name_is_one_plain_word(given, safe):
    assert runs.safe_name(given) == safe


def test_a_name_without_letters_or_digits_is_refused():
    with pytest.raises(ValueError, match="no letters or digits"):
        runs.safe_name("../..")


def test_a_run_is_found_by_name_folder_and_job(run):
    (run / "job.json").write_text(json.dumps({"job_id": "17"}))
    (run / "task-2").mkdir()

    assert {runs.find_run(given) for given in ("first", str(run), "runs/first", "17")} == {run}
    assert runs.find_run("17_2") == run / "task-2"
    for wrong in ("second", "18", "", ".."):
        with pytest.raises(ValueError, match=r"no run .* runs/ \(first\)"):
            runs.find_run(wrong)


def test_only_complete_steps_and_checkpoints_count(run):
    for name in ("step-000002", "step-000010"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "COMPLETE").touch()
    (run / "checkpoints" / "step-000012").mkdir()  # incomplete
    (run / "events.jsonl").write_text('{"step": 11, "loss": 2.5}\n{"step": 11, "eval_loss": 3.0}\n{"step": 12, "lo')

    assert runs.checkpoint_step(run) == 10
    assert runs.last_step(run) == {"step": 11, "loss": 2.5}


def test_the_last_value_of_an_option_counts():
    assert runs.option("--output", ["--output", "a", "--rank=8", "--output=b"]) == "b"
    assert runs.option("--output", ["--output-dir=x"]) is None


def test_logs_show_the_last_lines_of_every_rank(run, capsys):
    (run / "logs" / "rank10@node2.log").write_text("ten\n")
    (run / "logs" / "rank2@node1.log").write_text("one\ntwo\nthree\n")
    (run / "slurm-5.log").write_text("from the batch script\n")

    follow.logs("first", lines=2)

    assert capsys.readouterr().out.splitlines() == [
        "slurm-5: from the batch script", "rank2@node1: two", "rank2@node1: three", "rank10@node2: ten",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="rank 7 has no log"):
        follow.logs("first", rank=7)


def test_the_logs_of_an_array_are_those_of_its_runs(run, capsys):
    for task in (0, 1):
        (run / f"task-{task}" / "logs").mkdir(parents=True)
        (run / f"task-{task}" / "logs" / "rank0@node1.log").write_text(f"of {task}\n")
        (run / f"slurm-9_{task}.log").write_text(f"batch {task}\n")

    follow.logs("first")

    assert capsys.readouterr().out.splitlines() == [
        "task-0/slurm-9_0: batch 0", "task-0/rank0@node1: of 0",
        "task-1/slurm-9_1: batch 1", "task-1/rank0@node1: of 1",
    ]  # fmt: skip


def test_following_shows_each_new_line_once_and_ends_with_the_run(run, capsys, monkeypatch):
    monkeypatch.setattr(follow, "POLL_S", 0.02)
    monkeypatch.setattr(follow, "ASK_SLURM_S", 0.1)
    log = run / "logs" / "rank0@node1.log"
    log.write_text("one\ntw")

    def write():
        time.sleep(0.1)
        with open(log, "a") as file:
            file.write("o\n")
        (run / "logs" / "rank1@node2.log").write_text("a new rank\n")
        time.sleep(0.1)
        with open(log, "a") as file:
            file.write("three\n")
        (run / "state").write_text("finished\n")

    writer = threading.Thread(target=write)
    writer.start()
    follow.logs("first", follow=True)
    writer.join()

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("rank0")] == [f"rank0@node1: {word}" for word in ("one", "two", "three")]  # fmt: skip  # noqa: E501
    assert "rank1@node2: a new rank" in lines


def test_a_run_without_logs_gives_the_command_that_waits_for_them(run):
    with pytest.raises(ValueError, match="loldu logs -f first waits for them"):
        follow.logs("first")


@pytest.mark.parametrize("follows", [False, True])
def test_a_run_of_loldu_train_has_no_logs_to_wait_for(run, follows):
    (run / "events.jsonl").write_text('{"step": 1, "loss": 2.0}\n')

    with pytest.raises(ValueError, match="loldu train prints to its terminal: loldu status first shows its step"):
        follow.logs("first", follow=follows)
