"""The run folder before there is a run in it, and after."""

import hashlib
import os
from dataclasses import replace

import pytest
from launching import Runs

from launcher.config import Config
from launcher.processes import Communicator, Ranks
from launcher.training import folder
from launcher.training.checkpoint import Checkpoint


def test_a_start_that_was_killed_before_its_first_file_stood_is_no_foreign_folder(tmp_path):
    for name in ("state", "control", ".config.json.tmp", ".0123abc.probe", "slurm-7.out"):
        (tmp_path / name).touch()

    assert folder.prepare(Config(), tmp_path, {"base": "a"}, Communicator(Ranks())) is None


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
