"""The memory that a training step frees goes back to the system: a process on a CPU keeps no more than it uses.

glibc maps large allocations by themselves, and raises the size from which it does so, up to 32 MiB, whenever one is
freed. Activations of changing sizes then share a heap with holes that later ones do not fit: the resident set of a
model with 135 M parameters grew from step to step. Fixed at 1 MiB, every activation is mapped and unmapped by itself,
in huge pages (torch's own option), since page faults for small ones took a quarter of the step. Nothing here imports
torch, which reads its option once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # malloc.h
MAPPED_BYTES = 1 << 20
CHOSEN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")


def return_freed_memory(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Map large allocations by themselves; returns whether that was done. To be called before torch is imported.

    Nothing is done under another C library, or where the user has chosen how memory is allocated.
    """
    if any(environ.get(name) for name in CHOSEN):
        return False
    with suppress(OSError, AttributeError):  # no glibc
        if ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES):
            environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
            return True
    return False
