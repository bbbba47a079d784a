"""SVFit's factors against torch.linalg.svd, on power-law spectra of 4096 x 4096 at rank 256.

    OMP_NUM_THREADS=1 python benchmarks/svd.py                     # about 10 minutes, one thread
    OMP_NUM_THREADS=1 python benchmarks/svd.py --repetitions 1     # 4 minutes

Each repetition measures the processor time of the whole SVD, the exact and the block method in turn, so that a slow
moment of the machine affects all of them. Reported are the median and the spread, the share of the optimal energy that
a method's directions miss, the largest principal angle between its subspace and the exact one, the largest angle of a
single direction, and the block method's own bound for both. Writes benchmarks/results/svd.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from factorization import about, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapters.svd import leading_block, leading_exact

SHAPE, RANK = (4096, 4096), 256
EXPONENTS = (0.5, 0.7, 1.0)  # s_i = i^-a
RESULTS = Path(__file__).parent / "results" / "svd.json"
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--exponents", type=float, nargs="+", default=EXPONENTS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)

    started = time.monotonic()
    rows = [compare(exponent, options.repetitions) for exponent in options.exponents]
    result = about(options.repetitions) | {"benchmark": "leading singular vectors against torch.linalg.svd"}
    result |= {"seconds": round(time.monotonic() - started, 1), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"written to {options.output}")


def compare(exponent: float, repetitions: int) -> dict[str, Any]:
    """Times and errors for a float32 weight with the singular values i^-exponent."""
    W = power_law(exponent)
    times: dict[str, list[float]] = {"whole": [], "exact": [], "block": []}
    for _ in range(repetitions):
        timed(times["whole"], partial(torch.linalg.svd, W, full_matrices=False))
        U, s = timed(times["exact"], partial(leading_exact, W, RANK))
        blocks, values, bound = timed(times["block"], partial(leading_block, W, RANK))
    cosines = torch.linalg.svdvals(U.T @ blocks).clamp(max=1)
    along = (U * blocks).sum(0).abs().clamp(max=1)
    seconds = {f"{name}_s": spread(each) for name, each in times.items()}
    return seconds | {
        "m": SHAPE[0],
        "n": SHAPE[1],
        "r": RANK,
        "exponent": exponent,
        "speedup_exact": median(times["whole"]) / median(times["exact"]),
        "speedup_block": median(times["whole"]) / median(times["block"]),
        "energy_missed": float(1 - values.square().sum() / s.square().sum()),
        "largest_principal_angle": float((1 - cosines.min().square()).sqrt()),
        "largest_angle_of_a_direction": float((1 - along.square()).max().sqrt()),
        "bound_given": bound,
    }


def timed(seconds: list[float], work: Callable[[], Any]) -> Any:
    """Call work, append its processor time to the list, and return its result."""
    started = time.process_time()
    result = work()
    seconds.append(time.process_time() - started)
    return result


def power_law(exponent: float) -> Tensor:
    """W (m, n) with random singular vectors."""
    generator = torch.Generator().manual_seed(SEED)
    k = min(SHAPE)
    U, V = (torch.linalg.qr(torch.randn(side, k, generator=generator)).Q for side in SHAPE)
    return (U * torch.arange(1, k + 1) ** -exponent) @ V.T


def show(result: dict[str, Any]) -> None:
    title = f"{result['machine']}; torch {result['torch']}; median of {result['repetitions']} (min-max)"
    columns = ("weight, rank", "spectrum", "whole SVD", "exact", "times", "block", "times", "energy missed")
    table = Table(*columns, "principal angle", "one direction", "bound", title=title)
    for row in result["rows"]:
        whole, exact, block = (_seconds(row[f"{name}_s"]) for name in ("whole", "exact", "block"))
        errors = ("energy_missed", "largest_principal_angle", "largest_angle_of_a_direction", "bound_given")
        table.add_row(
            f"{row['m']} x {row['n']}, {row['r']}", f"i^-{row['exponent']}", whole, exact,
            f"{row['speedup_exact']:.1f}x", block, f"{row['speedup_block']:.1f}x",
            *(f"{row[name]:.0e}" for name in errors),
        )  # fmt: skip
    Console(width=170).print(table)


def _seconds(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.1f} s ({seconds['min']:.1f}-{seconds['max']:.1f})"


if __name__ == "__main__":
    main()
