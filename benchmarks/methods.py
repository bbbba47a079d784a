"""Methods side by side: each at its own best learning rate, on two small Llamas and three tasks, with three seeds.

    python benchmarks/methods.py [FOLDER]   # resumes; benchmarks/results/methods.json and methods.svg
    python benchmarks/methods.py --left     # the runs that are left, and about how long they take
    python benchmarks/methods.py --table    # the tables of docs/methods.md and the plot from the results so far
    python benchmarks/methods.py --model smollm2 ...   # the same on SmolLM2-135M-Instruct: methods_smollm2.py

FOLDER (../shared/data) holds models/babyllama-361, models/stories260K, instruction/*.json and classification/*.tsv.
In pretraining both models ended each text with <s> and never saw </s>, whose embedding is parallel (cosine 0.999 and
more) to those of other unseen tokens, so a method that does not train the embedding cannot learn to produce it. Answers
therefore end with <s> here.

campaign.py says how the learning rate is searched. Three other seeds are trained with it. Several processes may share
the work.

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
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from campaign import Campaign, Study, plot, spread  # noqa: E402

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig  # noqa: E402
from launcher.training.loop import Training  # noqa: E402
from launcher.training.run import run  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "methods.json"
STEPS, BATCH, MAX_LENGTH = 60, 8, 128
SEEDS = (1, 2, 3)
END = "<s>"
MODELS = {"babyllama-361": 110, "stories260K": 55}  # numbers per weight that a full-rank diagonal core has on average
CELLS = (  # so that an early stop leaves complete cells
    ("babyllama-361", "alpaca"),
    ("stories260K", "instructions"),
    ("stories260K", "sst2"),
    ("stories260K", "alpaca"),
    ("babyllama-361", "sst2"),
    ("babyllama-361", "instructions"),
)
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
    torch.set_num_threads(1)
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
        campaign.study.results.with_suffix(".svg").write_text(plot(campaign))
    print(campaign.left())


if __name__ == "__main__":
    sys.modules["methods"] = sys.modules[__name__]  # methods_smollm2 imports it
    main()
