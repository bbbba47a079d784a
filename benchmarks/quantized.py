"""The cost of 8 and 4 bits: losses after equal training, logits, an adapter on another precision, merging.

    python benchmarks/quantized.py ../shared/data [MODEL ...]   # benchmarks/results/quantized.json; 20 min on one core

The folder holds models/babyllama-361, models/stories260K and instruction/alpaca_5000.json. A third model is random:
four layers of hidden size 1024 whose weights have a power-law spectrum. Each method's learning rate is the best of
three on the float32 base, seed 0; precisions are then compared at that rate. The quantised bases compute in float32.
LoRA on nf4 is QLoRA. A run's adapter is also merged into its own precision: by `loldu merge --quantize`, which rounds
the full-precision weight plus update, and, for comparison, by adding the update to the quantised weight and rounding
again.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from adapters.layer import FactorLayer  # noqa: E402
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig  # noqa: E402
from launcher.data import batches, encode, records  # noqa: E402
from launcher.inference.export import export_lora  # noqa: E402
from launcher.inference.heldout import mean_loss  # noqa: E402
from launcher.inference.merge import merge  # noqa: E402
from launcher.models.build import build  # noqa: E402
from launcher.models.files import load_tokenizer  # noqa: E402
from launcher.models.quantize import Quantised, keep_packing, linear_layers  # noqa: E402
from launcher.packages import versions  # noqa: E402
from launcher.training.run import run  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "quantized.json"
FULL = ("float32", "bfloat16")
PRECISIONS = (*FULL, "int8", "nf4", "fp4")
USED_ON = ("float32", "bfloat16", "int8", "nf4")  # by an adapter of another precision
METHODS: dict[str, dict[str, Any]] = {
    "LoLDU, full rank": {
        "adapter": {"rank": 4096, "options": ("normalize_directions=true",)},
        "rates": (1e-2, 3e-2, 1e-1),
    },
    "LoLDU, r 64": {"adapter": {"rank": 64, "options": ("normalize_directions=true",)}, "rates": (1e-2, 3e-2, 1e-1)},
    "LoRA, r 8": {
        "adapter": {"method": "lora", "rank": 8, "options": ("lora_alpha=16",)},
        "rates": (1e-3, 3e-3, 1e-2),
    },
}
# model -> steps, seeds of the comparison
PLANS = {"babyllama-361": (25, (1, 2)), "stories260K": (25, (1, 2)), "random 4 x 1024": (8, (1,))}


def random_spectrum(folder: Path, tokenizer: Path) -> Path:
    """Four layers of hidden size 1024, every weight G1 diag(i^-0.7) G2 with Gaussian G, entries of size 1/sqrt(n)."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, max_position_embeddings=512))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            m, n = weight.shape
            left, right = torch.randn(m, n, generator=generator), torch.randn(n, n, generator=generator)
            product = left * torch.arange(1, n + 1) ** -0.7 @ right
            weight.data = product / product.std() / n**0.5
    model.save_pretrained(folder)
    for file in tokenizer.glob("token*"):
        shutil.copy(file, folder)
    return folder


def model_config(model: Path, kind: str) -> ModelConfig:
    if kind in FULL:
        return ModelConfig(model=str(model), dtype=kind)  # type: ignore[arg-type]
    return ModelConfig(model=str(model), dtype="float32", quantize=kind)  # type: ignore[arg-type]


def config_of(model: Path, method: str, rate: float, seed: int, kind: str, steps: int, work: Path) -> Config:
    small = "babyllama" in model.name or "stories" in model.name
    return Config(
        model=model_config(model, kind),
        data=DataConfig(
            data=str(work / "records.json"), eval_records=60 if small else 16, prompt_template="short", max_length=128
        ),
        adapter=AdapterConfig(targets=("all-linear",), **METHODS[method]["adapter"]),
        optimizer=OptimizerConfig(learning_rate=rate, batch_size=8 if small else 2, max_steps=steps, seed=seed),
        run=RunConfig(output=str(work / "run"), cache=str(work / "cache"), resume="never"),
    )


def measure(config: Config) -> dict[str, Any]:
    """Held-out loss before and after one run."""
    shutil.rmtree(config.run.output or "", ignore_errors=True)
    started = time.monotonic()
    if run(config, "benchmark"):
        raise SystemExit(f"{config} failed")
    events = [json.loads(line) for line in (Path(config.run.output or "") / "events.jsonl").read_text().splitlines()]
    losses = [event["eval_loss"] for event in events if "eval_loss" in event]
    resolved = json.loads((Path(config.run.output or "") / "config.json").read_text())["resolved"]
    return {
        "before": losses[0], "after": losses[-1], "trained": resolved["trained"],
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


class HeldOut:
    """The run's held-out samples, and the loss and logits of a model on them."""

    def __init__(self, config: Config):
        _, held = records.load_splits(config.data.data, None, config.data.eval_records)
        self.tokenizer = load_tokenizer(Path(config.model.model))
        self.encoded = encode.encode(held, self.tokenizer, config.data)

    def loss(self, model: Any) -> float:
        return mean_loss(model, self.encoded, self.tokenizer)

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        batch = batches.collate(self.encoded, range(8), pad_id=0, packing=False, attention="sdpa")
        return model.eval()(input_ids=batch["input_ids"]).logits[batch["labels"] != -100].float()


def bare(model: Path, kind: str) -> Any:
    """The base in a precision, loaded as by a run."""
    config = model_config(model, kind)
    how: dict[str, Any] = {"factors": lambda module: None, "device": torch.device("cpu")}
    return build(config, model, None, dtype=config.dtype, attention="sdpa", **how)


def weight_error(model: Any, full: Any) -> float:
    """Relative distance of the linear layers' weights from the full-precision ones, all layers together."""
    from peft.utils.integrations import dequantize_bnb_weight

    far = size = 0.0
    for name, layer in linear_layers(full).items():
        here, W = model.get_submodule(name), layer.weight
        quantised = isinstance(here, Quantised)
        found = dequantize_bnb_weight(here.weight, state=getattr(here, "state", None)) if quantised else here.weight
        far, size = far + float((found.float() - W).square().sum()), size + float(W.square().sum())
    return (far / size) ** 0.5


def compare(name: str, folder: Path, work: Path) -> dict[str, Any]:
    """All measurements of one model."""
    steps, seeds = PLANS[name]
    small = len(seeds) > 1
    runs, swaps, bases, merged = [], [], [], []
    ours = "LoLDU, full rank" if small else "LoLDU, r 64"
    methods = {key: METHODS[key] for key in (ours, "LoRA, r 8")}
    held = HeldOut(config_of(folder, "LoRA, r 8", 1e-3, 0, "float32", steps, work))
    full = bare(folder, "float32")
    plain = held.logits(full)
    for kind in PRECISIONS:
        base = full if kind == "float32" else bare(folder, kind)
        off = held.logits(base)
        bases.append(
            {"precision": kind, "loss": held.loss(base), "logits_error": float((off - plain).norm() / plain.norm()),
             "weight_error": weight_error(base, full)}
        )  # fmt: skip
    for method, spec in methods.items():
        tried = {}
        for rate in spec["rates"]:
            found = measure(config_of(folder, method, rate, 0, "float32", steps, work))
            tried[rate] = found["after"]
            runs.append({"method": method, "precision": "float32", "rate": rate, "seed": 0, "search": True} | found)
        best = min(tried, key=lambda rate: tried[rate])
        for kind in PRECISIONS:
            if kind == "fp4" and method != ours:
                continue
            for seed in seeds:
                found = measure(config_of(folder, method, best, seed, kind, steps, work))
                runs.append({"method": method, "precision": kind, "rate": best, "seed": seed, "search": False} | found)
                if seed == seeds[0] and kind not in FULL and method == ours:
                    merged.append({"precision": kind, "apart": found["after"]} | merges(folder, work, held, kind))
                if seed == seeds[0] and kind in USED_ON:
                    entry = {"method": method, "trained_on": kind}
                    swaps += [entry | used for used in on_every_precision(folder, work, held, method == ours)]
    return {
        "model": name,
        "steps": steps,
        "seeds": seeds,
        "bases": bases,
        "runs": runs,
        "other_precision": swaps,
        "merged": merged,
    }


def on_every_precision(folder: Path, work: Path, held: HeldOut, export: bool) -> list[dict[str, Any]]:
    """Held-out losses of the run's adapter on other bases than its own; with export also as a LoRA, which equals it on
    the full-precision base but reads the layer's input, where ours reads the quantised output."""
    forms = {"adapter": work / "run" / "adapter"}
    if export:
        forms["exported LoRA"] = work / "lora"
        shutil.rmtree(forms["exported LoRA"], ignore_errors=True)
        export_lora(str(work / "run"), out=str(forms["exported LoRA"]))
    return [
        {"form": form, "used_on": kind, "loss": held.loss(PeftModel.from_pretrained(bare(folder, kind), where))}
        for form, where in forms.items()
        for kind in USED_ON
    ]


def merges(folder: Path, work: Path, held: HeldOut, kind: str) -> dict[str, float]:
    """Held-out losses of the run's adapter merged into its own precision, in both ways."""
    once, again = work / "once", work / "again"
    for place in (once, again):
        shutil.rmtree(place, ignore_errors=True)
    merge(str(work / "run"), out=str(once), quantize=kind)  # type: ignore[arg-type]
    full = AutoModelForCausalLM.from_pretrained(folder)
    beside = PeftModel.from_pretrained(bare(folder, kind), work / "run" / "adapter")
    for layer in beside.modules():
        if isinstance(layer, FactorLayer):
            full.get_submodule(layer.name).weight.data = layer.matrix().float() + layer.get_delta_weight("default")
    full.save_pretrained(again)
    settings = json.loads((once / "config.json").read_text())["quantization_config"]
    losses = {}
    for name, place, how in (
        ("rounded once", once, {}),
        ("rounded again", again, {"quantization_config": BitsAndBytesConfig(**settings)}),
    ):
        model = AutoModelForCausalLM.from_pretrained(place, **how)
        keep_packing(model)
        losses[name] = held.loss(model)
    return losses


def table(found: list[dict[str, Any]]) -> str:
    """Held-out losses: means over the seeds."""
    lines = []
    for one in found:
        lines += [
            f"\n{one['model']}, {one['steps']} steps",
            f"| | {' | '.join(PRECISIONS)} |",
            f"|{'---|' * (len(PRECISIONS) + 1)}",
        ]
        by_kind = {base["precision"]: base for base in one["bases"]}
        for key, form in (("weight_error", ".3f"), ("logits_error", ".3f"), ("loss", ".3f")):
            cells = [f"{by_kind[kind][key]:{form}}" for kind in PRECISIONS]
            lines.append(f"| the base: {key.replace('_', ' ')} | {' | '.join(cells)} |")
        for method in METHODS:
            rows = [entry for entry in one["runs"] if entry["method"] == method and not entry["search"]]
            cells = []
            for kind in PRECISIONS:
                values = [entry["after"] for entry in rows if entry["precision"] == kind]
                cells.append(f"{mean(values):.3f} ({min(values):.3f}-{max(values):.3f})" if values else "")
            if rows:
                lines.append(f"| {method}, rate {rows[0]['rate']:g} | {' | '.join(cells)} |")
        swaps: dict[str, dict[str, float]] = {}
        for swap in one["other_precision"]:
            form = ", as exported LoRA" if swap["form"] != "adapter" else ""
            name = f"{swap['method']}, trained on {swap['trained_on']}{form}, used on"
            swaps.setdefault(name, {})[swap["used_on"]] = swap["loss"]
        for name, used in swaps.items():
            lines.append(f"| {name} | {' | '.join(f'{used[kind]:.3f}' for kind in USED_ON)} | |")
        for way in ("rounded once", "rounded again"):
            cells = [f"{each[way]:.3f} (apart {each['apart']:.3f})" for each in one["merged"]]
            lines.append(f"| LoLDU, merged into its own precision, {way} |{' |' * len(FULL)} {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=REPO.parent / "shared" / "data")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"any of {', '.join(PLANS)}; all without it")
    chosen = parser.parse_args()
    shared: Path = chosen.folder
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=REPO).stdout.strip()
    found = {one["model"]: one for one in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        kept = json.loads((shared / "instruction" / "alpaca_5000.json").read_text())
        fits = [record for record in kept if record["output"] and len(record["instruction"] + record["input"]) < 60]
        (work / "records.json").write_text(json.dumps(fits[:1500]))
        for name in chosen.models or PLANS:
            folder, started = shared / "models" / name, time.monotonic()
            if not folder.exists():
                folder = random_spectrum(work / "random", shared / "models" / "stories260K")
            found[name] = compare(name, folder, work) | {
                "date": time.strftime("%Y-%m-%d"),
                "commit": commit,
                "machine": f"{platform.machine()}, 1 thread",
                "seconds": round(time.monotonic() - started),
                "versions": versions(),
            }
            RESULTS.write_text(json.dumps([found[known] for known in PLANS if known in found], indent=1) + "\n")
    print(table(list(found.values())))


if __name__ == "__main__":
    main()
