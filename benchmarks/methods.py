"""Methods side by side: each at its own best rate, on two small Llamas and three tasks, with three seeds.

    python benchmarks/methods.py [FOLDER]   # goes on where it stopped; benchmarks/results/methods.json and methods.svg
    python benchmarks/methods.py --left     # what is left to run, and about how long it takes
    python benchmarks/methods.py --table    # the README's tables and the plot from the results so far

FOLDER (../shared/data) holds models/babyllama-361, models/stories260K, instruction/*.json and classification/*.tsv.
A rate is searched on the validation split with seed 0, on a grid of half decades: three around a first guess, and
further while the best lies at an edge. Then three other seeds are trained at it and tested on the test split. A run
that is in the results file is not repeated; what decides a run is its whole row up to `steps`.

Time is the process's own CPU time (one thread) for a training step, memory the peak of the run above what the process
held before it: both include everything a user would pay, and neither minds a busy machine.
"""

from __future__ import annotations

import ctypes
import gc
import io
import itertools
import json
import math
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig  # noqa: E402
from launcher.training import loop  # noqa: E402
from launcher.training.run import run  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "methods.json"
STEPS, BATCH, MAX_LENGTH = 60, 8, 128
SEEDS = (1, 2, 3)
RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
MODELS = {"babyllama-361": 110, "stories260K": 55}  # numbers per weight that a full-rank diagonal core has on average
CELLS = (  # an early stop leaves whole cells: first the larger model on real instructions, then what is cheapest
    ("babyllama-361", "alpaca"),
    ("stories260K", "instructions"),
    ("stories260K", "sst2"),
    ("stories260K", "alpaca"),
    ("babyllama-361", "sst2"),
    ("babyllama-361", "instructions"),
)
FIRST = 8  # methods that go through all cells before the others do
ALL, FULL = ("all-linear",), 4096  # every linear layer; full rank, after clamping
# name -> adapter, and a first guess of the rate. "counted" ones get about as many numbers as a full-rank diagonal.
METHODS: dict[str, dict[str, Any]] = {
    "LoLDU": {"rank": FULL, "rate": 3e-3},
    "LoLDU, directions normalised": {"rank": FULL, "options": {"normalize_directions": True}, "rate": 1e-1},
    "SVFit": {"method": "svfit", "rank": FULL, "rate": 1e-1},
    "LoRA, r 8": {"method": "lora", "rank": 8, "options": {"lora_alpha": 16}, "rate": 1e-2},
    "LoRA, r 1 on q, v, o": {
        "method": "lora", "rank": 1, "targets": ("q_proj", "v_proj", "o_proj"), "options": {"lora_alpha": 2},
        "rate": 3e-2,
    },
    "full fine-tuning": {"method": "full", "rate": 1e-3},
    "LoRA-XS": {"method": "loraxs", "counted": "square", "rate": 1e-2},
    "IA3": {
        "method": "ia3", "targets": ("k_proj", "v_proj", "down_proj"), "rate": 3e-2,
        "options": {"feedforward_modules": ["down_proj"]},
    },
    "SVFT, 1 diagonal either side": {
        "method": "svft", "rank": FULL, "options": {"off_diagonals": 1}, "rate": 3e-2,
    },
    "DoRA, r 8": {"method": "lora", "rank": 8, "options": {"lora_alpha": 16, "use_dora": True}, "rate": 1e-2},
    "VeRA, r 256": {"method": "vera", "rank": 256, "rate": 3e-2},
    "FourierFT": {"method": "fourierft", "counted": "n_frequency", "options": {"scaling": 100}, "rate": 3e-2},
    "LoLDU-XS": {"method": "lolduxs", "counted": "square", "options": {"normalize_directions": True}, "rate": 1e-2},
}  # fmt: skip


def adapter_of(name: str, model: str) -> AdapterConfig:
    spec = METHODS[name]
    options, rank = dict(spec.get("options", {})), spec.get("rank", 8)
    if spec.get("counted") == "square":
        rank = math.isqrt(MODELS[model])
    elif "counted" in spec:
        options[spec["counted"]] = MODELS[model]
    return AdapterConfig(
        method=spec.get("method", "loldu"),
        rank=rank,
        targets=spec.get("targets", ALL),
        options=tuple(f"{option}={json.dumps(value)}" for option, value in options.items()),
    )


def what(model: str, task: str, name: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """All that decides a run, as the results file has it."""
    adapter = adapter_of(name, model)
    return {
        "model": model, "task": task, "method": name, "adapter": f"{adapter.method} rank {adapter.rank}",
        "targets": " ".join(adapter.targets), "options": " ".join(adapter.options), "rate": rate, "seed": seed,
        "split": split, "batch": BATCH, "max_length": MAX_LENGTH, "steps": STEPS,
    }  # fmt: skip


def write_data(shared: Path, work: Path) -> None:
    """TASK-train.json, TASK-validation.json and TASK-test.json: records that fit, in an order of their own."""
    fits = lambda record: record["output"] and len(record["instruction"] + record["input"]) < 60  # noqa: E731
    rows = [line.rsplit("\t", 1) for line in (shared / "classification/sst2_train.tsv").read_text().splitlines()[1:]]
    words = ("negative", "positive")
    tasks = {
        "alpaca": json.loads((shared / "instruction/alpaca_5000.json").read_text()),
        "instructions": json.loads((shared / "instruction/llms_from_scratch_instruction_data.json").read_text()),
        "sst2": [
            {"instruction": text.strip(), "input": "", "output": words[int(label)]} for text, label in rows[:8000]
        ],
    }
    for task, records in tasks.items():
        kept = [record for record in records if fits(record)]
        random.Random(0).shuffle(kept)
        held = 200 if task == "sst2" else 100
        parts = {"validation": kept[:held], "test": kept[held : 2 * held], "train": kept[2 * held :][:2000]}
        for part, chosen in parts.items():
            (work / f"{task}-{part}.json").write_text(json.dumps(chosen))


def measure(row: dict[str, Any], shared: Path, work: Path) -> dict[str, Any]:
    """One run: held-out loss (and exact match) before and after, trained numbers, frozen bytes, time, memory."""
    config = Config(
        model=ModelConfig(model=str(shared / "models" / row["model"]), dtype="float32"),
        data=DataConfig(
            data=str(work / f"{row['task']}-train.json"),
            eval_data=str(work / f"{row['task']}-{row['split']}.json"),
            prompt_template="short",
            max_length=MAX_LENGTH,
            exact_match=row["task"] == "sst2" and row["split"] == "test",
            answer_tokens=10,
        ),
        adapter=adapter_of(row["method"], row["model"]),
        optimizer=OptimizerConfig(
            learning_rate=row["rate"], batch_size=BATCH, max_steps=STEPS, warmup_ratio=0.05, seed=row["seed"]
        ),
        run=RunConfig(output=str(work / "run"), cache=str(work / "cache"), resume="never"),
    )
    shutil.rmtree(work / "run", ignore_errors=True)
    said, started = io.StringIO(), time.process_time()
    with watched() as seen, redirect_stdout(said), redirect_stderr(said):
        failed = run(config, "benchmark")
    if failed and "the loss is nan" not in said.getvalue() and "the loss is inf" not in said.getvalue():
        raise SystemExit(f"{row} failed:\n{said.getvalue()}")
    events = [json.loads(line) for line in (work / "run" / "events.jsonl").read_text().splitlines()]
    evaluations = [event for event in events if "eval_loss" in event]
    first, last = evaluations[0], {"eval_loss": None} if failed else evaluations[-1]  # None: it diverged
    return {
        **row,
        "before": first["eval_loss"], "loss": last["eval_loss"],
        "exact_before": first.get("exact_match"), "exact": last.get("exact_match"),
        "trained": seen["trained"], "frozen_bytes": seen["frozen_bytes"], "step_ms": seen["step_ms"],
        "peak_mb": seen["peak_mb"], "cpu_s": round(time.process_time() - started, 1),
    }  # fmt: skip


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """What a run inside costs: CPU time between two calls of `gradients`, the model's tensors, peak memory."""
    marks: list[float] = []
    seen: dict[str, Any] = {}
    plain = loop.gradients

    def gradients(job: loop.Job, step: int) -> Any:
        marks.append(time.process_time())
        if step == 1:
            seen.update(tensors_of(job.engine.model))
        return plain(job, step)

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed blocks of the run before hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, loop.gradients = resident_mb("VmRSS"), gradients
    try:
        yield seen
    finally:
        loop.gradients = plain
        steps = [later - earlier for earlier, later in itertools.pairwise(marks)]
        seen["step_ms"] = round(median(steps) * 1e3, 1) if steps else None
        seen["peak_mb"] = round(resident_mb("VmHWM") - before, 1)


def resident_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def tensors_of(model: Any) -> dict[str, int]:
    """Numbers that train, and bytes of frozen tensors that the adapter added, each storage once."""
    frozen: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            base = {id(part) for part in layer.get_base_layer().parameters()}
            held = [*layer.parameters(), *layer.buffers()]
            for values in vars(layer).values():  # FourierFT keeps its places in a plain dict
                held += values.values() if isinstance(values, dict) else []
            for part in held:
                if isinstance(part, torch.Tensor) and id(part) not in base and not part.requires_grad:
                    frozen[part.data_ptr()] = part.numel() * part.element_size()
    trained = sum(part.numel() for part in model.parameters() if part.requires_grad)
    return {"trained": trained, "frozen_bytes": sum(frozen.values())}


class Campaign:
    """The results so far, and the runs that are still to be made."""

    def __init__(self, shared: Path):
        self.shared = shared
        self.found: list[dict[str, Any]] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []

    def result(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return next((old for old in self.found if row.items() <= old.items()), None)

    def loss(self, row: dict[str, Any]) -> float:
        """Of a run that was made; infinite where it diverged."""
        result = self.result(row)
        assert result is not None, row
        return math.inf if result["loss"] is None else result["loss"]

    def next(self, name: str, model: str, task: str) -> dict[str, Any] | None:
        """The next run of a method on a model and a task; None where all were made."""
        searched = lambda rate: what(model, task, name, rate, 0, "validation")  # noqa: E731
        for rate in self.rates(name, model, task):
            if self.result(searched(rate)) is None:
                return searched(rate)
        best = self.best(name, model, task)
        for seed in SEEDS:
            if self.result(row := what(model, task, name, best, seed, "test")) is None:
                return row
        return None

    def rates(self, name: str, model: str, task: str) -> list[float]:
        """The rates to search: three around the guess (the first cell's best, once known), then on from an edge."""
        guess = METHODS[name]["rate"]
        if (model, task) != CELLS[0] and self.next(name, *CELLS[0]) is None:
            guess = self.best(name, *CELLS[0])
        low = high = RATES.index(guess)
        low, high = low - 1, high + 1
        while True:
            rows = [what(model, task, name, rate, 0, "validation") for rate in RATES[low : high + 1]]
            if any(self.result(row) is None for row in rows):
                return [row["rate"] for row in rows]
            losses = [self.loss(row) for row in rows]
            best = losses.index(min(losses))
            if best == 0 and low > 0:
                low -= 1
            elif best == len(losses) - 1 and high < len(RATES) - 1:
                high += 1
            else:
                return [row["rate"] for row in rows]

    def best(self, name: str, model: str, task: str) -> float:
        """The rate with the lowest validation loss, once all were tried."""
        rates = self.rates(name, model, task)
        return min(rates, key=lambda rate: self.loss(what(model, task, name, rate, 0, "validation")))

    def tested(self, name: str, model: str, task: str) -> list[dict[str, Any]]:
        """The test runs, or none while some are missing."""
        if self.next(name, model, task) is not None:
            return []
        best = self.best(name, model, task)
        return [self.result(what(model, task, name, best, seed, "test")) or {} for seed in SEEDS]

    def run_all(self) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            write_data(self.shared, work)
            for name, model, task in plan():
                while (row := self.next(name, model, task)) is not None:
                    self.found.append(measure(row, self.shared, work))
                    self.save()
                    done = self.found[-1]
                    print(
                        *(done[key] for key in ("model", "task", "method", "rate", "seed", "loss", "cpu_s")), flush=True
                    )

    def save(self) -> None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=REPO).stdout.strip()
        head = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": f"{platform.machine()}, 1 thread"}
        rows = ",\n".join(json.dumps(row) for row in self.found)
        partial = RESULTS.with_suffix(".tmp")
        partial.write_text(f'{json.dumps(head)[:-1]}, "runs": [\n{rows}\n]}}\n')
        partial.replace(RESULTS)

    def left(self) -> str:
        """How many runs are still to be made, if no search goes on from an edge, and about how long they take."""
        count, seconds = 0, 0.0
        for name, model, task in plan():
            rates = self.rates(name, model, task)
            tried = sum(self.result(what(model, task, name, rate, 0, "validation")) is not None for rate in rates)
            missing = len(rates) - tried + len(SEEDS)
            if tried == len(rates):
                best = self.best(name, model, task)
                missing -= sum(self.result(what(model, task, name, best, seed, "test")) is not None for seed in SEEDS)
            like = [row["cpu_s"] for row in self.found if row["model"] == model] or [12.0]
            count, seconds = count + missing, seconds + missing * mean(like)
        return f"{len(self.found)} runs made, at least {count} left: about {seconds / 60:.0f} minutes of one free core"


def plan() -> list[tuple[str, str, str]]:
    """(method, model, task) in the order of running: the first cell whole, the first methods everywhere, the rest."""
    names = list(METHODS)
    first = [(name, *CELLS[0]) for name in names]
    return [
        *first,
        *((name, *cell) for cell in CELLS[1:] for name in names[:FIRST]),
        *((name, *cell) for cell in CELLS[1:] for name in names[FIRST:]),
    ]


def main() -> None:
    torch.set_num_threads(1)
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    campaign = Campaign(folders[0] if folders else REPO.parent / "shared" / "data")
    if "--left" not in sys.argv:
        campaign.run_all()
    print(campaign.left())


if __name__ == "__main__":
    main()
