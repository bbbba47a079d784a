"""Train and merge a model of Llama-2-7B's size on a CPU: the memory of a process, in bfloat16 and 4 bits.

    python benchmarks/whole_model.py FOLDER                    # 28 GB of disk in FOLDER, 16 GB of memory, 10 minutes
    python benchmarks/whole_model.py FOLDER --layers 2 --output /tmp/small.json

Writes 6.7 billion random weights to FOLDER/model, unless they exist, and starts the recipe on them: factors of rank
64 for all 224 linear layers, cached in FOLDER, then two steps of two short samples. `loldu merge` of the bfloat16 run,
with its check, follows. Peak memory is the process's largest resident set (VmHWM); the weights are read from mapped
files, whose pages count while they are in use. Writes benchmarks/results/whole_model.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from factorization import about
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

REPO = Path(__file__).resolve().parents[1]
RESULT = REPO / "benchmarks" / "results" / "whole_model.json"
TINY = REPO / "recipes" / "tiny"
WAYS = {"bfloat16": [], "nf4": ["--quantize", "nf4"]}
SHARD_BYTES = 4e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()

    numbers = write_model(options.folder / "model", options.layers)
    rows = {way: run(options.folder, way, extra) for way, extra in WAYS.items()}
    rows["merge"] = merge(options.folder)
    result = about(1, "a model of Llama-2-7B's size on a CPU", f"{torch.get_num_threads()} threads used")
    result |= {"weights": numbers, "ways": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for way, row in rows.items():
        print(f"{way}: peak {row['peak_gb']:.1f} GB, {row['seconds']:.0f} s", *row.get("losses", ()))


def write_model(folder: Path, layers: int) -> int:
    """Write the checkpoint in files of 4 GB; all weights are slices of one block of random numbers."""
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: part.shape for name, part in LlamaForCausalLM(config).named_parameters()}
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TINY / "model" / file, folder / file)
        largest = max(shape.numel() for shape in shapes.values())
        block = torch.randn(largest, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        shard: dict[str, Tensor] = {}
        places: dict[str, str] = {}
        for number, (name, shape) in enumerate(shapes.items()):
            rolled = block.roll(7919 * number)[: shape.numel()].view(shape).clone()
            shard[name] = rolled if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
            if sum(part.nbytes for part in shard.values()) > SHARD_BYTES or number == len(shapes) - 1:
                file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
                save_file(shard, folder / file, metadata={"format": "pt"})
                places |= dict.fromkeys(shard, file)
                shard = {}
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(shape.numel() for shape in shapes.values())


def run(folder: Path, way: str, extra: list[str]) -> dict[str, Any]:
    """One process of the recipe; returns its cost and the held-out losses that it wrote."""
    output = folder / f"run-{way}"
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "--model": folder / "model", "--dtype": "bfloat16", "--data": TINY / "instructions" / "train.json",
        "--prompt-template": "short", "--max-length": 96, "--eval-records": 2, "--show-samples": 0, "--rank": 64,
        "--targets": "all-linear", "--max-steps": 2, "--batch-size": 2, "--output": output, "--cache": folder / "cache",
    }  # fmt: skip
    words = [REPO / "recipes" / "llama2_alpaca_loldu.py", *(word for option in options.items() for word in option)]
    needed = watched([*words, *extra])
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    return needed | {"losses": [round(event["eval_loss"], 4) for event in events if "eval_loss" in event]}


def merge(folder: Path) -> dict[str, Any]:
    """Merge the bfloat16 run with the check, and remove the merged model again."""
    out = folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    needed = watched(["-m", "launcher", "merge", folder / "run-bfloat16", "--out", out])
    shutil.rmtree(out)
    return needed


def watched(words: Sequence[Any]) -> dict[str, Any]:
    """Peak memory and seconds of `python WORDS`, which must succeed."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=REPO)
    peak = 0  # wait4's value would include the memory of this process
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{words[0]} ended with {process.returncode}")
    return {"peak_gb": peak * 1024 / 1e9, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
