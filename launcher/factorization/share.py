"""All processes factor the weights of a model together: look them up in the cache and share out the missing ones.

Each rank reads only the weights that it owns, factors them on its own device and stores one file per weight (make.py).
Meanwhile every rank follows the progress and failures of the others, without a collective (watch.py).

Letters: W (m, n) = out x in, k = min(m, n), r the rank.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from launcher.devices import own_device
from launcher.factorization import cache
from launcher.factorization.make import (
    Factored,
    FactorRequest,
    NoFactors,
    check,
    lookup,
    make,
    read_ahead,
    remedy,
)
from launcher.factorization.watch import BEAT_S, OnProgress, Watch
from launcher.processes import SLOW_S, Communicator, Stopped, agreed, in_time, nodes_without

log = logging.getLogger(__name__)
# Returns the summed gradient (m, n) of the first of these modules' weights; the others will be requested next.
GradientOf = Callable[[Sequence[str]], Tensor]
AHEAD = 6  # weights that are read and factored ahead of the one that is needed


def share_out(costs: Mapping[str, float], world: int) -> list[int]:
    """The owner of each name, in the mapping's order: largest cost first, each to the least loaded rank.

    Ties are broken by name and by rank, so every rank computes the same. A plain stride would give one rank every MLP
    weight if the number of ranks divides the layer pattern.
    """
    load, owner = [0.0] * world, {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owner[name] = min(range(world), key=lambda rank: (load[rank], rank))
        load[owner[name]] += costs[name]
    return [owner[name] for name in costs]


def factorize(
    requests: Sequence[FactorRequest],
    folder: Path,
    comm: Communicator,
    on_progress: OnProgress = lambda done, total, weight: None,
    *,
    verify_base: bool = False,
    per_node: bool = False,
    device: torch.device | None = None,
    gradient_of: GradientOf | None = None,
) -> dict[str, Factored]:
    """Make the factors that the cache folder lacks; returns those of every request by module. Called by all ranks.

    per_node: the folder is a different one on each node, and each node makes the factors that its own lacks.
    gradient_of is for requests whose factors come from gradients; each rank asks it for its own weights.
    verify_base reads the weights again instead of trusting their files' size and modification time. on_progress is
    called on every rank, a few times a second; if it raises Stopped on one rank, all ranks raise it, and the factors
    made so far stay in the cache.

    Raises, on all ranks, ValueError listing all weights that have no factors; ValueError naming rank and module if
    the folder cannot be written, or the nodes that do not see the folder or have other factors; and RuntimeError
    naming a rank that died.
    """
    ranks, world = comm.ranks, comm.ranks.world_size
    by_module = {request.module: request for request in requests}
    assert len(by_module) == len(requests), "one request per module"
    token = comm.from_main("a name for this factorisation", lambda: uuid.uuid4().hex)
    node = range(ranks.rank - ranks.local_rank, ranks.rank - ranks.local_rank + ranks.local_world_size)
    group = node if per_node else range(world)

    def look_up() -> dict[str, str]:
        if verify_base or ranks.rank != group[0]:
            return {}
        return {name: key for name, request in by_module.items() if (key := lookup(request, folder))}

    device = device or own_device(ranks.local_rank, ranks.local_world_size)
    found = _check_all(comm.together("factors in the cache", look_up)[group[0]], by_module, folder, comm, group, device)
    missing = {name: request.cost for name, request in by_module.items() if name not in found}
    owners = share_out(missing, len(group))
    mine = [by_module[name] for name, owner in zip(missing, owners, strict=True) if group[owner] == ranks.rank]
    nodes = ranks.local_world_size < world
    must_share = nodes and not per_node and missing
    if must_share and (blind := nodes_without(folder, comm, "the factor cache", "--cache DIR")):
        raise agreed(_not_shared(folder, blind))

    watch = Watch(comm, token, len(mine), on_progress)
    parts = comm.gather(  # tuples arrive as lists
        "factors made", _make_all(mine, folder, device, gradient_of, watch)
    )
    if refused := {name: reason for _, reasons in parts for name, reason in reasons.items()}:
        raise ValueError(remedy({name: refused[name] for name in by_module if name in refused}))
    together = {name: Factored(*how) for owner in group for name, how in parts[owner][0].items()}
    assert len(together) == len(missing)
    done = {name: together.get(name) or found[name] for name in by_module}
    if nodes:
        _check_equal(folder, done, comm)
    return done


def _check_all(
    keys: Mapping[str, str],
    by_module: Mapping[str, FactorRequest],
    folder: Path,
    comm: Communicator,
    group: Sequence[int],
    device: torch.device,
) -> dict[str, Factored]:
    """Those of the cached factors that belong to their weights; each is compared by one rank of the group.

    Before: every rank has the same keys. After: every rank has the same result, and files with wrong factors are set
    aside.
    """
    owners = share_out({name: float(prod(by_module[name].shape)) for name in keys}, len(group))
    mine = [name for name, owner in zip(keys, owners, strict=True) if group[owner] == comm.ranks.rank]

    def compare() -> dict[str, Factored]:
        if comm.ranks.local_world_size < comm.ranks.world_size:  # made, perhaps just now, by another node
            in_time(lambda: all(cache.find(folder, keys[name]) for name in mine))
        checked = {name: check(by_module[name], folder, keys[name], device) for name in mine}
        return {name: how for name, how in checked.items() if how}

    parts = comm.together("the factors in the cache compared", compare, SLOW_S)
    good = {name: Factored(*how) for owner in group for name, how in parts[owner].items()}  # tuples arrive as lists
    return {name: good[name] for name in keys if name in good}


def _make_all(
    mine: Sequence[FactorRequest], folder: Path, device: torch.device, gradient_of: GradientOf | None, watch: Watch
) -> tuple[dict[str, Factored], dict[str, str]]:
    """This rank's factors, and the reasons of the weights that have none. Returns once all ranks are done.

    One other thread reads and others factor (two weights at a time if only panels are in memory), so that this one
    can exchange heartbeats during a long factorisation.
    """
    alone = device.type != "cpu" or any(request.needs_all for request in mine)
    workers, threads = 1 if alone else 2, torch.get_num_threads()
    pool, reader = ThreadPoolExecutor(workers, "factorize"), ThreadPoolExecutor(1, "read")
    leaving = threading.Event()
    futures: list[Future[Factored]] = []
    made: dict[str, Factored] = {}
    refused: dict[str, str] = {}

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
            watch.own["weight"] = request.module  # even if the other thread has finished it, or failed, already
            while not wait([futures[number]], timeout=BEAT_S).done:
                watch.beat(number, request.module)
            try:
                made[request.module] = futures[number].result()
            except NoFactors as error:  # continue: all such weights are reported at once
                refused[request.module] = str(error)
            watch.beat(number + 1, request.module)
        since = time.monotonic()
        while not watch.beat(len(mine), "", finished=True):
            time.sleep(min(BEAT_S, 0.005 + (time.monotonic() - since) / 4))  # waits at most a quarter too long
        return made, refused
    except BaseException as error:
        leaving.set()
        pool.shutdown(wait=False, cancel_futures=True)
        watch.tell(error)
        wait([future for future in futures if future.running()], timeout=5 * BEAT_S)  # let them finish writing
        raise
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=False)
        torch.set_num_threads(threads)


def _not_shared(folder: Path, nodes: Sequence[str]) -> ValueError:
    return ValueError(
        f"{', '.join(nodes)} does not see the factor cache {folder} of rank 0: give --cache DIR on a file system that "
        "all nodes share, or --cache-per-node, with which each node makes all factors in a folder of its own"
    )


def _check_equal(folder: Path, done: Mapping[str, Factored], comm: Communicator) -> None:
    """Raises ValueError naming a node whose factors are missing or differ from rank 0's.

    Each rank reads its rows from its own node's cache. Different hardware rounds differently, and rows from two
    factorisations must not be mixed.
    """

    def digests() -> list[str | None] | None:
        if comm.ranks.local_rank:
            return None
        found: list[cache.Entry | None] = []

        def look() -> bool:
            found[:] = [cache.find(folder, how.key) for how in done.values()]
            return None not in found

        in_time(look)
        return [entry and entry.seal for entry in found]

    answers = comm.together("the factors of each node", lambda: [digests(), socket.gethostname()])
    expected, first = answers[0]
    for rank, (found, host) in enumerate(answers):
        if found and None in found:
            raise _not_shared(folder, [f"{host} (rank {rank})"])
        for module, here, there in zip(done, expected, found or expected, strict=True):
            if here != there:
                raise ValueError(
                    f"the factors of {module} in {folder} on {host} (rank {rank}) differ from those on {first} (rank "
                    "0): other hardware or libraries round differently. Give --cache DIR on a file system that all "
                    f"nodes share, or copy {folder} from one node to the others"
                )
