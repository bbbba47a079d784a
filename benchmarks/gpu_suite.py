"""Everything that needs one NVIDIA GPU, in one command: parts of at most two minutes, most important first.

    python benchmarks/gpu_suite.py                       # writes benchmarks/results/gpu_suite.json
    python benchmarks/gpu_suite.py --sections bf16,nf4 --seconds 300
    python benchmarks/gpu_suite.py --rehearse --output /tmp/rehearsal.json   # the same on tiny shapes, on a CPU

Each section is a separate process with a budget of seconds. One that fails, hangs or runs out of memory is reported
with its results so far, and the others continue. Every measurement is written when it ends, so a suite that is cut off
keeps its results so far. Logs are in the folder beside the results, or in --logs. The suite ends --seconds after it was
started. A section, run or test whose package is not installed is reported as not measured, and the others are.

    bf16       Llama-2-7B's shapes, random weights made on the device: tokens/s, peak memory and seconds to make the
               factors, for the frozen floor (gradient through the inputs only), ours and PEFT's LoRA, ranks 64 and 256.
               LoRA twice: with float32 adapters, as PEFT makes them, and in bfloat16. The goals are against the faster
    parity     loss and gradients of each method, and factors: the GPU against the CPU, in float32
    runs       short runs of the recipe: fsdp2, offload, packing, 4 and 8 bits, LoRA, SVFit; some must end with one loss
    nf4        bf16 on 4-bit weights
    tests      the tests marked gpu
    layer      one adapted layer: its matrix products alone against the whole layer (the most that a fused kernel could
               save), and time and error of the read map in float32, TF32 and bfloat16
    attention  flash attention and the others
    factors    seconds to factor one weight on the device
    compile    torch.compile and not

The sections are in gpu_sections.py, what they share in gpu_measuring.py. There is no Triton kernel for the gather, the
product and the sum, since none was measured to be faster.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
from benchmarks.gpu_measuring import LORA, Plan, plan_for  # noqa: E402
from benchmarks.gpu_sections import NEEDS, SECTIONS, lacking  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "gpu_suite.json"
GOALS = {"tokens_per_s_of_lora": 1.15, "peak_memory_of_lora": 0.85}
BUDGET_S = {  # in this order: a short loan of a machine ends before the last
    "bf16": 120, "parity": 60, "runs": 115, "nf4": 100, "tests": 110, "layer": 40, "attention": 45, "factors": 40,
    "compile": 115,
}  # fmt: skip
SECONDS = 570.0  # of everything: less than ten minutes
POLL_S = 1.0
LEAST_S = 20.0  # a section with less time left is not begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(BUDGET_S), help="which, separated by commas")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which all ends")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--logs", type=Path, help="folder (default: OUTPUT without its suffix)")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one section, in this process
    options = parser.parse_args()
    if options.only:
        run_here(options.only, plan_for(options.rehearse), options.output)
        return 0
    names, plan = options.sections.split(","), plan_for(options.rehearse)
    if unknown := set(names) - set(BUDGET_S):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(BUDGET_S)}")
    if options.rehearse and options.output is None:
        parser.error("a rehearsal's figures mean nothing: give --output a file outside benchmarks/results")
    output = options.output or RESULTS
    result = about(plan)
    parts = options.logs or output.with_suffix("")
    parts.mkdir(parents=True, exist_ok=True)
    slower = 5 if options.rehearse else 1  # a rehearsal is for the logic, on machines that may be busy
    running_s = time.time() - psutil.Process().create_time()  # imports took some of it
    deadline = time.monotonic() + options.seconds * slower - running_s

    def write(name: str, found: dict[str, Any]) -> None:
        result["sections"][name] = found
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(output)

    for name in names:
        command = [sys.executable, __file__, "--only", name, *(["--rehearse"] if options.rehearse else [])]
        budget_s = min(BUDGET_S[name] * slower, deadline - time.monotonic())
        if budget_s < LEAST_S:
            write(name, {"status": f"not begun: {options.seconds:g} s are over", "seconds": 0.0, "found": {}})
            continue
        if missing := lacking(NEEDS.get(name, ())):
            write(name, {"status": missing, "seconds": 0.0, "found": {}})
            continue
        found = run_apart(command, budget_s, parts / name, functools.partial(write, name))
        write(name, found)
        print(f"{name}: {found['status']}, {found['seconds']:.0f} s", flush=True)
    print(report(result))
    print(f"written to {output}, logs in {parts}")
    return 0 if all(found["status"] == "done" for found in result["sections"].values()) else 1


def run_apart(
    command: list[str],
    budget_s: float,
    folder: Path,
    write: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Run a section's command, and end it with all that it started; what it wrote to --output, and how it ended.

    Its files and its log stay in folder. write is given what is found so far whenever that grows.
    """
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    part, log = folder / "found.json", folder / "log"
    status, seen, below = "", 0.0, set[psutil.Process]()

    def found() -> dict[str, Any]:
        so_far = json.loads(part.read_text()) if part.exists() else {}
        return {"status": status or "running", "seconds": round(time.monotonic() - started, 1), "found": so_far}

    with log.open("w") as words:
        process = subprocess.Popen(
            [*command, "--output", str(part)], stdout=words, stderr=words, cwd=REPO, start_new_session=True
        )
        try:
            while not status:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=min(POLL_S, max(0.0, started + budget_s - time.monotonic())))
                    status = "done" if code == 0 else f"failed, exit code {code}"
                if not status and time.monotonic() - started >= budget_s:
                    status = f"stopped after its {budget_s:.0f} s"
                if not status and part.exists() and part.stat().st_mtime != seen:
                    seen = part.stat().st_mtime
                    write(found())
                below.update(started_by(process))
        finally:
            end(process, below | started_by(process))
    result = found()
    if status != "done":
        result["last_words"] = log.read_text(errors="replace")[-2000:]
    return result


def started_by(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    """All processes below one."""
    try:
        return set(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def end(process: subprocess.Popen[bytes], below: set[psutil.Process]) -> None:
    """Kill a process, its group, and what it started: torchrun starts each worker in its own session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in below:
        with contextlib.suppress(psutil.NoSuchProcess):  # or another process has its number now
            each.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps a killed process; leave it
        process.wait(timeout=10)
    psutil.wait_procs(below, timeout=10)


def run_here(name: str, plan: Plan, output: Path) -> None:
    """One section in this process; what it has found so far is in output after every step."""
    found: dict[str, Any] = {}
    failed = False
    for key, step in SECTIONS[name](plan):
        try:
            found[key] = step()
        except Exception as error:  # report it, and continue with the next
            failed = True
            found[key] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            traceback.print_exc()
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(output)
    if failed:
        raise SystemExit(1)


def about(plan: Plan) -> dict[str, Any]:
    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO, timeout=20)
            return done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    names = ("torch", "transformers", "peft", "bitsandbytes", "triton", "flash_attn")
    on_gpu = plan.device == "cuda"
    return {
        "benchmark": "all that needs a GPU" if on_gpu else "a rehearsal on a CPU: its figures mean nothing",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": said("git", "rev-parse", "HEAD") or "unknown",
        "changed_files": said("git", "status", "--short", "--untracked-files=no").splitlines(),
        "device": torch.cuda.get_device_name(0) if on_gpu else platform.processor() or platform.machine(),
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "versions": {name: version_of(name) for name in names},
        "plan": asdict(plan),
        "sections": {},
    }


def version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def report(result: dict[str, Any]) -> str:
    """What was found, as text: a line per measurement, goals beside those that have one."""
    lines = [f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit'][:9]}"]
    for name, section in result["sections"].items():
        lines.append(f"\n{name}: {section['status']}, {section['seconds']:.0f} s")
        lines += [f"  {key}: {in_words(found)}" for key, found in section["found"].items()]
        for rank, ratios in against_lora(section["found"]).items():
            for key, goal in GOALS.items():
                holds = ratios[key] >= goal if key.startswith("tokens") else ratios[key] <= goal
                sign = ">=" if key.startswith("tokens") else "<="
                lines.append(
                    f"  rank {rank}: {key.replace('_', ' ')} {ratios[key]:.3f}, goal {sign} {goal}: "
                    f"{'holds' if holds else 'MISSED'}"
                )
        if "last_words" in section:
            lines += ["  " + line for line in section["last_words"].splitlines()[-4:]]
    return "\n".join(lines)


def against_lora(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ratios ours / LoRA by rank, if a section measured both: LoRA with the adapters that make it faster.

    On a CPU there is no peak memory to compare.
    """
    ratios = {}
    for name, ours in found.items():
        method, _, rank = name.partition("-")
        measured = [found.get(f"{kind}-{rank}", {}) for kind in LORA]
        measured = [lora for lora in measured if "tokens_per_s" in lora]
        if method == "loldu" and "tokens_per_s" in ours and measured:
            lora = max(measured, key=lambda lora: lora["tokens_per_s"])
            ratios[rank] = {
                "tokens_per_s_of_lora": ours["tokens_per_s"] / lora["tokens_per_s"],
                "peak_memory_of_lora": ours["peak_bytes"] / max(lora["peak_bytes"], 1),
            }
    return ratios


def in_words(found: Any) -> str:
    if not isinstance(found, dict):
        return str(found)
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
    )


if __name__ == "__main__":
    raise SystemExit(main())
