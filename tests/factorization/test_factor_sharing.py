"""Factoring with several ranks: equal to torch's LU, shared evenly, nothing made twice, failures named by all."""

import errno
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import together
from safetensors.torch import load_file, save_file
from torch.distributed.distributed_c10d import _get_default_store

from adapters import METHODS
from adapters.checkpoint_files import TensorInfo, list_tensors
from adapters.factors import Factors, base_fingerprint, probe_digest
from adapters.loldu import loldu_factors
from adapters.svd import svd_factors
from launcher.factorization import cache, make, share, watch
from launcher.factorization.make import FactorRequest, factors_of
from launcher.factorization.share import factorize, share_out
from launcher.processes import Communicator, Ranks, Stopped

ALONE = Communicator(Ranks())


def write_model(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Path:
    draw = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"{name}.weight": torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def factorization(method: str = "loldu", **options: Any) -> Any:
    config: Any = METHODS[method]
    return config(**options).factorization()


LU = factorization()


def requests_for(model: Path, rank: int = 4, method: Any = LU, **options: Any) -> list[FactorRequest]:
    names = list_tensors(model)
    return [FactorRequest(name.removesuffix(".weight"), names[name], rank, method, **options) for name in sorted(names)]


SIX = {f"layers.{i}.{part}": shape for i in range(3) for part, shape in {"q": (16, 12), "up": (40, 16)}.items()}


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model", SIX)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def assert_nothing_half_written(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != cache.MARK]
    assert [file for file in files if file.suffix not in (".safetensors", ".json")] == []
    assert cache.verify(folder) == []


def no_reading(*_args: Any) -> Any:
    raise AssertionError("a warm start opens no tensor data")


@pytest.mark.parametrize(("m", "n", "r"), [(24, 24, 24), (40, 24, 5), (24, 40, 24), (24, 40, 1)])
def test_factors_from_the_panel_on_disk_are_those_of_the_lu_of_the_whole(tmp_path, folder, m, n, r):
    """float64 throughout: 1e-12 is a few hundred roundings."""
    (request,) = requests_for(write_model(tmp_path, {"w": (m, n)}, torch.float64), r, dtype="float64")
    weight = load_file(tmp_path / "model.safetensors")["w.weight"]

    factorize([request], folder, ALONE)
    factors = factors_of(request, folder)

    P, L, U = torch.linalg.lu(weight)
    torch.testing.assert_close(factors.write, (P @ L)[:, :r], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factors.values, U.diagonal()[:r].float(), rtol=1e-6, atol=0)
    assert torch.equal(factors.pivots.long(), P.argmax(dim=0)[:r])
    reading = factors.read @ weight[factors.pivots.long()]  # what the layer computes: U_r
    torch.testing.assert_close(reading, U[:r] / U.diagonal()[:r, None], rtol=1e-10, atol=1e-10)
    assert torch.equal(factors.probe, probe_digest(weight, weight.shape))
    about = cache.entries(folder)[0].about
    assert about["residual"] < 1e-6  # it goes through d_r, which is kept in float32
    assert about["norms"]["panel"] == pytest.approx(float(weight[:, :r].norm()))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((12, 20), {"transposed": True}),
        ((12, 20), {"transposed": True, "normalize": True}),
        ((20, 12), {"normalize": True}),
        ((20, 12), {"embedding": True}),
        ((20, 12), {"embedding": True, "normalize": True}),
        ((8, 3, 2, 2), {}),
    ],
)
def test_every_kind_of_layer_gets_the_factors_of_its_matrix(tmp_path, folder, shape, options):
    how = factorization(normalize_directions=options.get("normalize", False))
    layout = {name: value for name, value in options.items() if name != "normalize"}
    (request,) = requests_for(write_model(tmp_path, {"w": shape}), 5, how, **layout)
    stored = load_file(tmp_path / "model.safetensors")["w.weight"]
    W = stored.T if options.get("transposed") else stored.flatten(1)
    maths = {name: value for name, value in options.items() if name != "transposed"}
    expected = loldu_factors(W[:, :5], lambda rows: W[rows.long()], **maths)._replace(probe=probe_digest(W, W.shape))

    factors = factors_of(request, folder)

    for name in Factors._fields:
        torch.testing.assert_close(getattr(factors, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert cache.entries(folder)[0].about["residual"] < 1e-5  # float32, 5 columns
    assert request.shape == tuple(W.shape)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((20, 12), {}), ((12, 20), {"transposed": True}), ((20, 12), {"embedding": True}), ((8, 3, 2, 2), {})],
)
@pytest.mark.parametrize("energy", [None, 0.8])
def test_every_kind_of_layer_gets_svfits_factors_of_its_matrix(tmp_path, folder, shape, options, energy):
    model = write_model(tmp_path, {"w": shape})
    (request,) = requests_for(model, 5, factorization("svfit", energy=energy), **options)
    stored = load_file(tmp_path / "model.safetensors")["w.weight"]
    W = stored.T if options.get("transposed") else stored.flatten(1)
    outputs = W.T if options.get("embedding") else W
    expected = svd_factors(outputs, None if energy else 5, energy=energy or 1.0)

    how = factorize([request], folder, ALONE)["w"]
    factors = factors_of(request, folder)
    part = factors_of(request, folder, slice(2, 5))

    for name in ("write", "read", "values"):
        torch.testing.assert_close(getattr(factors, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(factors.probe, probe_digest(W, W.shape))
    assert torch.equal(part.write, factors.write[2:5])
    assert how.rank == len(factors.values) == len(expected.values)
    assert factorize([request], folder, ALONE)["w"] == how._replace(made=False)
    assert cache.entries(folder)[0].about["residual"] < 1e-6  # float32 roundings of columns of 20
    assert cache.verify(folder) == []


def test_a_whole_weight_of_svfit_is_the_key_and_not_its_panel(tmp_path, folder):
    """One number in the last column is another SVD, though LoLDU's panel and the probe may not have it."""
    first = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[1, 199] += 1
    assert torch.equal(probe_digest(first, first.shape), probe_digest(second, second.shape))
    save_file({"a.weight": first, "b.weight": second}, tmp_path / "model.safetensors")

    keys = {make.make(request, folder).key for request in requests_for(tmp_path, method=factorization("svfit"))}
    panels = {make.make(request, folder).key for request in requests_for(tmp_path)}

    assert (len(keys), len(panels)) == (2, 1)


def test_the_write_map_is_stored_in_the_asked_dtype_and_the_rest_in_float32(model, folder):
    request = requests_for(model, dtype="bfloat16")[0]

    factors = factors_of(request, folder, slice(2, 9))

    assert [tensor.dtype for tensor in factors] == [
        torch.bfloat16,
        torch.float32,
        torch.int32,
        torch.float32,
        torch.uint8,
    ]
    assert factors.write.shape == (7, 4)


def test_a_warm_start_makes_nothing(model, folder, monkeypatch):
    requests = requests_for(model)
    cold = factorize(requests, folder, ALONE)

    monkeypatch.setattr(type(LU), "factors", no_reading)
    warm = factorize(requests, folder, ALONE)

    assert all(how.made for how in cold.values())
    assert not any(how.made for how in warm.values())
    assert [how.key for how in warm.values()] == [how.key for how in cold.values()]
    assert list(warm) == [request.module for request in requests]


def test_a_copied_checkpoint_is_read_but_not_factored_again(model, folder, tmp_path, monkeypatch):
    factorize(requests_for(model), folder, ALONE)
    write_model(tmp_path / "copy", SIX)

    monkeypatch.setattr(type(LU), "factors", no_reading)
    again = factorize(requests_for(tmp_path / "copy"), folder, ALONE)

    assert not any(how.made for how in again.values())


def test_another_rank_dtype_option_or_weight_has_another_key(model, folder, tmp_path):
    request = requests_for(model)[0]
    other = write_model(tmp_path / "other", dict(reversed(SIX.items())))  # same shapes, other numbers
    variants = [
        request,
        *(requests_for(model, **options)[0] for options in ({"rank": 3}, {"dtype": "bfloat16"})),
        requests_for(model, method=factorization(normalize_directions=True))[0],
        *(
            requests_for(model, method=factorization("svfit", **options))[0]
            for options in ({}, {"energy": 0.9}, {"svd": "exact"})
        ),
        requests_for(other)[0],
        requests_for(model)[2],
    ]

    keys = {make.make(variant, folder).key for variant in variants}

    assert len(keys) == len(variants)


def test_weights_with_equal_panels_keep_their_own_probes(tmp_path, folder):
    """The panel alone would give both the same key, and one of them a wrong probe."""
    first = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    second = torch.cat([first[:, :4], first[:, 4:] + 1], dim=1)
    save_file({"a.weight": first, "b.weight": second}, tmp_path / "model.safetensors")

    a, b = (factors_of(request, folder) for request in requests_for(tmp_path))

    assert torch.equal(a.write, b.write)
    assert torch.equal(b.probe, probe_digest(second, second.shape))


@pytest.mark.parametrize("verify_base", [False, True])
def test_a_weight_that_changed_is_noticed_though_size_and_time_hide_it(model, folder, verify_base):
    requests, file = requests_for(model), model / "model.safetensors"
    before, stat = factorize(requests, folder, ALONE), os.stat(file)
    weights = load_file(file)
    weights["layers.0.q.weight"] += 1
    save_file(weights, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    after = factorize(requests, folder, ALONE, verify_base=verify_base)

    assert after["layers.0.q"].key != before["layers.0.q"].key
    assert [name for name, how in after.items() if how.made] == ["layers.0.q"]
    assert cache.find(folder, before["layers.0.q"].key)  # nothing is wrong with the old factors


def test_a_damaged_file_is_made_again_when_it_is_read(model, folder, caplog):
    requests = requests_for(model)
    first = factorize(requests, folder, ALONE)
    before = factors_of(requests[0], folder)
    file = folder / "factors" / f"{first['layers.0.q'].key}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    after = factors_of(requests[0], folder)

    assert "is damaged" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert file.exists()


def test_a_deleted_file_alone_is_made_again(model, folder):
    first = factorize(requests_for(model), folder, ALONE)
    (folder / "factors" / f"{first['layers.1.up'].key}.safetensors").unlink()

    second = factorize(requests_for(model), folder, ALONE)

    assert [name for name, how in second.items() if how.made] == ["layers.1.up"]


def test_the_fingerprint_is_that_of_the_model_in_memory_and_is_remembered(model, folder, monkeypatch):
    save_file({"norm.weight": torch.ones(3), "conv.weight": torch.randn(4, 3, 2)}, model / "extra.safetensors")
    index = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    index |= {"norm.weight": "extra.safetensors", "conv.weight": "extra.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = load_file(model / "model.safetensors") | load_file(model / "extra.safetensors")
    matrices = [weight.flatten(1) for weight in weights.values() if weight.ndim > 1]

    cold = make.fingerprint(list_tensors(model), folder)
    monkeypatch.setattr(make, "open_tensor", no_reading)
    warm = make.fingerprint(list_tensors(model), folder)

    assert cold == warm == base_fingerprint(probe_digest(matrix, matrix.shape) for matrix in matrices)


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


def test_a_zero_pivot_says_which_column_and_what_to_type(tmp_path, folder):
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    weight[:, 2] = weight[:, 1]
    save_file({"q.weight": weight}, tmp_path / "model.safetensors")

    with pytest.raises(ValueError, match=r"^q \(q.weight in .*zero pivot in column 2.*--exclude q, or lower --rank"):
        factorize(requests_for(tmp_path), folder, ALONE)


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (
            lambda f: f._replace(write=f.write[:, :2], read=f.read[:2, :2], values=f.values[:2]),
            "it has rank 2, expected 4",
        ),
        (lambda f: f._replace(write=f.write[1:]), r"its maps have the shapes \(15, 4\) and \(4, 4\)"),
        (lambda f: f._replace(read=f.read * float("nan")), "it has NaN or infinite numbers"),
        (lambda f: f._replace(pivots=f.pivots + 1000), "its pivots are not rows of the weight"),
        (lambda f: f._replace(probe=f.probe.flip(0)), "it was made from another weight"),
    ],
)
def test_a_well_formed_file_that_does_not_fit_the_weight_is_set_aside_and_made_again(model, folder, caplog, lie, said):
    request = requests_for(model)[0]
    good = factors_of(request, folder)
    (entry,) = cache.entries(folder)
    cache.store(folder, entry.key, lie(good), entry.about)

    again = factors_of(request, folder)

    assert all(torch.equal(one, other) for one, other in zip(again, good, strict=True))
    assert re.search(f"{said}; it belongs to user .*renamed to", caplog.text)


THAT_COMPARE = {
    "loldu": LU, "loldu, norm one": factorization(normalize_directions=True), "svfit": factorization("svfit"),
    "loraxs": factorization("loraxs"),
}  # fmt: skip
LIES = {
    "random factors": lambda f, other: f._replace(write=torch.randn_like(f.write), read=torch.randn_like(f.read)),
    "those of another weight": lambda f, other: other._replace(probe=f.probe),
    "the write map of another weight": lambda f, other: f._replace(write=other.write),
    "half the rows of another weight": lambda f, other: f._replace(write=torch.cat([f.write[:8], other.write[8:]])),
    "shuffled rows": lambda f, other: f._replace(write=f.write.roll(3, 0)),
    "directions three times as long": lambda f, other: f._replace(write=3 * f.write, read=f.read / 3),
    "other values": lambda f, other: f._replace(values=2 * f.values),
}


@pytest.mark.parametrize("method", THAT_COMPARE)
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("verify_base", [False, True])
def test_factors_that_are_not_the_weights_are_set_aside_and_made_again(model, folder, caplog, method, lie, verify_base):
    """As another user may leave them in a shared cache: well-formed, finite, of the right shape and checksums."""
    request, second = requests_for(model, method=THAT_COMPARE[method])[:3:2]  # of the same shape
    good, other = factors_of(request, folder), factors_of(second, folder)
    made = {name: how.key for name, how in factorize([request, second], folder, ALONE).items()}
    entry = cache.find(folder, made[request.module])
    wrong = LIES[lie](good, other)
    cache.store(folder, entry.key, wrong._replace(write=wrong.write.contiguous()), entry.about)

    with caplog.at_level(logging.WARNING):
        results = together(2, lambda comm: factorize([request, second], folder, comm, verify_base=verify_base))

    again = factors_of(request, folder)
    assert [[how.made for how in result.values()] for result in results] == [[True, False]] * 2
    assert all(torch.equal(one, another) for one, another in zip(again, good, strict=True))
    assert re.search(rf"{entry.file} is damaged .*it belongs to user .* \(uid {os.getuid()}\)", caplog.text)


def notes_of(folder: Path) -> list[Path]:
    """The index files that say which factors this user has compared."""
    return [file for file in (folder / "index").iterdir() if '\\"compared\\"' in file.read_text()]


@pytest.mark.parametrize("method", ["loldu", "svfit"])
def test_factors_are_compared_with_their_weight_once_and_again_if_others_can_write_the_note(
    model, folder, monkeypatch, method
):
    request = requests_for(model, method=factorization(method))[0]
    factors_of(request, folder)
    compared = []
    monkeypatch.setattr(make, "compare", lambda *_args: compared.append(1))

    factorize([request], folder, ALONE)
    made_here = len(compared)
    (note,) = notes_of(folder)
    note.chmod(0o666)
    factorize([request], folder, ALONE)  # which also writes the note again
    by_others = len(compared)
    factorize([request], folder, ALONE)

    assert (made_here, by_others, len(compared)) == (0, 1, 1)


def test_factors_from_gradients_are_used_only_if_this_user_has_made_them(model, folder, caplog):
    """They cannot be compared with the weight."""
    (request,) = requests_for(model, method=factorization("lorasb"), gradients="of some samples")[:1]
    make.make(request, folder, gradient=lambda: torch.randn(request.shape, generator=torch.Generator().manual_seed(0)))
    (entry,) = cache.entries(folder)

    mine = make.check(request, folder, entry.key)
    notes_of(folder)[0].unlink()
    another_users = make.check(request, folder, entry.key)

    assert mine
    assert mine.seal == entry.seal
    assert another_users is None
    assert "another user may have made it; it belongs to user" in caplog.text
    assert not entry.file.exists()


def test_a_weight_that_changed_under_its_old_time_is_noticed_although_its_factors_were_compared(model, folder):
    request = requests_for(model)[0]
    first, before = factors_of(request, folder), request.tensor.file.stat()
    weights = load_file(request.tensor.file)
    weights[request.tensor.name] += 1
    save_file(weights, request.tensor.file)
    os.utime(request.tensor.file, ns=(before.st_atime_ns, before.st_mtime_ns))

    again = factorize([request], folder, ALONE)

    assert again[request.module].made
    assert not torch.equal(factors_of(request, folder).values, first.values)


def test_a_weight_with_nan_is_a_damaged_checkpoint_and_no_layer_to_leave_out(tmp_path, folder):
    """Without its adapter the layer would still compute NaN."""
    weight = torch.randn(16, 12)
    weight[3, 0] = float("nan")
    save_file({"q.weight": weight}, tmp_path / "model.safetensors")

    with pytest.raises(
        ValueError, match=r"^q \(q.weight in .*NaN or infinite; the checkpoint is damaged: fetch it again"
    ):
        factorize(requests_for(tmp_path), folder, ALONE)


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
