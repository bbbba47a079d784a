"""A communicator whose ranks are threads of this process, so that their messages need no processes."""

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from launcher.processes import Communicator, Ranks


def one_node(rank: int, world: int) -> Ranks:
    return Ranks(rank, world, rank, world)


def together(
    world: int,
    do: Callable[[Communicator], Any],
    ranks: Callable[[int, int], Ranks] = one_node,
    store: dist.Store | None = None,
) -> list[Any]:
    """do(comm) on world threads that share a key-value store; each result, or the exception it ended with."""
    shared, results = store or dist.HashStore(), [None] * world

    def one(rank: int) -> None:
        try:
            results[rank] = do(Communicator(ranks(rank, world), shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results
