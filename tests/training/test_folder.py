"""The run folder before there is a run in it."""

from launcher.config import Config
from launcher.ranks import Party, Ranks
from launcher.training import folder


def test_a_start_that_was_killed_before_its_first_file_stood_is_no_foreign_folder(tmp_path):
    for name in ("state", "control", ".config.json.tmp", ".0123abc.probe", "slurm-7.out"):
        (tmp_path / name).touch()

    assert folder.prepare(Config(), tmp_path, {"base": "a"}, Party(Ranks())) is None
