"""Seconds and memory to tokenise a large data set, on one process and on several: nothing of it stays in memory.

    python benchmarks/tokenising.py --records 400000 --processes 1 2 --repeats 2

The records are those of --data, again and again, each with a number before it so that no two are equal. All processes
read, check and tokenise them through the code of a run, into an empty cache; then they read it once more from there.
Runs with few and with many processes take turns; each process has one thread. Of each process: processor seconds, and
the peak of its own memory (anonymous pages; those of mapped files are not counted) above what it held before. Seconds
are those of the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
GOALS = {"seconds_of_one": 0.6, "own_gb": 0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--data", type=Path, default=REPO / "recipes/tiny/instructions/train.json")
    parser.add_argument("--model", type=Path, default=REPO / "recipes/tiny/model", help="folder with a tokenizer")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of one process
    options = parser.parse_args()
    if options.folder:
        one_process(options.folder, options.model, options.max_length)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_records(options.data, Path(folder) / "data.json", options.records)
        runs = []
        for _ in range(options.repeats):
            for count in options.processes:
                found = measure(Path(folder), count, options)
                print(f"{count} processes: {in_words(found)}", flush=True)
                runs.append({"processes": count, **found})
    result = {
        "benchmark": "tokenising",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=REPO
        ).stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg(),  # above the number of cores: wall-clock seconds mean little
        "records": options.records,
        "data_bytes": runs[0]["data_bytes"],
        "tokens": runs[0]["tokens"],
        "runs": runs,
        "summary": summary(runs, options.processes),
    }
    print(json.dumps(result["summary"], indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def summary(runs: list[dict[str, Any]], processes: list[int]) -> dict[str, Any]:
    """Medians for each number of processes, and the ratios to the first."""
    found: dict[str, Any] = {}
    for count in processes:
        mine = [run for run in runs if run["processes"] == count]
        found[str(count)] = {
            "seconds": median(run["seconds"] for run in mine),
            "processor_s_of_the_slowest": median(max(run["processor_s"]) for run in mine),
            "own_gb_at_most": max(max(run["own_gb"]) for run in mine),
            "own_gb_when_read_again": max(max(run["again_own_gb"]) for run in mine),
            "seconds_when_read_again": median(run["again_s"] for run in mine),
        }
    first = found[str(processes[0])]
    for count in processes[1:]:
        for name in ("seconds", "processor_s_of_the_slowest"):
            found[str(count)][f"{name}_of_{processes[0]}"] = found[str(count)][name] / first[name]
    return found


def write_records(source: Path, target: Path, count: int) -> None:
    """One JSON list, as most public sets are."""
    rows = json.loads(source.read_text())
    with target.open("w") as file:
        for i in range(count):
            row = rows[i % len(rows)]
            file.write(("[" if i == 0 else ",\n") + json.dumps({**row, "instruction": f"{i}. {row['instruction']}"}))
        file.write("]")


def measure(folder: Path, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *(__file__, "--folder", str(folder), "--model", str(options.model), "--max-length", str(options.max_length)),
    ]
    (folder / "cache").mkdir()
    subprocess.run(command, check=True, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    subprocess.run(["rm", "-r", str(folder / "cache")], check=True)
    assert len({each["digest"] for each in found}) == 1
    return {
        "seconds": max(each["seconds"] for each in found),
        "processor_s": [each["processor_s"] for each in found],
        "own_gb": [each["own_gb"] for each in found],
        "again_s": max(each["again_seconds"] for each in found),
        "again_own_gb": [each["again_own_gb"] for each in found],
        "tokens": found[0]["tokens"],
        "data_bytes": (folder / "data.json").stat().st_size,
        "digest": found[0]["digest"],
        "load_average": os.getloadavg(),
    }


def one_process(folder: Path, model: Path, max_length: int) -> None:
    """What a run does with its data; figures go to a file of the folder."""
    from launcher.config import Config, DataConfig
    from launcher.data.crew import Crew
    from launcher.models.files import load_tokenizer
    from launcher.processes import Ranks, connect
    from launcher.tasks.choose import task_of
    from launcher.training.report import Screen

    comm = connect(Ranks.from_environment())
    screen, tokenizer = Screen(comm.ranks.is_main), load_tokenizer(model)
    data = DataConfig(data=str(folder / "data.json"), eval_records=200, max_length=max_length, prompt_template="alpaca")
    config = Config(data=data)
    found: dict[str, Any] = {}
    for name in ("", "again_"):
        comm.gather("start", None)
        started, before, processor = time.monotonic(), own_bytes(), time.process_time()
        with Peak() as peak:
            samples = task_of(config).read_together(config, tokenizer, folder / "cache", Crew(comm, screen.bar))
            samples.train.distinct_ids()
        found |= {
            f"{name}seconds": time.monotonic() - started,
            f"{name}processor_s": time.process_time() - processor,
            f"{name}own_gb": (peak.bytes - before) / 1e9,
        }
    found |= {"digest": samples.train.digest(), "tokens": samples.train.report.tokens}
    (folder / f"{comm.ranks.rank}.json").write_text(json.dumps(found))
    comm.gather("end", None)


def own_bytes() -> int:
    """Memory of this process that does not belong to a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


class Peak:
    """The largest private memory of this process, sampled fifty times a second."""

    def __enter__(self) -> Peak:
        self.bytes, self.ended = own_bytes(), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.ended.wait(0.02):
            self.bytes = max(self.bytes, own_bytes())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def in_words(found: dict[str, Any]) -> str:
    cpu = ", ".join(f"{each:.1f}" for each in found["processor_s"])
    memory = ", ".join(f"{each:.3f}" for each in found["own_gb"])
    return (
        f"{found['tokens']:,} tokens in {found['seconds']:.1f} s (processor seconds {cpu}), own memory {memory} GB; "
        f"read again in {found['again_s']:.1f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
