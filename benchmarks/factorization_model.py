"""Factor a whole model with 1, 2 and 4 processes, against reading its files, the LU of whole weights and PEFT.

    OMP_NUM_THREADS=1 python benchmarks/factorization_model.py                 # about 5 minutes, 2 GB of disk
    OMP_NUM_THREADS=1 python benchmarks/factorization_model.py --parts ours    # without PEFT, half of that
    OMP_NUM_THREADS=1 python benchmarks/factorization_model.py --quick         # small shapes, nothing recorded

The model is two layers of Llama-2-7B: random bfloat16 weights of all its linear layers, one file a layer. Each
repetition drops the files from the page cache, reads them from end to end, twice (the second counts: the host of a
virtual disk may have them in memory from then on, for all alike), drops them again, and lets 1, 2 and 4 forked
processes, which share the cores among their threads, factor them into an empty cache: seconds from the moment all are
connected until all know where the factors are, written and fsynced. torch.linalg.lu (of one layer's weights, in memory)
and PEFT (of one weight of each shape) run in one process with a thread for each core, and are scaled to two layers.
Peak memory is RssAnon above the start, the highest of the ranks, and in float32 panels of the tallest weight
(11008 x r); a process works on two weights at a time.

Adds its parts to benchmarks/results/factorization.json, under "model".
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import LoLDUConfig
from benchmarks.factorization import RESULTS, about, spread, timed
from benchmarks.sharded_memory import MIB, Watch
from launcher.factorization.make import FactorRequest
from launcher.factorization.share import factorize, share_out
from launcher.factorization.targets import targets_of
from launcher.processes import Communicator, Ranks

LAYERS, WORLDS = 2, (1, 2, 4)
PARTS = {"q_proj": 4, "gate_proj": 2, "down_proj": 1}  # one linear layer of each shape, and its count per decoder layer
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("ours", "peft"), default=("ours", "peft"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process that has used several threads cannot be forked either
    sizes, ranks = ((512, 1376), (16, 128)) if options.quick else ((4096, 11008), (64, 1024))

    output = None if options.quick else options.output
    with tempfile.TemporaryDirectory(prefix="factorization-") as place:
        folder = write_model(Path(place) / "model", *sizes)
        if "ours" in options.parts:
            result = ours(folder, ranks, options.repetitions)
            show(result)
            record(output, "ours", result)
        if "peft" in options.parts:
            rows = []
            for found in peft(folder, ranks):
                rows.append(found)
                parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in found["seconds"].items())
                print(f"PEFT {found['method']} r = {found['r']}: {parts}; two layers {found['two_layers_s']:.1f} s")
                threads = f"{os.cpu_count()} threads"
                record(output, "peft", about(1, "PEFT's initialisation of weights", threads) | {"rows": rows})


def record(output: Path | None, part: str, result: dict[str, Any]) -> None:
    """Add a part to the results file."""
    if output is not None:
        recorded = json.loads(output.read_text()) if output.exists() else {}
        recorded["model"] = recorded.get("model", {}) | {part: result}
        output.write_text(json.dumps(recorded, indent=1) + "\n")


def write_model(folder: Path, hidden: int, intermediate: int) -> Path:
    """config.json, an index and one file a layer with all its linear layers, on the disk and not only on its way."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 128, vocab_size=512, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], (hidden, hidden))
    shapes |= dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], (intermediate, hidden))
    shapes["mlp.down_proj"] = (hidden, intermediate)
    draw, index = torch.Generator().manual_seed(SEED), dict[str, str]()
    for layer in range(LAYERS):
        weights = {
            f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=draw).mul_(0.02).bfloat16()
            for name, shape in shapes.items()
        }
        file = folder / f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        save_file(weights, file)
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        index |= dict.fromkeys(weights, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def ours(folder: Path, ranks: Sequence[int], repetitions: int) -> dict[str, Any]:
    """Everything but PEFT: a row for each rank r and number of processes."""
    threads = "threads shared out among our processes, all for torch.linalg.lu"
    header = about(repetitions, "two layers of Llama-2-7B factored by 1, 2 and 4 processes", threads)
    requests = {
        r: targets_of(folder, ("all-linear",), (), r, LoLDUConfig().factorization(), dtype="bfloat16") for r in ranks
    }
    files = sorted(folder.glob("*.safetensors"))
    reads: dict[int, list[float]] = {r: [] for r in ranks}
    found: dict[tuple[int, int], list[list[dict[str, float]]]] = {(r, world): [] for r in ranks for world in WORLDS}
    whole = []
    for number in range(repetitions):
        for r in ranks:
            for _ in range(2):  # afterwards a virtual disk's host may have the files in memory, for every contender
                drop(files)
                read = in_processes(1, read_through, files)
            reads[r] += read
            for world in WORLDS:
                drop(files)
                cache = folder.parent / f"cache-{r}-{world}-{number}"
                store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                found[r, world].append(in_processes(world, factor, world, store.port, requests[r], cache))
        whole += in_processes(1, whole_lu, files[0])
    lu_s = [LAYERS * each["seconds"] for each in whole]
    return header | {
        "bytes": sum(file.stat().st_size for file in files),
        "read_s": spread([seconds for each in reads.values() for seconds in each]),
        "whole_lu_s": spread(lu_s),
        "whole_lu_peak_mib": round(max(each["peak_mib"] for each in whole), 1),
        "rows": [row(requests[r], world, runs, reads[r], lu_s) for (r, world), runs in found.items()],
    }


def row(
    requests: list[FactorRequest],
    world: int,
    runs: list[list[dict[str, float]]],
    reads: list[float],
    lus: list[float],
) -> dict[str, Any]:
    """One rank r and number of processes. runs: costs of each process, by repetition; ratios are within one."""
    seconds = [max(rank["seconds"] for rank in run) for run in runs]
    peak = max(rank["peak_mib"] for run in runs for rank in run)
    r = max(request.rank for request in requests)
    panel_mib = max(request.shape[0] for request in requests) * r * 4 / MIB
    return {
        "r": r,
        "processes": world,
        "seconds": spread(seconds),
        "times_a_read": spread([took / read for took, read in zip(seconds, reads, strict=True)]),
        "times_faster_than_whole_lu": spread([lu / took for took, lu in zip(seconds, lus, strict=True)]),
        **{name: [median(run[rank][name] for run in runs) for rank in range(world)]
           for name in ("read_bytes", "rchar", "cpu_s")},
        "peak_mib": round(peak, 1),
        "peak_panels": round(peak / panel_mib, 2),
        "balance": balance(requests, 1, world),
        "balance_32_layers": balance(requests, 32 // LAYERS, world),
    }  # fmt: skip


def balance(requests: list[FactorRequest], times: int, world: int) -> float:
    """Largest cost of a process over the mean, for so many times these layers."""
    costs = {f"{number}.{request.module}": request.cost for number in range(times) for request in requests}
    loads = [0.0] * world
    for name, owner in zip(costs, share_out(costs, world), strict=True):
        loads[owner] += costs[name]
    return max(loads) * world / sum(loads)


def factor(rank: int, world: int, port: int, requests: list[FactorRequest], cache: Path) -> dict[str, float]:
    """The costs of one process, measured in it."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    store = dist.TCPStore("127.0.0.1", port, is_master=False) if world > 1 else None
    comm = Communicator(Ranks(rank, world, rank, world), store)
    comm.gather("all are here", rank)
    watch, before, cpu, started = Watch(), io_bytes(), time.process_time(), time.perf_counter()
    done = factorize(requests, cache, comm, device=torch.device("cpu"))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    assert all(how.made for how in done.values())
    read = {name: count - before[name] for name, count in io_bytes().items()}
    return {"seconds": seconds, "cpu_s": cpu, "peak_mib": watch.peak(), **read}


def read_through(rank: int, files: list[Path]) -> float:
    """Seconds for one sequential read, which must have come from the disk."""
    before, started, block = io_bytes(), time.perf_counter(), bytearray(8 * MIB)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
    seconds, size = time.perf_counter() - started, sum(path.stat().st_size for path in files)
    read = io_bytes()["read_bytes"] - before["read_bytes"]
    assert read > 0.95 * size, f"{read} of {size} bytes came from the disk: the page cache cannot be dropped here"
    return seconds


def whole_lu(rank: int, file: Path) -> dict[str, float]:
    """torch.linalg.lu of every weight of a file, in float32 and without the reading."""
    torch.set_num_threads(os.cpu_count() or 1)
    weights, watch, seconds = load_file(file), Watch(), list[float]()
    for weight in weights.values():
        W = weight.float()
        timed(seconds, partial(torch.linalg.lu, W))
    return {"seconds": sum(seconds), "peak_mib": watch.peak()}


def peft(folder: Path, ranks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """PEFT's initialisations of the first layer's weights in memory, one of each shape, scaled to the model."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, num_hidden_layers=1)).bfloat16()
    model.load_state_dict(load_file(min(folder.glob("*.safetensors"))), strict=False)
    few, many = ranks  # QR and exact SVD factor the whole weight at any rank
    methods: list[tuple[Any, int]] = [
        ("olora", few), ("pissa_niter_4", few), ("pissa_niter_4", many), ("pissa", few)
    ]  # fmt: skip
    for method, r in methods:
        seconds = {}
        for part in PARTS:
            base = copy.deepcopy(model)
            lora = LoraConfig(r=r, target_modules=[part], init_lora_weights=method, task_type="CAUSAL_LM")
            started = time.perf_counter()
            get_peft_model(base, lora)
            seconds[part] = time.perf_counter() - started
        scaled = LAYERS * sum(count * seconds[part] for part, count in PARTS.items())
        yield {"method": method, "r": r, "seconds": seconds, "two_layers_s": scaled}


def in_processes(count: int, work: Callable[..., Any], *words: Any) -> list[Any]:
    """Run work(rank, *words) in forked processes, without imports; returns the results by rank."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    processes = [
        fork.Process(target=lambda rank=rank: results.put((rank, work(rank, *words)))) for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes), "a process failed: its message is above"
    return [result for _, result in sorted((results.get() for _ in processes), key=lambda each: each[0])]


def drop(files: list[Path]) -> None:
    """Drop files from the page cache; they are on disk, and no process has them open."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def io_bytes() -> dict[str, int]:
    """rchar, asked for by read(), and read_bytes, fetched from the disk: also for a mapped file and ahead of use."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = {name: int(count) for name, count in (line.split(": ") for line in lines)}
    return {name: counts[name] for name in ("rchar", "read_bytes")}


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; torch {result['torch']}; load {result['load_average']:.1f}")
    print(f"one cold read of {result['bytes'] / 1e6:.0f} MB {_s(result['read_s'])}; torch.linalg.lu of all weights "
          f"{_s(result['whole_lu_s'])}, peak {result['whole_lu_peak_mib']:.0f} MiB")  # fmt: skip
    names = "r", "processes", "seconds", "of a read", "faster than LU", "MB from disk, each", "peak MiB (panels)"
    table = Table(*names, "max/mean cost, 32 layers", title="median (min-max)")
    for row in result["rows"]:
        table.add_row(
            str(row["r"]), str(row["processes"]), _s(row["seconds"]), _times(row["times_a_read"]),
            _times(row["times_faster_than_whole_lu"]), " ".join(f"{count / 1e6:.0f}" for count in row["read_bytes"]),
            f"{row['peak_mib']:.0f} ({row['peak_panels']:.1f})",
            f"{row['balance']:.3f} {row['balance_32_layers']:.3f}",
        )  # fmt: skip
    Console(width=150).print(table)


def _s(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.2f} s ({seconds['min']:.2f}-{seconds['max']:.2f})"


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


if __name__ == "__main__":
    main()
