"""Which GPU a process uses, why there may be none, and what the CPU lacks. Imports torch if it is needed."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder for each GPU that the driver runs


def own_device(local_rank: int, local_world_size: int) -> Any:
    """This process's torch.device: its GPU, or the CPU if torch finds no GPU.

    A scheduler may show each process only one GPU, which then has number 0 in all of them. Raises ValueError if
    there are more processes than GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count > 1 and local_world_size > count:
        raise ValueError(
            f"{local_world_size} processes on {socket.gethostname()}, where torch sees {count} GPUs: start {count} "
            f"(--nproc-per-node {count}), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return torch.device("cuda", local_rank % count)  # as accelerate counts


def identity_of(device: Any) -> list[str]:
    """The host and the GPU, as its driver numbers it."""
    import torch

    return [socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)]


def check_distinct(found: Sequence[Sequence[str]]) -> None:
    """Raises ValueError, naming the ranks, if two of them have one GPU; found: each rank's `identity_of`."""
    first: dict[tuple[str, ...], int] = {}
    for rank, which in enumerate(map(tuple, found)):
        if which in first:
            raise ValueError(
                f"ranks {first[which]} and {rank} have the same GPU of {which[0]}: start as many processes there as it "
                "has GPUs (--nproc-per-node), or let the scheduler give each process one of its own"
            )
        first[which] = rank


def unusable_gpus(driver: Path = DRIVER) -> str | None:
    """Why torch finds no GPU on a machine that has some; None if it finds one, or there is none to find."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.cuda.is_available() or not driver.is_dir():
        return None
    count = len(list(driver.iterdir()))
    if not count:
        return None
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    return (
        f"this machine has {count} NVIDIA GPU{'s' * (count > 1)} that torch cannot use, so this run takes the CPU: "
        f"torch {torch.__version__} {built}; install one that fits the driver (pytorch.org/get-started)"
    )


def emulated_bfloat16() -> str | None:
    """Why bfloat16 is slow on this machine's CPU; None if it has instructions for it, or torch does not say."""
    import torch

    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.8 lacks it
    known = [can[name] for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16") if name in can]
    if not known or any(known):
        return None
    return (
        "this CPU has no instructions for bfloat16, so a step takes longer than in float32: where the memory suffices, "
        "give --dtype float32"
    )
