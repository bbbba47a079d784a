"""Pretrain the small ViT of `recipes/tiny/vit` from nothing on one CPU core, to tell drawn shapes apart.

OMP_NUM_THREADS=1 python recipes/tiny/pretrain_vit.py --output recipes/tiny/vit
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import shapes
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

SEED = 0
SIZE = 24
BATCH = 64
STEPS = 1600
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.05
TESTED_PER_SHAPE = 40

CONFIG = ViTConfig(
    image_size=SIZE,
    patch_size=6,
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    initializer_range=0.08,  # about 1 / sqrt(hidden_size)
    id2label=dict(enumerate(shapes.NAMES)),
)
PROCESSOR = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})  # to -1 .. 1


def batch(name: str, count: int, hard: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pixels (count, 3, SIZE, SIZE) and labels (count,), seeded by the name."""
    rng = random.Random(name)
    labels = [rng.randrange(len(shapes.NAMES)) for _ in range(count)]
    drawn = b"".join(shapes.draw(rng, shapes.NAMES[label], SIZE, hard).tobytes() for label in labels)
    pixels = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).reshape(count, SIZE, SIZE, 3).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1, torch.tensor(labels)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """All training batches, harder from step to step; the next one is drawn in a thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch, f"{SEED} 0", BATCH, 0.0)
        for step in range(STEPS):
            drawn = ahead.result()
            ahead = pool.submit(batch, f"{SEED} {step + 1}", BATCH, min(1.0, 1.5 * step / STEPS))
            yield drawn


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to zero at STEPS."""
    return LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def train(model: ViTForImageClassification) -> None:
    """AdamW on the class of each drawing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    started, recent = time.monotonic(), 0.0
    for step, (pixels, labels) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent += loss.item() / 100
        if step % 100 == 99:
            print(f"step {step + 1:5d}  loss {recent:.4f}  {time.monotonic() - started:6.1f} s", flush=True)
            recent = 0.0


@torch.no_grad()
def accuracy(model: ViTForImageClassification) -> float:
    """Share of new drawings whose shape is recognised."""
    right = total = 0
    for part in range(TESTED_PER_SHAPE * len(shapes.NAMES) // BATCH):
        pixels, labels = batch(f"test {part}", BATCH)
        right += int((model(pixel_values=pixels).logits.argmax(-1) == labels).sum())
        total += len(labels)
    return right / total


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that gets the model")
    output: Path = parser.parse_args(argv).output

    torch.set_num_threads(1)  # the same sums in the same order wherever it runs
    torch.manual_seed(SEED)
    model = ViTForImageClassification(CONFIG)
    print(f"{model.num_parameters():,} parameters, {len(shapes.NAMES)} shapes")
    train(model)
    print(f"{accuracy(model.eval()):.1%} of new drawings recognised")

    model.vit.to(torch.bfloat16).save_pretrained(output)  # without the head; half the size in git
    PROCESSOR.save_pretrained(output)


if __name__ == "__main__":
    main()
