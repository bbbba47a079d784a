"""Methods side by side: each at its own best learning rate, on two small Llamas and three tasks, with three seeds.

    python benchmarks/methods.py [FOLDER]   # resumes; benchmarks/results/methods.json and methods.svg
    python benchmarks/methods.py --left     # the runs that are left, and about how long they take
    python benchmarks/methods.py --table    # the tables of docs/methods.md and the plot from the results so far
    python benchmarks/methods.py --model smollm2 ...   # the same on SmolLM2-135M-Instruct: methods_smollm2.py

FOLDER (../shared/data) holds models/babyllama-361, models/stories260K, instruction/*.json and classification/*.tsv.
In pretraining both models ended each text with <s> and never saw </s>, whose embedding is parallel (cosine 0.999 and
more) to those of other unseen tokens, so a method that does not train the embedding cannot learn to produce it. Answers
therefore end with <s> here.

The learning rate is searched on the validation split with seed 0, on a grid of half decades: three values around a
first guess, and more while the best is at an edge. Then three other seeds are trained with it and evaluated on the test
split. A run in the results file is not repeated; its row up to `steps` identifies it.

Time is the process's own CPU time (one thread) for a training step, memory the peak of the run above what the process
held before it. Both include all costs for a user, and neither depends on the load of the machine.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig  # noqa: E402
from launcher.files import alone  # noqa: E402
from launcher.training.loop import Training  # noqa: E402
from launcher.training.run import run  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "methods.json"
STEPS, BATCH, MAX_LENGTH = 60, 8, 128
SEEDS = (1, 2, 3)
END = "<s>"
RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
MODELS = {"babyllama-361": 110, "stories260K": 55}  # numbers per weight that a full-rank diagonal core has on average
CELLS = (  # so that an early stop leaves complete cells
    ("babyllama-361", "alpaca"),
    ("stories260K", "instructions"),
    ("stories260K", "sst2"),
    ("stories260K", "alpaca"),
    ("babyllama-361", "sst2"),
    ("babyllama-361", "instructions"),
)
OURS = (
    "loldu",
    "lolduxs",
    "svfit",
    "svft",
    "loraxs",
    "lorasb",
)  # diagonal, banded and dense cores between frozen factors
FIRST = 8  # methods that run on all cells; the others run on the first cell only
LION = {"adam_beta2": 0.99}
ALL, FULL = ("all-linear",), 4096  # every linear layer; full rank, after clamping
# name -> adapter and first learning rate. "counted" ones train about as many numbers as a full-rank diagonal.
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
    "IA3, outputs of every linear layer": {"method": "ia3", "options": {"feedforward_modules": []}, "rate": 1e-1},
    "SVFT, 1 diagonal either side": {
        "method": "svft", "rank": FULL, "options": {"off_diagonals": 1}, "rate": 3e-2,
    },
    "DoRA, r 8": {"method": "lora", "rank": 8, "options": {"lora_alpha": 16, "use_dora": True}, "rate": 1e-2},
    "VeRA, r 256": {"method": "vera", "rank": 256, "rate": 3e-2},
    "FourierFT": {"method": "fourierft", "counted": "n_frequency", "options": {"scaling": 100}, "rate": 3e-2},
    "IA3": {
        "method": "ia3", "targets": ("k_proj", "v_proj", "down_proj"), "rate": 3e-2,
        "options": {"feedforward_modules": ["down_proj"]},
    },
    "LoLDU-XS": {"method": "lolduxs", "counted": "square", "options": {"normalize_directions": True}, "rate": 1e-2},
    "LoRA-SB": {"method": "lorasb", "counted": "square", "rate": 1e-3},
    "FLoRA, r 8": {"method": "flora", "rank": 8, "rate": 3e-3},
    "DSEE, r 8": {"method": "dsee", "rank": 8, "rate": 3e-3},
    "SaRA, a twentieth of the entries": {"method": "sara", "rate": 3e-3},
    "AdaLoRA, mean r 8": {"method": "adalora", "rank": 8, "rate": 3e-2},
    "IncreLoRA, mean r 8": {"method": "increlora", "rank": 8, "rate": 3e-2},
    "full fine-tuning, GradNormLoRP": {"method": "full", "optimizer": {"optimizer": "gradnormlorp"}, "rate": 1e-3},
    "full fine-tuning, Lion": {"method": "full", "optimizer": {"optimizer": "lion", **LION}, "rate": 1e-4},
    "full fine-tuning, 8-bit AdamW": {"method": "full", "optimizer": {"optimizer": "adamw8bit"}, "rate": 3e-4},
    "full fine-tuning, 8-bit Lion": {"method": "full", "optimizer": {"optimizer": "lion8bit", **LION}, "rate": 1e-4},
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
    """Everything that identifies a run, as in the results file."""
    adapter = adapter_of(name, model)
    return {
        "model": model, "task": task, "method": name, "adapter": f"{adapter.method} rank {adapter.rank}",
        "targets": " ".join(adapter.targets), "options": " ".join(adapter.options), "rate": rate, "seed": seed,
        "split": split, "batch": BATCH, "max_length": MAX_LENGTH, "end": END, "steps": STEPS,
        **METHODS[name].get("optimizer", {}),
    }  # fmt: skip


def write_data(shared: Path, work: Path) -> None:
    """Write TASK-train.json, TASK-validation.json and TASK-test.json: records that fit the context, shuffled."""
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


def write_models(shared: Path, work: Path) -> None:
    """The models, with texts that end as in pretraining."""
    for model in MODELS:
        folder = work / model
        folder.mkdir()
        for file in (shared / "models" / model).iterdir():
            shutil.copyfile(file, folder / file.name)
        ends = {"config.json": ("eos_token_id", 1), "generation_config.json": ("eos_token_id", 1)}
        for file, (key, end) in {**ends, "tokenizer_config.json": ("eos_token", END)}.items():
            settings = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps({**settings, key: end}))


def measure(row: dict[str, Any], work: Path) -> dict[str, Any]:
    """One run: held-out loss (and exact match) before and after, trained numbers, frozen bytes, time, memory."""
    config = Config(
        model=ModelConfig(model=str(work / row["model"]), dtype="float32"),
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
            learning_rate=row["rate"],
            batch_size=BATCH,
            max_steps=STEPS,
            warmup_ratio=0.05,
            seed=row["seed"],
            **METHODS[row["method"]].get("optimizer", {}),
        ),
        run=RunConfig(output=str(work / "run"), cache=str(work / "cache"), resume="never"),
    )
    return {**row, **outcome(config)}


def outcome(config: Config) -> dict[str, Any]:
    """Train in a folder that is emptied first: losses before and after, trained numbers, frozen bytes, time, memory."""
    folder = Path(str(config.run.output))
    shutil.rmtree(folder, ignore_errors=True)
    said, started = io.StringIO(), time.process_time()
    with watched() as (seen, on_step), redirect_stdout(said), redirect_stderr(said):
        failed = run(config, "benchmark", on_step=on_step)
    if failed and "Nothing was updated" not in said.getvalue():  # what a run that diverges says
        raise SystemExit(f"{config.adapter} failed:\n{said.getvalue()}")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    evaluations = [event for event in events if "eval_loss" in event]
    first, last = evaluations[0], {"eval_loss": None} if failed else evaluations[-1]  # None: it diverged
    return {
        "before": first["eval_loss"], "loss": last["eval_loss"],
        "exact_before": first.get("exact_match"), "exact": last.get("exact_match"),
        "trained": seen["trained"], "frozen_bytes": seen["frozen_bytes"], "step_ms": seen["step_ms"],
        "peak_mb": seen["peak_mb"], "cpu_s": round(time.process_time() - started, 1),
    }  # fmt: skip


@contextmanager
def watched() -> Iterator[tuple[dict[str, Any], Callable[..., None]]]:
    """The cost of the run inside, and its on_step: CPU time between two steps, the model's tensors, peak memory."""
    marks: list[float] = []
    seen: dict[str, Any] = {}

    def on_step(training: Training, event: dict[str, Any]) -> None:
        marks.append(time.process_time())
        if event["step"] == 1:
            seen.update(tensors_of(training.engine.model))

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise freed blocks of the run before hide the memory of this one
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_mb("VmRSS")
    try:
        yield seen, on_step
    finally:
        steps = [later - earlier for earlier, later in itertools.pairwise(marks)]
        seen["step_ms"] = round(median(steps) * 1e3, 1) if steps else None
        seen["peak_mb"] = round(resident_mb("VmHWM") - before, 1)


def resident_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def tensors_of(model: Any) -> dict[str, int]:
    """How many numbers train, and the bytes of the adapter's frozen tensors, each storage counted once."""
    frozen: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            base = {id(part) for part in layer.get_base_layer().parameters()}
            held = [*layer.parameters(), *layer.buffers()]
            for values in vars(layer).values():  # FourierFT keeps its indices in a plain dict
                held += values.values() if isinstance(values, dict) else []
            for part in held:
                if isinstance(part, torch.Tensor) and id(part) not in base and not part.requires_grad:
                    frozen[part.data_ptr()] = part.numel() * part.element_size()
    trained = sum(part.numel() for part in model.parameters() if part.requires_grad)
    return {"trained": trained, "frozen_bytes": sum(frozen.values())}


@dataclass(frozen=True)
class Study:
    """What a campaign runs. A cell is a model and a task; a row identifies a run."""

    results: Path
    methods: Mapping[str, Mapping[str, Any]]  # with the first guess of a learning rate under "rate"
    plan: tuple[tuple[str, str, str], ...]  # (method, model, task) in the order of running
    what: Callable[[str, str, str, float, int, str], dict[str, Any]]  # model, task, method, rate, seed, split -> row
    measure: Callable[[dict[str, Any], Path], dict[str, Any]]  # row, work folder -> the row and what came out
    prepare: Callable[[Path, Path], None]  # write models and data from the first folder into the second
    seeds: tuple[int, ...]
    without_search: Collection[str] = ()  # tasks at the first cell's best rate

    @property
    def first(self) -> tuple[str, str]:
        return self.plan[0][1:]


class Campaign:
    """The results so far, and the runs that are left."""

    def __init__(self, study: Study, shared: Path):
        self.study, self.shared = study, shared
        self.found: list[dict[str, Any]] = self.read()

    def read(self) -> list[dict[str, Any]]:
        return json.loads(self.study.results.read_text())["runs"] if self.study.results.exists() else []

    def result(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return next((old for old in self.found if row.items() <= old.items()), None)

    def loss(self, row: dict[str, Any]) -> float:
        """Held-out loss of a run in the results; infinite if it diverged."""
        result = self.result(row)
        assert result is not None, row
        return math.inf if result["loss"] is None else result["loss"]

    def searched(self, name: str, model: str, task: str, rate: float) -> dict[str, Any]:
        return self.study.what(model, task, name, rate, 0, "validation")

    def next(self, name: str, model: str, task: str) -> dict[str, Any] | None:
        """The next run of a method on a model and a task; None if all are done."""
        if task in self.study.without_search:
            if (first := self.next(name, *self.study.first)) is not None:
                return first
        else:
            for rate in self.rates(name, model, task):
                if self.result(self.searched(name, model, task, rate)) is None:
                    return self.searched(name, model, task, rate)
        best = self.best(name, model, task)
        for seed in self.study.seeds:
            if self.result(row := self.study.what(model, task, name, best, seed, "test")) is None:
                return row
        return None

    def rates(self, name: str, model: str, task: str) -> list[float]:
        """The learning rates to try: three around the guess (the first cell's best, if known), then beyond an edge."""
        guess = self.study.methods[name]["rate"]
        if (model, task) != self.study.first and self.next(name, *self.study.first) is None:
            guess = self.best(name, *self.study.first)
        low = high = RATES.index(guess)
        low, high = low - 1, high + 1
        while True:
            rows = [self.searched(name, model, task, rate) for rate in RATES[low : high + 1]]
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
        """The learning rate with the lowest validation loss, once all were tried."""
        if task in self.study.without_search:
            model, task = self.study.first
        rates = self.rates(name, model, task)
        return min(rates, key=lambda rate: self.loss(self.searched(name, model, task, rate)))

    def tested(self, name: str, model: str, task: str) -> list[dict[str, Any]]:
        """The test runs, or none while some are missing."""
        if self.next(name, model, task) is not None:
            return []
        best = self.best(name, model, task)
        return [self.result(self.study.what(model, task, name, best, seed, "test")) or {} for seed in self.study.seeds]

    def run_all(self, only: Collection[str] = ()) -> None:
        """Run what is left, of these methods only if any are given; several processes may share one results file."""
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            self.study.prepare(self.shared, work)
            for name, model, task in self.study.plan:
                while (not only or name in only) and (row := self.next(name, model, task)) is not None:
                    done = self.study.measure(row, work)
                    self.save(done)
                    print(
                        *(done[key] for key in ("model", "task", "method", "rate", "seed", "loss", "cpu_s")), flush=True
                    )

    def save(self, row: dict[str, Any]) -> None:
        """Add a row to the results file, which other processes may have changed."""
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=REPO).stdout.strip()
        head = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": f"{platform.machine()}, 1 thread"}
        partial = self.study.results.with_suffix(".tmp")
        with alone(partial.parent):
            self.found = [*self.read(), row]
            rows = ",\n".join(json.dumps(row) for row in self.found)
            partial.write_text(f'{json.dumps(head)[:-1]}, "runs": [\n{rows}\n]}}\n')
            partial.replace(self.study.results)

    def left(self) -> str:
        """How many runs are left, if no search extends beyond an edge, and about how long they take."""
        count, seconds = 0, 0.0
        for name, model, task in self.study.plan:
            missing = len(self.study.seeds)
            searched = True
            if task not in self.study.without_search:
                rates = self.rates(name, model, task)
                tried = sum(self.result(self.searched(name, model, task, rate)) is not None for rate in rates)
                missing, searched = missing + len(rates) - tried, tried == len(rates)
            elif self.next(name, *self.study.first) is not None:
                searched = False
            if searched:
                best, what = self.best(name, model, task), self.study.what
                missing -= sum(
                    self.result(what(model, task, name, best, seed, "test")) is not None for seed in self.study.seeds
                )
            like = [row["cpu_s"] for row in self.found if row["model"] == model and row["task"] == task]
            like = like or [row["cpu_s"] for row in self.found if row["model"] == model] or [12.0]
            count, seconds = count + missing, seconds + missing * mean(like)
        return f"{len(self.found)} runs made, at least {count} left: about {seconds / 60:.0f} minutes of one free core"


def prepare(shared: Path, work: Path) -> None:
    write_data(shared, work)
    write_models(shared, work)


def plan() -> tuple[tuple[str, str, str], ...]:
    """(method, model, task) in the order of running."""
    names = list(METHODS)
    return (*((name, *CELLS[0]) for name in names), *((name, *cell) for cell in CELLS[1:] for name in names[:FIRST]))


def study() -> Study:
    return Study(RESULTS, METHODS, plan(), what, measure, prepare, SEEDS)


def tables(campaign: Campaign) -> str:
    """For the README: results and costs on the first cell, then held-out losses (SST-2: exact match) on the others."""
    lines = [
        "| | trained | held-out loss | rate | frozen MB beside the base | CPU ms a step | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        if runs := campaign.tested(name, *CELLS[0]):
            cost = {key: median(run[key] for run in runs) for key in ("frozen_bytes", "step_ms", "peak_mb")}
            lines.append(
                f"| {name} | {runs[0]['trained']:,} | {spread(runs, 'loss')} | {runs[0]['rate']:g} | "
                f"{cost['frozen_bytes'] / 1e6:.2f} | {cost['step_ms']:.0f} | {cost['peak_mb']:.0f} |"
            )
    if runs := campaign.tested("LoLDU", *CELLS[0]):
        lines.append(f"| the base, untuned | 0 | {runs[0]['before']:.3f} | | | | |")
    cells = [cell for cell in CELLS[1:] if any(campaign.tested(name, *cell) for name in METHODS)]
    if cells:
        lines += [
            "",
            f"| | {' | '.join(f'{model}, {task}' for model, task in cells)} |",
            "|---" * (len(cells) + 1) + "|",
        ]
    for name in METHODS if cells else ():
        tested = [campaign.tested(name, *cell) for cell in cells]
        shown = [spread(runs, "loss") + (f", {mean(run['exact'] for run in runs):.0%}" if runs[0]["exact"] is not None else "") if runs else "" for runs in tested]  # fmt: skip  # noqa: E501
        if any(shown):
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def spread(runs: list[dict[str, Any]], key: str) -> str:
    values = [math.inf if run[key] is None else run[key] for run in runs]
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if all(map(math.isfinite, values)) else "diverged"


STYLE = (  # readable on a white and on a dark page
    "text{fill:#333}.grid{stroke:#8884}.ours{fill:#b3261e;stroke:#b3261e}.others{fill:#1f4e9c;stroke:#1f4e9c}"
    ".ours text,text.ours{fill:#b3261e;stroke:none}.others text{fill:#1f4e9c;stroke:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}.ours{fill:#ff8a80;stroke:#ff8a80}"
    ".others{fill:#82b1ff;stroke:#82b1ff}.ours text,text.ours{fill:#ff8a80}.others text{fill:#82b1ff}}"
)


def plot(campaign: Campaign) -> str:
    """Held-out loss against trained numbers on the first cell, as SVG: a bar from the best to the worst seed."""
    cell, methods = campaign.study.first, campaign.study.methods
    drawn = [name for name, spec in methods.items() if "optimizer" not in spec]
    tested = {name: runs for name in drawn if (runs := campaign.tested(name, *cell))}
    tested = {name: runs for name, runs in tested.items() if all(run["loss"] is not None for run in runs)}
    losses = {name: [run["loss"] for run in runs] for name, runs in tested.items()}
    order = sorted(tested, key=lambda name: -mean(losses[name]))  # as the axis has them
    low = math.floor(min(map(min, losses.values())) * 10) / 10
    high = math.ceil(max(map(max, losses.values())) * 10) / 10
    steps = next(iter(tested.values()))[0]["steps"]
    powers = [math.log10(runs[0]["trained"]) for runs in tested.values()]
    first, last = math.floor(min(powers)), math.ceil(max(powers) - 0.01)
    x = lambda trained: 50 + 470 * (math.log10(trained) - first) / (last - first)  # noqa: E731
    y = lambda loss: 20 + 340 * (high - loss) / (high - low)  # noqa: E731
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 410" font-family="sans-serif" font-size="12">',
        f"<style>{STYLE}</style>",
        '<text x="285" y="400" text-anchor="middle">trained numbers</text>',
        f'<text x="50" y="12">held-out loss, {" on ".join(cell)}, {steps} steps</text>',
        '<text x="535" y="12" class="ours">red: a core between frozen factors</text>',
    ]
    for power in range(first, last + 1):
        at = x(10**power)
        parts.append(f'<path d="M{at:.0f} 20V360" class="grid"/><text x="{at:.0f}" y="378" text-anchor="middle">10<tspan dy="-5" font-size="9">{power}</tspan></text>')  # fmt: skip  # noqa: E501
    for tenth in range(round(low * 10), round(high * 10) + 1):
        at = y(tenth / 10)
        parts.append(f'<path d="M50 {at:.0f}H520" class="grid"/><text x="44" y="{at + 4:.0f}" text-anchor="end">{tenth / 10:.1f}</text>')  # fmt: skip  # noqa: E501
    line = 382.0  # of the last label; each is as near its point as the label below allows
    for name in reversed(order):
        at, found = x(tested[name][0]["trained"]), losses[name]
        ours = methods[name].get("method", "loldu") in OURS
        line = min(line - 15.5, y(mean(found)) + 4)
        parts += [
            f'<g class="{"ours" if ours else "others"}">'
            f'<path d="M{at:.1f} {y(min(found)):.1f}V{y(max(found)):.1f}" stroke-width="2"/>'
            f'<circle cx="{at:.1f}" cy="{y(mean(found)):.1f}" r="4"/>'
            f'<path d="M{at + 5:.1f} {y(mean(found)):.1f}L532 {line - 4:.1f}" stroke-width="0.4"/>'
            f'<text x="535" y="{line:.1f}">{mean(found):.3f}  {name}</text></g>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=REPO.parent / "shared" / "data")
    parser.add_argument(
        "--model", choices=("small", "smollm2"), default="small", help="small: two Llamas of 1 M and 0.3 M"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="METHOD", help="run this method only; may be repeated"
    )
    parser.add_argument("--left", action="store_true", help="print what is left to run")
    parser.add_argument("--table", action="store_true", help="print the tables and draw the plot from the results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.model == "smollm2":
        import methods_smollm2 as chosen_study
    else:
        chosen_study = sys.modules[__name__]
    campaign = Campaign(chosen_study.study(), chosen.folder)
    if unknown := set(chosen.only) - set(campaign.study.methods):
        parser.error(f"--only {unknown.pop()}: give one of {', '.join(campaign.study.methods)}")
    if not (chosen.left or chosen.table):
        campaign.run_all(chosen.only)
    if not chosen.left:
        print(chosen_study.tables(campaign))
        campaign.study.results.with_suffix(".svg").write_text(chosen_study.plot(campaign))
    print(campaign.left())


if __name__ == "__main__":
    sys.modules["methods"] = sys.modules[__name__]  # methods_smollm2 imports it
    main()
