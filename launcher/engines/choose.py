"""Which engine a run uses: what was asked for, what the launcher was configured for, the number of processes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

from launcher.processes import Ranks


def check_sharding(
    wanted: str | None, ranks: Ranks, shard_size: int = 0, environ: Mapping[str, str] = os.environ
) -> str:
    """The sharding to use: what is wanted, else what accelerate launch was configured for, else by the world size.

    Raises ValueError, with the arithmetic, where it does not fit the number of processes or the launcher.
    """
    world, launched = ranks.world_size, launched_for(environ)
    if launched and wanted not in (None, launched) and (launched, wanted) != ("fsdp2", "hsdp"):
        raise ValueError(
            f"accelerate launch was configured for {launched}, but --sharding is {wanted}: leave --sharding out, or "
            f"give --config_file recipes/accelerate/{'ddp' if wanted == 'none' else wanted}.yaml"
        )
    wanted = wanted or launched or ("ddp" if world > 1 else "none")
    if wanted == "none" and world > 1:
        raise ValueError(f"--sharding none is for one process, but WORLD_SIZE is {world}: give --sharding ddp")
    if wanted in ("zero2", "zero3"):
        missing = [name for name in ("deepspeed", "ninja") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"--sharding {wanted} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if wanted == "hsdp" and world % (size := shard_size or ranks.local_world_size):
        raise ValueError(
            f"--sharding hsdp: {world} processes / {size} that share one copy = {world / size:.2f} copies, not a whole "
            "number: give --shard-size a divisor, or --sharding fsdp2"
        )
    if shard_size and wanted != "hsdp":
        raise ValueError(f"--shard-size {shard_size} goes with --sharding hsdp, not {wanted}")
    return wanted


def check_offload(wanted: bool, sharding: str, *, on_gpu: bool) -> None:
    """Raises ValueError where --cpu-offload would do nothing."""
    if wanted and sharding not in ("fsdp2", "hsdp", "zero2", "zero3"):
        raise ValueError(
            f"--cpu-offload goes with --sharding fsdp2, hsdp, zero2 or zero3, {sharding} keeps all on the GPU: leave "
            "it out, or change --sharding"
        )
    if wanted and not on_gpu:
        raise ValueError(
            "--cpu-offload keeps in main memory what would lie on the GPU, and torch finds no GPU here: leave it out"
        )


def launched_for(environ: Mapping[str, str]) -> str | None:
    """The sharding in the configuration of accelerate launch, None where it names none (or did not start this)."""
    if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if (version := environ.get("FSDP_VERSION", "1")) != "2":
            raise ValueError(f"accelerate's configuration has fsdp_version: {version}, only 2 is built: write 2 there")
        return "fsdp2"
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ or stage not in ("2", "3"):
            raise ValueError(
                f"accelerate's configuration asks for DeepSpeed with zero_stage {stage}: write zero_stage: 2 or 3 "
                "there and no deepspeed_config_file, whose settings would not count (see recipes/accelerate)"
            )
        return f"zero{stage}"
    return None
