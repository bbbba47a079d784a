"""Predicted against measured peak memory of a training process: what `loldu plan` predicts, and what a run takes.

    python benchmarks/plan.py --smollm2 DIR --babyllama DIR --data FILE      # about an hour on two quiet cores
    python benchmarks/plan.py ... --only smollm2/loldu/none                  # the cells that begin so
    python benchmarks/plan.py ... --predict                                  # predictions beside kept measurements

SmolLM2-135M, babyllama-361 and the embedded model x four methods (rank 16, all linear layers) x none, ddp and fsdp2
(two processes) x float32, bfloat16 and nf4 (computed in bfloat16): two steps of 8 samples of Alpaca in micro-batches of
at most 4 rows (the embedded model: its own instructions). Measured is VmHWM of the first process after the last
step, as metrics.jsonl records it: Python, its libraries and loading included, factors and tokens from the cache (a run
that makes them takes more: `tokenise`). Runs that are in the results file are not repeated. Writes
benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
TINY = PROJECT / "recipes" / "tiny"
RESULTS = Path(__file__).parent / "results" / "plan.json"
METHODS = ("loldu", "lora", "svfit", "full")
SHARDINGS = ("none", "ddp", "fsdp2")
PRECISIONS = ("float32", "bfloat16", "nf4")
PROCESSES = 2
RECORDS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--babyllama", type=Path)
    parser.add_argument("--data", type=Path, help="Alpaca records")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=[], help="cells that begin so: model/method/sharding/precision")
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--measure", action="store_true", help="predict nothing")
    parser.add_argument("--work", type=Path, help="folder for runs and the cache; default: a temporary one")
    options = parser.parse_args()
    models = {
        "smollm2": (options.smollm2, options.data, "chat"),
        "babyllama": (options.babyllama, options.data, "short"),
        "tiny": (
            PROJECT / "recipes" / "tiny" / "model",
            PROJECT / "recipes" / "tiny" / "instructions" / "train.json",
            "short",
        ),
    }
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    cells: dict[str, Any] = kept.get("cells", {})
    with tempfile.TemporaryDirectory(prefix="plan-") as made:
        temporary = options.work or made
        Path(temporary).mkdir(parents=True, exist_ok=True)
        for name in cell_names():
            model, data, template = models[name.partition("/")[0]]
            if model is None or (options.only and not name.startswith(tuple(options.only))):
                continue
            words = command(name, model.expanduser(), few(data, Path(temporary)), template, Path(temporary))
            cell = cells.setdefault(name, {})
            if "measured" not in cell and not options.predict:
                tokenise(name, model.expanduser(), data, template, Path(temporary))
                cell["measured"] = measure(words, name, Path(temporary))
            if not options.measure:
                cell["predicted"] = predict(words, name)
            cells[name] = cell
            about = {
                "date": str(date.today()),
                "commit": commit(),
                "machine": platform.processor() or platform.machine(),
            }
            write(options.output, {**about, "cells": cells})
            print(line(name, cell), flush=True)
    print(summary(cells))


def cell_names() -> list[str]:
    """model/method/sharding/precision, the most important first; what is not supported is left out."""
    return [
        f"{model}/{method}/{sharding}/{precision}"
        for sharding in SHARDINGS
        for model in ("smollm2", "tiny", "babyllama")
        for precision in PRECISIONS
        for method in METHODS
        if not (method == "full" and precision == "nf4")  # refused: it trains the base
    ]


def few(data: Path, folder: Path) -> Path:
    """A file with the first records."""
    file = folder / f"{data.stem}.json"
    if not file.exists():
        file.write_text(json.dumps(json.loads(data.read_text())[:RECORDS]))
    return file


def command(name: str, model: Path, data: Path, template: str, folder: Path) -> list[str]:
    """The options of the run."""
    _, method, sharding, precision = name.split("/")
    file = folder / "run.yaml"
    file.write_text("{}")
    dtype = ["--dtype", "bfloat16", "--quantize", "nf4"] if precision == "nf4" else ["--dtype", precision]
    rank = [] if method == "full" else ["--rank", "16", "--targets", "all-linear"]
    return [
        str(file), "--model", str(model), "--data", str(data), "--prompt-template", template, "--max-length", "128",
        "--method", method, *rank, *dtype, "--sharding", sharding, "--batch-size", "8", "--micro-batch-size", "4",
        "--max-steps", "2", "--no-report", "--cache", str(folder / "cache"),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}


def tokenise(name: str, model: Path, data: Path, template: str, folder: Path) -> None:
    """Put the tokens into the cache, with a run of one step.

    A process that tokenises keeps memory that it does not return: with the embedded model 9 MB more after 64 records,
    70 MB after 8,000 and 170 MB after 50,000.
    """
    done = folder / f"tokenised-{name.partition('/')[0]}"
    if done.exists():
        return
    words = command(f"{name.partition('/')[0]}/lora/none/float32", model, few(data, folder), template, folder)
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    start = [sys.executable, "-m", "launcher", "train", *words, "--max-steps", "1", "--output", str(output)]
    subprocess.run(start, env=environment(), check=True, capture_output=True)
    done.touch()


def measure(words: list[str], name: str, folder: Path) -> dict[str, Any]:
    """Peak bytes of the first process after the last step, of a run whose factors and tokens are in the cache."""
    start = [sys.executable, "-m", "launcher", "train"]
    if name.split("/")[2] != "none":
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(PROCESSES),
            "-m",
            "launcher",
            "train",
        ]
    if name.split("/")[1] in ("loldu", "svfit"):  # making factors takes additional memory
        make = [sys.executable, "-m", "launcher", "factorize", *factor_options(words)]
        subprocess.run(make, env=environment(), check=True, capture_output=True)
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    done = subprocess.run([*start, *words, "--output", str(output)], env=environment(), capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr or done.stdout).strip().splitlines()[-1]}
    lines = [json.loads(each) for each in (output / "metrics.jsonl").read_text().splitlines()]
    return {"peak_bytes": round(lines[-1]["memory_gib"] * 2**30), "commit": commit()}


def factor_options(words: list[str]) -> list[str]:
    keep = {"--model", "--method", "--rank", "--targets", "--cache", "--dtype"}
    found = []
    for flag, value in zip(words[1::2], words[2::2], strict=False):
        if flag in keep:
            found += [flag, value]
    return found


def predict(words: list[str], name: str) -> dict[str, Any]:
    """What loldu plan predicts for the same run."""
    several = [] if name.split("/")[2] == "none" else ["--processes", str(PROCESSES)]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "plan", *words, *several, "--json"],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "?"}
    found = json.loads(done.stdout)
    return {"peak_bytes": found["peak_bytes"], "commit": commit()}


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.strip()


def write(file: Path, content: Any) -> None:
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)


def line(name: str, cell: dict[str, Any]) -> str:
    measured, predicted = (cell.get(each, {}).get("peak_bytes") for each in ("measured", "predicted"))
    shown = [f"{value / 1e6:8.0f} MB" if value else "       not" for value in (measured, predicted)]
    error = f"{predicted / measured - 1:+7.1%}" if measured and predicted else ""
    return f"{name:<34} measured {shown[0]}  predicted {shown[1]}  {error}"


def summary(cells: dict[str, Any]) -> str:
    """How many cells are within 10 %."""
    pairs = [
        (c.get("predicted", {}).get("peak_bytes"), c.get("measured", {}).get("peak_bytes")) for c in cells.values()
    ]
    errors = [abs(p / m - 1) for p, m in pairs if p and m]
    if not errors:
        return "nothing was measured"
    near, left = sum(error <= 0.1 for error in errors), len(cell_names()) - len(errors)
    return f"{near} of {len(errors)} within 10 %, the largest error {max(errors):.1%}; {left} not run"


if __name__ == "__main__":
    main()
