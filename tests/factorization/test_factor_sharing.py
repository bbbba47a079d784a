"""Factoring with several ranks: shared evenly, nothing made twice, failures named by all."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from communicators import together
from safetensors.torch import load_file, save_file
from small_weights import ALONE, LU, SIX, assert_nothing_half_written, no_reading, requests_for, write_model
from torch.distributed.distributed_c10d import _get_default_store

from adapters.checkpoint_files import TensorInfo, list_tensors
from launcher.factorization import cache, make, share, watch
from launcher.factorization.make import FactorRequest
from launcher.factorization.share import factorize, share_out
from launcher.processes import Communicator, Ranks, Stopped


def llama_2_7b(rank: int) -> dict[str, float]:
    square, tall, wide = (4096, 4096), (11008, 4096), (4096, 11008)
    parts = dict.fromkeys("qkvo", square) | {"gate": tall, "up": tall, "down": wide}
    shapes = {f"{layer}.{part}": shape for layer in range(32) for part, shape in parts.items()}
    where = Path("model.safetensors")
    tensors = {name: TensorInfo(where, name, shape, "BF16") for name, shape in shapes.items()}
    return {name: FactorRequest(name, tensor, rank, LU).cost for name, tensor in tensors.items()}


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("rank", [8, 64, 1024, 4096])
def test_llama_2_7b_is_shared_out_evenly(world, rank):
    costs = llama_2_7b(rank)

    owners = share_out(costs, world)

    loads = [sum(c for c, owner in zip(costs.values(), owners, strict=True) if owner == one) for one in range(world)]
    assert max(loads) / (sum(loads) / world) <= 1.1


def test_every_rank_computes_the_same_shares_whatever_the_order():
    costs = llama_2_7b(64)

    forward = dict(zip(costs, share_out(costs, 3), strict=True))
    turned = dict(reversed(costs.items()))
    backward = dict(zip(turned, share_out(turned, 3), strict=True))

    assert forward == backward
    assert share_out({"a": 1.0}, 4) == [0]
    assert share_out({}, 2) == []


@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_make_each_weight_once_with_the_same_result_as_one_rank(
    model, folder, tmp_path, monkeypatch, world
):
    made, real = [], make.make
    alone = factorize(requests_for(model), tmp_path / "alone", ALONE)
    monkeypatch.setattr(share, "make", lambda request, *rest: made.append(request.module) or real(request, *rest))

    results = together(world, lambda comm: factorize(requests_for(model), folder, comm))

    assert results == [alone] * world
    assert sorted(made) == sorted(SIX)
    for how in alone.values():
        ours, theirs = cache.load(folder, how.key), cache.load(tmp_path / "alone", how.key)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_progress_of_all_ranks_reaches_rank_0(model, folder, monkeypatch):
    """Each weight takes five beats, so that the other rank's are counted while rank 0 works."""
    seen, real = [], make.make

    def slow(request, *rest):
        time.sleep(0.1)
        return real(request, *rest)

    monkeypatch.setattr(share, "make", slow)
    monkeypatch.setattr(share, "BEAT_S", 0.02)
    monkeypatch.setattr(watch, "BEAT_S", 0.02)

    def run(comm: Communicator) -> None:
        report = (lambda *news: seen.append(news)) if comm.ranks.is_main else (lambda *news: None)
        factorize(requests_for(model), folder, comm, report)

    together(2, run)

    assert seen[-1][:2] == (6, 6)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {weight for _, _, weight in seen} & set(SIX)


def test_two_panels_are_worked_on_at_once_with_half_of_torchs_threads_each(model, folder, monkeypatch):
    """A thread that arrives alone at the barrier times out."""
    meeting, threads, real, before = threading.Barrier(2), set(), make.make, torch.get_num_threads()

    def meet(request, *rest):
        meeting.wait(timeout=30)
        threads.add(torch.get_num_threads())
        return real(request, *rest)

    monkeypatch.setattr(share, "make", meet)
    torch.set_num_threads(4)
    try:
        done = factorize(requests_for(model), folder, ALONE)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

    assert len(done) == 6
    assert (threads, after) == ({2}, 4)


def test_weights_are_read_before_they_are_factored_and_not_far_ahead(tmp_path, folder, monkeypatch):
    """If the model is larger than the memory, weights that are read too early are evicted again."""
    model = write_model(tmp_path / "model", {f"layers.{i:02}.q": (8, 6) for i in range(20)})
    real, log = make.make, []

    def logged(request, *rest):
        log.append(("made", request.tensor.name))
        return real(request, *rest)

    monkeypatch.setattr(share, "make", logged)
    monkeypatch.setattr(share, "read_ahead", lambda info, *_: log.append(("read", info.name)))

    factorize(requests_for(model), folder, ALONE)

    assert sorted(log) == [(what, f"layers.{i:02}.q.weight") for what in ("made", "read") for i in range(20)]
    for place, (what, name) in enumerate(log):
        earlier = log[:place]
        made = sum(each == "made" for each, _ in earlier)
        assert ("read", name) in earlier if what == "made" else len(earlier) - made <= made + share.AHEAD


def test_a_stop_ends_the_reading_too(model, folder, monkeypatch):
    """Of a large weight from a slow disk it could take minutes; what was not read is not made."""
    heard = threading.Event()

    def read_for_ever(info, leaving):
        while not leaving():
            time.sleep(0.01)
        heard.set()

    def stop(*_):
        raise Stopped("SIGTERM")

    monkeypatch.setattr(share, "read_ahead", read_for_ever)
    monkeypatch.setattr(share, "make", no_reading)

    with pytest.raises(Stopped, match="SIGTERM"):
        factorize(requests_for(model), folder, ALONE, stop)

    assert heard.wait(30)


@pytest.mark.parametrize("damage", [b"\xff" * 64, (2**62).to_bytes(8, "little"), b"\2\0\0\0\0\0\0\0[]"])
def test_a_file_that_changed_after_its_header_was_read_is_an_error_with_the_reason(model, damage):
    info = list_tensors(model)["layers.0.q.weight"]
    info.file.write_bytes(damage)

    make.read_ahead(info)  # logs nothing, since the weight is not known here

    with pytest.raises(Exception, match=r"header|Header"):
        make.open_tensor(info)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's count of a process's bytes")
def test_reading_ahead_takes_a_tensor_from_end_to_end(tmp_path):
    shapes = {"a": (700, 1000), "b": (900, 1000)}
    info = list_tensors(write_model(tmp_path, shapes))["a.weight"]
    count = lambda: int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])  # noqa: E731
    before = count()

    make.read_ahead(info)

    assert 700 * 1000 * 4 <= count() - before < 700 * 1000 * 4 + 20_000  # and the file's header


def test_a_weight_without_factors_is_named_on_all_ranks_and_nothing_is_half_written(model, folder):
    weights = load_file(model / "model.safetensors")
    weights["layers.1.up.weight"][3, 2] = float("nan")
    save_file(weights, model / "model.safetensors")
    started = time.monotonic()

    errors = together(2, lambda comm: factorize(requests_for(model), folder, comm))

    assert time.monotonic() - started < 60  # nobody waits until a rank counts as missing
    for error in errors:
        assert isinstance(error, ValueError)
        for word in ("layers.1.up", "layers.1.up.weight in", "model.safetensors", "NaN", "damaged"):
            assert word in str(error)
    assert_nothing_half_written(folder)


def test_a_weight_that_fails_while_another_is_worked_on_is_the_one_that_is_named(model, folder, monkeypatch):
    """Its failure is there before anyone waits for it."""
    real = make.make

    def fail(request, *rest):
        if request.module == "layers.1.up":
            raise ValueError("cannot be")
        time.sleep(0.1)
        return real(request, *rest)

    monkeypatch.setattr(share, "make", fail)

    errors = together(2, lambda comm: factorize(requests_for(model), folder, comm))

    owner = next(rank for rank, error in enumerate(errors) if str(error) == "cannot be")
    assert str(errors[1 - owner]) == f"rank {owner} failed at layers.1.up: cannot be"


def test_all_weights_without_factors_are_listed_at_once_and_the_others_are_kept(model, folder):
    weights = load_file(model / "model.safetensors")
    weights["layers.0.q.weight"].zero_()
    weights["layers.2.up.weight"][:, 1] = weights["layers.2.up.weight"][:, 0]
    save_file(weights, model / "model.safetensors")

    errors = together(2, lambda comm: factorize(requests_for(model), folder, comm))

    for error in errors:
        assert isinstance(error, ValueError)
        assert str(error).startswith("2 weights have no factors: layers.0.q (")
        assert "; layers.2.up (" in str(error)
        assert str(error).endswith("leave these layers out with --exclude layers.0.q layers.2.up, or lower --rank")
    assert len(cache.entries(folder)) == len(SIX) - 2


def test_a_full_disk_on_one_rank_is_named_on_all(model, folder, monkeypatch):
    real = save_file

    def full(tensors, file, metadata):
        if '"name": "layers.2.q"' in metadata["about"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    errors = together(2, lambda comm: factorize(requests_for(model), folder, comm))

    for error in errors:
        assert isinstance(error, ValueError)
        assert "layers.2.q" in str(error)
        assert "no space is left" in str(error)
        assert str(folder) in str(error)
    assert_nothing_half_written(folder)


def _work_until_killed(port: int, model: Path, folder: Path, working) -> None:
    share.make = lambda *_args: time.sleep(1) or working.set() or time.sleep(600)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    factorize(requests_for(model), folder, Communicator(Ranks(1, 2, 1, 2), store))


def test_a_killed_rank_is_named_with_its_weight(model, folder, monkeypatch):
    """Its silence counts from then on, so that the test is quick, and right on a busy machine."""
    monkeypatch.setattr(watch, "SILENCE_S", 600.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    working = fork.Event()
    other = fork.Process(target=_work_until_killed, args=(store.port, model, folder, working))
    other.start()

    def kill():
        assert working.wait(120)
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        watch.SILENCE_S = 1.0

    killer = threading.Thread(target=kill)
    killer.start()

    with pytest.raises(RuntimeError, match=r"no heartbeat from rank 1 .* the last one at layers\.\d\.\w+: it died"):
        factorize(requests_for(model), folder, Communicator(Ranks(0, 2, 0, 2), store))

    killer.join()


def _die_at_the_third_weight(model: Path, folder: Path) -> None:
    real, stored = os.replace, []

    def replace(source, target):
        if str(target).endswith(".safetensors"):
            stored.append(target)
        if len(stored) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    cache.os.replace = replace
    factorize(requests_for(model), folder, ALONE)


def test_killed_half_way_the_next_run_makes_only_what_is_missing(model, folder):
    victim = multiprocessing.get_context("fork").Process(target=_die_at_the_third_weight, args=(model, folder))
    victim.start()
    victim.join(60)
    left = {entry.about["name"] for entry in cache.entries(folder)}

    done = factorize(requests_for(model), folder, ALONE)

    assert victim.exitcode == -signal.SIGKILL
    assert len(left) == 2
    assert {name for name, how in done.items() if how.made} == set(SIX) - left
    assert cache.verify(folder) == []
    assert len(cache.entries(folder)) == len(SIX)  # the temporary file of the killed one is not one of them


def _one_of_two(rank: int, port: int, good: Path, bad: Path, folder: Path, out: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    comm = Communicator(Ranks(rank, 2, rank, 2), _get_default_store())
    done = factorize(requests_for(good, 8), folder, comm)
    started = time.monotonic()
    try:
        factorize(requests_for(bad, 8), folder, comm)
        message = "no error"
    except ValueError as error:
        message = str(error)
    answer = {"done": done, "message": message, "seconds": time.monotonic() - started}
    (out / f"{rank}.json").write_text(json.dumps(answer))
    os._exit(0)  # gloo sometimes aborts while the interpreter is torn down, after all is done


def test_two_processes_share_the_work_and_both_name_the_bad_weight(model, folder, tmp_path):
    """Processes with a gloo group, their store kept outside as torchrun's agent does; forked, so no import is paid."""
    bad = write_model(tmp_path / "bad", SIX)
    weights = load_file(bad / "model.safetensors") | {"layers.0.up.weight": torch.full((40, 16), float("inf"))}
    save_file(weights, bad / "model.safetensors")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork, words = multiprocessing.get_context("fork"), (store.port, model, bad, folder, tmp_path)

    processes = [fork.Process(target=_one_of_two, args=(rank, *words)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0, 0]
    alone = factorize(requests_for(model, 8), tmp_path / "alone", ALONE)
    for rank in range(2):
        answer = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answer["done"] == {name: list(how) for name, how in alone.items()}
        assert "layers.0.up" in answer["message"]
        assert answer["seconds"] < 60
    assert_nothing_half_written(folder)
