"""What three methods that train low-rank weights do on the embedded model, in short forms, beside the alternatives.

    python benchmarks/studies.py    # benchmarks/results/studies.json; two minutes on an idle core

They compress or pretrain a model and leave no adapter, so they are studied here and are no `--method`. All runs: the
embedded model, its instructions, STEPS steps of 16, AdamW with cosine decay, the 28 projections, one seed; the loss is
that of the answers of 120 held-out records.

    SST (arXiv 2405.15481)      W = U diag(s) V^T: all s and, for a while, the r columns of U and V drawn with chance
                                s; their gradients leave s out; columns are normalised, and W is factored anew at each
                                draw. Beside LoRA of the same rank and full fine-tuning
    Maestro (2308.14929)        W = U V^T: at each step one layer uses its first b directions alone, b drawn (ordered
                                dropout), with a group lasso on what is beyond each b. Then every layer is cut to its
                                first directions
    Trained Rank Pruning        full fine-tuning; every 10 steps each W becomes its best approximation of the rank that
    (1910.04576)                is kept, and between them a step along the nuclear norm's subgradient shrinks it. Then
                                cut to that rank

The last two are compared with cutting the base, and the fully fine-tuned model, by SVD at the same rank.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from launcher.config import DataConfig
from launcher.data import batches, encode, records
from launcher.models.files import load_tokenizer

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny"
FILE = Path(__file__).with_name("results") / "studies.json"
STEPS, BATCH, HELD_OUT, RANK = 30, 16, 120, 8
KEPT = (0.25, 0.5)  # shares of each weight's rank
RATES = {"full": (1e-3,), "lora": (3e-3, 1e-2), "sst": (1e-3, 3e-3)}
DRAW = 10  # steps between two draws of SST, and between two cuts of Trained Rank Pruning
LASSO, NUCLEAR = 1e-4, 1e-2

Hook = Callable[[int, float], None]  # called with the step and its learning rate


class Setting:
    """The data, the base, and a loop."""

    def __init__(self) -> None:
        how, tokenizer = DataConfig(prompt_template="short", max_length=192), load_tokenizer(TINY / "model")
        read = lambda name: records.load_records(str(TINY / "instructions" / name))  # noqa: E731
        self.train = encode.encode(read("train.json")[: STEPS * BATCH], tokenizer, how)
        self.held_out = encode.encode(read("test.json")[:HELD_OUT], tokenizer, how)

    def base(self) -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        model.eval()
        total = targets = 0.0
        for start in range(0, HELD_OUT, 40):
            batch = batches.collate(self.held_out, range(start, start + 40), pad_id=0)
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch, use_cache=False).loss) * count
            targets += count
        return total / targets

    def fit(self, model: Any, rate: float, before: Hook, update: Hook) -> None:
        """STEPS steps: before(step, rate), a backward pass, update(step, rate)."""
        model.train()
        for step in range(STEPS):
            now = rate * (1 + math.cos(math.pi * step / STEPS)) / 2
            before(step, now)
            rows = range(step * BATCH, (step + 1) * BATCH)
            model(**batches.collate(self.train, rows, pad_id=0), use_cache=False).loss.backward()
            update(step, now)
            model.zero_grad()


def adamw(parameters: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Hook]:
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)

    def update(step: int, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    return optimizer, update


def nothing(step: int, rate: float) -> None:
    pass


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in name}


@torch.no_grad()
def cut(model: Any, share: float) -> Any:
    """Every projection by its best approximation of this share of its rank."""
    for layer in projections(model).values():
        U, s, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
        r = max(1, round(share * len(s)))
        layer.weight.copy_(U[:, :r] * s[:r] @ Vh[:r])
    return model


def full(setting: Setting, rate: float) -> Any:
    """All projections, fine-tuned whole."""
    model = setting.base().requires_grad_(False)
    weights = [layer.weight.requires_grad_() for layer in projections(model).values()]
    setting.fit(model, rate, nothing, adamw(weights)[1])
    return model


def lora(setting: Setting, rate: float) -> Any:
    model = get_peft_model(setting.base(), LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear"))
    setting.fit(model, rate, nothing, adamw([p for p in model.parameters() if p.requires_grad])[1])
    return model


def sst(setting: Setting, rate: float) -> Any:
    """Sparse spectral training."""
    model = setting.base().requires_grad_(False)
    layers = {name: (layer, layer.weight.requires_grad_()) for name, layer in projections(model).items()}
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, dict[str, Any]] = {}
    update: Hook = nothing

    def draw(step: int, now: float) -> None:
        nonlocal update
        if step % DRAW:
            return
        for name, (_, W) in layers.items():
            U, s, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
            chosen = torch.multinomial(s.clamp(min=1e-12), min(RANK, len(s)), generator=generator)
            trained = [nn.Parameter(part.clone()) for part in (U[:, chosen], s, Vh[chosen])]
            parts[name] = {"U": U, "Vh": Vh, "chosen": chosen, "trained": trained}
        update = adamw([p for part in parts.values() for p in part["trained"]])[1]

    @torch.no_grad()
    def step_parts(step: int, now: float) -> None:
        for name, (_, W) in layers.items():
            part, G = parts[name], W.grad
            u, s, v = part["trained"]
            u.grad, v.grad = G @ part["Vh"][part["chosen"]].T, part["U"][:, part["chosen"]].T @ G
            s.grad = ((part["U"].T @ G) * part["Vh"]).sum(1)
        update(step, now)
        for name, (_, W) in layers.items():
            part = parts[name]
            u, s, v = part["trained"]
            s.clamp_(min=0)
            u /= u.norm(dim=0)
            v /= v.norm(dim=1, keepdim=True)
            part["U"][:, part["chosen"]], part["Vh"][part["chosen"]] = u, v
            W.copy_(part["U"] * s @ part["Vh"])

    setting.fit(model, rate, draw, step_parts)
    return model


class Prefix(nn.Module):
    """A linear layer U V^T of which the first `width` directions are used."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        U, s, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        self.U, self.V = nn.Parameter(U * s.sqrt()), nn.Parameter(s.sqrt()[:, None] * Vh)
        self.full = self.width = len(s)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.V[: self.width].T @ self.U[:, : self.width].T


def maestro(setting: Setting, rate: float) -> Any:
    model = setting.base().requires_grad_(False)
    layers = []
    for name, layer in projections(model).items():
        model.set_submodule(name, Prefix(layer))
        layers.append(model.get_submodule(name))
    generator = torch.Generator().manual_seed(0)
    step_all = adamw([p for layer in layers for p in (layer.U, layer.V)])[1]

    def before(step: int, now: float) -> None:
        one = layers[int(torch.randint(len(layers), (), generator=generator))]
        for layer in layers:
            layer.width = layer.full
        one.width = 1 + int(torch.randint(one.full, (), generator=generator))

    def update(step: int, now: float) -> None:
        beyond = torch.zeros(())
        for layer in layers:
            for part in (layer.U, layer.V.T):  # the norm of all directions from b on, for each b
                beyond = beyond + part.square().sum(0).flip(0).cumsum(0).clamp(min=1e-12).sqrt().sum()
        (LASSO * beyond).backward()
        step_all(step, now)

    setting.fit(model, rate, before, update)
    for layer in layers:
        layer.width = layer.full
    return model


def rank_pruning(setting: Setting, rate: float, share: float) -> Any:
    model = setting.base().requires_grad_(False)
    layers = projections(model)
    step_all = adamw([layer.weight.requires_grad_() for layer in layers.values()])[1]

    @torch.no_grad()
    def update(step: int, now: float) -> None:
        step_all(step, now)
        for layer in layers.values():
            U, s, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            if step % DRAW == DRAW - 1:
                r = max(1, round(share * len(s)))
                layer.weight.copy_(U[:, :r] * s[:r] @ Vh[:r])
            else:
                layer.weight -= now * NUCLEAR * (U @ Vh)

    setting.fit(model, rate, nothing, update)
    return model


def main() -> None:
    torch.set_num_threads(1)
    started, setting = time.process_time(), Setting()
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "steps": STEPS, "base": setting.loss(setting.base())}

    def show(name: str, value: float) -> float:
        print(f"{name:48} {value:.3f}   {time.process_time() - started:4.0f} s of processor time", flush=True)
        return round(value, 4)

    show("base", found["base"])
    best: dict[str, tuple[float, float, Any]] = {}
    found["sst"] = {}
    for name, fit in (("full", full), ("lora", lora), ("sst", sst)):
        found["sst"][name] = {}
        for rate in RATES[name]:
            model = fit(setting, rate)
            loss = found["sst"][name][f"{rate:g}"] = show(f"{name}, learning rate {rate:g}", setting.loss(model))
            if name not in best or loss < best[name][0]:
                best[name] = (loss, rate, model)
    _, rate, tuned = best["full"]
    state = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    factored = maestro(setting, rate)
    found["kept"] = {"all": {"maestro": show("maestro, every direction", setting.loss(factored))}}
    for share in KEPT:
        row = found["kept"][f"{share:g}"] = {}
        row["base"] = show(f"{share:.0%} of the rank: base, cut", setting.loss(cut(setting.base(), share)))
        tuned.load_state_dict(state)
        row["full"] = show(f"{share:.0%}: full fine-tuning, then cut", setting.loss(cut(tuned, share)))
        for layer in factored.modules():
            if isinstance(layer, Prefix):
                layer.width = max(1, round(share * layer.full))
        row["maestro"] = show(f"{share:.0%}: maestro, first directions", setting.loss(factored))
        pruned = cut(rank_pruning(setting, rate, share), share)
        row["trained rank pruning"] = show(f"{share:.0%}: trained rank pruning", setting.loss(pruned))
    found["processor_seconds"] = round(time.process_time() - started)
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
