"""The processes of a run: their numbers from the environment, and the messages they exchange outside collectives.

Messages go through the process group's key-value store, not through an NCCL collective: its watchdog would end a long
wait, and the store can tell which rank is missing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.devices import check_distinct, identity_of, own_device
from launcher.engines.registry import fitting
from launcher.shipped import accelerate_file
from launcher.text import expected, printable

POLL_S = 0.1
PATIENCE_S = 3.0
WAIT_S = 600.0  # for another rank that does the same short work
SLOW_S = 6 * 3600.0  # for work that grows with the model or the data: 140 GB over a slow network file system take hours
FOLDER_S = 5.0  # within which a network file system shows on one node what another has made


class Stopped(Exception):
    """A rank was asked to stop before there was anything to save. All ranks raise it."""


@dataclass(frozen=True)
class Ranks:
    """The numbers of this process, as torchrun, accelerate launch or our Slurm entry set them in the environment."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def from_environment(environ: Mapping[str, str] = os.environ) -> Ranks:
        """Raises ValueError if the variables contradict each other."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = {name: environ[name] for name in names if name in environ}
        if "WORLD_SIZE" not in values:
            if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environ.keys():
                several = next(fitting(lambda info: True)).accelerate
                raise ValueError(
                    "accelerate launch was asked for several processes but started one, as with --cpu or MULTI_CPU: "
                    f"use ACCELERATE_USE_CPU=true accelerate launch --config_file {accelerate_file(several)} "
                    "--num_processes N"
                )
            return Ranks()
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        if not all(value.isascii() and value.isdigit() for value in values.values()) or "RANK" not in values:
            raise ValueError(
                f"expected whole numbers in RANK and WORLD_SIZE, got {shown}: start with accelerate launch"
            )
        rank, world = int(values["RANK"]), int(values["WORLD_SIZE"])
        local, local_world = int(values.get("LOCAL_RANK", 0)), int(values.get("LOCAL_WORLD_SIZE", world))
        if not (rank < world and local < local_world <= world):
            raise ValueError(f"the process numbers contradict each other: {shown}")
        return Ranks(rank, world, local, local_world)


AGREED = "all ranks have this error"


def agreed(error: Exception) -> Exception:
    """The error, with the note that all ranks raise it; see `is_agreed`."""
    error.add_note(AGREED)
    return error


def is_agreed(error: Exception) -> bool:
    """Whether all ranks are known to raise this error. Any other may be this rank's own."""
    return AGREED in getattr(error, "__notes__", ())


class Communicator:
    """All processes of a run. With one process every call returns at once and nothing is opened."""

    def __init__(self, ranks: Ranks, store: Any = None):
        assert (store is None) == (ranks.world_size == 1)
        self.ranks, self.store, self._round = ranks, store, 0
        self._posted: str | None = None

    def gather(self, what: str, value: Any, timeout_s: float = WAIT_S) -> list[Any]:
        """Every rank's value (JSON data), in rank order, on all ranks.

        Raises TimeoutError naming the ranks that posted no value within timeout_s of this one.
        """
        self._round += 1
        if self.store is None:
            return [value]
        key, pause_s = f"loldu/{self._round}/{what}", POLL_S / 64
        self.store.set(f"{key}/{self.ranks.rank}", json.dumps(value))
        deadline = time.monotonic() + timeout_s
        missing = list(range(self.ranks.world_size))
        while missing := [rank for rank in missing if not self.store.check([f"{key}/{rank}"])]:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"waited {timeout_s:.0f} s at '{what}': no word from rank {', '.join(map(str, missing))} of "
                    f"{self.ranks.world_size}; look at the log of that rank first"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S)
        values = [json.loads(self.store.get(f"{key}/{rank}")) for rank in range(self.ranks.world_size)]
        # A rank that posts in this round has read the last one, so our previous key can be deleted.
        if self._posted is not None:
            self.store.delete_key(self._posted)
        self._posted = f"{key}/{self.ranks.rank}"
        return values

    def from_main(self, what: str, make: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
        """The value (JSON data) that make returns on rank 0, on all ranks. An error there is raised on all ranks."""
        return self.together(what, lambda: make() if self.ranks.is_main else None, timeout_s)[0]

    def together(self, what: str, do: Callable[[], Any], timeout_s: float = WAIT_S) -> list[Any]:
        """Run do on every rank and return all values (JSON data). If a rank fails, all ranks raise and name it.

        On the other ranks a mistake of the user (ValueError, OSError) becomes a ValueError, Stopped stays Stopped, and
        any other error becomes a RuntimeError.
        """
        failure: Exception | None = None
        result: dict[str, Any] = {}
        try:
            result["value"] = do()
        except BaseException as error:
            failure = expected(error)
            result["error"] = (
                str(failure) if isinstance(failure, ValueError) else f"{type(failure).__name__}: {failure}"
            )
            result["mistake"] = isinstance(failure, (ValueError, OSError))
            result["stopped"] = isinstance(failure, Stopped)
        answers = self.gather(what, result, timeout_s)
        for rank, answer in enumerate(answers):
            if answer.get("stopped"):
                raise failure if isinstance(failure, Stopped) else Stopped("another rank")
            if "error" in answer:
                if failure is not None and (rank == self.ranks.rank or not answer["mistake"]):
                    raise agreed(failure)
                where = f"rank {rank}: " if self.ranks.world_size > 1 and rank > 0 else ""
                raise agreed((ValueError if answer["mistake"] else RuntimeError)(f"{where}{answer['error']}"))
        return [answer["value"] for answer in answers]

    def each(self, what: str, make: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
        """What make returns on this rank, any object. If it fails on one rank, all ranks raise and name that rank."""
        made: list[Any] = []
        self.together(what, lambda: made.append(make()), timeout_s)
        return made[0]


def in_time(look: Callable[[], bool]) -> bool:
    """Whether look() becomes true within the time that a network file system may take to show a new file."""
    deadline = time.monotonic() + FOLDER_S
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return seen


def nodes_without(folder: Path, comm: Communicator, what: str, option: str) -> list[str]:
    """The nodes that do not see rank 0's folder, each as "HOST (rank R)". Called by all ranks.

    Raises ValueError, on all ranks, if rank 0 cannot write there.
    """

    def write() -> str:
        name = f".{uuid.uuid4().hex}.probe"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            raise ValueError(
                f"cannot write to {what} {folder}: {error.strerror}; give another folder with {option}"
            ) from error
        return name

    ranks = comm.ranks
    probe = folder / comm.from_main(f"a probe of {what}", write)
    answers = comm.gather(
        f"a look at {what}", [in_time(probe.exists), ranks.rank - ranks.local_rank, socket.gethostname()]
    )
    if ranks.is_main:
        with suppress(OSError):
            probe.unlink()
    blind: dict[int, str] = {}  # first rank of a node -> the node
    for rank, (seen, node, host) in enumerate(answers):
        if not seen:
            blind.setdefault(node, f"{host} (rank {rank})")
    return list(blind.values())


def same_everywhere(comm: Communicator, what: str, make: Callable[[], str | None]) -> str:
    """What make returns on rank 0. On another rank None means that it did not look. Called by all ranks.

    Raises ValueError, on all ranks, naming the host of a rank whose value differs.
    """
    found = comm.together(what, lambda: [make(), socket.gethostname()], SLOW_S)
    for rank, (mine, host) in enumerate(found):
        if mine not in (None, found[0][0]):
            differs = f"{what} is not the same on {host} (rank {rank}) as on {found[0][1]} (rank 0)"
            raise agreed(ValueError(f"{differs}: bring the same files and versions there"))
    return found[0][0]


def print_error(error: Exception, is_main: bool, *, shared: bool, ended: Callable[[], bool] = lambda: False) -> None:
    """Print one line on standard error, once if all ranks have the same error.

    Rank 0 prints at once. The others wait for PATIENCE_S, or until `ended`: a launcher ends all ranks when one exits.
    Then they print as well, since each may be the only one with this error, unless it is known to be shared.
    """
    if not is_main:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not ended():
            time.sleep(POLL_S)
        if shared or ended():
            return
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def connect(ranks: Ranks, *, cpu_offload: bool = False) -> Communicator:
    """Open the process group (NCCL with GPUs, else gloo) through accelerate, and check its size.

    cpu_offload: open gloo besides NCCL, for tensors in main memory. Raises ValueError if the port of rank 0 is taken,
    or cannot be reached.
    """
    if ranks.world_size == 1:
        return Communicator(ranks)
    import torch
    from accelerate import PartialState
    from torch.distributed.distributed_c10d import _get_default_store

    device = own_device(ranks.local_rank, ranks.local_world_size)
    if cpu_offload and device.type == "cuda":
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl")  # accelerate uses an open group
    try:
        state = PartialState(cpu=not torch.cuda.is_available())
    except torch.distributed.DistNetworkError as error:
        raise ValueError(_not_met(ranks, os.environ, str(error))) from error
    if state.num_processes != ranks.world_size:
        raise RuntimeError(
            f"WORLD_SIZE is {ranks.world_size} but accelerate sees {state.num_processes}: each process would train "
            "alone. On CPU start with torchrun, or with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"
        )
    comm = Communicator(ranks, _get_default_store())
    if device.type == "cuda":  # NCCL would fail at the first collective, with its own message
        check_distinct(comm.gather("GPUs", identity_of(device)))
    return comm


def _not_met(ranks: Ranks, environ: Mapping[str, str], said: str) -> str:
    """Why rank 0 cannot listen, or this rank cannot reach it, from what torch's store said."""
    host, port = environ.get("MASTER_ADDR", "localhost"), environ.get("MASTER_PORT", "29500")
    if "EADDRINUSE" in said:
        return (
            f"rank {ranks.rank} cannot listen on port {port}: another job or program uses it. Give another one: "
            "--port of loldu launch, --master-port of torchrun, --main_process_port of accelerate launch"
        )
    return f"rank {ranks.rank} cannot reach rank 0 at {host} port {port}: {said.splitlines()[0][:300]}"


def open_alone(device: Any) -> None:
    """Open a process group of this process alone, which sharding engines need, unless a launcher opened one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
