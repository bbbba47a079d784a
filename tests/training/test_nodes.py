"""What several nodes must share or have identical: the run folder, the base, the data."""

from communicators import together

from launcher import processes
from launcher.config import Config, RunConfig
from launcher.processes import Ranks, same_everywhere
from launcher.training import folder
from launcher.training.ownership import Ownership


def two_nodes(rank, world):
    return Ranks(rank, world, 0, 1)


def test_a_run_folder_that_another_node_does_not_see_is_refused_naming_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "FOLDER_S", 0.2)

    def prepare(comm):
        named = Config(run=RunConfig(output="run"))
        return folder.prepare(named, tmp_path / f"node{comm.ranks.rank}" / "run", {"base": "a"}, 6, comm, Ownership())

    errors = together(2, prepare, two_nodes)

    for error in errors:
        assert isinstance(error, ValueError)
        assert "(rank 1) does not see the run folder" in str(error)
        assert "give --output DIR" in str(error)


def test_files_that_differ_between_nodes_are_refused_naming_the_host():
    def compare(comm):
        return same_everywhere(comm, "the base llama", lambda: f"copy {min(comm.ranks.rank, 2)}")

    errors = together(3, compare, two_nodes)

    for error in errors:
        assert isinstance(error, ValueError)
        assert "the base llama is not the same on" in str(error)
        assert "(rank 1) as on" in str(error)


def test_ranks_that_did_not_look_are_not_compared():
    found = together(3, lambda comm: same_everywhere(comm, "the base", lambda: [None, "a"][comm.ranks.rank == 0]))

    assert found == ["a"] * 3
