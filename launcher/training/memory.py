"""Whether the weights fit the memory of this process, checked before anything is read."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters.checkpoint_files import list_tensors
from launcher.engines.registry import ENGINES, fitting
from launcher.engines.registry import give as how_to_get
from launcher.main_memory import main_memory
from launcher.models.quantize import bytes_per_number
from launcher.training.resolve import Resolved, check_carried

STORED = {"float32": "F32", "bfloat16": "BF16"}  # as safetensors names them


def check_memory(resolved: Resolved, base: Path) -> None:
    """Raises ValueError where this process's part of the base does not fit its GPU, or this machine's its memory."""
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
    """Raises ValueError where the base's weights alone do not fit: a machine out of memory kills without a message.

    kind: the base's dtype, or how it is quantised. share: the part of the base that lies in this memory. memory: its
    bytes; limited: whether a job or container limits them. A lower bound is used: every weight of a quantised base
    counts as packed, in endless rows. allowed(option): whether the run would be accepted with that option.
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
