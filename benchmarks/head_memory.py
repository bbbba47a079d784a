"""Peak memory of a training step with many classes: the loss computed in the head, against logits of all positions.

    OMP_NUM_THREADS=1 python benchmarks/head_memory.py              # 128,256 classes, about 2 minutes, 4 GB
    OMP_NUM_THREADS=1 python benchmarks/head_memory.py --classes 49152 --rounds 1 --output /tmp/some.json

A Llama of four layers, hidden size 1024, random weights, float32, tied head, LoRA of rank 16 on all linear layers; 8
rows of 107 tokens, 55 % of which carry loss, as Alpaca's do. Each step runs in a separate process, whose peak
resident set (VmHWM) is cleared before it: what is printed is how far the step rises above what the process held. Both
ways are run in turns, with their losses and processor seconds beside. Writes benchmarks/results/head_memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from factorization import about, spread
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.models.head_loss import HeadLoss

RESULT = Path(__file__).parent / "results" / "head_memory.json"
ROWS, TOKENS, WITH_LOSS, GOAL = 8, 107, 0.55, 0.5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--way", choices=("head", "logits"), help="one step in this process, as JSON")
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(step(asked.way, asked.classes)))
        return
    found: dict[str, list[dict[str, float]]] = {"head": [], "logits": []}
    for _ in range(asked.rounds):
        for way, runs in found.items():
            command = [sys.executable, __file__, "--way", way, "--classes", str(asked.classes)]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    pairs = list(zip(found["head"], found["logits"], strict=True))
    assert all(abs(head["loss"] - logits["loss"]) < 1e-5 * logits["loss"] for head, logits in pairs)
    result = about(asked.rounds, "peak memory of a step, loss in the head against logits") | {"classes": asked.classes}
    result |= {"ways": found, "ratio": spread([head["peak_mib"] / logits["peak_mib"] for head, logits in pairs])}
    result["processor_s_ratio"] = spread([head["processor_s"] / logits["processor_s"] for head, logits in pairs])
    asked.output.write_text(json.dumps(result, indent=1) + "\n")
    for way, runs in found.items():
        peaks = ", ".join(f"{run['peak_mib']:.0f}" for run in runs)
        print(f"{way}: {peaks} MiB above the model, loss {runs[0]['loss']:.6f}")
    print(f"ratio {result['ratio']['median']:.2f}, goal {GOAL}; written to {asked.output}")


def step(way: str, classes: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4, "num_attention_heads": 16}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=classes, tie_word_embeddings=True, **sizes))
    model: Any = get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM")).train()
    ids = torch.randint(0, classes, (ROWS, TOKENS))
    labels = torch.where(torch.arange(TOKENS) < TOKENS * (1 - WITH_LOSS), -100, ids)
    forward = HeadLoss(model)
    if way == "logits":
        forward.usable = False
    few = {"input_ids": ids[:1, :9], "labels": labels[:1, :9].clone().fill_(7)}
    forward(**few, num_items_in_batch=8, use_cache=False).loss.backward()  # checks the head; buffers are made
    Path("/proc/self/clear_refs").write_text("5")
    held, started = memory("VmRSS"), time.process_time()
    loss = forward(input_ids=ids, labels=labels, num_items_in_batch=int((labels >= 0).sum()), use_cache=False).loss
    loss.backward()
    spent = time.process_time() - started
    return {"peak_mib": memory("VmHWM") - held, "held_mib": held, "loss": float(loss), "processor_s": spent}


def memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
