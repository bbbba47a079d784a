"""Which engine a run uses, and whether it supports the run's settings. Pure functions over the registry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.engines.registry import ENGINES, EngineInfo, configured_by_accelerate, fitting, give, names
from launcher.optimizers import OPTIMIZERS
from launcher.processes import Ranks
from launcher.shipped import accelerate_file


def check_sharding(
    wanted: str | None, ranks: Ranks, shard_size: int = 0, environ: Mapping[str, str] = os.environ
) -> str:
    """The engine to use: the requested one, else the one accelerate launch was configured for, else the first
    of the registry for this number of processes.

    Raises ValueError, with the arithmetic, if it does not fit the number of processes or the launcher.
    """
    world, configured = ranks.world_size, configured_by_accelerate(environ)
    if configured and wanted and ENGINES[wanted].accelerate != configured:
        raise ValueError(
            f"accelerate launch was configured for {configured}, but --sharding is {wanted}: leave --sharding out, or "
            f"give --config_file {accelerate_file(ENGINES[wanted].accelerate)}"
        )
    several = next(fitting(lambda info: True))
    info = ENGINES[wanted or configured or (several.name if world > 1 else next(iter(ENGINES)))]
    if info.one_process_only and world > 1:
        raise ValueError(f"--sharding {info.name} is for one process, but WORLD_SIZE is {world}: give {give(several)}")
    if info.missing:
        raise ValueError(
            f"--sharding {info.name} needs {' and '.join(info.missing)}: pip install {' '.join(info.missing)}"
        )
    if info.grouped and world % (size := shard_size or ranks.local_world_size):
        other = next(fitting(lambda other: not other.holds_base and not other.grouped))
        raise ValueError(
            f"--sharding {info.name}: {world} processes / {size} that share one copy = {world / size:.2f} copies, not "
            f"a whole number: give --shard-size a divisor of {world}, or {give(other)}"
        )
    if shard_size and not info.grouped:
        grouped = names(lambda other: other.grouped)
        raise ValueError(f"--shard-size {shard_size} works with --sharding {grouped} only, not with {info.name}")
    return info.name


def check_offload(wanted: bool, sharding: str, *, on_gpu: bool) -> None:
    """Raises ValueError if --cpu-offload would do nothing."""
    if wanted and not ENGINES[sharding].offloads:
        raise ValueError(
            f"--cpu-offload works with --sharding {names(lambda info: bool(info.offloads))}; {sharding} keeps "
            "everything on the GPU: leave --cpu-offload out, or change --sharding"
        )
    if wanted and not on_gpu:
        raise ValueError(
            "--cpu-offload moves tensors from the GPU to main memory, but torch finds no GPU here: leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What a run requires of its engine."""

    method: str
    quantize: str = "none"
    compiled: bool = False
    from_gradients: bool = False  # the method's factors come from gradients of the whole base
    reads_4bit_class: bool = False  # the method reads the scales of a packed weight from its Params4bit
    optimizer: str = "adamw"
    reads_weights: bool = False  # the method starts from the values of whole weights
    has_schedule: bool = False  # the method works on all trained parameters between steps
    trains_prompt: bool = False  # the method calls the embedding, or hands keys and values to the layers, itself


def refusal(info: EngineInfo, demands: Demands) -> tuple[str, str] | None:
    """Why this engine does not support the run, and what to change besides the engine; None if it does."""
    method, quantize, name = demands.method, demands.quantize, info.name
    if quantize != "none" and not info.carries_quantised:
        return (
            f"--quantize {quantize} is not supported under --sharding {name}: bitsandbytes copies what {name} gathers "
            "into whole tensors of its own, so nothing would be saved",
            "--quantize none",
        )
    if demands.compiled and not info.compiles:
        return (
            f"--compile is not supported under --sharding {name}, which gathers weights inside a decoder layer",
            "leave --compile out",
        )
    if demands.from_gradients and not info.holds_base:
        return (
            f"--method {method} cannot be trained under --sharding {name}: its factors come from gradients, for which "
            "each process runs the whole base",
            "a method whose factors come from the weights alone",
        )
    if not OPTIMIZERS[demands.optimizer].sharded and not info.any_optimizer:
        return (
            f"--optimizer {demands.optimizer} is not supported under --sharding {name}: it steps whole "
            "parameters, which this engine cuts",
            "--optimizer adamw",
        )
    if demands.reads_weights and not info.holds_base:
        return (
            f"--method {method} cannot be trained under --sharding {name}: it chooses entries by the values of whole "
            "weights, which no process holds",
            "a method that does not look at the weights, such as lora",
        )
    if demands.has_schedule and not info.any_optimizer:
        return (
            f"--method {method} cannot be trained under --sharding {name}: between steps it works on whole parameters "
            "and their gradients, which this engine cuts",
            "a method without a schedule, such as lora",
        )
    if demands.trains_prompt and not info.holds_base:
        return (
            f"--method {method} cannot be trained under --sharding {name}: it calls the base's embedding by itself, "
            "which no process has whole",
            "a method that changes weights, such as lora",
        )
    if demands.reads_4bit_class and quantize not in ("none", "int8") and not info.keeps_4bit_class:
        return (
            f"--method {method} cannot be trained with --quantize {quantize} under --sharding {name}, where PEFT's "
            "layer does not find the scales",
            "--quantize int8",
        )
    return None


def check_carries(sharding: str, demands: Demands) -> None:
    """Raises ValueError if the engine does not support the run, naming the first engine that does."""
    if (refused := refusal(ENGINES[sharding], demands)) is None:
        return
    reason, other = refused
    # similar engines first: a base that is sharded because no process can hold it stays sharded if possible
    able = sorted(
        fitting(lambda info: refusal(info, demands) is None and not info.grouped),
        key=lambda info: info.holds_base != ENGINES[sharding].holds_base,
    )
    raise ValueError(f"{reason}: give {give(able[0])}, or {other}")
