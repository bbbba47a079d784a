"""Counts how the commands end on hostile and unlucky input. Each case must end within 10 s with one line and exit code
2, or run if the input is odd but valid, without a traceback and without touching files outside run folder and cache.

    python benchmarks/hostile.py --model FOLDER [--kind data --kind run ...] [--every 3]
    python benchmarks/hostile.py --model FOLDER --results FILE --seconds 800        # again and again: it resumes
    python benchmarks/hostile.py --model FOLDER --again FILE                        # the cases that had a fault

FOLDER is a small causal language model. The cases are in tests/fuzz/cases.py and format_cases.py. With --every N only
each N-th case runs; with --seconds no case starts after that time, and the same command continues with the next one.
The results record how many cases exist and how many ran. The time that a case waits for a processor does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

SAVED_EVERY = 20  # cases between two writes of the results
REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "fuzz")]
for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

from cases import KINDS as COMMAND_KINDS  # noqa: E402
from format_cases import FORMAT_KINDS  # noqa: E402
from harness import Ended, command, faults, run, snapshot  # noqa: E402
from hostile_parts import Case, Materials, train_words  # noqa: E402

KINDS = COMMAND_KINDS | FORMAT_KINDS


def preload() -> None:
    """Import what the commands import, once: each case is a fork of this process."""
    import torch
    from peft import PeftModel  # noqa: F401

    import launcher.evaluation.run
    import launcher.inference.generate
    import launcher.planning.predict
    import launcher.reports.commands
    import launcher.training.run  # noqa: F401

    torch.set_num_threads(1)


def materials(model: Path, folder: Path) -> Materials:
    """A finished run of one step, made by the command itself."""
    made = Materials(model, folder / "run")
    folder.mkdir(parents=True)
    ended = run(lambda: command(train_words(folder, made)), folder, 120.0)
    if ended.code:
        raise RuntimeError(f"the run that the cases start from failed: {ended.error}")
    return made


def try_case(case: Case, folder: Path) -> tuple[Ended, list[str]]:
    """Run one case in its folder; files there outside run folder and cache must stay as they are."""
    folder.mkdir()
    words = case.write(folder)
    before = snapshot(folder, apart_from=("run", "cache", "place"))
    ended = run(lambda: command(words), folder)
    found = faults(ended, codes=case.accepts)
    after = snapshot(folder, apart_from=("run", "cache", "place"))
    if touched := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        found.append(f"touched {', '.join(touched[:3])}")
    return ended, found


def again(results: Path, known: list[Case], place: Path) -> int:
    """Run the cases with a fault once more: those that now end as they should are listed as fixed."""
    summary = json.loads(results.read_text())
    faulty = {(one["kind"], one["case"]): one for one in summary["faults"]}
    left, mended = [], summary.get("mended", [])
    for at, case in enumerate(case for case in known if (case.kind, case.name) in faulty):
        _, found = try_case(case, place / f"case{at}")
        one = faulty[case.kind, case.name]
        if found:
            left.append(one | {"faults": found})
        else:
            mended.append(one | {"mended": True})
        print(case.kind, case.name, found, flush=True)
    summary = earlier(results, known) | {"with_a_fault": len(left), "fine": summary["ran"] - len(left)}
    summary |= {"faults": left, "mended": mended}
    results.write_text(json.dumps(summary | counts(left), indent=1) + "\n")
    return 1 if left else 0


def counted(known: list[Case], done: str) -> dict[str, Any]:
    """Which cases ran, a digit for each, and how many of each kind."""
    by_kind = Counter(case.kind for case, ran in zip(known, done, strict=True) if ran == "1")
    return {"ran": done.count("1"), "ran_by_kind": by_kind, "done": done}


def counts(bad: list[dict]) -> dict[str, int]:
    """How many cases have each of the faults that must never happen."""
    return {
        "tracebacks": sum("traceback" in one["faults"] for one in bad),
        "over_10_s": sum(any(f.endswith(" s") and f[0].isdigit() for f in one["faults"]) for one in bad),
        "files_touched": sum(any(f.startswith("touched") for f in one["faults"]) for one in bad),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="default: all")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only", default="", help="run only cases whose name contains this, and print what they say")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--again", type=Path, help="run only the cases with a fault in these results, and update them")
    chosen = parser.parse_args()
    preload()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loldu-hostile-") as name:
        place = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(place / "cache-home")
        made = materials(chosen.model.resolve(), place / "materials")
        known = [case for kind in chosen.kind or KINDS for case in KINDS[kind](made)]
        wanted = [case for case in known if chosen.only in case.name]
        if chosen.again:
            return again(chosen.again, wanted, place)
        random.Random(0).shuffle(wanted)  # a run that is cut short has tried some of every kind
        summary = earlier(chosen.results, known)
        places = {case: place for place, case in enumerate(known)}
        done = list(summary["done"])
        for at, case in enumerate([case for case in wanted[:: chosen.every] if done[places[case]] == "0"]):
            if time.monotonic() - began > chosen.seconds:
                break
            ended, found = try_case(case, place / f"case{at}")
            done[places[case]] = "1"
            if found or chosen.only:
                last = (ended.error.strip().splitlines() or [""])[-1][:200]
                one = {"kind": case.kind, "case": case.name, "faults": found, "last line": last}
                summary["faults"] += [one] if found else []
                print(f"{case.kind:8} {case.name[:70]:70} {'; '.join(found) or 'fine'} | {last}", flush=True)
            shutil.rmtree(place / f"case{at}", ignore_errors=True)
            if at % SAVED_EVERY == 0:
                summed_up(summary, known, done, began, chosen.results)
        summary = summed_up(summary, known, done, began, chosen.results)
    print(
        json.dumps({key: value for key, value in summary.items() if key not in ("faults", "mended", "done")}, indent=2)
    )
    return 1 if summary["faults"] else 0


def summed_up(
    summary: dict[str, Any], known: list[Case], done: list[str], began: float, results: Path | None
) -> dict[str, Any]:
    """The summary with what ran since began, also written to the results' file."""
    bad = summary["faults"]
    whole = summary | counted(known, "".join(done)) | {"seconds": summary["seconds"] + round(time.monotonic() - began)}
    whole |= {"fine": whole["ran"] - len(bad), "with_a_fault": len(bad)} | counts(bad)
    if results:
        results.write_text(json.dumps(whole, indent=1) + "\n")
    return whole


def earlier(results: Path | None, known: list[Case]) -> dict[str, Any]:
    """What a run before this one has found, to be continued, or a new summary."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=REPO).strip()
    summary: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores", "commits": [],
        "seconds": 0, "cases": len(known), "cases_by_kind": Counter(case.kind for case in known),
        **counted(known, "0" * len(known)), "faults": [],
    }  # fmt: skip
    if results and results.exists():
        summary = json.loads(results.read_text())
        if summary["cases"] != len(known):
            raise SystemExit(f"{results} is about other cases: give another file, or remove it")
    if commit not in summary["commits"]:
        summary["commits"].append(commit)
    return summary


if __name__ == "__main__":
    raise SystemExit(main())
