"""The engines by name, and what each can do. Plain data, read before torch or DeepSpeed is imported.

An engine is one file in this folder and one line here (docs/add-an-engine.md). Checks, errors and the command line read
this table; no file outside this folder compares an engine's name.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass

from launcher.shipped import accelerate_file


@dataclass(frozen=True)
class EngineInfo:
    """What is known about an engine without importing it."""

    name: str  # the value of --sharding
    where: str  # "module:Class" of the engine, imported when a run uses it
    _: KW_ONLY
    holds_base: bool = True  # each process holds the whole base model and can run it alone
    gathers: bool = False  # a forward pass is a collective: all ranks must make the same number of passes
    averages: bool = False  # backward averages the gradients over the ranks
    one_process_only: bool = False
    any_optimizer: bool = False  # steps whole parameters, with any of the optimizers
    grouped: bool = False  # the processes of a group (--shard-size) share one copy of the base
    carries_quantised: bool = True  # runs a base that bitsandbytes quantised
    compiles: bool = True  # runs decoder layers that torch.compile compiled
    keeps_4bit_class: bool = True  # packed weights stay bitsandbytes' Params4bit, which holds their scales
    maps_files: bool = False  # a frozen base stays mapped from its files: processes of a machine share the pages
    maps_large_blocks: bool = False  # on a CPU: gathered layers would leave a hole in the heap after each layer
    offloads: tuple[str, ...] = ()  # what --cpu-offload moves: "parameters", "optimizer"
    packages: tuple[str, ...] = ()  # Python packages that it needs besides torch
    accelerate: str = "ddp"  # recipes/accelerate/NAME.yaml starts it

    @property
    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


BOTH = ("parameters", "optimizer")
ENGINES: dict[str, EngineInfo] = {
    info.name: info
    for info in (
        EngineInfo("none", "launcher.engines.replicated:Replicated", one_process_only=True, any_optimizer=True,
                   maps_files=True),
        EngineInfo("ddp", "launcher.engines.replicated:Replicated", any_optimizer=True, maps_files=True),
        EngineInfo("fsdp2", "launcher.engines.fsdp2:FullyShard", holds_base=False, gathers=True, averages=True,
                   keeps_4bit_class=False, maps_large_blocks=True, offloads=BOTH, accelerate="fsdp2"),
        EngineInfo("hsdp", "launcher.engines.fsdp2:FullyShard", holds_base=False, gathers=True, averages=True,
                   grouped=True, keeps_4bit_class=False, maps_large_blocks=True, offloads=BOTH, accelerate="fsdp2"),
        EngineInfo("zero2", "launcher.engines.zero:Zero2", averages=True, offloads=("optimizer",),
                   packages=("deepspeed", "ninja"), accelerate="zero2"),
        EngineInfo("zero3", "launcher.engines.zero:Zero3", holds_base=False, gathers=True, averages=True,
                   carries_quantised=False, compiles=False, maps_large_blocks=True, offloads=BOTH,
                   packages=("deepspeed", "ninja"), accelerate="zero3"),
    )
}  # fmt: skip


def fitting(fits: Callable[[EngineInfo], bool]) -> Iterator[EngineInfo]:
    """The engines to suggest if one is refused: those that fit, whose packages are installed, in the order of
    the table. An engine for one process only is never among them."""
    return (info for info in ENGINES.values() if fits(info) and not info.one_process_only and not info.missing)


def give(info: EngineInfo, environ: Mapping[str, str] = os.environ) -> str:
    """What to type to get this engine."""
    if configured_by_accelerate(environ) and configured_by_accelerate(environ) != info.accelerate:
        return f"accelerate launch --config_file {accelerate_file(info.accelerate)} with --sharding {info.name}"
    return f"--sharding {info.name}"


def give_first(fits: Callable[[EngineInfo], bool]) -> str:
    """What to type to get the first engine that fits. There always is one: ddp supports everything."""
    return give(next(fitting(fits)))


def names(fits: Callable[[EngineInfo], bool] = lambda info: True, word: str = "or") -> str:
    """`fsdp2, hsdp or zero3`: the engines that fit."""
    *first, last = [info.name for info in ENGINES.values() if fits(info)]
    return f"{', '.join(first)} {word} {last}" if first else last


def configured_by_accelerate(environ: Mapping[str, str]) -> str | None:
    """The file of recipes/accelerate with the sharding for which accelerate launch was configured; None if it names
    no sharding, or did not start this process. Raises ValueError for a configuration that no engine here supports.
    """
    if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if (version := environ.get("FSDP_VERSION", "1")) != "2":
            raise ValueError(
                f"accelerate's configuration has fsdp_version: {version}; only 2 is supported: set it to 2"
            )
        return "fsdp2"
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ or stage not in ("2", "3"):
            raise ValueError(
                f"accelerate's configuration asks for DeepSpeed with zero_stage {stage}: set zero_stage to 2 or 3, and "
                "remove deepspeed_config_file, whose settings would be ignored (see recipes/accelerate)"
            )
        return f"zero{stage}"
    return None
