"""Every way to run a recipe on some machines: what it takes, whether it fits, and which one to choose."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters import FactorConfig
from adapters.checkpoint_files import list_tensors
from adapters.layer import FactorLayer
from launcher.config import Config
from launcher.data.microbatches import global_batches
from launcher.engines.choose import check_sharding
from launcher.engines.layout import PROCESS_BYTES
from launcher.engines.registry import ENGINES, EngineInfo
from launcher.files import user_path
from launcher.main_memory import resident_bytes
from launcher.models.skeleton import prepare_base
from launcher.planning.machines import DISK, Machines
from launcher.processes import Ranks
from launcher.tasks.base import Sampled
from launcher.text import first_line
from launcher.training.footprint import (
    STORED_BYTES,
    Footprint,
    Held,
    Sketch,
    Work,
    activations,
    footprint,
    heap_holes,
    held,
    library_bytes,
    recast,
    sketch,
    work_of,
)
from launcher.training.resolve import Resolved, check_carried, resolve
from launcher.training.trace import Traced

log = logging.getLogger(__name__)
RECORDS = 1000  # at most these are tokenised for a plan
ASSUMED = "assumptions"
PRECISIONS = ("float32", "bfloat16", "int8", "nf4", "fp4")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run it."""

    sharding: str
    dtype: str  # in which it computes
    quantize: str
    checkpointing: bool
    asked: bool
    why_not: str | None  # None: it fits
    takes: Footprint | None = None  # None: not supported
    step_s: float = 0.0

    @property
    def precision(self) -> str:
        return self.dtype if self.quantize == "none" else self.quantize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that `loldu plan` shows."""

    config: Config
    resolved: Resolved
    machines: Machines
    parts: Held
    ways: list[Way]
    sampled: Sampled
    work: Work
    steps: int
    operations: float  # of a process in a step
    factor_s: float
    factor_bytes: float
    factored: int
    token_bytes: float
    notes: list[str]

    @property
    def asked(self) -> Way:
        return next(way for way in self.ways if way.asked)

    @property
    def known(self) -> bool:
        """Whether the number of steps is known."""
        return self.sampled.how != ASSUMED or bool(self.config.optimizer.max_steps)

    def recommended(self) -> Way | None:
        """The requested way if it fits, else the fastest way in the widest precision that fits."""
        fitting = [way for way in self.ways if way.why_not is None]
        order = {"bfloat16": 0, "float32": 0, "int8": 1, "nf4": 2, "fp4": 3}
        same = self.asked.dtype
        fitting = [way for way in fitting if way.quantize != "none" or way.dtype in (same, "bfloat16")]
        if self.asked.why_not is None:
            return self.asked
        return min(fitting, default=None, key=lambda way: (order[way.precision], way.step_s, way.checkpointing))


def predict(config: Config, folder: Path, machines: Machines) -> Plan:
    """Predict all ways. folder: of the base, where config.json is enough. Raises ValueError as a run would."""
    notes: list[str] = []
    ranks = Ranks(0, machines.processes, 0, machines.local)
    resolved = resolve(config, ranks, gpus=machines.gpu is not None)
    sampled, tokenizer = _samples(resolved, folder, notes)
    batches = global_batches(config, sampled.samples, ranks.world_size, flat=resolved.joins)
    work = work_of(batches)
    rows = round(len(batches.rows) * sampled.of / len(sampled.samples))
    head = resolved.task.head(sampled.samples, tokenizer) if resolved.task.labels else None
    attention = "eager" if resolved.attention == "eager" else "sdpa"
    fixed = 0.0 if machines.gpu else resident_bytes() + (PROCESS_BYTES if ranks.world_size > 1 else 0)
    made = sketch(
        config.model, folder, config, resolved.adapter, dtype=resolved.dtype, attention=attention, head=head
    )  # fmt: skip
    traces = _Traces(made, resolved, work, notes, heap_holes(machines.gpu is not None))
    stored = _stored_bytes(folder)
    ways = []
    for info in _engines(config, machines, resolved):
        for precision in PRECISIONS:
            for checkpointing in (False, True):
                ways.append(_way(info, precision, checkpointing, resolved, machines, made, traces, work, stored, fixed))
    traces.cast(resolved.dtype)
    factor_s, factor_bytes, factored = _factoring(made, resolved, machines, stored)
    traced = traces.of(resolved.dtype, config.model.gradient_checkpointing)
    tokens = float(sampled.samples.report.tokens) * sampled.of / len(sampled.samples)
    return Plan(
        config=config, resolved=resolved, machines=machines, parts=held(made, config.model.quantize), ways=ways,
        sampled=sampled, work=work, steps=resolved.steps(rows),
        operations=traced.operations * work.scale if traced else 0.0, factor_s=factor_s, factor_bytes=factor_bytes,
        factored=factored, token_bytes=5 * tokens + 16 * sampled.of if resolved.task.text else 0.0, notes=notes,
    )  # fmt: skip


def _engines(config: Config, machines: Machines, resolved: Resolved) -> list[EngineInfo]:
    """Those that make sense for so many processes, and the requested one."""
    one = machines.processes == 1
    return [
        info
        for info in ENGINES.values()
        if info.name == resolved.sharding
        or (info.one_process_only == one and not (info.grouped and machines.nodes == 1))
    ]


def _way(
    info: EngineInfo, precision: str, checkpointing: bool, resolved: Resolved, machines: Machines, made: Sketch,
    traces: _Traces, work: Work, stored: tuple[float, str | None], fixed: float,
) -> Way:  # fmt: skip
    config, ranks = resolved.config, resolved.ranks
    packed = precision not in ("float32", "bfloat16")
    quantize: Any = precision if packed else "none"
    dtype = resolved.dtype if packed else precision
    mine = resolved.dtype if config.model.quantize == "none" else config.model.quantize
    asked = (
        info.name == resolved.sharding and precision == mine and checkpointing == config.model.gradient_checkpointing
    )
    how: dict[str, Any] = {
        "sharding": info.name, "dtype": dtype, "quantize": quantize, "checkpointing": checkpointing, "asked": asked,
    }  # fmt: skip
    try:
        changed = replace(config, model=replace(config.model, quantize=quantize))
        check_carried(changed, resolved.adapter, info.name)
        check_sharding(info.name, ranks, config.run.shard_size if info.grouped else 0, {})
        traced = traces.of(dtype, checkpointing)
    except ValueError as error:
        return Way(**how, why_not=first_line(error))
    size, kept_as = stored
    frozen = config.adapter.method != "full"
    in_place = info.maps_files and frozen and kept_as == dtype and not packed
    offload = info.offloads if config.run.cpu_offload else ()
    takes = footprint(
        held(made, quantize), traced, sharding=info.name, world=ranks.world_size,
        local_world=ranks.local_world_size, shard_size=config.run.shard_size, passes=work.passes,
        fixed=fixed + library_bytes(dtype, quantize, machines.gpu is not None),
        itemsize=getattr(torch, dtype).itemsize, mapped=0.0 if machines.gpu or in_place else size,
        offload=offload,
    )  # fmt: skip
    operations = traced.operations * work.scale if traced else 0.0
    step_s = max(operations / machines.operations[dtype], machines.sending_s(takes.sent, takes.across))
    room = machines.room()
    why = None
    if takes.peak > room:
        parts = {
            name: value for name, value in asdict(takes).items() if name not in ("peak", "loading", "sent", "across")
        }
        largest = max(parts, key=lambda name: parts[name])
        why = f"takes {takes.peak / 1e9:.1f} GB of {room / 1e9:.1f} GB, {parts[largest] / 1e9:.1f} GB of it {largest}"
    return Way(**how, why_not=why, takes=takes, step_s=step_s)


class _Traces:
    """The traced passes by dtype and checkpointing, each made once. They change the sketch's dtypes."""

    def __init__(self, made: Sketch, resolved: Resolved, work: Work, notes: list[str], holes: float):
        self.holes = holes
        self.made, self.resolved, self.work, self.notes = made, resolved, work, notes
        self.dtype, self.found = resolved.dtype, dict[tuple[str, bool], Traced | None]()

    def cast(self, dtype: str) -> None:
        if dtype != self.dtype:
            recast(self.made, dtype)
            self.dtype = dtype

    def of(self, dtype: str, checkpointing: bool) -> Traced | None:
        """Raises ValueError if this model cannot recompute its layers."""
        self.cast(dtype)
        if (dtype, checkpointing) not in self.found:
            base = self.made.model.get_base_model() if hasattr(self.made.model, "get_base_model") else self.made.model
            asked = replace(self.made.config, gradient_checkpointing=checkpointing)
            if not checkpointing and base.is_gradient_checkpointing:
                base.gradient_checkpointing_disable()
            prepare_base(base, asked, Path(base.name_or_path))
            self.found[dtype, checkpointing] = self._trace()
        return self.found[dtype, checkpointing]

    def _trace(self) -> Traced | None:
        resolved = self.resolved
        given: Any = {"packing": resolved.config.data.packing, "joins": resolved.joins, "holes": self.holes}
        try:
            return activations(self.made, resolved.task, self.work, **given)
        except Exception as error:  # a model's own code may read numbers, which do not exist here
            note = f"activations are not included: this model cannot be run on shapes alone ({first_line(error)[:200]})"
            if note not in self.notes:
                self.notes.append(note)
            return None


def _stored_bytes(folder: Path) -> tuple[float, str | None]:
    """Bytes of the checkpoint, and its dtype if all of it has one; from config.json if there are no weights."""
    names = {"F32": "float32", "BF16": "bfloat16"}
    try:
        tensors = list_tensors(folder).values()
    except ValueError:
        return 0.0, None
    size = 0.0
    for info in tensors:
        count = 1
        for length in info.shape:
            count *= length
        size += count * STORED_BYTES.get(info.dtype, 4)
    kinds = {info.dtype for info in tensors}
    return size, names.get(next(iter(kinds))) if len(kinds) == 1 else None


def _factoring(
    made: Sketch, resolved: Resolved, machines: Machines, stored: tuple[float, str | None]
) -> tuple[float, float, int]:
    """Seconds to make the factors, bytes of them in the cache, and of how many weights."""
    adapter = resolved.adapter
    if not isinstance(adapter, FactorConfig):
        return 0.0, 0.0, 0
    method, operations, size, count, read = adapter.factorization(), 0.0, 0.0, 0, 0.0
    for layer in [module for module in made.model.modules() if isinstance(module, FactorLayer)]:
        for factor_map in layer.maps.values():
            rank = len(factor_map.values)
            operations += 2 * method.cost(layer.shape, rank, embedding=layer.embedding)
            size += factor_map.write.nbytes + factor_map.read.nbytes + 12 * rank
            read += 2 * layer.shape[0] * layer.shape[1]  # rows are contiguous: a panel touches nearly every page
            count += 1
    return max(operations / machines.factoring, read / DISK) / machines.processes, size, count


def _samples(resolved: Resolved, folder: Path, notes: list[str]) -> tuple[Sampled, Any]:
    """Some training samples with their lengths, and the tokenizer; assumed if data or tokenizer are not here."""
    config, data = resolved.config, resolved.config.data
    sources = [data.data] if isinstance(data.data, str) else list(data.data)
    missing = [source for source in sources if not _is_here(source)]
    task, trusted = resolved.task, config.model.trust_remote_code
    task.check_folder(folder)
    if task.has_tokenizer(folder) and not missing:
        tokenizer = task.tokenizer(folder, trust_remote_code=trusted)
        return task.sample(config, tokenizer, resolved.cache, RECORDS), tokenizer
    count = max(RECORDS, config.optimizer.batch_size)
    assumed = task.assumed(config, folder, count)
    why = f"{' and '.join(missing)} is not here" if missing else f"{folder} has no tokenizer or image processor"
    notes.append(f"{why}: {count:,} samples of {assumed.lengths[0]} {task.counts} are assumed")
    return Sampled(assumed, count, ASSUMED), None


def _is_here(source: str) -> bool:
    from huggingface_hub import constants

    name = re.sub(r":[\d.]+$", "", source)
    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{name.partition(':')[0].replace('/', '--')}"
    return user_path(name).exists() or cached.is_dir()
