"""Whether a run fits the memory of a process: its weights before anything is read, the rest before factors are made."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters.checkpoint_files import list_tensors
from launcher.data.microbatches import GlobalBatches
from launcher.engines.registry import ENGINES, fitting
from launcher.engines.registry import give as how_to_get
from launcher.main_memory import main_memory, resident_bytes
from launcher.models.quantize import bytes_per_number
from launcher.training.resolve import Resolved, check_carried

log = logging.getLogger(__name__)
STORED = {"float32": "F32", "bfloat16": "BF16"}  # as safetensors names them


def check_memory(resolved: Resolved, base: Path) -> None:
    """Raises ValueError if this process's part of the base does not fit its GPU, or this machine's its memory."""
    config, ranks = resolved.config, resolved.ranks

    def allowed(option: str) -> bool:
        name, value = option.removeprefix("--").split()
        quantize: Any = value if name == "quantize" else config.model.quantize
        try:
            changed = replace(config, model=replace(config.model, quantize=quantize))
            check_carried(changed, resolved.adapter, value if name == "sharding" else resolved.sharding)
        except ValueError:
            return False
        return True

    engine = ENGINES[resolved.sharding]
    group = (config.run.shard_size or ranks.local_world_size) if engine.grouped else ranks.world_size
    share = 1.0 if engine.holds_base else 1 / group
    kind = resolved.dtype if config.model.quantize == "none" else config.model.quantize
    offloaded = config.run.cpu_offload and "parameters" in engine.offloads
    if resolved.device.type == "cuda" and not offloaded:
        device = torch.cuda.get_device_properties(resolved.device)
        check_size(base, kind, share=share, memory=device.total_memory, where=device.name, allowed=allowed)
        return
    frozen = config.adapter.method != "full"
    mapped = engine.maps_files and frozen and {info.dtype for info in list_tensors(base).values()} == {STORED.get(kind)}
    here = share if mapped else share * ranks.local_world_size
    memory, limited = main_memory()
    host = socket.gethostname()
    check_size(base, kind, share=here, memory=memory, where=host, limited=limited, allowed=allowed)


ACTIVATION_BYTES = 24  # kept for each output of a linear layer and token: twice what any traced model needed


def check_run(resolved: Resolved, base: Path, bare: Any, batches: GlobalBatches) -> None:
    """Warn if the predicted peak of a process is more than it may use; ValueError if that holds without a batch.

    The prediction is that of `loldu plan`. It takes a second, so it is skipped if a simple bound shows that memory is
    plentiful. bare: the model's skeleton.
    """
    config, ranks = resolved.config, resolved.ranks
    on_gpu = resolved.device.type == "cuda"
    if on_gpu:
        room = float(torch.cuda.get_device_properties(ranks.local_rank).total_memory)
    else:
        room = main_memory()[0] / ranks.local_world_size
    numbers = sum(parameter.numel() for parameter in bare.parameters())
    outputs = sum(module.weight.shape[0] for module in bare.modules() if isinstance(module, torch.nn.Linear))
    positions = batches.most_positions or max(batches.data.lengths) * config.optimizer.batch_size
    if (
        4 * (4 if config.adapter.method == "full" else 3) * numbers + ACTIVATION_BYTES * outputs * positions
        < 0.9 * room
    ):
        return
    fixed = 0.0 if on_gpu else resident_bytes()  # before the prediction itself takes memory
    from launcher.training import footprint  # loads torch's counters of operations, and its sharding

    fixed += footprint.library_bytes(resolved.dtype, config.model.quantize, on_gpu)

    attention = "eager" if resolved.attention == "eager" else "sdpa"
    how = {"dtype": resolved.dtype, "attention": attention}
    made = footprint.sketch(config.model, base, config, resolved.adapter, **how)
    work = footprint.work_of(batches)
    try:
        given: Any = {"packing": config.data.packing, "joins": resolved.joins, "holes": footprint.heap_holes(on_gpu)}
        traced = footprint.activations(made, resolved.task, work, **given)
    except Exception as error:  # a model's own code may read numbers, which do not exist here
        log.info("the memory of a pass is not predicted: %s", error)
        traced = None
    takes = footprint.footprint(
        footprint.held(made, config.model.quantize), traced, sharding=resolved.sharding, world=ranks.world_size,
        local_world=ranks.local_world_size, shard_size=config.run.shard_size, passes=work.passes,
        fixed=fixed, itemsize=getattr(torch, resolved.dtype).itemsize,
        offload=ENGINES[resolved.sharding].offloads if config.run.cpu_offload else (),
    )  # fmt: skip
    has = f"{room / 1e9:.3g} GB for each process"
    if takes.resident > room:
        raise ValueError(
            f"weights, factors and optimizer of a process take {takes.resident / 1e9:.3g} GB, and there are {has}: "
            "loldu plan with the same options shows what fits"
        )
    if takes.peak > room:
        log.warning(
            "a process is predicted to take %.3g GB, and there are %s: if memory runs out, lower --micro-batch-size or "
            "give --gradient-checkpointing; loldu plan with the same options shows what fits", takes.peak / 1e9, has,
        )  # fmt: skip


def check_size(
    folder: Path,
    kind: str,
    *,
    share: float,
    memory: int,
    where: str,
    limited: bool = False,
    allowed: Callable[[str], bool] = lambda option: True,
) -> None:
    """Raises ValueError if the base's weights alone do not fit: a machine that runs out of memory kills the process
    without a message.

    kind: the base's dtype, or how it is quantised. share: the part of the base that is in this memory. memory: its
    bytes; limited: whether a job or container limits them. A lower bound is used: every weight of a quantised base
    counts as packed, in infinitely long rows. allowed(option): whether the run would be accepted with that option.
    """
    numbers = sum(math.prod(tensor.shape) for tensor in list_tensors(folder).values())
    needs = {
        each: numbers * bytes_per_number(each, getattr(torch, each, torch.float32), math.inf) * share
        for each in ("float32", "bfloat16", "int8", "nf4", "fp4")
    }
    if needs[kind] <= memory:
        return
    options = {"--dtype bfloat16": "bfloat16", "--quantize int8": "int8", "--quantize nf4": "nf4"}
    give = [
        f"{option} ({needs[each] / 1e9:.3g} GB)"
        for option, each in options.items()
        if needs[each] <= memory and allowed(option)
    ]
    for info in fitting(lambda info: not info.holds_base and not info.grouped):
        if allowed(f"--sharding {info.name}"):
            give.append(f"{how_to_get(info)} on enough GPUs or machines")
            break
    give.append("the job or container more memory (Slurm: --mem)" if limited else "a machine that has more")
    copies = f", {share:.3g} times," if share > 1 else ""
    has = "where this job or container may use" if limited else "which has"
    raise ValueError(
        f"the weights of {folder} take {needs[kind] / 1e9:.3g} GB in {kind}{copies} on {where}, {has} "
        f"{memory / 1e9:.3g} GB: give {', or '.join(give)}"
    )
