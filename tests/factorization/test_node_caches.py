"""If nodes do not see one cache folder, the run is refused, or, on request, each has a cache with the same numbers."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from communicators import together
from safetensors.torch import save_file

from adapters import LoLDUConfig
from adapters.checkpoint_files import list_tensors
from launcher import processes
from launcher.factorization import cache, share
from launcher.factorization.make import FactorRequest
from launcher.factorization.share import factorize
from launcher.processes import Communicator, Ranks

NAMES = ("k", "q", "v")


def two_nodes(rank: int, world: int) -> Ranks:
    return Ranks(rank, world, 0, 1)


@pytest.fixture
def requests(tmp_path) -> list[FactorRequest]:
    draw = torch.Generator().manual_seed(0)
    save_file({f"{name}.weight": torch.randn(16, 12, generator=draw) for name in NAMES}, tmp_path / "model.safetensors")
    tensors = list_tensors(tmp_path)
    return [FactorRequest(name, tensors[f"{name}.weight"], 4, LoLDUConfig().factorization()) for name in NAMES]


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[Path]:
    monkeypatch.setattr(processes, "FOLDER_S", 0.2)
    return [tmp_path / "node0", tmp_path / "node1"]


def by_both(requests: list[FactorRequest], folders: list[Path], **options: Any) -> list[Any]:
    return together(2, lambda comm: factorize(requests, folders[comm.ranks.rank], comm, **options), two_nodes)


def test_a_cache_that_another_node_does_not_see_is_refused_naming_it_and_what_to_type(requests, folders):
    errors = by_both(requests, folders)

    for error in errors:
        assert isinstance(error, ValueError)
        for word in ("(rank 1) does not see the factor cache", "--cache DIR", "--cache-per-node"):
            assert word in str(error)
    assert not any(cache.entries(folder) for folder in folders)


def test_where_each_node_has_a_cache_of_its_own_each_makes_all(requests, folders):
    cold = by_both(requests, folders, per_node=True)
    warm = by_both(requests, folders, per_node=True)

    assert all(how.made for done in cold for how in done.values())
    assert not any(how.made for done in warm for how in done.values())
    assert all(len(cache.entries(folder)) == len(NAMES) for folder in folders)


def test_only_what_a_node_lacks_is_made_there(requests, folders):
    factorize(requests[:2], folders[1], Communicator(Ranks()))

    first, second = by_both(requests, folders, per_node=True)

    assert [how.made for how in first.values()] == [True, True, True]
    assert [how.made for how in second.values()] == [False, False, True]


def test_a_warm_cache_of_all_nodes_is_read_and_nothing_written_beside_it(requests, folders, monkeypatch):
    """It may be read-only."""
    factorize(requests, folders[0], Communicator(Ranks()))
    monkeypatch.setattr(share, "nodes_without", lambda *_: pytest.fail("a probe was written"))

    results = by_both(requests, [folders[0], folders[0]])

    assert not any(how.made for done in results for how in done.values())


def test_a_warm_cache_of_one_node_alone_is_refused_too(requests, folders):
    factorize(requests, folders[0], Communicator(Ranks()))

    errors = by_both(requests, folders)

    assert all("(rank 1) does not see the factor cache" in str(error) for error in errors)


def test_a_node_may_see_late_what_another_has_made(requests, folders, monkeypatch):
    """As on a network file system."""
    monkeypatch.setattr(processes, "FOLDER_S", 30.0)
    factorize(requests, folders[0], Communicator(Ranks()))
    shutil.copytree(folders[0], late := folders[1].with_name("late"))
    timer = threading.Timer(0.3, late.rename, [folders[1]])

    timer.start()
    results = by_both(requests, folders)

    assert not any(how.made for done in results for how in done.values())


def test_nodes_whose_factors_are_other_numbers_are_refused_by_weight(requests, folders):
    """As another GPU or library rounds them: rows of the two would not belong together."""
    real = cache.store

    def rounded(folder: Path, key: str, factors: Any, about: Any) -> Any:
        if folder == folders[1] and about["name"] == "q":
            factors = factors._replace(write=factors.write * (1 + 1e-6))
        return real(folder, key, factors, about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "store", rounded)
        errors = by_both(requests, folders, per_node=True)

    for error in errors:
        assert isinstance(error, ValueError)
        assert "the factors of q in" in str(error)
        assert "(rank 1) differ from those on" in str(error)
