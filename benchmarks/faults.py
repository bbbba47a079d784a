"""Kill runs, damage their files and fill their disk at seeded random moments: each run must recover completely.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --model DIR --data FILE        # about 10 minutes on two cores
    OMP_NUM_THREADS=1 python benchmarks/faults.py --model DIR --data FILE --kills 8 --only kills

kills     kill -9 of one rank or of all while factoring, loading, training, evaluating or saving; the run is started
          again until it finishes, and its events and adapter must equal the uninterrupted run's bit for bit
damage    a flipped byte or a truncation in every kind of file of the run folder and the cache: reported and repaired
disk      a full disk (a small tmpfs, which needs root) during a save: earlier checkpoints stay intact
cache     two jobs that fill one cache at the same time, 20 times
owners    20 starts at once on one --output, of one process and of two, alone or with a holder, stopped or killed

One process imports everything and forks the ranks of each attempt, as a launcher would start them: when one dies it
ends the others. Writes benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file

from adapters import LoLDUConfig
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.factorization import cache
from launcher.factorization.share import factorize
from launcher.factorization.targets import targets_of
from launcher.processes import Communicator, Ranks
from launcher.training import checkpoint
from launcher.training.run import run

RESULTS = Path(__file__).parent / "results" / "faults.json"
KINDS = (("none", 1), ("ddp", 2), ("fsdp2", 2))  # sharding and number of processes
LIMIT_S = 180.0
KILLS_OF_A_RUN = 6  # before it may finish
PORTS = itertools.cycle(range(20000, 32000))
# How the start of a phase shows from outside, and within how many seconds after it the kill comes.
PHASES = {"factor": 0.05, "load": 0.5, "train": 0.05, "evaluate": 0.1, "save": 0.02}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["kills", "damage", "disk", "cache", "owners"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder), options.model, options.data, options.seed)
        parts: dict[str, Callable[[], Any]] = {
            "kills": lambda: bench.kills(options.kills),
            "damage": bench.damage,
            "disk": bench.full_disk,
            "cache": bench.shared_cache,
            "owners": bench.owners,
        }
        found = {name: part() for name, part in parts.items() if options.only in (None, name)}
    result = about(options.seed) | {"seconds": round(time.monotonic() - started), **found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


class Bench:
    """One folder of runs, all of the same training."""

    def __init__(self, folder: Path, model: Path, data: Path, seed: int):
        torch.set_num_threads(1)
        self.folder, self.draw, self.count = folder, random.Random(seed), 0
        records = folder / "records.json"
        records.write_text(json.dumps(json.loads(Path(data).read_text())[:120]))
        self.config = Config(
            model=ModelConfig(model=str(model)),
            data=DataConfig(data=str(records), eval_records=40, prompt_template="short", max_length=64),
            adapter=AdapterConfig(rank=16, targets=("all-linear",)),
            optimizer=OptimizerConfig(learning_rate=1e-2, batch_size=4, max_steps=14),
            run=RunConfig(save_every=2, eval_every=3),
        )
        self.references: dict[str, Path] = {}

    def run_config(self, output: Path, sharding: str, **options: Any) -> Config:
        cache_folder = options.pop("cache", str(output) + "-cache")
        changed = replace(self.config.run, output=str(output), sharding=sharding, cache=cache_folder, **options)
        return replace(self.config, run=changed)

    def reference(self, sharding: str, processes: int) -> Path:
        """The uninterrupted run."""
        if sharding not in self.references:
            output = self.folder / f"whole-{sharding}"
            codes = Attempt(self.run_config(output, sharding), processes, self.folder / f"whole-{sharding}.log").wait()
            assert codes == [0] * processes, (self.folder / f"whole-{sharding}.log").read_text()
            self.references[sharding] = output
        return self.references[sharding]

    def kills(self, count: int) -> dict[str, Any]:
        struck: Counter[str] = Counter()
        lives = starts = wrong = 0
        while struck.total() < count:
            sharding, processes = KINDS[lives % len(KINDS)]
            whole, lives = self.reference(sharding, processes), lives + 1
            output = self.folder / f"life-{lives}"
            config, log, done = self.run_config(output, sharding), self.folder / f"life-{lives}.log", False
            last = min(count, struck.total() + KILLS_OF_A_RUN)
            while not done:
                phase = self.draw.choice(list(PHASES)) if struck.total() < last else None
                everyone = self.draw.random() < 0.5
                if phase == "factor":
                    shutil.rmtree(str(output) + "-cache", ignore_errors=True)
                attempt = Attempt(config, processes, log)
                starts += 1
                seen = self.strike(phase, output, attempt) if phase else None
                codes = attempt.wait(seen, victims=None if everyone else [self.draw.randrange(processes)])
                if attempt.struck:
                    struck[f"{phase}, {'all' if everyone or processes == 1 else 'one'} of {processes}"] += 1
                    print(f"kill {struck.total()}: {sharding}, {phase}, {'all' if everyone else 'one'}", flush=True)
                done = codes == [0] * processes
                assert done or attempt.struck, f"{codes}\n{log.read_text()[-6000:]}"
            if not same(output, whole):
                wrong += 1
                print(f"life {lives} differs from the uninterrupted run: see {log.read_text()[-3000:]}", flush=True)
            shutil.rmtree(output)
            shutil.rmtree(str(output) + "-cache")
        assert wrong == 0, f"{wrong} of {lives} runs differ"
        return {"kills": struck.total(), "runs": lives, "starts": starts, "differing": wrong, "moments": dict(struck)}

    def strike(self, phase: str, output: Path, attempt: Attempt) -> Callable[[], bool]:
        """Whether the moment has come, asked every few milliseconds."""
        events, factors = output / "events.jsonl", Path(str(output) + "-cache") / "factors"
        wanted, since = self.draw.randrange(1, 30), 0.0
        delay = self.draw.uniform(0, PHASES[phase])
        before = len(lines(events))

        def begun() -> bool:
            if phase == "factor":
                return factors.exists() and len(list(factors.glob("*.safetensors"))) >= wanted
            if phase == "load":
                return "factors of" in attempt.said()
            if phase == "train":
                return len(lines(events)) > 1 and abs(len(lines(events)) - before) >= wanted % 6 + 1
            if phase == "evaluate":
                last = lines(events)[-1:]
                return bool(last) and '"loss"' in last[0] and json.loads(last[0])["step"] % 3 == 0
            return any((output / "checkpoints").glob("*.tmp"))

        def seen() -> bool:
            nonlocal since
            if not since and begun():
                since = time.monotonic()
            return bool(since) and time.monotonic() - since >= delay

        return seen

    def damage(self) -> dict[str, Any]:
        whole, found = self.reference("none", 1), []
        with_cache = Path(str(whole) + "-cache")
        in_run = [
            "checkpoints/step-000008/rank-00000.safetensors", "checkpoints/step-000008/index.json",
            "checkpoints/step-000008/COMPLETE", "events.jsonl", "config.json", "state", "control",
            "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/SHA256SUMS",
        ]  # fmt: skip
        in_cache = [sorted((with_cache / part).iterdir())[0].relative_to(with_cache) for part in ("factors", "index")]
        for kind in [*in_run, *(Path("cache") / file for file in in_cache)]:
            for how in ("flip", "cut"):
                output = self.folder / f"damaged-{len(found)}"
                shutil.copytree(whole, output)
                shutil.copytree(with_cache, str(output) + "-cache", copy_function=shutil.copy2)
                if not str(kind).startswith("adapter"):
                    interrupt(output, 8)
                file = (output / kind) if "cache" not in str(kind) else Path(str(output) + "-cache", *kind.parts[1:])
                spoil(file, how, self.draw)
                log = self.folder / "damaged.log"
                log.unlink(missing_ok=True)
                codes = Attempt(self.run_config(output, "none"), 1, log).wait()
                assert codes == [0], log.read_text()
                plain = str(kind) in ("config.json", "state", "control")  # rewritten at every start
                # a warning is broken into lines; a damaged index means a damaged checkpoint
                said = "".join(log.read_text().split())
                named = file.name in said or (file.name == "COMPLETE" and "index.jsondiffersfromitschecksum" in said)
                assert named or plain, f"{kind} {how}\n{log.read_text()}"
                events_ok = set(lines(output / "events.jsonl")) <= set(lines(whole / "events.jsonl"))
                good = same(output, whole, events=kind != "events.jsonl") and (events_ok or how == "flip")
                assert good, f"{kind} {how}: the run differs\n{log.read_text()}"
                found.append({"file": kind_name(kind), "damage": how, "named": named, "equal afterwards": good})
                shutil.rmtree(output)
                shutil.rmtree(str(output) + "-cache")
        print(f"{len(found)} damaged files made good", flush=True)
        return {"cases": len(found), "files": found}

    def full_disk(self) -> dict[str, Any]:
        whole = self.reference("none", 1)
        output, log = self.folder / "full", self.folder / "full.log"
        root = output / "checkpoints"
        one = sum(-(-file.stat().st_size // 4096) * 4096 for file in (whole / "checkpoints" / "step-000008").iterdir())
        root.mkdir(parents=True)
        shutil.copy(whole / "config.json", output)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(3.5 * one)}", "none", str(root)])
        if mounted.returncode:
            return {"skipped": "mounting a small tmpfs needs root"}
        try:
            config = self.run_config(output, "none", save_every=1)
            assert Attempt(config, 1, log).wait() == [2], log.read_text()
            kept = checkpoint.newest(root)
            assert kept is not None
            assert kept.step == 3, kept
            assert "no space is left" in log.read_text()
            subprocess.run(["mount", "-o", f"remount,size={100 * one}", str(root)], check=True)
            assert Attempt(config, 1, log).wait() == [0], log.read_text()
            assert same(output, whole)
        finally:
            subprocess.run(["umount", str(root)], check=True)
        print("a full disk was reported, and the run resumed once there was space", flush=True)
        return {"exit code": 2, "last good step": kept.step, "equal afterwards": True}

    def shared_cache(self, times: int = 20) -> dict[str, Any]:
        requests = targets_of(
            Path(self.config.model.model), ("all-linear",), (), 16, LoLDUConfig().factorization(), dtype="float32"
        )
        for number in range(times):
            folder = self.folder / f"shared-{number}"
            jobs = [
                fork(lambda folder=folder: int(not factorize(requests, folder, Communicator(Ranks()))))
                for _ in range(2)
            ]
            assert [os.waitpid(job, 0)[1] for job in jobs] == [0, 0]
            assert len(cache.entries(folder)) == len(requests)
            assert cache.verify(folder) == []
            assert not list(folder.rglob("*.tmp"))
        print(f"two jobs at once, {times} times: {len(requests)} valid files each time", flush=True)
        return {"times": times, "weights": len(requests), "damaged": 0}

    def owners(self, count: int = 20) -> dict[str, Any]:
        """Exactly one start trains, the others name it or find the run finished, and the result is the whole run's."""
        told = {}
        for sharding, processes in KINDS[:2]:
            whole = self.reference(sharding, processes)
            for holder in ("none", "killed", "stopped"):
                output = self.folder / f"owners-{processes}-{holder}"
                config = self.run_config(output, sharding, cache=str(whole) + "-cache")
                first, hold = None, output / "events.jsonl"
                if holder != "none":
                    first = Attempt(config, processes, self.folder / f"{output.name}-holder.log")
                    until(lambda hold=hold: len(lines(hold)) > 3)
                    for pid in first.pids:
                        os.kill(pid, signal.SIGKILL if holder == "killed" else signal.SIGSTOP)
                logs = [self.folder / f"{output.name}-{number}.log" for number in range(count)]
                attempts = [Attempt(config, processes, log) for log in logs]
                codes = [set(attempt.wait()) for attempt in attempts]
                if holder == "stopped" and first is not None:
                    for pid in first.pids:
                        os.kill(pid, signal.SIGCONT)
                    codes.append(set(first.wait()))
                    logs.append(first.log)
                said = [log.read_text() for log in logs]
                trained = sum(text.count(f"finished {self.config.optimizer.max_steps} steps") for text in said)
                refused = sum("in use by another start of this run (process" in text for text in said)
                later = sum("is already finished at step" in text for text in said)  # begun when the winner had ended
                assert trained == 1, f"{holder}, {processes}: {codes}"
                assert trained + refused + later == len(said), f"{holder}, {processes}: {codes}"
                assert all(code in ({0}, {2}) for code in codes), f"{holder}, {processes}: {codes}"
                assert same(output, whole), f"{holder}, {processes}: the run differs"
                case = {"trained": trained, "refused": refused, "found it finished": later, "equal afterwards": True}
                told[f"{processes} each, holder {holder}"] = case
                print(f"{count} starts of {processes}, holder {holder}: {case}", flush=True)
        return {"starts at once": count, "cases": told}


def until(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Attempt:
    """One start of a run: its ranks as forked processes, all ended when one fails."""

    def __init__(self, config: Config, processes: int, log: Path):
        self.log, self.struck = log, False
        self.start = log.stat().st_size if log.exists() else 0
        port = free_port()
        self.pids = [fork(lambda rank=rank: self._rank(config, rank, processes, port)) for rank in range(processes)]

    def _rank(self, config: Config, rank: int, processes: int, port: int) -> int:
        out = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if processes > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in numbers.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return run(config, "faults")

    def said(self) -> str:
        """What this attempt has printed so far."""
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as file:
            file.seek(self.start)
            return file.read().decode(errors="replace")

    def wait(self, strike: Callable[[], bool] | None = None, victims: list[int] | None = None) -> list[int]:
        """Exit codes once all have ended (minus the signal for a killed one); the victims, or all, die at strike()."""
        codes: dict[int, int] = {}
        deadline, ending = time.monotonic() + LIMIT_S, None
        while len(codes) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
            left = [rank for rank in range(len(self.pids)) if rank not in codes]
            now = time.monotonic()
            if strike is not None and not self.struck and not codes and strike():
                self.struck = True
                for rank in victims if victims is not None else left:
                    os.kill(self.pids[rank], signal.SIGKILL)
            elif any(codes.values()) and ending is None:  # as torchrun does: SIGTERM first, then SIGKILL
                ending = now + 2.0
                for rank in left:
                    os.kill(self.pids[rank], signal.SIGTERM)
            elif now > min(deadline, ending or deadline):
                for rank in left:
                    os.kill(self.pids[rank], signal.SIGKILL)
            assert now < deadline + 10, f"still running after {LIMIT_S} s: {self.said()}"
            time.sleep(0.002)
        return [codes[rank] for rank in range(len(self.pids))]


def free_port() -> int:
    """A port that no other attempt was given, and that no outgoing connection gets: those are above 32767.

    With a port from the system, a connection of another attempt could take it before rank 0 listened.
    """
    for port in PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("not reached")


def fork(work: Callable[[], int]) -> int:
    """Fork a child that exits with the result of work; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def interrupt(output: Path, step: int) -> None:
    """Make a finished run look as if it had been stopped after that step."""
    for folder in (output / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(output / "adapter")
    (output / "state").write_text("stopped\n")


def spoil(file: Path, how: str, draw: random.Random) -> None:
    """Flip a bit or cut the end off, in the first half: the end of a log may be newer than its seal."""
    content = bytearray(file.read_bytes())
    place = draw.randrange(-(-len(content) // 2))
    if how == "flip":
        content[place] ^= 1 << draw.randrange(8)
    else:
        del content[place:]
    file.write_bytes(content)


def same(output: Path, whole: Path, *, events: bool = True) -> bool:
    """The events of each step and the adapter, to be compared bit for bit."""
    name = "adapter/adapter_model.safetensors"
    found, expected = load_file(output / name), load_file(whole / name)
    equal = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    return equal and (not events or lines(output / "events.jsonl") == lines(whole / "events.jsonl"))


def lines(file: Path) -> list[str]:
    """The complete lines of a file that may be growing."""
    try:
        return file.read_bytes().decode(errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []


def kind_name(kind: Any) -> str:
    return str(Path(*kind.parts[:2], "...")) if isinstance(kind, Path) else kind


def about(seed: int) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "benchmark": "faults: kills, damage, full disk, shared cache, simultaneous starts",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, gloo on CPU",
        "torch": torch.__version__,
        "seed": seed,
    }


if __name__ == "__main__":
    main()
