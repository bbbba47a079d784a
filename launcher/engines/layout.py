"""How the bytes of a model are distributed over an engine's processes, and what a step sends. Pure arithmetic on
sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from launcher.engines.registry import EngineInfo

CONTROL_NUMBERS = 2  # float32 numbers that travel with the gradients: the loss, and whether a stop was requested
PROCESS_BYTES = 15_000_000  # that torch.distributed adds to a process on a CPU, measured


class Unit(NamedTuple):
    """What an engine gathers at once: a decoder layer, or everything outside the layers. Bytes of the whole unit."""

    frozen: float
    trained: float


class Layout(NamedTuple):
    """Bytes of one process, the largest of them, and bytes that one process sends."""

    frozen: float  # weights and factors that it holds
    trained: float  # trained numbers that it holds
    gradients: float
    optimizer: float
    gathered: float  # most that is whole beside its own part while layers compute
    at_root: float  # and once the backward pass has left them, when the root unit's gradients are exchanged
    exchanged: float  # buffer of the exchange of gradients, after the backward pass
    sent_per_pass: float  # in one forward and backward pass
    sent_per_step: float  # once in a step
    across_per_pass: float = 0.0  # of these, bytes over the network of a machine
    across_per_step: float = 0.0


def group_size(info: EngineInfo, world: int, local_world: int, shard_size: int) -> int:
    """Processes that share one copy of the base."""
    if info.holds_base:
        return 1
    return (shard_size or local_world) if info.grouped else world


def layout(
    info: EngineInfo, units: Sequence[Unit], world: int, local_world: int, group: int, widened: float = 1.0
) -> Layout:
    """How these units are distributed: decoder layers first, the rest last. group: processes that share one copy of the
    base. widened: bytes of a trained number in float32 / its own, since replicated processes add gradients in float32.

    Adam's two moments have the dtype of what is trained, and gradients too. Collectives run as rings, which leave a
    machine once: an all-reduce of P bytes over n ranks sends 2 (n - 1) / n P from each, an all-gather or a
    reduce-scatter half of that.
    """
    frozen, trained = sum(unit.frozen for unit in units), sum(unit.trained for unit in units)
    part, several = (world - 1) / world, world > local_world
    if info.holds_base:
        split = world if info.averages else 1  # DeepSpeed's stage 2 spreads gradients and moments
        added = trained * (1.0 if info.averages else widened)
        reduced = 2 * part * (added + 4 * CONTROL_NUMBERS)
        return Layout(
            frozen, trained, gradients=trained / split, optimizer=2 * trained / split, gathered=0.0,
            at_root=0.0, exchanged=added if world > 1 else 0.0, sent_per_pass=0.0, sent_per_step=reduced,
            across_per_step=several * reduced,
        )  # fmt: skip
    *layers, root = units
    largest = max((unit.frozen + unit.trained for unit in layers), default=0.0)
    moved = max((unit.trained for unit in layers), default=0.0)
    # The root unit stays whole between its forward and backward pass, and its gradient until all layers have made
    # theirs. A layer is also in the buffer of its gather. Gradients are exchanged from a copy.
    gathered = root.frozen + 2 * root.trained + 2 * largest + 2 * moved if group > 1 else 0.0
    root_exchange = root.frozen + 3 * root.trained if group > 1 else 0.0
    inside, copies = (group - 1) / group, world // group
    whole, at_root = frozen + trained, root.frozen + root.trained
    sent = inside * (2 * (whole - at_root) + at_root + trained)
    between = 2 * (copies - 1) / copies * trained / group
    return Layout(
        frozen / group, trained / group, gradients=trained / group, optimizer=2 * trained / group, gathered=gathered,
        at_root=root_exchange, exchanged=0.0, sent_per_pass=sent,
        sent_per_step=between + 2 * part * 4 * CONTROL_NUMBERS,
        across_per_pass=sent if group > local_world else 0.0,
        across_per_step=several * between * min(group, local_world),
    )  # fmt: skip
