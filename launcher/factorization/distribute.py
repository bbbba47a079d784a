"""Who factors what: look each weight up in the cache, share the missing ones out, and wait without a collective.

Each rank reads only the weights it owns, of which slices become memory, factors them on its own device and stores one
file per weight.
Meanwhile every rank says a few times a second on the key-value store that it is alive and what it works on; rank 0 sums
that up in one word that all read. So the others learn within seconds which rank failed at which weight, also where it
was killed, and no NCCL watchdog sees a long wait.

Letters: W (m, n) = out x in, k = min(m, n), r the rank.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.checkpoint_files import TensorInfo, open_tensor
from adapters.factors import Factors, base_fingerprint, loldu_factors, probe_digest
from adapters.svd import first_step_factors, svd_factors
from launcher.factorization import cache
from launcher.ranks import Party, Stopped, in_time, nodes_without

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]  # weights done on all ranks, weights to do, one being worked on

ALGORITHMS = {
    "loldu": ("loldu-panel-lu", 3), "svfit": ("svd", 1), "loraxs": ("svd", 1), "lorasb": ("svd-of-first-step", 1)
}  # fmt: skip
# The summed gradient (m, n) of the first of these modules' weights; the others are asked for next.
GradientOf = Callable[[Sequence[str]], Tensor]
AHEAD = 6  # so many weights are read and factored beyond the one that is waited for
READ_BYTES = 1 << 20
BEAT_S = 0.2  # how often a rank says that it is alive
SILENCE_S = 7.0  # without a word for so long a rank counts as dead; all ranks say so within 10 s


@dataclass(frozen=True)
class FactorRequest:
    """One weight to factor, from headers alone."""

    module: str
    tensor: TensorInfo
    rank: int  # at most min(m, n)
    transposed: bool = False  # transformers' Conv1D stores W as (in, out)
    embedding: bool = False
    normalize: bool = False  # loldu
    dtype: str = "float32"  # of the stored write map
    method: str = "loldu"  # whose factors: loldu, svfit, loraxs or lorasb
    energy: float | None = (
        None  # of the SVD: rank is then min(m, n), and the factors have the rank that holds this share
    )
    svd: str = "auto"  # how
    gradients: str | None = None  # lorasb: digest of all that the weight's gradient depends on

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n); a convolution counts as its channels x everything else."""
        m, n = self.tensor.shape[0], prod(self.tensor.shape[1:])
        return (n, m) if self.transposed else (m, n)

    @property
    def needs_all(self) -> bool:
        """Whether the factors depend on more of W than its panel W[:, :r]."""
        return self.method != "loldu" or self.normalize or self.embedding


class Factored(NamedTuple):
    """Where the factors of a module are."""

    key: str
    made: bool  # by this run; False: they were there
    rank: int


def cost(request: FactorRequest) -> float:
    """Multiplications of the panel's LU (m r^2, and r^2 n for norms), and m n for the pages a disk serves anyway.

    Of the SVD about 10 m n k, and 16 m n r by the block method.
    """
    m, n = request.shape
    if request.method != "loldu":
        exact = request.energy is not None or request.svd == "exact" or 8 * request.rank > min(m, n)
        return m * n * (10 * min(m, n) if exact else 16 * request.rank)
    return m * request.rank**2 + m * n + (n * request.rank**2 if request.needs_all else 0)


def share_out(costs: Mapping[str, float], world: int) -> list[int]:
    """The owner of each name, in the mapping's order: largest cost first, each to the least loaded rank.

    Ties go by name and by rank, so every rank computes the same. A plain stride would hand one rank every MLP weight
    where the number of ranks divides the layer pattern.
    """
    load, owner = [0.0] * world, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner[name] = min(range(world), key=lambda rank: (load[rank], rank))
        load[owner[name]] += costs[name]
    return [owner[name] for name in costs]


def factorize(
    requests: Sequence[FactorRequest],
    folder: Path,
    party: Party,
    on_progress: Progress = lambda done, total, weight: None,
    *,
    verify_base: bool = False,
    per_node: bool = False,
    device: torch.device | None = None,
    gradient_of: GradientOf | None = None,
) -> dict[str, Factored]:
    """Factors of every request in the cache folder, by module; what is there is not made again. Called by all ranks.

    per_node: the folder is another one on each node, and each node makes all that its own lacks.
    gradient_of is for requests whose factors come from gradients; each rank asks it for those of its own weights.
    verify_base reads the weights again instead of trusting the file's size and time. on_progress is called on every
    rank, a few times a second; where it raises Stopped on one rank, all raise it, and what was made stays.

    Raises, on all ranks, ValueError naming rank, module, tensor and file where a weight has no factors or the folder
    cannot be written, ValueError naming the nodes that do not see the folder or have other factors in theirs, and
    RuntimeError naming a rank that died.
    """
    ranks, world = party.ranks, party.ranks.world_size
    by_module = {request.module: request for request in requests}
    assert len(by_module) == len(requests), "one request per module"
    token = party.from_main("a name for this factorisation", lambda: uuid.uuid4().hex)
    node = range(ranks.rank - ranks.local_rank, ranks.rank - ranks.local_rank + ranks.local_world_size)
    group = node if per_node else range(world)

    def look_up() -> dict[str, str]:
        if verify_base or ranks.rank != group[0]:
            return {}
        return {name: key for name, request in by_module.items() if (key := lookup(request, folder))}

    found = party.together("factors in the cache", look_up)[group[0]]
    missing = {name: cost(request) for name, request in by_module.items() if name not in found}
    owners = share_out(missing, len(group))
    mine = [by_module[name] for name, owner in zip(missing, owners, strict=True) if group[owner] == ranks.rank]
    nodes = ranks.local_world_size < world
    must_share = nodes and not per_node and missing
    if must_share and (blind := nodes_without(folder, party, "the factor cache", "--cache DIR")):
        raise _not_shared(folder, blind)

    watch = _Watch(party, token, len(mine), on_progress)
    made = _make_all(mine, folder, device or own_device(ranks.local_rank), gradient_of, watch)
    parts = party.gather("factors made", made)  # tuples arrive as lists
    together = {name: Factored(*how) for owner in group for name, how in parts[owner].items()}
    assert len(together) == len(missing)
    done = {name: together.get(name) or Factored(found[name], False, _rank(folder, found[name])) for name in by_module}
    if nodes:
        _check_equal(folder, done, party)
    return done


def _make_all(
    mine: Sequence[FactorRequest], folder: Path, device: torch.device, gradient_of: GradientOf | None, watch: _Watch
) -> dict[str, Factored]:
    """This rank's factors; returns once all ranks have theirs.

    Work goes on in other threads, so that this one can speak and listen while a long factorisation runs: one reads,
    others factor, two weights at a time where only panels of them are in memory.
    """
    alone = device.type != "cpu" or any(request.needs_all for request in mine)
    workers, threads = 1 if alone else 2, torch.get_num_threads()
    pool, reader = ThreadPoolExecutor(workers, "factorize"), ThreadPoolExecutor(1, "read")
    leaving = threading.Event()
    futures: list[Future[Factored]] = []
    made: dict[str, Factored] = {}

    def work(request: FactorRequest, read: Future[None], gradient: Callable[[], Tensor] | None) -> Factored:
        read.result()
        if leaving.is_set():
            raise Stopped("another weight")
        return make(request, folder, device, gradient)

    torch.set_num_threads(max(1, threads // workers))
    try:
        for number, request in enumerate(mine):
            for at in range(len(futures), min(number + AHEAD + 1, len(mine))):
                gradient = partial(gradient_of, [later.module for later in mine[at:]]) if gradient_of else None
                read = reader.submit(read_ahead, mine[at].tensor, leaving.is_set)
                futures.append(pool.submit(work, mine[at], read, gradient))
            watch.own["weight"] = request.module  # also where the other thread is through with it, or failed, already
            while not wait([futures[number]], timeout=BEAT_S).done:
                watch.beat(len(made), request.module)
            made[request.module] = futures[number].result()
            watch.beat(len(made), request.module)
        since = time.monotonic()
        while not watch.beat(len(made), "", finished=True):
            time.sleep(min(BEAT_S, 0.005 + (time.monotonic() - since) / 4))  # a quarter of the wait too long at most
        return made
    except BaseException as error:
        leaving.set()
        pool.shutdown(wait=False, cancel_futures=True)
        watch.tell(error)
        wait([future for future in futures if future.running()], timeout=5 * BEAT_S)  # no file is left half written
        raise
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=False)
        torch.set_num_threads(threads)


def lookup(request: FactorRequest, folder: Path) -> str | None:
    """The key of a request whose factors are in the cache, reading headers alone; None where they must be made."""
    key = cache.recall(folder, _identity(request))
    return key if key and cache.find(folder, key) else None


def make(
    request: FactorRequest,
    folder: Path,
    device: torch.device | None = None,
    gradient: Callable[[], Tensor] | None = None,
) -> Factored:
    """Read what the factors depend on, and make and store them unless the same content is already there.

    gradient returns the summed gradient of this weight, for factors that come from it.

    Raises ValueError naming module, tensor, file and the remedy.
    """
    opened, recipe = _open_matrix(request.tensor), _recipe(request)
    if request.needs_all:
        stored = opened[:].contiguous()
    else:  # a view of the file: the disk reads ahead anyway, but only r columns ever become memory
        stored = opened[: request.rank] if request.transposed else opened[:, : request.rank]
    # the probe belongs to the key: it is one of the factors, and the panel does not decide it
    probe = probe_digest(_Turned(opened) if request.transposed else opened, request.shape)
    key = cache.content_key(recipe, stored, probe)
    made = cache.find(folder, key) is None
    if made:
        W = stored.T if request.transposed else stored
        where = (
            f"{request.module} ({request.tensor.name} in {request.tensor.file}, {' x '.join(map(str, request.shape))})"
        )
        if request.method == "lorasb":
            if gradient is None:  # asked for while the model is being built
                raise ValueError(f"{where}: its factors were lost, and only a new start makes them: run this again")
            on_device = gradient().to(device)
        else:
            on_device = W.to(device) if request.method != "loldu" else W[:, : request.rank].to(device)
        try:
            factors = _factors(request, W, on_device)
        except ValueError as error:
            raise ValueError(
                f"{where}: {error}; leave the layer out with --exclude {request.module}, or lower --rank"
            ) from error
        about = recipe | {
            "name": request.module,
            "tensor": request.tensor.name,
            "file": str(request.tensor.file),
            "rank": len(factors.values),
            "residual": _residual(request, on_device, factors),
            "norms": {
                "panel": _norm(on_device),
                "write": float(factors.write.norm()),
                "read": float(factors.read.norm()),
            },
            "device": torch.cuda.get_device_name(on_device.device) if on_device.is_cuda else "cpu",
        }
        write = factors.write.to(getattr(torch, request.dtype), memory_format=torch.contiguous_format)
        factors = factors._replace(write=write, probe=probe)  # the wide one goes before the file is written
        try:
            cache.store(folder, key, factors, about)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    cache.remember(folder, _identity(request), key)
    return Factored(key, made, len(factors.values) if made else _rank(folder, key))


def read_ahead(info: TensorInfo, leaving: Callable[[], bool] = lambda: False) -> None:
    """Bring a tensor from the disk into the system's page cache, from end to end; what fails here fails in `make`.

    The whole of it: rows are as long as a page or two, so a slice of columns touches every page or every other one, and
    reading on is quicker than jumping (4096 x 4096, r = 64, row by row: 2.3 times fewer bytes in 14 times the time).
    Read, not asked for: the system then keeps more requests before the disk than for pages of a map as they are met.
    """
    with suppress(Exception), open(info.file, "rb", buffering=0) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        first, last = json.loads(file.read(header_bytes))[info.name]["data_offsets"]
        file.seek(8 + header_bytes + first)
        block = memoryview(bytearray(READ_BYTES))
        while (left := 8 + header_bytes + last - file.tell()) > 0 and file.readinto(block[:left]) and not leaving():
            pass


def factors_of(request: FactorRequest, folder: Path, rows: slice = slice(None)) -> Factors:
    """Verified factors, with those rows of `write`; what turns out damaged or gone is made again, by this process."""
    for _ in range(3):  # another job may prune between the making and the reading
        key = lookup(request, folder) or make(request, folder).key
        if factors := cache.load(folder, key, rows):
            return factors
    raise ValueError(
        f"the factors of {request.module} in {folder} are damaged or gone each time they are made: check that disk, or "
        "give another folder with --cache DIR"
    )


def fingerprint(tensors: Mapping[str, TensorInfo], folder: Path) -> str:
    """The base's fingerprint (`adapters.factors.base_fingerprint`) from its files.

    The digests of a file are remembered with its size and time, so that a second call reads no weights.
    """
    digests: list[str] = []
    matrices = [info for info in tensors.values() if len(info.shape) >= 2]
    for file in sorted({info.file for info in matrices}):
        inside = sorted(info for info in matrices if info.file == file)
        identity = {"probes": [info.name for info in inside], **_file_identity(file)}
        if (known := cache.recall(folder, identity)) is None:
            probes = [
                probe_digest(_open_matrix(info), (info.shape[0], info.shape[1] * prod(info.shape[2:])))
                for info in inside
            ]
            known = [bytes(probe.tolist()).hex() for probe in probes]
            cache.remember(folder, identity, known)
        digests += known
    return base_fingerprint(torch.tensor(list(bytes.fromhex(digest))) for digest in digests)


def own_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


class _Turned:
    """A slice of the file seen as its transpose."""

    def __init__(self, stored: Any):
        self.stored = stored

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        rows, columns = place
        return self.stored[columns, rows].T


def _open_matrix(info: TensorInfo) -> Any:
    """Slices of a tensor (a, b) as the file has it; a convolution is read whole and counts as a x everything else."""
    return open_tensor(info) if len(info.shape) == 2 else open_tensor(info)[:].flatten(1)


class _Watch:
    """What every rank is doing, on the key-value store: `beat` says it and hears how all are. Alone it needs none."""

    def __init__(self, party: Party, token: str, total: int, on_progress: Progress):
        self.ranks, self.store, self.prefix = party.ranks, party.store, f"loldu/factorize/{token}"
        self.own: dict[str, Any] = {"beat": 0, "done": 0, "total": total, "weight": "", "error": None}
        self.on_progress = on_progress
        self.heard: dict[Any, tuple[int, float]] = {}  # who -> last beat and when it came
        self.told = False

    def beat(self, done: int, weight: str, finished: bool = False) -> bool:
        """Say what this rank is doing; True when all ranks have finished. Raises what another rank failed with."""
        self.own |= {"beat": self.own["beat"] + 1, "done": done, "weight": weight, "finished": finished}
        news = self._exchange()
        if news["error"]:
            self.told = True
            text = news["error"]["text"]
            if news["error"].get("stopped"):
                raise Stopped("another rank")
            raise ValueError(text) if news["error"]["mistake"] else RuntimeError(text)
        self.on_progress(news["done"], news["total"], news["weight"])
        return bool(news["finished"])

    def tell(self, error: BaseException) -> None:
        """Let the others know that this rank failed, and stay until they have heard it: once one process has gone, a
        launcher may end the others, and rank 0 may keep the store."""
        if self.store is None:
            return
        if not self.told:
            plain = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            text = f"rank {self.ranks.rank} failed at {self.own['weight'] or 'the end'}: {plain}"
            self.own["error"] = {"text": text, "mistake": isinstance(error, (ValueError, OSError))}
            self.own["error"]["stopped"] = isinstance(error, Stopped)
            with suppress(RuntimeError, LookupError):
                self._exchange()
        if self.ranks.is_main or not self.told:
            time.sleep(5 * BEAT_S)

    def _exchange(self) -> dict[str, Any]:
        if self.store is None:
            return self.own
        try:
            self.store.set(f"{self.prefix}/{self.ranks.rank}", json.dumps(self.own))
            if self.ranks.is_main:
                news = self._sum_up()
                self.store.set(f"{self.prefix}/all", json.dumps(news))
                return news
            if self.store.check([f"{self.prefix}/all"]):
                news = json.loads(self.store.get(f"{self.prefix}/all"))
            else:
                news = {"beat": 0, "done": 0, "total": 0, "weight": "", "error": None, "finished": False}
        except RuntimeError as error:  # torch's DistError: the process that keeps the store is gone
            raise RuntimeError(f"lost the key-value store: rank 0 is gone, look at its log first ({error})") from error
        if self._silent("all", news["beat"]):
            raise RuntimeError(f"no word from rank 0 for {SILENCE_S:.0f} s: it died or hangs, look at its log first")
        return news

    def _sum_up(self) -> dict[str, Any]:
        """What rank 0 tells all: how far the ranks are together, and the first that failed or fell silent."""
        words = [self.own]
        for rank in range(1, self.ranks.world_size):
            key = f"{self.prefix}/{rank}"
            words.append(json.loads(self.store.get(key)) if self.store.check([key]) else {"beat": 0})
            if self._silent(rank, words[rank]["beat"]):
                at = words[rank].get("weight") or "the start"
                text = f"no word from rank {rank} for {SILENCE_S:.0f} s, last heard of at {at}: it died or hangs"
                remedy = "look at its log, then start again: finished weights are kept"
                words[rank]["error"] = {"text": f"{text}; {remedy}", "mistake": False}
        return {
            "beat": self.own["beat"],
            "done": sum(word.get("done", 0) for word in words),
            "total": sum(word.get("total", 0) for word in words),
            "weight": next((word["weight"] for word in words if word.get("weight")), ""),
            "error": next((word["error"] for word in words if word.get("error")), None),
            "finished": all(word.get("finished") for word in words),
        }

    def _silent(self, who: Any, beat: int) -> bool:
        now = time.monotonic()
        if who not in self.heard or self.heard[who][0] != beat:
            self.heard[who] = (beat, now)
        return now - self.heard[who][1] > SILENCE_S


def _not_shared(folder: Path, nodes: Sequence[str]) -> ValueError:
    return ValueError(
        f"{', '.join(nodes)} does not see the factor cache {folder} of rank 0: give --cache DIR on a file system that "
        "all nodes share, or --cache-per-node, and each node makes all factors in a folder of its own"
    )


def _check_equal(folder: Path, done: Mapping[str, Factored], party: Party) -> None:
    """Raises ValueError naming a node where the factors are missing, or are other numbers than on rank 0's.

    Each rank takes its rows from what its node has. Nodes of different hardware round differently, and rows of two such
    factorisations do not belong together.
    """

    def digests() -> list[str | None] | None:
        if party.ranks.local_rank:
            return None
        found: list[cache.Entry | None] = []

        def look() -> bool:
            found[:] = [cache.find(folder, how.key) for how in done.values()]
            return None not in found

        in_time(look)
        return [
            entry and hashlib.sha256(json.dumps(entry.about["checksums"], sort_keys=True).encode()).hexdigest()[:16]
            for entry in found
        ]

    answers = party.together("the factors of each node", lambda: [digests(), socket.gethostname()])
    expected, first = answers[0]
    for rank, (found, host) in enumerate(answers):
        if found and None in found:
            raise _not_shared(folder, [f"{host} (rank {rank})"])
        for module, here, there in zip(done, expected, found or expected, strict=True):
            if here != there:
                raise ValueError(
                    f"the factors of {module} in {folder} on {host} (rank {rank}) are not those on {first} (rank 0): "
                    "hardware and libraries differ, and rounding with them. Give --cache DIR on a file system that all "
                    f"nodes share, or copy {folder} from one node to the others"
                )


def _factors(request: FactorRequest, W: Tensor, on_device: Tensor) -> Factors:
    """By the request's method, from W (m, n) on the CPU and what of it is on the device."""
    if request.method == "loldu":
        return loldu_factors(
            on_device,
            lambda pivots: W[pivots.cpu().long()].to(on_device.device),
            normalize=request.normalize,
            embedding=request.embedding,
        )
    if request.method == "lorasb":
        return first_step_factors(on_device, request.rank, method=request.svd)
    outputs = on_device.T if request.embedding else on_device
    r = request.rank if request.energy is None else None
    divide = request.method != "loraxs"
    return svd_factors(outputs, r, energy=request.energy or 1.0, method=request.svd, divide=divide)


def _rank(folder: Path, key: str) -> int:
    entry = cache.find(folder, key)
    return entry.about["rank"] if entry else 0


def _recipe(request: FactorRequest) -> dict[str, Any]:
    own = {"loldu": ("normalize",), "lorasb": ("svd", "gradients", "module")}.get(request.method, ("energy", "svd"))
    names = ("rank", "embedding", "transposed", "dtype", "method", *own)
    how = {name: getattr(request, name) for name in names}
    return how | {"algorithm": list(ALGORITHMS[request.method]), "shape": list(request.tensor.shape)}


def _identity(request: FactorRequest) -> dict[str, Any]:
    return _recipe(request) | {"tensor": request.tensor.name, **_file_identity(request.tensor.file)}


def _file_identity(file: Path) -> dict[str, Any]:
    stat = os.stat(file)
    return {"file": os.path.realpath(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _residual(request: FactorRequest, weight: Tensor, factors: Factors) -> float:
    """How well the maps fit W, before `write` is rounded.

    loldu: max |L11 diag(d) L11^-1 C - C| over max |C|, with read for diag(1/d) L11^-1, for up to 64 columns C of
    panel[pivots], the first and the last among them. Else: the largest |W v - s u| over s_1 with v = W^T u / s.
    """
    if request.method != "loldu":
        W = (weight.T if request.embedding else weight).to(factors.write)
        W = W.sign() if request.method == "lorasb" else W
        s = factors.values.to(W)
        return float((W @ (W.T @ factors.write) / s - factors.write * s).norm(dim=0).max() / s[0])
    pivots, r = factors.pivots.long(), len(factors.values)
    some = torch.linspace(0, r - 1, min(r, 64), device=pivots.device).long()
    if request.embedding:
        C, square = weight[pivots[some]].T.to(factors.read), factors.write[:r]
    else:
        C, square = weight[pivots[:, None], some].to(factors.read), factors.write.T.index_select(1, pivots).T
    scale = square.diagonal() * factors.read.diagonal()  # 1/d; where normalize divided the maps, by that as well
    again = square @ (factors.read @ C / scale[:, None])
    return float((again - C).abs().max() / C.abs().max())


def _norm(W: Tensor) -> float:
    """Frobenius norm, by blocks of rows: no float32 copy of W."""
    wide = torch.promote_types(W.dtype, torch.float32)
    return float(torch.stack([rows.to(wide).norm() for rows in W.split(512)]).norm())
