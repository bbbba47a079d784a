"""The machines of a plan: processes, memory and speed, stated by a data sheet or measured here."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

import torch

from launcher.main_memory import main_memory

GB = 1e9
# name: (bytes, operations per second dense in bfloat16, in float32), from the vendors' data sheets.
DEVICES = {
    "H200": (141 * GB, 989e12, 67e12),
    "H100": (80 * GB, 989e12, 67e12),
    "B200": (180 * GB, 2250e12, 75e12),
    "A100-80GB": (80 * GB, 312e12, 19.5e12),
    "A100": (40 * GB, 312e12, 19.5e12),
    "L40S": (48 * GB, 362e12, 91.6e12),
    "A6000": (48 * GB, 155e12, 38.7e12),
    "A10": (24 * GB, 125e12, 31.2e12),
    "L4": (24 * GB, 121e12, 30.3e12),
    "RTX4090": (24 * GB, 165e12, 82.6e12),
    "RTX3090": (24 * GB, 71e12, 35.6e12),
}
BY_MEMORY = {141: "H200", 180: "B200", 80: "A100-80GB", 48: "A6000", 40: "A100", 24: "RTX3090"}
CONTEXT = 0.8 * GB  # of a GPU's memory: what CUDA and NCCL take (stated, not measured here)
USABLE = 0.95  # of the rest: an allocator's gaps (stated)
GPU_USE = 0.4  # of the data sheet's rate that training reaches (stated, as in benchmarks/scaling.py)
CPU_USE = 0.4  # of a matrix product's rate that training reached with SmolLM2-135M (benchmarks/peers.py, float32)
FACTOR_USE = 0.5  # of a float32 product's rate that LU reached on a CPU (benchmarks/factorization_model.py)
NETWORK = 50e9, 0.8  # bytes per second of a machine's network (400 Gb/s, stated) and the part that payload reaches
INSIDE = 300e9  # bytes per second of a GPU to the others of its machine (stated)
DISK = 1e9  # bytes per second (stated)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where a run would run."""

    nodes: int
    local: int  # processes of a node
    gpu: str | None  # name; None: CPU
    memory: float  # bytes that one process may use on a GPU; of the whole machine on a CPU
    operations: dict[str, float]  # per second and process that training reaches, by dtype
    factoring: float  # operations per second and process in float32
    said: str  # where these come from

    @property
    def processes(self) -> int:
        return self.nodes * self.local

    def room(self) -> float:
        """Bytes that one process may use."""
        return self.memory if self.gpu else self.memory / self.local

    def sending_s(self, sent: float, across: float) -> float:
        """Seconds in which each process sends so many bytes, some of them across the network of its machine."""
        return max(sent / INSIDE, across / (NETWORK[0] * NETWORK[1]))


def parse(gpus: str | None, nodes: int, processes: int) -> Machines:
    """The machines of --gpus, or this one. processes: of this machine's CPU. Raises ValueError for what is no GPU."""
    if nodes < 1 or processes < 1:
        raise ValueError(f"--nodes and --processes are at least 1, got {nodes} and {processes}")
    if gpus is None and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        count, name, memory = torch.cuda.device_count(), found.name, float(found.total_memory)
        sheet = next((known for known in DEVICES if known in name.replace(" ", "")), None)
        return _gpus(
            count, nodes, sheet or "A100-80GB", memory, f"{name}, {'its' if sheet else 'an A100-80GB’s'} rates"
        )
    if gpus is None:
        return _cpu(nodes, processes)
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", gpus.strip())
    count, kind = (int(match[1] or 1), match[2]) if match else (0, gpus)
    if kind.isdigit() and match and match[1] is None:
        count, kind = int(kind), "80GB"
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB?|GiB)", kind, re.IGNORECASE)
    known = {name.lower(): name for name in DEVICES}
    if count < 1 or not (size or kind.lower() in known):
        raise ValueError(
            f"--gpus {gpus}: give COUNTxMEMORY (8x80GB) or COUNTxNAME with one of {', '.join(DEVICES)} (8xH100)"
        )
    if size is None:
        name = known[kind.lower()]
        return _gpus(count, nodes, name, DEVICES[name][0], f"{name}, by its data sheet")
    most = float(size[1])
    if most * GB <= CONTEXT:
        raise ValueError(f"--gpus {gpus}: CUDA alone takes {CONTEXT / GB} GB of a GPU: give one with more memory")
    near = BY_MEMORY[min(BY_MEMORY, key=lambda have: abs(have - most))]
    return _gpus(count, nodes, near, most * GB, f"{size[1]} GB, with the rates of an {near} by its data sheet")


def _gpus(count: int, nodes: int, sheet: str, memory: float, said: str) -> Machines:
    _, narrow, wide = DEVICES[sheet]
    return Machines(
        nodes=nodes, local=count, gpu=sheet, memory=(memory - CONTEXT) * USABLE,
        operations={"bfloat16": narrow * GPU_USE, "float32": wide * GPU_USE}, factoring=wide * 0.1,
        said=f"{said}, at {GPU_USE:.0%} (stated, not measured)",
    )  # fmt: skip


def _cpu(nodes: int, processes: int) -> Machines:
    rates = {name: _product_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    memory, _ = main_memory()
    counts = {"core": os.cpu_count() or 1, "thread": torch.get_num_threads()}
    cores, threads = (f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    shown = ", ".join(f"{rate / 1e9:.0f} billion operations/s in {name}" for name, rate in rates.items())
    return Machines(
        nodes=nodes, local=processes, gpu=None, memory=float(memory),
        operations={name: rate * CPU_USE for name, rate in rates.items()}, factoring=rates["float32"] * FACTOR_USE,
        said=f"this machine's CPU ({cores}, {threads} a process): {shown}, measured now, at {CPU_USE:.0%}",
    )  # fmt: skip


def _product_rate(dtype: torch.dtype, size: int = 512, limit_s: float = 0.1) -> float:
    """Operations per second of a matrix product here: the best of several, in processor time, so that other programs on
    the machine do not count."""
    a = torch.ones(size, size, dtype=dtype)
    a[:64, :64] @ a[:64, :64]  # the first product loads the library
    seconds: list[float] = []
    end = time.process_time() + limit_s
    while not seconds or time.process_time() < end:
        started = time.process_time()
        a @ a
        seconds.append((time.process_time() - started) / torch.get_num_threads())
    return 2 * size**3 / max(min(seconds), 1e-9)
