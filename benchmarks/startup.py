"""How long a run takes until its first step with factors and tokens cached, against loading the base alone.

    python benchmarks/startup.py [--hidden 2048 --layers 8] [--repeats 5]     # 1 GB of disk while it runs

Alternates between a process that imports transformers and loads the base, and the recipe until its first step. Both
times start at the command, so both include Python's imports. Prints medians, their ratio and the spread. The base is
random, bfloat16, on disk; both processes touch every page of it, because mapping a file does not load it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
RESULT = REPO / "benchmarks" / "results" / "startup.json"
TINY = REPO / "recipes" / "tiny"

MAKE = """
import sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
folder, tokenizer, hidden, layers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
                     num_attention_heads=hidden // 128, vocab_size=512, max_position_embeddings=512)
torch.manual_seed(0)
LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
"""
TOUCH = "sum(int(p.detach().view(torch.int16).flatten()[::2048].sum()) for p in model.parameters() if p.itemsize == 2)"
BASE = f"""
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
{TOUCH}
"""
OURS = f"""
import os, sys
sys.path.insert(0, {str(REPO / "recipes")!r})
sys.modules["bitsandbytes"] = None  # as the recipe does before it imports the next line
import launcher.training.run as run
import torch
from launcher.start import run_recipe
from llama2_alpaca_loldu import llama2_alpaca, tiny

def first_step(job, resume):
    model = job.engine.model
    {TOUCH}
    os._exit(0)

run.train = first_step
raise SystemExit(run_recipe("llama2_alpaca_loldu", llama2_alpaca, tiny, sys.argv[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/model"
        run(MAKE, folder, str(TINY / "model"), str(asked.hidden), str(asked.layers))
        options = [
            f"--model={folder}", f"--data={TINY / 'instructions' / 'train.json'}", "--dtype=bfloat16",
            "--eval-records=0", f"--rank={asked.rank}", "--targets", "all-linear", "--max-length=192",
            "--prompt-template=short", "--batch-size=1", "--max-steps=1", f"--cache={place}/cache",
        ]  # fmt: skip
        run(OURS, *options, f"--output={place}/warm")  # makes the factors and the tokens
        seconds: dict[str, list[float]] = {"base": [], "ours": []}
        for number in range(asked.repeats):
            seconds["base"].append(run(BASE, folder))
            seconds["ours"].append(run(OURS, *options, f"--output={place}/run-{number}"))
        size = os.path.getsize(f"{folder}/model.safetensors")
    base, ours = (statistics.median(found) for found in seconds.values())
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout.strip(),
        "asked": vars(asked), "base_bytes": size, "load_average": os.getloadavg()[0],
        "seconds": seconds, "medians": {"base": base, "ours": ours},
        "ratio": ours / base, "ratios": [ours_s / base_s for base_s, ours_s in zip(*seconds.values(), strict=True)],
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"base of {size / 1e9:.2f} GB alone {base:.2f} s, until the first step {ours:.2f} s: ratio {ours / base:.3f}")
    print(f"ratios of the pairs {min(result['ratios']):.3f} to {max(result['ratios']):.3f}; in {RESULT}")


def run(script: str, *arguments: str) -> float:
    """Seconds of this code in a new Python process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
