"""One training run of ours or of TRL's SFTTrainer, measured from inside; `peers.py` starts it, also under torchrun.

    python benchmarks/peer_runs.py tokens SETTINGS.json      # the records as tokens, in the order of our run, for TRL
    python benchmarks/peer_runs.py ours SETTINGS.json
    python benchmarks/peer_runs.py trl SETTINGS.json

Both sides train the same tokens in the same order from the same initial adapter, with AdamW at a constant learning
rate, float32, without gradient checkpointing. Each process writes FOLDER/SIDE-RANK.json: seconds since the command was
given and processor seconds of this process (its threads and children included) when the first step begins and when
each step ends, its peak resident set after each step (VmHWM), and the loss of each step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK, LORA_ALPHA, LOLDU_RANK, SEED, LEARNING_RATE = 16, 16, 64, 42, 1e-3


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_mib() -> float:
    """Peak resident set of this process; ru_maxrss would start at that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


class Clock:
    """What one process of a run measures."""

    def __init__(self, settings: dict[str, Any], side: str):
        self.settings, self.side = settings, side
        self.marks: list[dict[str, float]] = []
        self.losses: list[float] = []

    def mark(self) -> None:
        now, peak = time.time() - self.settings["started"], peak_mib()
        self.marks.append({"seconds": now, "processor_s": processor_seconds(), "peak_mib": peak})

    def write(self, targets: int) -> None:
        rank = os.environ.get("RANK", "0")
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        found = {"marks": self.marks, "losses": self.losses, "targets": targets, "page_faults": faults}
        (Path(self.settings["folder"]) / f"{self.side}-{rank}.json").write_text(json.dumps(found))


def config_of(settings: dict[str, Any]) -> Any:
    from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

    adapter = {
        "lora": AdapterConfig(method="lora", rank=LORA_RANK, targets=tuple(TARGETS), options=("lora_alpha=16",)),
        "loldu": AdapterConfig(method="loldu", rank=LOLDU_RANK, targets=tuple(TARGETS)),
        "full": AdapterConfig(method="full"),
    }[settings["method"]]
    folder = settings["folder"]
    return Config(
        model=ModelConfig(model=settings["model"], dtype="float32"),
        data=DataConfig(data=settings["data"], prompt_template="chat", max_length=settings["max_length"]),
        adapter=adapter,
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE, schedule="constant", batch_size=settings["batch"], seed=SEED,
            micro_batch_size=settings["micro"], max_steps=settings["steps"],
        ),
        run=RunConfig(output=f"{folder}/run", cache=settings["cache"], resume="never", report=False),
    )  # fmt: skip


def tokens(settings: dict[str, Any]) -> None:
    """Write the tokens of the run's batches, in their order, as a data set for TRL, and fill our caches."""
    from datasets import Dataset

    from launcher.data.batches import NO_LOSS, batch_indices
    from launcher.models.files import load_tokenizer
    from launcher.tasks.choose import task_of

    config = config_of(settings)
    tokenizer = load_tokenizer(Path(settings["model"]))
    data = task_of(config).read(config, tokenizer, Path(settings["cache"])).train
    rows = []
    for step in range(settings["steps"]):
        for index in batch_indices(SEED, step, settings["batch"], len(data)):
            span = slice(*data.offsets[index : index + 2].tolist())
            ids, loss = data.ids[span].tolist(), data.loss[span].tolist()
            labels = [token if carries else NO_LOSS for token, carries in zip(ids, loss, strict=True)]
            rows.append({"input_ids": ids, "labels": labels})
    Dataset.from_list(rows).save_to_disk(settings["tokens"])


def ours(settings: dict[str, Any]) -> None:
    from launcher.packages import without_bitsandbytes

    with without_bitsandbytes():  # as `loldu train` starts a run that does not need it
        train_ours(settings)


def train_ours(settings: dict[str, Any]) -> None:
    import launcher.training.run as run

    clock, own = Clock(settings, "ours"), run.train
    targets = 0

    def train(training: Any, resume: Any) -> Any:
        nonlocal targets
        targets = sum(training.batches.at(step).targets for step in range(1, training.steps + 1))
        clock.mark()
        return own(training, resume)

    def after_step(training: Any, event: dict[str, Any]) -> None:
        clock.mark()
        clock.losses.append(event["loss"])

    run.train = train
    if code := run.run(config_of(settings), "peers", on_step=after_step):
        raise SystemExit(code)
    clock.write(targets)


def trl(settings: dict[str, Any]) -> None:
    import torch
    import trl
    from datasets import load_from_disk
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    clock = Clock(settings, "trl")
    data = load_from_disk(settings["tokens"])
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    torch.manual_seed(SEED)
    if settings["method"] == "lora":
        options: Any = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**options))
    elif settings["method"] == "loldu":
        from adapters import LoLDUConfig

        model = get_peft_model(model, LoLDUConfig(r=LOLDU_RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = trl.SFTConfig(
        f"{settings['folder']}/trl", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
        per_device_train_batch_size=settings["micro"], max_steps=settings["steps"], max_grad_norm=1.0, seed=SEED,
        gradient_accumulation_steps=settings["batch"] // settings["micro"] // world, gradient_checkpointing=False,
        bf16=False, use_cpu=True, max_length=settings["max_length"], train_sampling_strategy=settings["sampling"],
        save_strategy="no", report_to="none", disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=10**6, ddp_find_unused_parameters=False if world > 1 else None,
    )  # fmt: skip

    class Marks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 0:
                clock.mark()
            clock.losses.append(0.0)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.mark()

    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=data, callbacks=[Marks()],
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )  # fmt: skip
    own: Callable[..., Any] = trainer.training_step

    def training_step(*args: Any, **rest: Any) -> Any:
        loss = own(*args, **rest)
        # TRL multiplies by the processes, whose gradients DDP averages; a rank's part of the global mean is this
        clock.losses[-1] += float(loss) / world
        return loss

    trainer.training_step = training_step
    trainer.train()
    targets = sum(sum(label >= 0 for label in row) for row in data["labels"])
    clock.write(targets)


if __name__ == "__main__":
    sides = {"tokens": tokens, "ours": ours, "trl": trl}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=sides)
    parser.add_argument("settings", type=Path)
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sides[asked.side](json.loads(asked.settings.read_text()))
