"""The run folder before there is a run in it, and after."""

import hashlib
import os
import shutil
from dataclasses import replace

import pytest
import torch
from launching import Runs

from launcher.config import Config, RunConfig
from launcher.processes import Communicator, Ranks
from launcher.training import checkpoint, folder
from launcher.training.checkpoint import Checkpoint, Piece
from launcher.training.checkpoint_index import TrainingState
from launcher.training.ownership import Ownership
from launcher.training.report import Events
from launcher.training.start import watch

NAMED = Config(run=RunConfig(output="run"))


def test_starts_without_output_at_the_same_second_get_folders_of_their_own(tmp_path):
    wanted = tmp_path / "runs" / "recipe-20240101-000000"

    made = [
        folder.prepare(Config(), wanted, {"base": "a"}, 6, Communicator(Ranks()), Ownership())[0].name for _ in range(3)
    ]

    assert made == [wanted.name, f"{wanted.name}-2", f"{wanted.name}-3"]


def test_a_start_that_was_killed_before_its_first_file_stood_is_no_foreign_folder(tmp_path):
    for name in ("state", "control", ".config.json.tmp", ".0123abc.probe", "slurm-7.out"):
        (tmp_path / name).touch()

    assert folder.prepare(NAMED, tmp_path, {"base": "a"}, 6, Communicator(Ranks()), Ownership()) == (tmp_path, None)


def test_a_folder_with_checkpoints_alone_is_a_run_whose_other_files_were_lost(tmp_path):
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)

    with pytest.raises(ValueError, match="is not a run folder and not empty"):
        folder.prepare(NAMED, tmp_path, {"base": "a"}, 6, Communicator(Ranks()), Ownership())
    (tmp_path / "checkpoints" / "step-000002" / "COMPLETE").write_text("x")

    assert folder.prepare(NAMED, tmp_path, {"base": "a"}, 6, Communicator(Ranks()), Ownership()) == (tmp_path, None)


def test_a_failed_run_leaves_its_error_on_one_line_without_secrets_until_it_starts_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    state = folder.State(Ranks(), Ownership())
    state.folder = tmp_path
    why = (
        "no answer from https://me:pass@host/x?token=abcdef&part=2\nwith 0123456789abcdef, hf_abcdefghijkl and "
        "Bearer xyz"
    )

    state.failed()
    state.because(why)

    shown = "no answer from https://***@host/x?token=***&part=2\\nwith ***, *** and Bearer ***\n"
    assert (tmp_path / "error").read_text() == shown
    state.write("running")
    assert not (tmp_path / "error").exists()


def save_steps(root, *steps):
    """Checkpoints of these steps, of a run whose identity is {"base": "a"}."""
    for step in steps:
        about = {"identity": {"base": "a"}, "progress": vars(TrainingState(step=step)), "world_size": 1}
        about["events"] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        checkpoint.save(root, step, {"model/a": Piece.whole(torch.ones(2))}, about, Communicator(Ranks()))


def test_damaged_checkpoints_are_set_aside_so_that_those_after_a_resume_count_as_the_newest(tmp_path):
    root = tmp_path / "checkpoints"
    save_steps(root, 2, 4, 6)
    for step in (4, 6):
        (root / f"step-{step:06d}" / "rank-00000.safetensors").write_bytes(b"")

    _, found = folder.prepare(NAMED, tmp_path, {"base": "a"}, 6, Communicator(Ranks()), Ownership())
    save_steps(root, 3)
    checkpoint.prune(root, keep_last=1, best_step=None)

    assert found.step == 2
    assert [step for step in (2, 3, 4, 6) if (root / f"step-{step:06d}").exists()] == [3]
    assert len(list(root.glob("step-*.before-*"))) == 2


def test_a_refused_resume_from_an_earlier_checkpoint_leaves_the_later_ones(tmp_path):
    root = tmp_path / "checkpoints"
    save_steps(root, 2, 4)
    back = Config(run=RunConfig(output="run", resume=str(root / "step-000002")))

    with pytest.raises(ValueError, match='base was "a", now "b"'):
        folder.prepare(back, tmp_path, {"base": "b"}, 6, Communicator(Ranks()), Ownership())

    assert sorted(path.name for path in root.iterdir()) == ["step-000002", "step-000004"]


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        (None, None),
        ("weights", "weights differs from its checksum in SHA256SUMS"),
        ("notes.txt", "notes.txt has no checksum in SHA256SUMS"),
    ],
)
def test_a_finished_run_is_left_as_it_is_unless_a_file_of_its_result_is_not_as_written(tmp_path, caplog, name, warned):
    result = tmp_path / "adapter"
    result.mkdir()
    (result / "weights").write_text("1")
    (result / "SHA256SUMS").write_text(f"{hashlib.sha256(b'1').hexdigest()}  weights\n")
    (tmp_path / "state").write_text("finished\n")
    if name:
        (result / name).write_text("2")

    done = folder.finished(Config(), tmp_path, Checkpoint(tmp_path, 3, {}, {}), steps=3)

    assert done == (name is None)
    assert (f"{result}/{warned}: made again from {tmp_path}" in caplog.text) == (name is not None)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_of_a_run_is_readable_as_the_umask_says(stories, alpaca_file, tmp_path, umask):
    """A colleague on the same cluster can read a run; safetensors alone would make its files private."""
    before = os.umask(umask)
    try:
        runs = Runs(tmp_path, stories, alpaca_file)
        runs.alone("run", change=lambda config: replace(config, optimizer=replace(config.optimizer, max_steps=1)))
    finally:
        os.umask(before)

    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]

    assert len([file for file in files if file.suffix == ".safetensors"]) == 2  # a checkpoint's and the adapter's
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "adapter.tmp", "model"])
def test_a_folder_of_a_run_that_is_a_link_is_refused_before_anything_is_touched(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("years of work")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "state").write_text("stopped\n")
    (run / name).symlink_to(elsewhere)

    with pytest.raises(ValueError, match=rf"run/{name} is a symbolic link to .*elsewhere, .*--output"):
        folder.prepare(NAMED, run, {"base": "a"}, 6, Communicator(Ranks()), Ownership())

    assert (elsewhere / "thesis").read_text() == "years of work"


@pytest.mark.parametrize("text", ["[]", "7", '{"identity": []}', '{"identity": "a"}', "{}", "[" * 100_000, "{"])
def test_a_config_that_cannot_be_read_is_damaged(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "state").write_text("stopped\n")

    with pytest.raises(
        ValueError, match=r"config\.json is damaged and no checkpoint tells which run this was: .*--output"
    ):
        folder.prepare(NAMED, tmp_path, {"base": "a"}, 6, Communicator(Ranks()), Ownership())


def test_odd_lines_of_events_are_left_out_on_a_resume(tmp_path, caplog):
    """The checkpoint's checksum shows that something is wrong; what can be read is kept."""
    good = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.5}', '{"step": 3, "loss": 1.0}']
    odd = ["[]", "7", "null", '"step"', '{"step": "1"}', '{"step": true}', "{}", "[" * 100_000, '{"step": 2, "lo']
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join([good[0], *odd, *good[1:]]))

    events = Events(file, 2, {"bytes": 10, "sha256": "0" * 64})
    events.close()

    assert file.read_text().splitlines() == good[:2]
    assert "the 2 lines that can be read are kept" in caplog.text


def test_events_that_are_a_link_are_not_written_through(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "events.jsonl").symlink_to(target)

    events = Events(tmp_path / "events.jsonl", 0, None)
    events.write({"step": 1})
    events.close()

    assert target.read_text() == "mine"
    assert (tmp_path / "events.jsonl").read_text() == '{"step": 1}\n'


def test_a_base_that_is_rewritten_in_place_is_noticed_and_one_that_is_renamed_into_its_place_is_not(stories, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(stories, base)
    file = base / "model.safetensors"
    file.chmod(0o644)
    check = watch(base)

    check()
    shutil.copy(file, tmp_path / "new")
    os.replace(tmp_path / "new", file)
    check()
    check = watch(base)
    with open(file, "r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        opened.write(b"x" * 100)

    with pytest.raises(ValueError, match=r"model.safetensors was rewritten while this run trains on it"):
        check()
