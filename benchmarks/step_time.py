"""The cost of an adapter in a training step: ours, PEFT's LoRA, VeRA and RandLoRA, and the frozen base alone.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py                # ours and LoRA, about 5 minutes, one thread
    OMP_NUM_THREADS=1 python benchmarks/step_time.py --others       # the rest, into step_time_others.json
    OMP_NUM_THREADS=1 python benchmarks/step_time.py --rounds 3 --only floor,loldu-64,lora-64 --output /tmp/some.json

A Llama of four layers, hidden size 1024, random weights, 512 tokens, every linear layer but the head adapted; a step is
forward, backward and AdamW. The floor is the frozen base without training, with the gradient of its inputs, which all
others compute too. A round runs each contender once, in random order, so that a slow moment of the machine affects all
of them; a ratio is the median over the rounds of the ratio within a round. `dense` is the reference code's way: it
builds the m x n update at every step. Writes benchmarks/results/step_time.json.

"by count" is the ratio if each multiplication took as long as LoRA's do here: for a weight m x n and a
token LoRA adds 3 r (m + n) of them (A, B; backward: through both, and both gradients), ours 2 r (m + r) (Read and
Write; backward: through both) less the skipped zeros of triangles: Read is one, and at full rank Write is another. Ours
keeps r numbers for each token and weight, from which it computes the core's gradient.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from factorization import about, spread
from peft import LoraConfig, RandLoraConfig, VeraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import LoLDUConfig
from adapters.functions import blocks, in_blocks
from adapters.loldu import loldu_factors

LAYERS, HIDDEN, INNER, VOCABULARY, TOKENS = 4, 1024, 2752, 512, 512
RANKS = (16, 64, 256, 1024)  # 1024 is the smaller side of every weight: full rank
GOALS = {16: 0.97, 64: 0.90, 256: 0.75}  # ours / LoRA
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULTS = Path(__file__).parent / "results" / "step_time.json"


class DenseUpdate(nn.Module):
    """The reference code's layer: F.linear with W + P L_r diag(delta) U_r, rebuilt in every forward."""

    def __init__(self, base: nn.Linear, r: int):
        super().__init__()
        W, r = base.weight.detach(), min(r, *base.weight.shape)
        factors = loldu_factors(W[:, :r], lambda rows: W[rows.long()])
        right = factors.read @ W.float()[factors.pivots.long()]
        self.base, self.left, self.right = base, factors.write.to(W.dtype), right.to(W.dtype)
        self.delta = nn.Parameter(torch.zeros(r))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + (self.left * self.delta.to(self.left.dtype)) @ self.right)


def base_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16, max_position_embeddings=TOKENS)).to(dtype)


def contenders() -> dict[str, Any]:
    """Functions that adapt a model in place, by name; the number in a name is the rank."""
    made: dict[str, Any] = {"floor": lambda model: model.requires_grad_(False)}
    for r in RANKS:
        made[f"loldu-{r}"] = lambda m, r=r: get_peft_model(m, LoLDUConfig(r=r, target_modules=TARGETS))
    for r in (64, 1024):
        options = {"target_modules": TARGETS, "normalize_directions": True}
        made[f"normalised-{r}"] = lambda m, r=r, o=options: get_peft_model(m, LoLDUConfig(r=r, **o))
    for r in RANKS:
        made[f"lora-{r}"] = lambda m, r=r: get_peft_model(m, LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS))
    made["vera-256"] = lambda m: get_peft_model(m, VeraConfig(r=256, target_modules=TARGETS))
    made["randlora-32"] = lambda m: get_peft_model(m, RandLoraConfig(r=32, target_modules=TARGETS))
    for r in (64, 1024):
        made[f"dense-{r}"] = lambda m, r=r: with_dense_updates(m, r)
    return made


def with_dense_updates(model: nn.Module, r: int) -> nn.Module:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            model.set_submodule(name, DenseUpdate(module, r))  # type: ignore[arg-type]
    return model


class Contender:
    """A model with its optimizer and a training step; all contenders share the frozen base's tensors."""

    def __init__(self, base: nn.Module, adapt: Any):
        self.model = adapt(copy.deepcopy(base, {id(p): p for p in base.parameters()})).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        self.times: list[float] = []

    def loss(self) -> Tensor:
        model, generator = self.model, torch.Generator().manual_seed(1)
        ids = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        return model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss

    def step(self) -> float:
        """Processor seconds of one training step. It has one thread, and other processes affect this time less."""
        started = time.process_time()
        self.loss().backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - started

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps for the backward pass, each storage once, without parameters and buffers."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        own |= {m.left.untyped_storage().data_ptr() for m in self.model.modules() if isinstance(m, DenseUpdate)}
        own |= {m.right.untyped_storage().data_ptr() for m in self.model.modules() if isinstance(m, DenseUpdate)}
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t  # kept alive, so that its address is not reused
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        del loss
        return sum(t.untyped_storage().nbytes() for t in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", default="", help="names of contenders, separated by commas")
    parser.add_argument(
        "--others", action="store_true", help="the contenders that are not in the main table, and LoRA r 64"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output or (RESULTS.with_name("step_time_others.json") if options.others else RESULTS)
    torch.set_num_threads(1)

    started, base = time.monotonic(), base_model(getattr(torch, options.dtype))
    main_table = [name for name in contenders() if name.startswith(("floor", "loldu", "lora"))]
    others = ["floor", "lora-64", *(name for name in contenders() if name not in main_table)]
    chosen = options.only.split(",") if options.only else others if options.others else main_table
    field = {name: Contender(base, contenders()[name]) for name in chosen}
    saved = {name: contender.saved_bytes() for name, contender in field.items()}
    for contender in field.values():
        contender.step()  # allocator, optimizer state, thread-local workspaces
    order = random.Random(0)
    for _ in range(options.rounds):
        for name in order.sample(chosen, len(chosen)):
            field[name].times.append(field[name].step())

    rows = [row(name, field, saved) for name in chosen]
    result = about(options.rounds) | {"benchmark": "one training step, adapters against LoRA and the frozen base"}
    result |= {"dtype": options.dtype, "tokens": TOKENS, "model": f"Llama, {LAYERS} layers, {HIDDEN}, {INNER}"}
    result |= {"seconds": round(time.monotonic() - started, 1), "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"written to {output}")


def row(name: str, field: dict[str, Contender], saved: dict[str, int]) -> dict[str, Any]:
    """Times and ratios of one contender, against LoRA of the same rank if it ran."""
    own, (method, _, rank) = field[name].times, name.partition("-")
    found: dict[str, Any] = {
        "name": name,
        "trained": sum(p.numel() for p in field[name].trained),
        "step_s": spread(own),
        "saved_bytes": saved[name],
    }
    if "floor" in field:
        floor = field["floor"].times
        found["of_floor"] = spread([mine / bare for mine, bare in zip(own, floor, strict=True)])
        found["saved_of_floor"] = saved[name] / saved["floor"]
    if (lora := field.get(f"lora-{rank}")) and method != "lora":
        found["of_lora"] = spread([mine / other for mine, other in zip(own, lora.times, strict=True)])
        if "floor" in field:
            bare = median(floor)
            found["overhead_of_loras"] = (median(own) - bare) / (median(lora.times) - bare)
            if method == "loldu":
                added = median(lora.times) / bare - 1
                found["of_lora_by_count"] = (1 + multiplications_of_loras(int(rank)) * added) / (1 + added)
    return found


def multiplications_of_loras(r: int) -> float:
    """Multiplications that ours adds to a step, over those that LoRA of the same rank adds."""
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]
    triangle = sum(end * (end - at) for at, end in blocks(r)) if in_blocks(torch.empty(TOKENS, r)) else r * r
    return sum(2 * (triangle + (triangle if m == r else r * m)) for m, _ in shapes) / sum(
        3 * r * (m + n) for m, n in shapes
    )


def show(result: dict[str, Any]) -> None:
    title = f"{result['machine']}; {result['dtype']}; median of {result['repetitions']} rounds (min-max)"
    table = Table(
        "", "trained", "step, ms", "/ floor", "/ LoRA", "by count", "goal", "overhead / LoRA's", "saved", title=title
    )
    for row in result["rows"]:
        ms = {key: value * 1e3 for key, value in row["step_s"].items()}
        rank = row["name"].rpartition("-")[2]
        of_lora = row.get("of_lora")
        table.add_row(
            row["name"],
            f"{row['trained']:,}",
            f"{ms['median']:.0f} ({ms['min']:.0f}-{ms['max']:.0f})",
            f"{row['of_floor']['median']:.3f}" if "of_floor" in row else "",
            f"{of_lora['median']:.3f} ({of_lora['min']:.3f}-{of_lora['max']:.3f})" if of_lora else "",
            f"{row['of_lora_by_count']:.3f}" if "of_lora_by_count" in row else "",
            f"{GOALS.get(int(rank), '')}" if of_lora and row["name"].startswith("loldu") else "",
            f"{row['overhead_of_loras']:.2f}" if "overhead_of_loras" in row else "",
            f"{row['saved_bytes'] / 1e6:.0f} MB, {row.get('saved_of_floor', float('nan')):.2f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
