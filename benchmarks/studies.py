"""What three methods that train low-rank weights do on the embedded model, in short forms, beside the alternatives.

    python benchmarks/studies.py    # benchmarks/results/studies.json; two minutes of processor time

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

import argparse
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
RATES = {"full": (1e-3, 3e-3), "lora": (3e-3, 1e-2), "sst": (1e-3, 3e-3)}
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


def study_full(setting: Setting) -> dict[str, float]:
    model = full(setting, RATES["full"][0])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {"base": setting.loss(setting.base()), f"learning rate {RATES['full'][0]:g}": setting.loss(model)}
    found |= {f"learning rate {rate:g}": setting.loss(full(setting, rate)) for rate in RATES["full"][1:]}
    for share in KEPT:
        found[f"base, cut to {share:.0%}"] = setting.loss(cut(setting.base(), share))
        model.load_state_dict(state)
        found[f"full, cut to {share:.0%}"] = setting.loss(cut(model, share))
    return found


def study_lora(setting: Setting) -> dict[str, float]:
    return {f"learning rate {rate:g}": setting.loss(lora(setting, rate)) for rate in RATES["lora"]}


def study_sst(setting: Setting) -> dict[str, float]:
    return {f"learning rate {rate:g}": setting.loss(sst(setting, rate)) for rate in RATES["sst"]}


def study_maestro(setting: Setting) -> dict[str, float]:
    model = maestro(setting, RATES["full"][0])
    found = {"every direction": setting.loss(model)}
    for share in KEPT:
        for layer in model.modules():
            if isinstance(layer, Prefix):
                layer.width = max(1, round(share * layer.full))
        found[f"first {share:.0%}"] = setting.loss(model)
    return found


def study_pruning(setting: Setting) -> dict[str, float]:
    return {
        f"cut to {share:.0%}": setting.loss(cut(rank_pruning(setting, RATES["full"][0], share), share))
        for share in KEPT
    }


STUDIES = {
    "full": study_full,
    "lora": study_lora,
    "sst": study_sst,
    "maestro": study_maestro,
    "trained rank pruning": study_pruning,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STUDIES, help="one of the studies; the results of the others stay")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    setting = Setting()
    for name in [only] if only else STUDIES:
        started = time.process_time()
        losses = {key: round(loss, 4) for key, loss in STUDIES[name](setting).items()}
        found[name] = {"losses": losses, "date": time.strftime("%Y-%m-%d"), "steps": STEPS}
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        for key, loss in losses.items():
            print(f"{name:22} {key:24} {loss:.3f}", flush=True)
        print(f"{name}: {time.process_time() - started:.0f} s of processor time", flush=True)


if __name__ == "__main__":
    main()
