"""The embedded image demo, method by method: accuracy on digits of LoLDU, LoRA, the head alone and full fine-tuning.

    python benchmarks/images.py            # writes benchmarks/results/images.json; about 4 minutes on one free core
    python benchmarks/images.py --table    # only prints the table of that file
    python benchmarks/images.py --results FILE

Every method trains for 100 steps of 32 images. Each learning rate is chosen on the validation split with seed 0; then
three other seeds are trained and tested on the test split. Runs in the results file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "recipes")]

from vit_images_loldu import TINY, tiny  # noqa: E402

from launcher.config import Config  # noqa: E402
from launcher.training.run import run  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "images.json"
SEEDS = (1, 2, 3)
STEPS = 100
METHODS: dict[str, dict[str, Any]] = {
    "LoLDU, full rank": {"rates": (3e-3, 1e-2, 3e-2)},
    "LoRA r 8": {"method": "lora", "rank": 8, "options": ("lora_alpha=16",), "rates": (1e-3, 3e-3, 1e-2, 3e-2)},
    # a run has an adapter: here LoLDU's, of one number
    "head alone": {"rank": 1, "targets": ("layers.0.attention.k_proj",), "rates": (1e-2, 3e-2, 1e-1, 3e-1)},
    "full fine-tuning": {"method": "full", "rates": (3e-4, 1e-3, 3e-3, 1e-2)},
}


def variation(spec: dict[str, Any], rate: float, seed: int, test: Path | None, work: Path) -> Config:
    """The demo's config with this method, learning rate and seed; evaluated on the test split, or on validation."""
    config = tiny()
    adapter = {name: value for name, value in spec.items() if name != "rates"}
    return replace(
        config,
        data=replace(config.data, eval_data=str(test) if test else None),
        adapter=replace(config.adapter, **adapter),
        optimizer=replace(config.optimizer, learning_rate=rate, seed=seed, max_steps=STEPS),
        run=replace(config.run, output=str(work / "run"), resume="never", save_every=0, report=False),
    )


def measure(name: str, rate: float, seed: int, test: Path | None) -> dict[str, Any]:
    """One run: accuracy and loss before and after, trained numbers, seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        started = time.monotonic()
        if run(variation(METHODS[name], rate, seed, test, work), "benchmark"):
            raise SystemExit(f"{name} failed")
        seconds = time.monotonic() - started
        events = [json.loads(line) for line in (work / "run" / "events.jsonl").read_text().splitlines()]
        evaluated = [event for event in events if "eval_loss" in event]
        trained = json.loads((work / "run" / "config.json").read_text())["resolved"]["trained"]
        return {
            "before": evaluated[0]["accuracy"], "accuracy": evaluated[-1]["accuracy"],
            "eval_loss": evaluated[-1]["eval_loss"], "trained": trained, "seconds": round(seconds, 1),
        }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Markdown, from the results."""
    lines = [
        "| method | trained numbers | learning rate | accuracy, test split | loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in found["methods"].items():
        chosen = f"test {result.get('rate', 0):g} "
        tested = [result["runs"][key] for key in result["runs"] if key.startswith(chosen)]
        if len(tested) < len(SEEDS):
            continue
        shares = [each["accuracy"] for each in tested]
        lines.append(
            f"| {name} | {tested[0]['trained']:,} | {result['rate']:g} | {mean(shares):.1%} ± {stdev(shares):.1%} | "
            f"{mean(each['eval_loss'] for each in tested):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    asked = parser.parse_args()
    found: dict[str, Any] = json.loads(asked.results.read_text()) if asked.results.exists() else {"methods": {}}
    if asked.table:
        print(table(found))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    found |= {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, 1 thread",
    }
    with tempfile.TemporaryDirectory() as temporary:
        with zipfile.ZipFile(TINY / "digits.zip") as archive:
            archive.extractall(temporary, [name for name in archive.namelist() if name.startswith("test/")])
        test = Path(temporary) / "test"
        for name, spec in METHODS.items():
            result = found["methods"].setdefault(name, {"runs": {}})

            def once(key: str, *how: Any, name: str = name, result: dict[str, Any] = result) -> dict[str, Any]:
                if key not in result["runs"]:
                    result["runs"][key] = measure(name, *how)
                    asked.results.write_text(json.dumps(found, indent=1) + "\n")
                return result["runs"][key]

            searched = {rate: once(f"validation {rate:g}", rate, 0, None)["eval_loss"] for rate in spec["rates"]}
            result["rate"] = min(searched, key=lambda rate: searched[rate])
            for seed in SEEDS:
                once(f"test {result['rate']:g} seed {seed}", result["rate"], seed, test)
    asked.results.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
