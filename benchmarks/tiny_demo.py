"""The embedded demo, method by method: LoLDU, LoRA, full fine-tuning, and LoLDU on a random base, at equal steps.

    python benchmarks/tiny_demo.py            # writes benchmarks/results/tiny_demo.json; about 50 minutes on one core
    python benchmarks/tiny_demo.py --quick    # one learning rate and one seed each

Each learning rate is chosen on the validation split with seed 0; then three other seeds are trained and tested.
"Unseen" are wordings that no training record has. Runs in the results file are not repeated.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "recipes")]

from llama2_alpaca_loldu import TINY, tiny  # noqa: E402

from launcher.config import Config  # noqa: E402
from launcher.data import records, templates  # noqa: E402
from launcher.inference.load import load  # noqa: E402
from launcher.inference.sources import find  # noqa: E402
from launcher.models.generation import answer  # noqa: E402
from launcher.training.run import run  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "tiny_demo.json"
SEEDS = (1, 2, 3)
METHODS: dict[str, dict[str, Any]] = {
    "LoLDU, full rank": {"rates": (5e-2, 1e-1, 2e-1)},
    "LoRA r 8": {"method": "lora", "rank": 8, "options": ("lora_alpha=16",), "rates": (3e-3, 1e-2, 3e-2)},
    "full fine-tuning": {"method": "full", "options": (), "rates": (3e-4, 1e-3, 3e-3)},
    "LoLDU on a random base": {"random": True, "rates": (5e-2, 1e-1, 2e-1)},
}


def variation(spec: dict[str, Any], rate: float, seed: int, split: str, work: Path) -> Config:
    """The demo's config with this method, learning rate, seed and evaluation split."""
    config = tiny()
    adapter = {name: value for name, value in spec.items() if name in ("method", "rank", "options")}
    model = str(random_base(work)) if spec.get("random") else config.model.model
    return replace(
        config,
        model=replace(config.model, model=model),
        data=replace(config.data, eval_data=str(TINY / "instructions" / f"{split}.json")),
        adapter=replace(config.adapter, **adapter),
        optimizer=replace(config.optimizer, learning_rate=rate, seed=seed),
        run=replace(config.run, output=str(work / "run"), resume="never", show_samples=0, save_every=0),
    )


def random_base(work: Path) -> Path:
    """The demo's architecture and tokenizer with random weights."""
    folder = work / "random"
    if not folder.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY / "model")).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    return folder


def measure(name: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """One run: losses, exact match before and after, exact match on unseen wordings, seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        config = variation(METHODS[name], rate, seed, split, work)
        started = time.monotonic()
        if run(config, "benchmark"):
            raise SystemExit(f"{name} failed")
        seconds = time.monotonic() - started
        output = work / "run"
        events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
        evaluations = [event for event in events if "eval_loss" in event]
        first, last = evaluations[0], evaluations[-1]
        return {
            "method": name, "rate": rate, "seed": seed, "split": split, "seconds": round(seconds, 1),
            "trained": json.loads((output / "config.json").read_text())["resolved"]["trained"],
            "loss_before": first["eval_loss"], "loss": last["eval_loss"],
            "exact_before": first["exact_match"], "exact": last["exact_match"],
            "unseen": unseen_match(output) if split == "test" else None,
        }  # fmt: skip


def unseen_match(tuned: Path) -> float:
    """Exact match of a run folder or a model on wordings that were not trained on."""
    model, tokenizer = load(find(str(tuned)))
    held = records.load_records(str(TINY / "instructions" / "test_unseen.json"))
    template = templates.load_template("short", tokenizer, conversations=False)
    ids = answer(
        model, tokenizer, [templates.prompt_ids(record, template, tokenizer) for record in held], max_tokens=16
    )
    texts = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in ids]
    return mean(text == records.answer(record).strip() for text, record in zip(texts, held, strict=True))


def main() -> None:
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv
    found = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() and not quick else []

    def once(name: str, rate: float, seed: int, split: str) -> dict[str, Any]:
        for old in found:
            if (old["method"], old["rate"], old["seed"], old["split"]) == (name, rate, seed, split):
                return old
        found.append(measure(name, rate, seed, split))
        if not quick:
            save(found)
        return found[-1]

    for name, spec in METHODS.items():
        rates = spec["rates"][:1] if quick else spec["rates"]
        best = rates[0] if quick else min(rates, key=lambda rate: once(name, rate, 0, "validation")["loss"])
        for seed in SEEDS[: 1 if quick else None]:
            once(name, best, seed, "test")
    print(table(found))


def save(found: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=REPO).stdout.strip()
    head = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": f"{platform.machine()}, 1 thread"}
    RESULTS.write_text(json.dumps({**head, "runs": found}, indent=1) + "\n")


def table(found: list[dict[str, Any]]) -> str:
    """The README's table: means over the test seeds, with the lowest and highest."""
    lines = ["| | trained | rate | held-out loss | exact match | unseen wordings |", "|---|---|---|---|---|---|"]
    for name in METHODS:
        tested = [one for one in found if one["method"] == name and one["split"] == "test"]
        if tested:
            cells = [spread([one[key] for one in tested], form) for key, form in (("loss", ".3f"), ("exact", ".1%"), ("unseen", ".1%"))]  # fmt: skip  # noqa: E501
            lines.append(f"| {name} | {tested[0]['trained']:,} | {tested[0]['rate']:g} | {' | '.join(cells)} |")
    before = next(one for one in found if one["split"] == "test" and "random" not in one["method"])
    untuned = [f"{before['loss_before']:.3f}", f"{before['exact_before']:.1%}", f"{unseen_match(TINY / 'model'):.1%}"]
    lines.append(f"| the base, untuned | 0 | | {' | '.join(untuned)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}} ({min(values):{form}}-{max(values):{form}})"


if __name__ == "__main__":
    main()
