"""The cost of a checkpoint at every step: how long training waits for it, against the time of a step.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_cost.py --tokenizer DIR --data FILE      # about 2 minutes

A random Llama of 4 layers and hidden size 1024 (float32), rank 64 on all linear layers, 512 tokens a step, one process
and one thread; once with checkpoints written before the next step, once in the background (--async-save). After each
save, one file of the same size is written and synced, to show the disk's share of the time, which is most of it on a
busy disk. Medians over the steps. Writes benchmarks/results/checkpoint_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.sharded_memory import about, write_model
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.training.checkpoint import Saver
from launcher.training.run import run

RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="checkpoint-cost-") as folder:
        model = write_model(Path(folder) / "model", options.tokenizer, layers=4)
        rows = [
            cost(Path(folder), model, options.data, options.steps, background=background)
            for background in (False, True)
        ]
    result = about("checkpoint at every step, 4 layers of 1024, 512 tokens a step") | {"rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row)
    print(f"written to {options.output}")


def cost(folder: Path, model: Path, data: Path, steps: int, *, background: bool) -> dict[str, Any]:
    output = folder / f"background-{background}"
    config = Config(
        model=ModelConfig(model=str(model)),
        data=DataConfig(data=str(data), prompt_template="short", max_length=512, packing=True),
        adapter=AdapterConfig(rank=64, targets=("all-linear",)),
        optimizer=OptimizerConfig(batch_size=1, max_steps=steps),
        run=RunConfig(output=str(output), cache=str(folder / "cache"), save_every=1, async_save=background),
    )
    waited: list[float] = []
    floor: list[float] = []
    ended: list[float] = []
    save = Saver.save

    def timed_save(*args: Any, **values: Any) -> None:
        start = time.perf_counter()
        save(*args, **values)
        waited.append(time.perf_counter() - start)
        if not background:
            floor.append(one_file(folder / "floor"))

    Saver.save = timed_save  # type: ignore[method-assign]
    try:
        assert run(config, "checkpoint-cost", on_step=lambda training, event: ended.append(time.perf_counter())) == 0
    finally:
        Saver.save = save  # type: ignore[method-assign]
    step_s = median(later - earlier for earlier, later in pairwise(ended))
    wait_s = median(waited[1:])
    last = output / "checkpoints" / f"step-{steps:06d}"
    return {
        "in the background": background,
        "step_s": round(step_s, 4),
        "waited_s": round(wait_s, 5),
        **({"one file to the disk, s": round(median(floor), 5)} if floor else {}),
        "share of the step": round(wait_s / (step_s - wait_s), 5),
        "checkpoint_bytes": sum(file.stat().st_size for file in last.iterdir()),
        "steps": steps,
    }


def one_file(path: Path) -> float:
    """Seconds until a new file of 50 kB, about a checkpoint, is on the disk."""
    with open(path, "wb") as file:
        file.write(bytes(50_000))
        file.flush()
        start = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
