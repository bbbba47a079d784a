"""Ours compared with TRL's SFTTrainer: same model, tokens, order, method and initial adapter, on the CPU.

    python benchmarks/peers.py --smollm2 DIR --data FILE --size sample   # LoRA, 16 samples a step: 2 minutes
    python benchmarks/peers.py --smollm2 DIR --data FILE                 # LoRA, 128 samples in micro-batches of 8
    python benchmarks/peers.py --smollm2 DIR --data FILE --size all      # 2 models, 3 methods, 1 and 2 processes

Models: SmolLM2-135M-Instruct (DIR), and a random Llama of four layers, hidden size 1024 and 128,256 classes, which is
written to a temporary folder. Float32, one thread per process, no gradient checkpointing; TRL gets the tokens from
disk, ours from its cache, so neither tokenises. A round runs each side once per cell, in its own order, and a
ratio is taken within a round; the table has medians and min-max. If machines are busy seconds mean little, so speed
is tokens with loss per processor second, of all processes and their children, from the start of the first step to the
end of the last. Peak memory is the largest resident set (VmHWM) of a process. The loss curves of both sides must agree
within 1e-4 of the loss. `trl grouped` is TRL with train_sampling_strategy="group_by_length", which visits samples in
another order, so its losses are not compared. Writes benchmarks/results/peers.json after each round; --output writes
elsewhere. The same command continues where it was stopped: rounds of the same commit and shape are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from factorization import about, spread
from rich.console import Console
from rich.table import Table

RUNS = Path(__file__).with_name("peer_runs.py")
RESULT = Path(__file__).parent / "results" / "peers.json"
GOALS = {"speed": 2.5, "memory": 0.4, "first_step": 1.0}  # ours / TRL's with LoRA
WITHIN = 1e-4  # of the loss: summed in another order, and AdamW's first steps amplify the last bit
RANDOM_LLAMA = {
    "vocab_size": 128_256, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4,
    "num_attention_heads": 16, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
MAKE = """
import json, sys, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
source, folder, sizes = sys.argv[1:]
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**json.loads(sizes))).save_pretrained(folder)
AutoTokenizer.from_pretrained(source).save_pretrained(folder)
"""


class Cell(NamedTuple):
    """A model, a method and a number of processes; who runs it."""

    model: str
    method: str
    processes: int
    sides: tuple[str, ...] = ("ours", "trl")

    @property
    def name(self) -> str:
        return f"{self.model}, {self.method}, {self.processes} process{'es' * (self.processes > 1)}"


MAIN = Cell("SmolLM2-135M", "lora", 1)
OTHERS = [
    Cell(model, method, processes)
    for model in ("SmolLM2-135M", "Llama 4 x 1024, 128k classes")
    for method in ("lora", "loldu", "full")
    for processes in (1, 2)
    if (model, method, processes) != MAIN[:3]
]
SIZES: dict[str, dict[str, Any]] = {
    "sample": {"cells": [MAIN], "batch": 16, "micro": 4, "steps": 1, "rounds": 1},
    "main": {"cells": [MAIN], "batch": 128, "micro": 8, "steps": 1, "rounds": 3},
    "all": {"cells": [MAIN._replace(sides=("ours", "trl", "trl grouped")), *OTHERS], "batch": 128, "micro": 8,
            "steps": 1, "rounds": 1},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="instruction records, as Alpaca has them")
    parser.add_argument("--size", choices=SIZES, default="main")
    for name, what in (("batch", "samples a step"), ("micro", "samples a forward pass"), ("steps", ""), ("rounds", "")):
        parser.add_argument(f"--{name}", type=int, help=f"{what or name}, in place of the size's own")
    parser.add_argument("--cells", default="", help="only cells whose name contains this, such as 'lora, 1'")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULT, help="results of other cells and sizes in it are kept")
    asked = parser.parse_args()
    size = SIZES[asked.size] | {k: v for k in ("batch", "micro", "steps", "rounds") if (v := getattr(asked, k))}
    cells = [cell for cell in size["cells"] if asked.cells in cell.name]

    order = random.Random(0)
    shape = {name: size[name] for name in ("batch", "micro", "steps")}
    own = about(size["rounds"], "ours beside TRL's SFTTrainer", "one thread per process") | {"asked": shape}
    own |= {"trl": version("trl"), "transformers": version("transformers")}
    found = {cell.name: rounds_before(asked.output, cell, own) for cell in cells}
    with tempfile.TemporaryDirectory() as place:
        models = {"SmolLM2-135M": asked.smollm2.resolve()}
        for cell in cells:
            if cell.model not in models:
                models[cell.model] = Path(place) / "random"
                python("-c", MAKE, str(asked.smollm2), str(models[cell.model]), json.dumps(RANDOM_LLAMA))
        given = shape | {"max_length": asked.max_length, "data": str(asked.data.resolve())}
        for number in range(size["rounds"]):
            for cell in cells:
                if len(found[cell.name]) > number:
                    continue
                settings = given | {"model": str(models[cell.model]), "method": cell.method}
                part = Path(place) / f"{cell.model}-{cell.method}"
                measured = dict(one_round(cell, settings, part, order.sample(cell.sides, len(cell.sides))))
                check_losses(cell, measured)
                found[cell.name].append(measured)
                print(f"round {number + 1}: {cell.name}: " + "; ".join(map(short, measured.items())), flush=True)
                own["repetitions"] = len(found[cell.name])
                keep(asked.output, row(cell, found[cell.name]) | {"about": own})
    show(json.loads(asked.output.read_text()))
    print(f"written to {asked.output}")


def rounds_before(file: Path, cell: Cell, own: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds of a cell that an earlier start at this commit measured in this shape."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    same = [each for each in rows if each["cell"] == cell.name and set(cell.sides) == set(each["sides"])]
    equal = [each for each in same if all(each["about"][key] == own[key] for key in ("commit", "asked"))]
    return list(equal[0]["rounds"]) if equal else []


def keep(file: Path, new: dict[str, Any]) -> None:
    """Write a row beside the others in the file, in place of an earlier one of its cell and shape."""
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    others = [each for each in rows if place_of(each) != place_of(new)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"benchmark": new["about"]["benchmark"], "rows": [new, *others]}, indent=1) + "\n")


def place_of(row: dict[str, Any]) -> tuple[str, str]:
    return row["cell"], str(row["about"]["asked"])


def one_round(
    cell: Cell, settings: dict[str, Any], part: Path, order: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each side's measurements. part keeps what the sides read: tokens and caches."""
    part.mkdir(parents=True, exist_ok=True)
    settings = settings | {"cache": str(part / "cache"), "tokens": str(part / "tokens"), "sampling": "sequential"}
    if not (part / "tokens").exists():
        given = settings | {"folder": str(part / "first"), "started": 0}
        python(str(RUNS), "tokens", write(part / "tokens.json", given))
        if cell.method == "loldu":  # factors, so that both sides' first step is that of a second start
            write(part / "warm" / "settings.json", given | {"folder": str(part / "warm"), "steps": 1, "batch": 1})
            python(str(RUNS), "ours", str(part / "warm" / "settings.json"))
    for side in order:
        folder = part / side.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        sampling = "group_by_length" if side == "trl grouped" else "sequential"
        load, now = os.getloadavg()[0], time.time()
        given = settings | {"folder": str(folder), "started": now, "sampling": sampling}
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell.processes}"]
        file = write(folder / "settings.json", given)
        python(*(many if cell.processes > 1 else ()), str(RUNS), side.split()[0], file)
        yield side, measured(folder, side.split()[0], cell.processes) | {"load_average": load}


def measured(folder: Path, side: str, processes: int) -> dict[str, Any]:
    """What the processes of a run wrote, put together."""
    ranks = [json.loads((folder / f"{side}-{rank}.json").read_text()) for rank in range(processes)]
    marks = [each["marks"] for each in ranks]
    spent = sum(mark[-1]["processor_s"] - mark[0]["processor_s"] for mark in marks)
    losses = [each["losses"] for each in ranks]  # ours: of the global batch on every rank; TRL: a rank's part of it
    return {
        "tokens_per_processor_s": ranks[0]["targets"] / spent,
        "processor_s_per_step": spent / (len(marks[0]) - 1),
        "peak_mib": [round(mark[-1]["peak_mib"]) for mark in marks],
        "before_training_mib": [round(mark[0]["peak_mib"]) for mark in marks],
        "first_step_s": max(mark[0]["seconds"] for mark in marks),
        "first_step_processor_s": sum(mark[0]["processor_s"] for mark in marks) / processes,
        "page_faults": sum(each["page_faults"] for each in ranks),
        "losses": losses[0] if side == "ours" else [sum(parts) for parts in zip(*losses, strict=True)],
    }


def check_losses(cell: Cell, measured: dict[str, dict[str, Any]]) -> None:
    """Both sides must have done the same work."""
    pairs = list(zip(measured["ours"]["losses"], measured["trl"]["losses"], strict=True))
    apart = max(abs(mine - other) / other for mine, other in pairs)
    assert apart < WITHIN, f"{cell.name}: losses differ by {apart:.2g} of the loss: {pairs}"
    measured["ours"]["losses_apart"] = apart


def row(cell: Cell, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spread of a cell; ratios within a round, ours to TRL's."""
    keys = ("tokens_per_processor_s", "processor_s_per_step", "first_step_s", "first_step_processor_s", "load_average")
    sides = {
        side: {key: spread([each[side][key] for each in rounds]) for key in keys}
        | {"peak_mib": spread([max(each[side]["peak_mib"]) for each in rounds])}
        for side in cell.sides
    }
    pairs = [(each["ours"], each["trl"]) for each in rounds]
    ratios = {
        "speed": [mine["tokens_per_processor_s"] / other["tokens_per_processor_s"] for mine, other in pairs],
        "memory": [max(mine["peak_mib"]) / max(other["peak_mib"]) for mine, other in pairs],
        "first_step": [mine["first_step_processor_s"] / other["first_step_processor_s"] for mine, other in pairs],
    }
    return {
        "cell": cell.name,
        "sides": sides,
        "ours_of_trl": {name: spread(values) for name, values in ratios.items()},
        "losses_apart": max(each["ours"]["losses_apart"] for each in rounds),
        "rounds": rounds,
    }


def short(named: tuple[str, dict[str, Any]]) -> str:
    side, found = named
    return f"{side} {found['tokens_per_processor_s']:.1f} tokens, {max(found['peak_mib'])} MiB"


def show(result: dict[str, Any]) -> None:
    about = result["rows"][0]["about"]
    table = Table(
        "", "", "tokens / processor s", "peak, MiB", "until step 1: s", "processor s", "load", title=about["machine"]
    )
    for each in result["rows"]:
        shape = "{batch} / {micro}".format(**each["about"]["asked"])
        for side, found in each["sides"].items():
            table.add_row(
                f"{each['cell']}, {shape}" if side == "ours" else "", side, wide(found["tokens_per_processor_s"]),
                wide(found["peak_mib"], 0), wide(found["first_step_s"]), wide(found["first_step_processor_s"]),
                wide(found["load_average"]),
            )  # fmt: skip
        ratios = each["ours_of_trl"]
        table.add_row(
            "", "ours / trl", wide(ratios["speed"], 2), wide(ratios["memory"], 2), "", wide(ratios["first_step"], 2), ""
        )
    Console(width=150).print(table)
    print(f"goals with LoRA: speed >= {GOALS['speed']}, memory <= {GOALS['memory']}, first step <= 1; losses equal")


def wide(values: dict[str, float], digits: int = 1) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"


def write(file: Path, settings: dict[str, Any]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))
    return str(file)


def python(*arguments: str) -> None:
    """Run a fresh Python to its end. Its screen is shown if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(RUNS.parents[1])
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
