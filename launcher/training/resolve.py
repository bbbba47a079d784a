"""What can be wrong with a run before anything is made: its options, and the model's context."""

from __future__ import annotations

import sys
from typing import Any

import torch

from adapters.config import LoRASBConfig
from launcher.config import Config
from launcher.data import batches
from launcher.engines.choose import Demands, check_carries, check_offload, check_sharding
from launcher.models.build import choose_attention, choose_dtype
from launcher.models.quantize import READ_4BIT_CLASS, check_method, check_quantize
from launcher.processes import Ranks
from launcher.tasks import label
from launcher.training.methods import peft_config
from launcher.training.report import check_trackers


def check(config: Config, ranks: Ranks) -> None:
    """Everything that can be wrong before a file or a device is touched; the same on every rank."""
    sharding = check_sharding(config.run.sharding, ranks, config.run.shard_size)
    check_carried(config, sharding)
    check_offload(config.run.cpu_offload, sharding, on_gpu=torch.cuda.is_available())
    batches.check_batch(config.optimizer.batch_size, ranks.world_size)
    if config.data.text_columns:
        label.check_head(config)
    check_trackers(config.run.trackers)
    dtype = choose_dtype(config.model.dtype)
    choose_attention(config.model.attention, on_gpu=torch.cuda.is_available(), dtype=dtype)


def check_carried(config: Config, sharding: str) -> None:
    """Whether the engine can carry this method on a base in this precision."""
    quantize = config.model.quantize
    check_quantize(quantize, cpu_offload=config.run.cpu_offload)
    adapter = peft_config(config.adapter)
    check_method(adapter, quantize)
    demands = Demands(
        method=config.adapter.method,
        quantize=quantize,
        from_gradients=isinstance(adapter, LoRASBConfig),
        reads_4bit_class=getattr(adapter, "peft_type", "").lower() in READ_4BIT_CLASS,
    )
    check_carries(sharding, demands)


def check_context(config: Config, settings: Any, room: int | None = None) -> None:
    """Whether the samples fit the model, by its config; room says it where the built model has less."""
    room = room or getattr(settings.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if config.data.max_length > room:
        raise ValueError(f"--max-length {config.data.max_length} is more than this model's context of {room} tokens")
    window = getattr(settings, "sliding_window", None)
    if config.data.packing and window and window < config.data.max_length:
        raise ValueError(f"packing cannot honour this model's sliding window of {window}: leave --packing out")
