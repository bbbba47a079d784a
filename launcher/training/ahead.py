"""The next micro-batch, collated in a thread while the device computes the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from launcher.tasks.base import Batch

Rows = Sequence[Any]


class Ahead:
    """Batches in preparation, in the order in which they will be taken."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="collate")  # its thread starts with the first batch
        self._begun: deque[Future[tuple[int, Rows, Batch]]] = deque()

    def begin(self, rows: Callable[[], Rows], make: Callable[[Rows], Batch], step: int = 0) -> None:
        """Start to collate the batch of these rows of a step; rows() is also called in the thread."""

        def work() -> tuple[int, Rows, Batch]:
            chosen = rows()
            return step, chosen, make(chosen)

        self._begun.append(self._pool.submit(work))

    def take(self, rows: Rows, make: Callable[[Rows], Batch], step: int = 0) -> Batch:
        """The batch of these rows of a step: the first in preparation if it is theirs, else made now.

        Raises make's error.
        """
        if self._begun:
            of, begun, batch = self._begun[0].result()
            if of == step and list(begun) == list(rows):
                self._begun.popleft()
                return batch
        return make(rows)

    def close(self) -> None:
        """Discard the batches in preparation."""
        self._begun.clear()
        self._pool.shutdown(cancel_futures=True)


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a GPU copies while the host continues."""

    def pin(part: Any) -> Any:
        return part.pin_memory() if isinstance(part, Tensor) else pinned(part) if isinstance(part, dict) else part

    return {name: pin(part) for name, part in batch.items()} if torch.cuda.is_available() else batch
