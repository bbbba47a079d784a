"""Kills `loldu plan` and `loldu eval` at random moments: what a killed command leaves must not change the next one.

    OMP_NUM_THREADS=1 python benchmarks/command_kills.py --model FOLDER --data FILE          # 20 kills of each

Each command is killed (kill -9) after a random part of the time that it takes, and then run again to its end. The
result must equal that of the uninterrupted command. Both write little: plan reads the cached tokens, eval adds to the
run's eval.json, which must never be half written. Temporary files that a kill leaves are counted, and harm nothing.
Writes results/command_kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "command_kills.json"
COMMANDS = ("plan", "eval")
for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)
sys.path[:0] = [str(REPO)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, help="the results of the other command are kept")
    options = parser.parse_args()
    preload()
    draw, started = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="command-kills-") as name:
        place = Path(name)
        os.chdir(place)
        words = prepare(place, options.model.resolve(), options.data)
        found = {
            command: kills(place, words[command], options.kills, draw)
            for command in COMMANDS
            if options.only in (None, command)
        }
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=REPO).strip()
    result = {"date": date.today().isoformat(), "commit": commit, "machine": f"{platform.machine()}, shared 2 cores"}
    result |= {"seed": options.seed, "seconds": round(time.monotonic() - started)}
    before = json.loads(RESULTS.read_text()) if options.only and RESULTS.exists() else {}
    result |= {name: before[name] for name in COMMANDS if name in before} | found
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 1 if any(one["differing"] for one in found.values()) else 0


def preload() -> None:
    """Import what the commands import, once: each command is a fork of this process."""
    import torch

    import launcher.evaluation.run
    import launcher.planning.predict
    import launcher.training.run  # noqa: F401

    torch.set_num_threads(1)


def prepare(place: Path, model: Path, data: Path) -> dict[str, list[str]]:
    """A finished run, whose cache holds the tokens that plan reads; returns the words of each command."""
    (place / "records.json").write_text(json.dumps(json.loads(data.read_text())[:40]))
    common = ["llama2_alpaca_loldu", f"--model={model}", "--data=records.json", "--rank=4", "--cache=cache"]
    common += ["--batch-size=2", "--eval-records=0", "--max-steps=1", "--output=run"]
    if Command(place, ["train", *common]).wait() != 0:
        raise RuntimeError(f"the run failed: {(place / 'said').read_text()}")
    questions = [{"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a - b}"], "answer": 0} for a, b in SUMS]
    (place / "sums.json").write_text(json.dumps(questions))
    return {
        "plan": ["plan", *common, "--json"],
        "eval": ["eval", "run", "--tasks", "records.json", "sums.json", "--max-tokens=4"],
    }


MEASURED = ("fixed", "loading", "peak_bytes", "bytes_per_process", "rates")
SUMS = [(3, 4), (10, 2), (7, 7), (5, 1), (9, 8), (6, 3)]


def kills(place: Path, words: list[str], count: int, draw: random.Random) -> dict[str, Any]:
    began = time.monotonic()
    assert Command(place, words).wait() == 0, (place / "said").read_text()
    whole, length_s = result_of(place, words), time.monotonic() - began
    differing = left_over = killed = 0
    while killed < count:
        if draw.random() < 0.5:  # half of the kills hit a first result
            (place / "run" / "eval.json").unlink(missing_ok=True)
        if not Command(place, words).kill_after(draw.uniform(0, length_s)):
            continue  # it had ended
        killed += 1
        half_written = not is_json(place / "run" / "eval.json")
        again = Command(place, words).wait()
        if half_written or again or result_of(place, words) != whole:
            differing += 1
            print(f"{words[0]} differs: {(place / 'said').read_text()[-2000:]}", flush=True)
        left = [file for file in place.rglob("*.tmp") if file.is_file()]
        left_over += len(left)
        for file in left:
            file.unlink()
        print(f"{words[0]}: {killed} kills", flush=True)
    return {"kills": killed, "differing": differing, "left_over": left_over, "seconds of one": round(length_s, 2)}


class Command:
    """One command as a forked process, whose output is the file `said`."""

    def __init__(self, place: Path, words: list[str]):
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            out = os.open(place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(os.open(place / "said-to-stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
            from launcher.cli import main as loldu

            code = loldu(words)
            sys.stdout.flush()
        finally:
            os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill_after(self, seconds: float) -> bool:
        """Whether it was still running then."""
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL


def result_of(place: Path, words: list[str]) -> Any:
    """What plan prints, but for times, which it measures, and its own memory; what eval writes."""
    if words[0] == "eval":
        return json.loads((place / "run" / "eval.json").read_text())
    return without_measured(json.loads((place / "said").read_text()))


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if "seconds" not in name and name not in MEASURED}
        return {name: without_measured(part) for name, part in kept.items()}
    return [without_measured(part) for part in value] if isinstance(value, list) else value


def is_json(file: Path) -> bool:
    """Whether a file is missing or whole."""
    try:
        return isinstance(json.loads(file.read_text()), dict)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
