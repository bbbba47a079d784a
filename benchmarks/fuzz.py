"""Feeds random input to every reader of a file or message, for a given time, and keeps the input of each fault.

    python benchmarks/fuzz.py [--seconds 600] [--reader records ...] [--seed 1] [--results FILE]

Each fault is shrunk to its smallest input and written to tests/fuzz/corpus/READER/, where the tests read it again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FUZZ = REPO / "tests" / "fuzz"
sys.path[:0] = [str(REPO), str(FUZZ)]
for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from readers import READERS  # noqa: E402
from test_readers import try_one  # noqa: E402


def fuzz(name: str, seconds: float, number: int, batch: int = 500) -> tuple[int, dict[str, str]]:
    """Try inputs for a time; returns the smallest input of each fault, by the exception that it raised."""
    tried, found, end = 0, {}, time.monotonic() + seconds
    last: list[bytes] = []
    while time.monotonic() < end:

        @seed(number + tried)
        @settings(
            max_examples=batch, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        @given(data=READERS[name].data)
        def run(data: bytes) -> None:
            nonlocal tried
            tried += 1
            last[:] = [data]
            began = time.monotonic()
            try_one(name, data)
            assert time.monotonic() - began < 10, "it took more than 10 s"

        try:
            run()
        except Exception as error:
            what = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            if what not in found:
                data = last[0]
                file = FUZZ / "corpus" / name / hashlib.sha256(data).hexdigest()[:12]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data[:1_000_000])
                found[what] = str(file.relative_to(REPO))
                print(f"{name}: {what}: {file.name} {data[:80]!r}", file=sys.stderr, flush=True)
    return tried, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all readers together")
    parser.add_argument("--reader", action="append", choices=list(READERS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path)
    chosen = parser.parse_args()
    names = chosen.reader or list(READERS)
    logging.disable()  # each damaged file is logged
    warnings.simplefilter("ignore")
    for name in names:
        try_one(name, READERS[name].good or b"")  # imports libraries, which takes seconds
    results = {}
    for name in names:
        with contextlib.redirect_stdout(io.StringIO()):  # some readers print
            tried, found = fuzz(name, chosen.seconds / len(names), chosen.seed)
        results[name] = {"inputs": tried, "faults": found}
        print(f"{name}: {tried} inputs, {len(found)} faults", flush=True)
    if chosen.results:
        chosen.results.write_text(
            json.dumps({"seconds": chosen.seconds, "seed": chosen.seed, **results}, indent=1) + "\n"
        )
    return 1 if any(one["faults"] for one in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
