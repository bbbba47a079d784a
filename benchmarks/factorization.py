"""Factors from a panel against torch.linalg.lu of the whole weight, on the shapes of Llama-2-7B.

    OMP_NUM_THREADS=1 python benchmarks/factorization.py            # about 2 minutes, one thread
    OMP_NUM_THREADS=1 python benchmarks/factorization.py --quick    # under one minute: one repetition, rank 64 and 256

Each repetition times the whole LU and every panel in turn, so that a slow moment of the machine affects all of them.
Reported are the median and the spread of the repetitions. Panels are also compared with the whole LU: equal pivots, and
the largest difference of P L_r. Writes benchmarks/results/factorization.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adapters.loldu import loldu_factors, lu_of_panel

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
RANKS = (64, 256, 1024)
RESULTS = Path(__file__).parent / "results" / "factorization.json"
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    repetitions, ranks = (1, RANKS[:2]) if options.quick else (5, RANKS)

    started, rows = time.monotonic(), []
    for shape in SHAPES:
        rows += compare(shape, ranks, repetitions)
    result = about(repetitions) | {"seconds": round(time.monotonic() - started, 1), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.exists():  # keep the results of factorization_model.py
        result |= {name: part for name, part in json.loads(options.output.read_text()).items() if name == "model"}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"written to {options.output}")


def compare(shape: tuple[int, int], ranks: tuple[int, ...], repetitions: int) -> list[dict[str, Any]]:
    """One row per rank for a Gaussian bfloat16 weight W (m, n), factored in float32 as both ways do."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).bfloat16().float()
    whole_s: list[float] = []
    panel_s: dict[int, list[float]] = {r: [] for r in ranks}
    factors_s: dict[int, list[float]] = {r: [] for r in ranks}
    difference, same_pivots = {}, {}
    for _ in range(repetitions):
        P, L, U = timed(whole_s, lambda: torch.linalg.lu(W))
        order = P.argmax(dim=0)
        for r in ranks:
            lower, _, pivots = timed(panel_s[r], partial(lu_of_panel, W[:, :r]))
            timed(factors_s[r], partial(loldu_factors, W[:, :r], lambda rows: W[rows.long()]))
            same_pivots[r] = bool(torch.equal(pivots.long(), order[:r]))
            difference[r] = float((lower[order] - L[:, :r]).abs().max())
        del P, L, U
    return [
        {
            "m": shape[0],
            "n": shape[1],
            "r": r,
            "whole_lu_s": spread(whole_s),
            "panel_lu_s": spread(panel_s[r]),
            "factors_s": spread(factors_s[r]),
            "speedup": median(whole_s) / median(panel_s[r]),
            "speedup_factors": median(whole_s) / median(factors_s[r]),
            "same_pivots": same_pivots[r],
            "largest_difference_of_L": difference[r],
        }
        for r in ranks
    ]


def timed(into: list[float], do: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = do()
    into.append(time.perf_counter() - started)
    return result


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds)}


def about(
    repetitions: int,
    benchmark: str = "panel LU against torch.linalg.lu of the whole matrix",
    threads: str = "one thread used",
) -> dict[str, Any]:
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    models = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "commit": commit or "unknown",
        "machine": f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {threads}",
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "seed": SEED,
        "repetitions": repetitions,
    }


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def show(result: dict[str, Any]) -> None:
    title = f"{result['machine']}; torch {result['torch']}; median of {result['repetitions']} (min-max)"
    table = Table("weight", "r", "whole LU", "panel LU", "times", "all factors", "times", "L differs by", title=title)
    for row in result["rows"]:
        whole, panel, factors = (_ms(row[name]) for name in ("whole_lu_s", "panel_lu_s", "factors_s"))
        off = f"{row['largest_difference_of_L']:.0e}" + ("" if row["same_pivots"] else ", other pivots")
        speedups = f"{row['speedup']:.0f}x", f"{row['speedup_factors']:.0f}x"
        cells = f"{row['m']} x {row['n']}", str(row["r"]), whole, panel, speedups[0], factors, speedups[1], off
        table.add_row(*cells)
    Console(width=130).print(table)


def _ms(seconds: dict[str, float]) -> str:
    median_ms, low, high = (seconds[name] * 1e3 for name in ("median", "min", "max"))
    return f"{median_ms:.0f} ms ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    main()
