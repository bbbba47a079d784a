"""What a run tells a person: what is about to run, which config.json keeps, and what came of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from launcher.config import as_dict, data_name
from launcher.devices import emulated_bfloat16, unusable_gpus
from launcher.engines.engine import Engine
from launcher.files import disk_errors, write_atomically
from launcher.methods import prompt_tokens, unusual_learning_rate
from launcher.models.quantize import base_size, quantised_share, size
from launcher.models.suitable import reach, unmatched
from launcher.packages import versions
from launcher.reports.read import same_records
from launcher.tasks.base import Samples
from launcher.text import padding
from launcher.training.loop import Training, evaluation_of
from launcher.training.report import before_and_after, read_events
from launcher.training.rounding import lost_updates
from launcher.training.start import Start

log = logging.getLogger(__name__)


def introduce(
    start: Start, identity: dict[str, Any], samples: Samples, engine: Engine, steps: int, token_share: float
) -> None:
    """Write config.json, complete, and show what is about to run."""
    chosen, ranks, say = start.resolved, start.comm.ranks, start.screen.say
    config = chosen.config
    trained, total = sum(size(parameter) for parameter in engine.parameters.values()), base_size(engine.model)
    if ranks.is_main:
        resolved = {
            "prompt_template": samples.template and samples.template.name,
            "dtype": chosen.dtype, "attention": chosen.attention,
            "attention_reason": chosen.attention_reason, "steps": steps, "world_size": ranks.world_size,
            "sharding": chosen.sharding, "base_folder": str(start.base.resolve()), "trained": trained,
            "token_share": round(token_share, 4),
            **({} if chosen.task.counts == "tokens" else {"counts": chosen.task.counts}),
            "device": torch.cuda.get_device_name(chosen.device) if chosen.device.type == "cuda" else "cpu",
        }  # fmt: skip
        whole = {
            "config": as_dict(config), "resolved": resolved, "identity": identity,
            "versions": versions(*chosen.task.packages),
        }  # fmt: skip
        with disk_errors("config.json", start.output, "give --output elsewhere"):
            write_atomically(start.output / "config.json", json.dumps(whole, indent=2) + "\n")
    adapter, size_of_batch = config.adapter, config.optimizer.batch_size
    quantized = config.model.quantize != "none"
    precision = chosen.dtype
    if quantized:
        precision += f", {quantised_share(engine.model):.0%} of them stored in {config.model.quantize}"
    rank = "" if adapter.method == "full" else f", rank {adapter.rank}"
    processes = "1 process" if ranks.world_size == 1 else f"{ranks.world_size} processes ({chosen.sharding})"
    say(f"model: {config.model.model}, {total:,} parameters in {precision}")
    say(f"method: {adapter.method}{rank}, {trained:,} trainable parameters ({trained / max(total, 1):.2%})")
    if count := prompt_tokens(chosen.adapter):
        say(f"{count} trained tokens before each sample; --targets is not used")
    elif hasattr(engine.model, "get_base_model"):
        say(reach(engine.model, start.bare))
        if ranks.is_main and (without := unmatched(engine.model, adapter.targets)):
            log.warning("--targets %s: this model has no such module", " ".join(without))
    say(f"data: {data_name(config.data.data)}, {samples.train.report}")
    say(f"device: {chosen.device.type}, {processes}, attention {chosen.attention} ({chosen.attention_reason})")
    if chosen.device.type == "cpu" and ranks.is_main:
        slow = emulated_bfloat16() if chosen.dtype == "bfloat16" else None
        for reason in filter(None, (unusable_gpus(), slow)):
            log.warning("%s", reason)
    rows = " packed rows" if config.data.packing else ""
    padded = f", {padding(token_share)}" if chosen.task.text else ""
    say(f"training: {steps} steps, batch size {size_of_batch}{rows}{padded}")
    learning_rate = config.optimizer.learning_rate
    if ranks.is_main and (unusual := unusual_learning_rate(adapter.method, chosen.adapter, learning_rate)):
        log.warning(unusual)
    if ranks.is_main and (lost := lost_updates(engine.parameters.values(), learning_rate)):
        log.warning(lost)


def conclude(training: Training, saved: Path, begun: int, ended: int, seconds: float) -> None:
    """The metrics before and after, what the task shows, and what to do next. Called by all ranks.

    begun, ended: the steps before and after this start.
    """
    screen, task, config = training.screen, training.task, training.config
    evaluations = [event for event in read_events(training.output / "events.jsonl") if "eval_loss" in event]
    if evaluations:
        screen.table("Held-out records", *before_and_after(evaluations))
        if others := len(evaluations) - len(same_records(evaluations)):
            screen.say(f"{others} earlier evaluations used other held-out records, and cannot be compared with these")
    training.engine.model.eval()
    if (shown := task.show(evaluation_of(training))) is not None:
        screen.table(*shown)
    waited = training.clock.waited_s / max(training.clock.steps_s, 1e-9)
    which = f", {begun + 1} to {ended}," if 0 < begun < ended else ""
    took = f"{ended - begun} steps{which} in {seconds:.0f} s"
    screen.say(f"finished {took} ({waited:.1%} of the step time waiting for data)")
    screen.say(f"saved {saved}")
    if config.run.report and training.comm.ranks.is_main:
        from launcher.reports.commands import write_report  # matplotlib takes a second to import

        try:
            screen.say(f"report {write_report([training.output])}")
        except ValueError as error:
            log.warning("%s", error)
    for line in task.next_steps(config, training.output, saved):
        screen.say(line)
