"""Read an adapter folder that is laid out like one read before: the thousandth costs a comparison and a copy.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: names, dtypes, shapes and
places) and the numbers. A file with the same header as one that the library has read and `ManyAdapters` has checked has
the same tensors at the same places; what is left to compare is that pivots and probes, and so the maps, are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.many_tensors import PREFIX

Words = NDArray[np.uint32]


@dataclass(frozen=True)
class Files:
    """The contents of an adapter folder."""

    config: bytes
    weights: bytes

    @classmethod
    def read(cls, folder: Path) -> Files:
        config, weights = (
            (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
        )
        return cls(config, weights)

    @property
    def start(self) -> int:
        """Where the numbers begin."""
        return 8 + int.from_bytes(self.weights[:8], "little")

    @property
    def kind(self) -> tuple[bytes, bytes, int]:
        """Equal for adapters that are laid out alike: the config, the header and the size."""
        return self.config, self.weights[: self.start], len(self.weights)

    @property
    def words(self) -> Words:
        """The numbers, four bytes each."""
        return np.frombuffer(self.weights, "<u4", (len(self.weights) - self.start) // 4, self.start)


@dataclass(frozen=True)
class Layout:
    """Places (in words) of the cores, in the order of a table's row, and of what the frozen maps follow from."""

    cores: NDArray[np.int64]
    origin: NDArray[np.int64]
    expected: Words  # of the origin
    scale: float

    def row(self, files: Files) -> Tensor | None:
        """The row of an adapter with this layout; None if its maps are others. Raises ValueError for NaN."""
        words = files.words
        if not np.array_equal(words[self.origin], self.expected):
            return None
        return self.scale * finite_row(torch.from_numpy(words[self.cores].view("<f4")))


def finite_row(row: Tensor) -> Tensor:
    """The row itself. Raises ValueError for NaN and infinite numbers."""
    if not torch.isfinite(row).all():
        raise ValueError("the adapter's file holds NaN or infinite numbers: use an earlier checkpoint, or train again")
    return row


def layout_of(files: Files, method: str, modules: Iterable[str], scale: float) -> Layout | None:
    """The layout of a file that was read and checked; None if numbers are not four bytes each."""
    header: dict[str, Any] = json.loads(files.weights[8 : files.start])
    cores: list[NDArray[np.int64]] = []
    origin: list[NDArray[np.int64]] = []
    for module in modules:
        for part, places in (("core", cores), ("pivots", origin), ("probe", origin)):
            held = header[f"{PREFIX}{module}.{method}_map.{part}"]
            first, end = held["data_offsets"]
            if first % 4 or end % 4 or held["dtype"] != {"core": "F32", "pivots": "I32", "probe": "U8"}[part]:
                return None
            places.append(np.arange(first // 4, end // 4))
    at = np.concatenate(origin)
    return Layout(np.concatenate(cores), at, files.words[at], scale)
