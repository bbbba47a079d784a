"""A table of cores that grows and shrinks while batches use it."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.base import FactorConfig
from adapters.factor_map import FactorMap

GROWTH = 1.125  # of a full table
SMALLEST = 8  # rows of a table


@dataclass(eq=False)
class Group:
    """Adapters that share their maps. table (capacity, numbers) float32: row 0 is zero, a row is an adapter."""

    config: FactorConfig  # of the first of them
    maps: dict[str, FactorMap]  # by module
    columns: dict[str, slice]  # of a module's core in a row
    table: Tensor
    free: list[int] = field(default_factory=list)  # rows, as a heap

    @property
    def used(self) -> int:
        """Rows that hold an adapter."""
        return len(self.table) - 1 - len(self.free)

    def take(self) -> int:
        """A free row; a full table grows."""
        if not self.free:
            self._resize(max(SMALLEST, int(len(self.table) * GROWTH) + 1))
        return heapq.heappop(self.free)

    def give_back(self, row: int) -> None:
        """Free a row. A table of which the last half is free shrinks."""
        with torch.no_grad():
            self.table[row] = 0
        heapq.heappush(self.free, row)
        if len(self.table) > SMALLEST and 2 * len(self.free) > len(self.table):
            last = max(set(range(len(self.table))).difference(self.free))
            if 2 * (last + 1) < len(self.table):
                self._resize(max(SMALLEST, last + 1))

    def _resize(self, capacity: int) -> None:
        """A new tensor: a batch in progress keeps the old one."""
        old, kept = self.table, min(len(self.table), capacity)
        table = old.new_zeros(capacity, old.shape[1])
        with torch.no_grad():
            table[:kept] = old[:kept]
        self.table = table.requires_grad_(old.requires_grad)
        self.free = [row for row in self.free if row < capacity] + list(range(len(old), capacity))
        heapq.heapify(self.free)
