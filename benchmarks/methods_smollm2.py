"""Methods side by side on a real instruction model, SmolLM2-135M-Instruct: methods.py --model smollm2.

Alpaca (the first 5,000 records, SmolLM2's own chat template, 256 tokens at most) in bfloat16, all linear layers unless
named, steps of 8 samples. The learning rate is searched on 100 held-out records with seed 0 and 60 steps, as methods.py
does, LoRA's as widely as ours; then two other seeds are evaluated on 200 other records. The methods of FEW train 240
steps too, at the same learning rate. They are also tuned on the train files of ARC-Easy, OpenBookQA and BoolQ, each
with its own search by held-out loss, and evaluated by `loldu eval`: accuracy by likelihood on the first 300 questions
of the test file, the base beside.

One run takes two to five minutes of one core that multiplies bfloat16 (AMX), and about four times as long on one that
does not (float32_products.py). The model comes from FOLDER/models/get-smollm2, once, into ~/.cache/loldu-tests; frozen
factors stay in LoLDU's usual cache.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from campaign import Campaign, Study, spread
from float32_products import products
from methods import ALL, FULL, RESULTS, outcome

from launcher import cli
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

FILE = RESULTS.with_name("methods_smollm2.json")
MODEL = "SmolLM2-135M-Instruct"
FOLDER = Path.home() / ".cache" / "loldu-tests" / "smollm2"
STEPS, MORE_STEPS, BATCH, MAX_LENGTH, SEEDS = 60, 240, 8, 256, (1, 2)
QUESTIONS = 300
CHOICE_TASKS = ("openbookqa", "arc_easy", "boolq")
NORMALISED = {"normalize_directions": True}
METHODS: dict[str, dict[str, Any]] = {
    "LoLDU, directions normalised, r 64": {"rank": 64, "options": NORMALISED, "rate": 3e-2},
    "LoRA, r 8": {"method": "lora", "rank": 8, "options": {"lora_alpha": 16}, "rate": 1e-3},
    "LoLDU, directions normalised": {"rank": FULL, "options": NORMALISED, "rate": 1e-1},
    "LoRA, r 1": {"method": "lora", "rank": 1, "options": {"lora_alpha": 2}, "rate": 3e-3},
    "full fine-tuning": {"method": "full", "rate": 1e-4},
    "LoLDU, r 64": {"rank": 64, "rate": 1e-3},
    "LoLDU": {"rank": FULL, "rate": 1e-3},
    "LoRA, r 1 on q, v, o": {
        "method": "lora", "rank": 1, "targets": ("q_proj", "v_proj", "o_proj"), "options": {"lora_alpha": 2},
        "rate": 3e-3,
    },
    "LoRA, r 1 on v": {
        "method": "lora", "rank": 1, "targets": ("v_proj",), "options": {"lora_alpha": 2}, "rate": 1e-2,
    },
    "SVFit, r 575": {"method": "svfit", "rank": 575, "rate": 3e-2},  # two weights have 575 directions of 576
    "IA3, outputs of every linear layer": {"method": "ia3", "options": {"feedforward_modules": []}, "rate": 3e-2},
    "LoRA-XS, r 21": {"method": "loraxs", "rank": 21, "rate": 3e-3},
    "LoRA, r 64": {"method": "lora", "rank": 64, "options": {"lora_alpha": 128}, "rate": 3e-4},
    "DoRA, r 8": {"method": "lora", "rank": 8, "options": {"lora_alpha": 16, "use_dora": True}, "rate": 1e-3},
    "LoRA-SB, r 21": {"method": "lorasb", "rank": 21, "rate": 1e-3},
}  # fmt: skip
FEW = (  # LoLDU as the recipe has it and of full rank, and LoRA of the usual rank
    "LoLDU, directions normalised, r 64",
    "LoRA, r 8",
    "LoLDU, directions normalised",
)
LONG_TASK = f"alpaca, {MORE_STEPS} steps"


def study() -> Study:
    first = tuple((name, MODEL, "alpaca") for name in METHODS)
    longer = tuple((name, MODEL, LONG_TASK) for name in FEW)
    choices = tuple((name, MODEL, task) for task in CHOICE_TASKS for name in FEW)
    return Study(FILE, METHODS, (*first, *longer, *choices), what, measure, prepare, SEEDS, (LONG_TASK,))


def what(model: str, task: str, name: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """Everything that identifies a run, as in the results file."""
    adapter = adapter_of(name)
    return {
        "model": model, "task": task, "method": name, "adapter": f"{adapter.method} rank {adapter.rank}",
        "targets": " ".join(adapter.targets), "options": " ".join(adapter.options), "rate": rate, "seed": seed,
        "split": split, "batch": BATCH, "max_length": MAX_LENGTH, "dtype": "bfloat16",
        "steps": MORE_STEPS if task == LONG_TASK else STEPS,
    }  # fmt: skip


def adapter_of(name: str) -> AdapterConfig:
    spec = METHODS[name]
    return AdapterConfig(
        method=spec.get("method", "loldu"),
        rank=spec.get("rank", 8),
        targets=spec.get("targets", ALL),
        options=tuple(f"{option}={json.dumps(value)}" for option, value in spec.get("options", {}).items()),
    )


def prepare(shared: Path, work: Path) -> None:
    """Make the model once, and write TASK-train.json, TASK-validation.json and TASK-test.json."""
    subprocess.run(["bash", shared / "models/get-smollm2", FOLDER, sys.executable], check=True, stdout=sys.stderr)
    alpaca = [
        record for record in json.loads((shared / "instruction/alpaca_5000.json").read_text()) if record["output"]
    ]
    random.Random(0).shuffle(alpaca)
    write(work, "alpaca", alpaca[300:], alpaca[:100], alpaca[100:300])
    for task in CHOICE_TASKS:
        train, test = (json.loads((shared / f"reasoning/{task}_{part}.json").read_text()) for part in ("train", "test"))
        random.Random(0).shuffle(train)
        write(work, task, train[100:4000], train[:100], test[:QUESTIONS])


def write(work: Path, task: str, train: list[Any], validation: list[Any], test: list[Any]) -> None:
    for part, records in (("train", train), ("validation", validation), ("test", test)):
        (work / f"{task}-{part}.json").write_text(json.dumps(records))


def measure(row: dict[str, Any], work: Path) -> dict[str, Any]:
    """One run, in this process."""
    task = row["task"].partition(",")[0]
    test = work / f"{task}-{row['split']}.json"
    config = Config(
        model=ModelConfig(model=str(FOLDER), dtype="bfloat16"),
        data=DataConfig(
            data=str(work / f"{task}-train.json"), eval_data=str(test), prompt_template="chat", max_length=MAX_LENGTH
        ),
        adapter=adapter_of(row["method"]),
        optimizer=OptimizerConfig(
            learning_rate=row["rate"], batch_size=BATCH, max_steps=row["steps"], warmup_ratio=0.05, seed=row["seed"]
        ),
        run=RunConfig(output=str(work / "run"), resume="never", report=False),
    )
    with products():
        return {**row, **trained(config, row, test), "ended": time.strftime("%Y-%m-%d %H:%M")}


def trained(config: Config, row: dict[str, Any], test: Path) -> dict[str, Any]:
    """What a run gave, and the accuracy of its model if it was a test on questions."""
    found, folder = outcome(config), Path(str(config.run.output))
    del found["peak_mb"]  # the heap of a process that has trained before has holes, which the peak would count
    saved = folder / ("model" if config.adapter.method == "full" else "adapter")
    found["saved_bytes"] = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    if row["task"] in CHOICE_TASKS and row["split"] == "test" and found["loss"] is not None:
        once = (row["method"], row["seed"]) == (FEW[0], SEEDS[0])  # the base is the same in every run
        scores = accuracy(folder, test, () if once else ("--no-compare",))
        found |= {"accuracy_before": scores.get("base"), "accuracy": scores.get("adapter", scores.get("model"))}
    return found


def accuracy(run: Path, questions: Path, more: Sequence[str]) -> dict[str, float]:
    """The accuracies that `loldu eval` prints: "adapter" and "base", or "model" after full fine-tuning."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if cli.main(["eval", str(run), "--tasks", str(questions), "--json", *more]):
            raise SystemExit("loldu eval failed")
    [scores] = (task["scores"] for task in json.loads(out.getvalue())["tasks"].values())
    return {name: each["acc"]["value"] for name, each in scores.items()}


def tables(campaign: Campaign) -> str:
    lines = [
        "| | trained | held-out loss | learning rate | saved kB | CPU s a step |",
        "|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        if runs := campaign.tested(name, MODEL, "alpaca"):
            saved, step = (median(run[key] for run in runs) for key in ("saved_bytes", "step_ms"))
            shown = f"{spread(runs, 'loss')} | {runs[0]['rate']:g} | {saved / 1e3:,.0f} | {step / 1e3:.2f}"
            lines.append(f"| {name} | {runs[0]['trained']:,} | {shown} |")
    with contextlib.suppress(StopIteration):
        before = next(run["before"] for run in campaign.found if run["task"] == "alpaca" and run["split"] == "test")
        lines.append(f"| the base, untuned | 0 | {before:.3f} | | | |")
    others = [task for task in (LONG_TASK, *CHOICE_TASKS) if any(campaign.tested(n, MODEL, task) for n in FEW)]
    if others:
        lines += ["", f"| | {' | '.join(others)} |", "|---" * (len(others) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(other(campaign, name, task) for task in others)} |" for name in FEW]
        lines.append(f"| the base, untuned | {' | '.join(untuned(campaign, task) for task in others)} |")
    return "\n".join(lines)


def other(campaign: Campaign, name: str, task: str) -> str:
    """Accuracy, if it was measured, and held-out loss."""
    runs = campaign.tested(name, MODEL, task)
    if not runs or task == LONG_TASK:
        return spread(runs, "loss") if runs else "not yet run"
    return f"{mean(run['accuracy'] for run in runs):.1%}, {spread(runs, 'loss')}"


def untuned(campaign: Campaign, task: str) -> str:
    runs = [run for run in campaign.found if run["task"] == task and run["split"] == "test"]
    accuracy = next((f"{run['accuracy_before']:.1%}, " for run in runs if run.get("accuracy_before") is not None), "")
    return f"{accuracy}{runs[0]['before']:.3f}"
