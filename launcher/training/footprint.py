"""What a run takes, predicted from shapes: memory of each process, cache on disk, bytes sent, operations.

`loldu plan` and the check before a run both call this. Nothing here reads a weight or touches a device.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from adapters import FactorConfig
from adapters.factor_map import FactorMap
from launcher.config import Config, ModelConfig
from launcher.data.batches import row_lengths
from launcher.data.encoded import Encoded
from launcher.data.microbatches import GlobalBatches, positions
from launcher.engines.fsdp2 import decoder_layers
from launcher.engines.layout import Layout, Unit, group_size, layout
from launcher.engines.registry import ENGINES
from launcher.models import joined
from launcher.models.head_loss import HeadLoss
from launcher.models.quantize import bytes_per_number, linear_layers
from launcher.models.skeleton import empty_model, exchange, in_head, prepare_base, same_compiler
from launcher.models.suitable import leave_out
from launcher.tasks.base import Layout as BatchLayout
from launcher.tasks.base import Task
from launcher.training.trace import Traced, equal_layers, trace

# Of activations on a CPU, what the holes in glibc's heap add. torch aligns tensors to 64 bytes, so that the place of a
# freed tensor is too small for the next one of its size, and small objects keep it from growing: the allocations of a
# LoRA step, recorded and repeated, left the same holes, and none without their small objects. With SmolLM2 and adapters
# they took 0.5 to 1.1 of the activations, and vary between equal runs.
HOLES = 0.65
# Bytes that libraries take on a CPU once they compute in bfloat16, and with bitsandbytes: what the embedded model's
# processes had more than in float32 (0.05 to 0.09 GB, and 0.04 GB more for nf4).
NARROW, PACKED = 65e6, 40e6
STEPS = 4  # whose micro-batches are searched for the largest
STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "BOOL": 1}


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A model with its adapter on the meta device, and what its parameters are."""

    model: Any
    config: ModelConfig
    base: frozenset[int]  # ids of the base's parameters
    packable: frozenset[int]  # ids of the weights that --quantize makes small
    units: list[list[nn.Parameter]]  # decoder layers, and the rest
    layers: nn.ModuleList | None  # the stack, if its layers are alike


def sketch(
    config: ModelConfig, folder: Path, asked: Config, adapter: Any, *, dtype: str, attention: str, head: Any = None
) -> Sketch:
    """The model of this run on the meta device, its base unquantised, from config.json alone."""
    base = empty_model(config, folder, dtype=dtype, attention=attention, head=head)
    prepare_base(base, config, folder)
    packed = linear_layers(base, getattr(adapter, "modules_to_save", None) or ())
    if head is not None:
        packed = {name: layer for name, layer in packed.items() if not in_head(base, name)}
    own = {id(parameter) for parameter in base.parameters()}
    packable = {id(layer.weight) for layer in packed.values()}
    model = base
    if adapter is not None:
        adapter = copy.deepcopy(adapter)  # PEFT completes it in place
        if hasattr(adapter, "exclude_modules"):
            more = leave_out(base, asked.adapter, labels=head is not None)
            adapter.exclude_modules = [*asked.adapter.exclude, *more] or None
        model = _adapted(base, adapter, config, folder, dtype=dtype, attention=attention, head=head)
    moved = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters() if not p.is_meta}
    exchange(model, lambda _, old: moved.get(id(old), old))
    seen: set[int] = set()
    units = []
    layers = decoder_layers(base)
    for module in [*layers, model]:
        unit = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in unit}
        units.append(unit)
    model.train()
    return Sketch(
        model=model, config=config, base=frozenset(own), packable=frozenset(packable), units=units,
        layers=equal_layers(base, layers),
    )  # fmt: skip


def _adapted(base: Any, adapter: Any, config: ModelConfig, folder: Path, **how: Any) -> Any:
    if isinstance(adapter, FactorConfig):
        if adapter.factorization().chooses_rank:  # at most all of it
            modules = {name: min(m.weight.shape) for name, m in base.named_modules() if isinstance(m, nn.Linear)}
            adapter = adapter.with_ranks(modules)
        return get_peft_model(base, adapter)
    with same_compiler():
        return get_peft_model(base, adapter, autocast_adapter_dtype=True, low_cpu_mem_usage=True)


def recast(made: Sketch, dtype: str) -> None:
    """Give a sketch another compute dtype, in place: its base's numbers and the maps that follow from it."""
    wanted = getattr(torch, dtype)

    def narrow(tensor: Any) -> Any:
        return tensor.to(wanted) if tensor.is_floating_point() else tensor

    for module in made.model.modules():
        if isinstance(module, FactorMap):
            module._apply(narrow)
    for parameter in made.model.parameters():
        if id(parameter) in made.base:
            parameter.data = narrow(parameter.data)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of all processes' parameters together, counted once."""

    weights: float
    factors: float
    trained: float
    units: list[Unit]
    largest_packed: float  # numbers of the largest weight that is unpacked for a product
    numbers: int  # of the base
    trained_numbers: int


def held(made: Sketch, quantize: str) -> Held:
    """The parameters' bytes in their dtypes, with the base's linear layers quantised."""
    weights = factors = trained = 0.0
    units, largest = [], 0
    for unit in made.units:
        frozen_bytes = trained_bytes = 0.0
        for parameter in unit:
            size = float(parameter.numel() * parameter.element_size())
            if id(parameter) in made.packable and quantize != "none" and not parameter.requires_grad:
                size = parameter.numel() * bytes_per_number(quantize, parameter.dtype, parameter.shape[-1])
                largest = max(largest, parameter.numel())
            if parameter.requires_grad:
                trained_bytes += size
            elif id(parameter) in made.base:
                weights, frozen_bytes = weights + size, frozen_bytes + size
            else:
                factors, frozen_bytes = factors + size, frozen_bytes + size
        trained += trained_bytes
        units.append(Unit(frozen_bytes, trained_bytes))
    parameters = [p for unit in made.units for p in unit]
    return Held(
        weights=weights, factors=factors, trained=trained, units=units, largest_packed=largest,
        numbers=sum(p.numel() for p in parameters if id(p) in made.base),
        trained_numbers=sum(p.numel() for p in parameters if p.requires_grad),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """The batches of a run, and the largest micro-batch of its first steps."""

    data: Encoded
    rows: list[Any]  # of the largest micro-batch
    targets: int  # of its global batch
    passes: int  # of a process in a step
    scale: float  # positions of all micro-batches of a process in a step / those of the largest micro-batch
    token_share: float
    tokens_per_step: float


def work_of(batches: GlobalBatches) -> Work:
    """What the first steps compute. Several ranks take the same time as the slowest."""
    steps = [batches.at(step) for step in range(1, 1 + STEPS)]
    best: tuple[int, list[Any], int] = (-1, [], 1)
    computed = 0
    for batch in steps:
        lengths = row_lengths(batches.data, batch.rows)
        for parts in batch.dealt:
            for part in parts:
                if part and (size := positions(part, lengths, flat=batches.flat)) > best[0]:
                    best = size, [batch.rows[place] for place in part], batch.targets
        rounds = zip(*batch.dealt, strict=True)
        computed += sum(max(positions(part, lengths, flat=batches.flat) for part in parts) for parts in rounds)
    return Work(
        data=batches.data, rows=best[1], targets=best[2], passes=max(len(batch.dealt[0]) for batch in steps),
        scale=computed / len(steps) / max(best[0], 1), token_share=sum(b.token_share for b in steps) / len(steps),
        tokens_per_step=sum(b.tokens for b in steps) / len(steps),
    )  # fmt: skip


def activations(
    made: Sketch, task: Task, work: Work, *, packing: bool, joins: bool = False, holes: float = 0.0
) -> Traced:
    """What a pass over the largest micro-batch keeps beside the parameters."""
    masked = packing or task.labels  # decoders need no mask for padding on the right: `needs_padding_mask`
    if joins:
        joined.register()
    layout = BatchLayout(packing=packing, padding_mask=masked, attention="joined" if joins else "sdpa")
    batch = task.collate(work.data, work.rows, layout)
    forward = HeadLoss(made.model)
    forward.usable = True  # the check of a run compares numbers, which are not here
    return trace(made.model, lambda: task.loss(forward, batch, work.targets), made.layers, holes)


def library_bytes(dtype: str, quantize: str, on_gpu: bool) -> float:
    """What the first product in this precision adds to a process's memory."""
    return 0.0 if on_gpu else NARROW * (dtype == "bfloat16") + PACKED * (quantize != "none")


def heap_holes(on_gpu: bool) -> float:
    """HOLES, where they were measured: on a CPU, with glibc."""
    return HOLES if not on_gpu and platform.libc_ver()[0] == "glibc" else 0.0


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Predicted bytes of one process."""

    fixed: float  # Python, its libraries and the tokens
    weights: float
    factors: float
    trained: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    unpacked: float  # a quantised weight in full, while it is multiplied
    peak: float
    loading: float  # peak while the model is loaded, which counts in peak
    sent: float  # in a step
    across: float  # of these, bytes over the network of a machine

    @property
    def resident(self) -> float:
        """What no setting of the batch changes."""
        return self.fixed + self.weights + self.factors + self.trained + self.gradients + self.optimizer


def footprint(
    parts: Held,
    traced: Traced | None,
    *,
    sharding: str,
    world: int,
    local_world: int,
    shard_size: int = 0,
    passes: int = 1,
    fixed: float = 0.0,
    itemsize: int = 4,
    mapped: float = 0.0,
    offload: Sequence[str] = (),
) -> Footprint:
    """The memory of one process. traced None: activations are left out. itemsize: of the compute dtype.

    mapped: bytes of the checkpoint's files that are mapped while the base is copied out of them.
    offload: "parameters" and "optimizer", if these are kept in main memory instead of on the GPU.
    """
    info = ENGINES[sharding]
    group = group_size(info, world, local_world, shard_size)
    widened = 4 * parts.trained_numbers / parts.trained if parts.trained else 1.0
    lies: Layout = layout(info, parts.units, world, local_world, group, widened)
    if "parameters" in offload:
        lies = lies._replace(frozen=0.0, trained=0.0)
    if "optimizer" in offload:
        lies = lies._replace(optimizer=0.0)
    whole = parts.weights + parts.factors
    weights = lies.frozen * parts.weights / whole if whole else 0.0
    factors = lies.frozen - weights
    gathered, alive = max(lies.gathered, lies.at_root), 0.0
    if traced is not None and info.maps_large_blocks:
        gathered, alive = max((lies.gathered, traced.mapped_layers), (lies.at_root, traced.mapped_after), key=sum)
    elif traced is not None:
        alive = traced.peak
    unpacked = float(parts.largest_packed * itemsize)
    resident = fixed + lies.frozen + lies.trained + lies.optimizer
    training = resident + lies.gradients + gathered + alive + unpacked
    reducing = resident + lies.gradients + lies.exchanged
    loading = fixed + lies.frozen + lies.trained + mapped / (1 if info.holds_base else group)
    return Footprint(
        fixed=fixed, weights=weights, factors=factors, trained=lies.trained, gradients=lies.gradients,
        optimizer=lies.optimizer, gathered=gathered, activations=alive, unpacked=unpacked,
        peak=max(training, reducing, loading), loading=loading,
        sent=lies.sent_per_pass * passes + lies.sent_per_step,
        across=lies.across_per_pass * passes + lies.across_per_step,
    )  # fmt: skip
