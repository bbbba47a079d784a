"""How much main memory this process may use: its container's or job's limit, else the machine's."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
OWN_MAPPING = 1 << 20  # bytes from which `map_large_blocks` keeps a block out of the heap


def map_large_blocks() -> None:
    """Let malloc give each block of OWN_MAPPING bytes or more its own mapping, which goes back when it is freed.

    glibc does so at first, and raises the limit to the largest block that was freed, up to 32 MiB. It lies within the
    heap from then on, and a freed block there is a hole until something small enough takes its place. Does nothing
    under another C library.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)


def main_memory(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> tuple[int, bool]:
    """Bytes of main memory that this process may use, and whether its container or job limits them."""
    machine = limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in proc.read_text().splitlines() if proc.exists() else ():
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        inside = PurePosixPath(group.lstrip("/"))
        for folder in (inside, *inside.parents):  # the smallest limit of all levels applies
            with suppress(OSError, ValueError):  # none at this level, not ours to read, or "max"
                limit = min(limit, int((top / folder / name).read_text()))
    return limit, limit < machine


def resident_bytes(proc: Path = Path("/proc/self/statm")) -> float:
    """Bytes of main memory that this process holds now: Python, and what it has imported and read."""
    if proc.exists():
        return float(int(proc.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS counts bytes
