"""Everything that follows from a config and the machine: resolved once, before a file is read or a device is used."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType

from adapters.schedule import has_schedule
from launcher.config import Config
from launcher.data import batches
from launcher.devices import own_device
from launcher.engines.choose import Demands, check_carries, check_offload, check_sharding
from launcher.factorization.cache import default_folder
from launcher.files import user_path
from launcher.methods import peft_config, prompt_tokens
from launcher.models.build import choose_attention, choose_dtype
from launcher.models.quantize import READ_4BIT_CLASS, check_method, check_quantize
from launcher.optimizers import check_optimizer
from launcher.processes import Ranks
from launcher.tasks.base import Task
from launcher.tasks.choose import task_of
from launcher.training.report import check_trackers


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A config, and what follows from it for this process. It does not change during the run."""

    config: Config
    ranks: Ranks
    task: Task
    adapter: PeftConfig | None  # as requested: the run trains a copy that knows its base; None: full fine-tuning
    sharding: str  # the engine
    dtype: str  # of the base
    attention: str  # transformers' name
    attention_reason: str
    device: torch.device
    cache: Path  # folder of factors and of tokenised data
    on_gpu: bool

    @property
    def how(self) -> dict[str, Any]:
        """How the base computes."""
        return {"dtype": self.dtype, "attention": self.attention}

    @property
    def joins(self) -> bool:
        """Whether a micro-batch is one row without padding, if the model allows it: see `launcher.data.joined`.

        Not on GPUs, which add up the gradients of a key that several samples read in no fixed order.
        """
        rows = self.task.flattens and not self.config.data.packing and not prompt_tokens(self.adapter)
        return rows and self.attention == "sdpa" and not self.on_gpu

    def steps(self, rows: int) -> int:
        """Optimizer steps of the run on this number of rows (samples, or packed rows)."""
        optimizer = self.config.optimizer
        return optimizer.max_steps or math.ceil(optimizer.epochs * rows / optimizer.batch_size)


def resolve(config: Config, ranks: Ranks, *, gpus: bool | None = None) -> Resolved:
    """Choose what the config leaves open, and check it. No file is read and no device touched; the same on every rank.

    gpus: whether the run will have GPUs, which compute in bfloat16; None: look at this machine. Raises ValueError for
    settings that do not fit together, the number of processes, or this machine.
    """
    on_gpu = torch.cuda.is_available() if gpus is None else gpus
    task = task_of(config)
    sharding = check_sharding(config.run.sharding, ranks, config.run.shard_size)
    adapter = peft_config(config.adapter, task.peft_type)
    check_carried(config, adapter, sharding)
    check_offload(config.run.cpu_offload, sharding, on_gpu=on_gpu)
    batches.check_batch(config.optimizer.batch_size, ranks.world_size)
    task.check(config, adapter)
    check_optimizer(config.optimizer.optimizer, dense=adapter is None)
    if prompt_tokens(adapter):
        check_prompt(config, adapter, labels=task.labels)
    check_trackers(config.run.trackers)
    dtype = choose_dtype(config.model.dtype, narrow=gpus)
    if on_gpu and not torch.cuda.is_available() and config.model.attention != "eager":
        attention, reason = "sdpa", "for GPUs that are elsewhere; every fused kernel takes the same memory"
    else:
        attention, reason = choose_attention(config.model.attention, on_gpu=on_gpu, dtype=dtype)
    return Resolved(
        config=config,
        ranks=ranks,
        task=task,
        adapter=adapter,
        sharding=sharding,
        dtype=dtype,
        attention=attention,
        attention_reason=reason,
        device=own_device(ranks.local_rank, ranks.local_world_size),
        cache=user_path(config.run.cache) if config.run.cache else default_folder(),
        on_gpu=on_gpu,
    )


def check_carried(config: Config, adapter: PeftConfig | None, sharding: str) -> None:
    """Raises ValueError if the engine does not support this method, or a base in this precision."""
    quantize = config.model.quantize
    check_quantize(quantize, cpu_offload=config.run.cpu_offload)
    check_method(adapter, quantize)
    demands = Demands(
        method=config.adapter.method,
        quantize=quantize,
        compiled=config.model.compile,
        from_gradients=getattr(adapter, "factors_from_gradients", False),
        reads_4bit_class=getattr(adapter, "peft_type", "").lower() in READ_4BIT_CLASS,
        optimizer=config.optimizer.optimizer,
        reads_weights=getattr(adapter, "reads_weights", False),
        has_schedule=has_schedule(adapter),
        trains_prompt=prompt_tokens(adapter) > 0,
    )
    check_carries(sharding, demands)


def check_prompt(config: Config, adapter: Any, *, labels: bool) -> None:
    """Raises ValueError for settings that do not work with trained tokens before each sample."""
    method = config.adapter.method
    if labels:
        raise ValueError(
            f"--method {method} hides the padding from a classification head, which would read the wrong token: give a "
            "method that changes weights, such as lora"
        )
    if config.data.packing:
        raise ValueError(
            f"--method {method} puts trained tokens before each row, and --packing several samples into one: leave "
            "--packing out"
        )
    if config.model.gradient_checkpointing and adapter.peft_type == PeftType.PREFIX_TUNING:
        raise ValueError(
            f"--method {method} hands keys and values to each layer, which --gradient-checkpointing cannot compute "
            "again: leave --gradient-checkpointing out, or give prompt_tuning or p_tuning"
        )


def check_context(config: Config, settings: Any, room: int | None = None) -> None:
    """Raises ValueError if samples of --max-length, with a trained prompt, do not fit the model.

    settings are the model's config; room is the context of the built model, which may be smaller.
    """
    room = room or getattr(settings.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    prompt = prompt_tokens(peft_config(config.adapter))
    if config.data.max_length + prompt > room:
        before = f" and {prompt} trained tokens are" if prompt else " is"
        raise ValueError(
            f"--max-length {config.data.max_length}{before} more than this model's context of {room} tokens"
        )
