"""Peak memory of each rank under fsdp2 while loading and training, against its shard and the largest layer.

    OMP_NUM_THREADS=1 python benchmarks/sharded_memory.py --tokenizer DIR --data FILE      # about 4 minutes

A random Llama of 8 layers and hidden size 1024 (float32), rank 64 on all linear layers, one row of 128 tokens for each
rank and step, on 2 and 4 gloo processes. Memory is RssAnon of /proc, sampled every 2 ms, above what the process held
before the model's skeleton; pages of the checkpoint that are only mapped do not count. malloc returns large blocks at
once (MALLOC_MMAP_THRESHOLD_), since blocks that it keeps would count. The goal while loading is the shard and the
largest layer; while training it is the shard, two gathered layers, the root unit and the activations (measured in one
process without sharding); 10 % is added to each. Writes benchmarks/results/sharded_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.engines import fsdp2
from launcher.engines.fsdp2 import decoder_layers
from launcher.models.quantize import size
from launcher.training import run as run_module

RESULTS = Path(__file__).parent / "results" / "sharded_memory.json"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=Path, help="a rank of the measurement; used by the benchmark itself")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.data)
        return
    with tempfile.TemporaryDirectory(prefix="sharded-memory-") as folder:
        write_model(Path(folder) / "model", options.tokenizer, layers=8)
        ranks = [rank for processes in (1, 2, 4) for rank in measure(Path(folder), options.data, processes)]
    # Memory of training besides the model: samples, activations, gradients of the cores.
    activations = ranks[0]["added_mib"]
    rows = []
    for rank in ranks[1:]:
        load = rank["shard_mib"] + rank["layer_mib"]
        train = rank["shard_mib"] + 2 * rank["layer_mib"] + rank["root_mib"] + activations
        rows.append(
            {name: round(value, 1) for name, value in rank.items()}
            | {"load / goal": round(rank["load_mib"] / (1.1 * load), 3)}
            | {"train / goal": round(rank["train_mib"] / (1.1 * train), 3)}
        )
        print(rows[-1], flush=True)
    result = about("peak memory of each rank under fsdp2") | {"activations_mib": round(activations, 1), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


def measure(folder: Path, data: Path, processes: int) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, __file__, f"--worker={folder}", f"--data={data}"],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [json.loads((folder / f"rank-{rank}-of-{processes}.json").read_text()) for rank in range(processes)]


def worker(folder: Path, data: Path) -> None:
    """One rank: an ordinary run, with a thread that measures it."""
    torch.set_num_threads(1)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = Config(
        model=ModelConfig(model=str(folder / "model")),
        data=DataConfig(data=str(data), prompt_template="short", max_length=128, packing=True),
        adapter=AdapterConfig(rank=64, targets=("all-linear",)),
        optimizer=OptimizerConfig(batch_size=processes, max_steps=4),
        run=RunConfig(output=str(folder / f"run-{processes}"), cache=str(folder / "cache")),
    )
    if processes > 1:
        config = replace(config, run=replace(config.run, sharding="fsdp2"))
    watch, found = Watch(), {}
    skeleton, wrap, train = fsdp2.skeleton, run_module._engine, run_module.train

    def watched_skeleton(*args: Any, **values: Any) -> Any:
        watch.begin()
        model = skeleton(*args, **values)
        layers = decoder_layers(model.get_base_model())
        whole, layer = tensor_bytes(model), max(tensor_bytes(layer) for layer in layers)
        found.update(model_mib=whole / MIB, shard_mib=whole / processes / MIB, layer_mib=layer / MIB)
        found.update(root_mib=(whole - sum(tensor_bytes(layer) for layer in layers)) / MIB)
        return model

    def watched_engine(*args: Any, **values: Any) -> Any:
        found["load_mib"] = watch.peak()
        return wrap(*args, **values)

    def watched_train(*args: Any, **values: Any) -> Any:
        watch.highest, before = 0, watch.peak()
        watch.highest = 0
        status = train(*args, **values)
        found["train_mib"] = watch.peak()
        found["added_mib"] = found["train_mib"] - before
        return status

    fsdp2.skeleton, run_module._engine, run_module.train = watched_skeleton, watched_engine, watched_train
    assert run_module.run(config, "sharded-memory") == 0
    found |= {"processes": processes, "rank": rank}
    (folder / f"rank-{rank}-of-{processes}.json").write_text(json.dumps(found))


class Watch:
    """The peak of this process's anonymous memory since begin(), less its memory then."""

    def __init__(self) -> None:
        self.begin()
        threading.Thread(target=self._look, daemon=True).start()

    def begin(self) -> None:
        self.base = self.highest = anonymous_bytes()

    def peak(self) -> float:
        return (max(self.highest, anonymous_bytes()) - self.base) / MIB

    def _look(self) -> None:
        while True:
            self.highest = max(self.highest, anonymous_bytes())
            time.sleep(0.002)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def tensor_bytes(module: torch.nn.Module) -> int:
    return sum(size(parameter) * parameter.element_size() for parameter in module.parameters())


def write_model(folder: Path, tokenizer: Path, *, layers: int) -> Path:
    """A random float32 Llama of hidden size 1024 with the given tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.glob("token*"):
        shutil.copy(file, folder)
    return folder


def about(name: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "benchmark": name,
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread a process, gloo",
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
