"""Everything that needs one NVIDIA GPU, in one command: parts of at most two minutes, most important first.

    python benchmarks/gpu_suite.py                       # writes benchmarks/results/gpu_suite.json
    python benchmarks/gpu_suite.py --sections bf16,nf4 --seconds 300
    python benchmarks/gpu_suite.py --rehearse --output /tmp/rehearsal.json   # the same on tiny shapes, on a CPU

Each section is a separate process with a budget of seconds. One that fails, hangs or runs out of memory is reported
with its results so far, and the others continue. Every measurement is written when it ends, so a suite that is cut off
keeps its results so far. Logs are in the folder beside the results. The suite ends after --seconds.

    parity     loss and gradients of each method, and factors: the GPU against the CPU, in float32
    bf16       Llama-2-7B's shapes, random weights made on the device: tokens/s, peak memory and seconds to make the
               factors, for the frozen floor (gradient through the inputs only), ours and PEFT's LoRA, ranks 64 and 256.
               LoRA twice: with float32 adapters, as PEFT makes them, and in bfloat16. The goals are against the faster
    runs       short runs of the recipe: fsdp2, offload, packing, 4 and 8 bits, LoRA, SVFit; some must end with one loss
    nf4        bf16 on 4-bit weights
    tests      the tests marked gpu
    layer      one adapted layer: its matrix products alone against the whole layer (the most that a fused kernel could
               save), and time and error of the read map in float32, TF32 and bfloat16
    attention  flash attention and the others
    factors    seconds to factor one weight on the device
    compile    torch.compile and not

There is no Triton kernel for the gather, the product and the sum, since none was measured to be faster.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

RESULTS = REPO / "benchmarks" / "results" / "gpu_suite.json"
GOALS = {"tokens_per_s_of_lora": 1.15, "peak_memory_of_lora": 0.85}
BUDGET_S = {  # in this order: a short loan of a machine ends before the last
    "parity": 60, "bf16": 115, "runs": 115, "nf4": 100, "tests": 110, "layer": 40, "attention": 45, "factors": 40,
    "compile": 115,
}  # fmt: skip
SECONDS = 570.0  # of all sections: less than ten minutes
LORA = ("lora", "lora_bf16")  # with adapters in float32, as PEFT makes them, and in the base's dtype
POLL_S = 1.0
LEAST_S = 20.0  # a section with less time left is not begun
GPU_TESTS = (
    "tests/models/test_quantize.py", "tests/engines/test_quantized_methods.py", "tests/data/test_encode.py",
    "tests/engines/test_offload.py",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Sizes of the model and of what is measured on it."""

    device: str
    dtype: str = "bfloat16"
    hidden: int = 4096
    inner: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32000
    batch: int = 2
    length: int = 2048
    ranks: tuple[int, ...] = (64, 256)
    steps: int = 6
    few_layers: int = 6  # if a part of the model is enough
    compiled_layers: int = 2  # inductor takes tens of seconds for each
    compiler: str = "inductor"


REHEARSAL = Plan(
    device="cpu", hidden=64, inner=96, layers=2, heads=4, vocabulary=128, batch=2, length=16, ranks=(4, 8), steps=2,
    few_layers=1, compiled_layers=1, compiler="aot_eager",
)  # fmt: skip


def plan_for(rehearse: bool) -> Plan:
    """Raises SystemExit if there is no GPU; below 40 GB half the tokens are taken, below 28 GB half the layers."""
    if rehearse:
        return REHEARSAL
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --rehearse goes through all sections on tiny shapes on a CPU")
    gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
    return Plan(device="cuda", batch=2 if gigabytes > 40 else 1, layers=32 if gigabytes > 28 else 16)


# --- running sections ---


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(BUDGET_S), help="which, separated by commas")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which all ends")
    parser.add_argument("--output", type=Path)
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
    parts = output.with_suffix("")
    parts.mkdir(parents=True, exist_ok=True)
    slower = 5 if options.rehearse else 1  # a rehearsal is for the logic, on machines that may be busy
    deadline = time.monotonic() + options.seconds * slower

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
    process.wait()
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
            return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO).stdout.strip()
        except OSError:
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


# --- sections: each yields (name, what to do) ---

Steps = Iterator[tuple[str, Callable[[], Any]]]


def parity(plan: Plan) -> Steps:
    """Loss and gradients on the embedded model, and factors, against those of the CPU."""
    import adapters

    methods: list[tuple[str, dict[str, Any]]] = [
        ("LoLDU", {}), ("LoLDU", {"r": 4096}), ("LoLDU", {"normalize_directions": True}), ("LoLDUXS", {}),
        ("SVFit", {}), ("SVFT", {}), ("LoRAXS", {}),
    ]  # fmt: skip
    for name, options in methods[: None if plan.device == "cuda" else 2]:
        config = getattr(adapters, f"{name}Config")
        settings = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
        words = " ".join(f"{key}={value}" for key, value in options.items())
        yield f"{name} {words}".strip(), functools.partial(parity_of, plan, config, settings)
    for r in (64, 1024):
        yield f"factors of rank {r}", functools.partial(parity_of_factors, plan, r)


def parity_of(plan: Plan, config: Any, settings: dict[str, Any]) -> dict[str, float]:
    """Distances of the loss and of all gradients together (relative), with every trained number 0.01."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(REPO / "recipes/tiny/model", dtype=torch.float32)
    ids = torch.randint(100, (2, 300), generator=torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", plan.device):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(base).to(device), config(**settings))
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.data.fill_(0.01)
        loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        found[device] = float(loss.detach()), torch.cat([p.grad.flatten().cpu() for p in trained])
    (loss_here, ours), (loss_there, theirs) = found["cpu"], found[plan.device]
    far = {"loss": abs(loss_here - loss_there), "gradients": float((theirs - ours).norm() / ours.norm())}
    if far["loss"] > 1e-4 or far["gradients"] > 1e-2:
        raise ValueError(f"the GPU computes something else: {far}")
    return far


def parity_of_factors(plan: Plan, r: int) -> dict[str, float]:
    """Share of equal pivots of a bfloat16 weight, and the largest distance of the write maps."""
    from adapters.loldu import loldu_factors

    m, n = (4096, 1024) if plan.device == "cuda" else (256, 128)
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(1)).bfloat16()
    here, there = (
        loldu_factors(W.to(device)[:, :r], lambda rows, device=device: W.to(device)[rows.long()])
        for device in ("cpu", plan.device)
    )
    return {
        "equal_pivots": float((here.pivots == there.pivots.cpu()).float().mean()),
        "write": float((here.write - there.write.cpu()).abs().max()),
    }


RUNS = {  # name -> (options, the run whose losses it must have)
    "float32": ("--dtype float32", ""),
    "fsdp2": ("--dtype float32 --sharding fsdp2", "float32"),
    "offload": ("--dtype float32 --sharding fsdp2 --cpu-offload", "float32"),
    "packing": ("--packing", ""),
    "varlen": ("--attention varlen", ""),
    "nf4": ("--quantize nf4", ""),
    "int8": ("--quantize int8", ""),
    "nf4 fsdp2": ("--quantize nf4 --sharding fsdp2", ""),
    "lora": ("--method lora --rank 8", ""),
    "svfit": ("--method svfit --async-save", ""),
}
RUN = (
    "--model recipes/tiny/model --data recipes/tiny/instructions/train.json --prompt-template short --max-length 192 "
    "--rank 64 --targets all-linear --batch-size 16 --micro-batch-size 8 --eval-records 16 --show-samples 0 --no-report"
)
SAME = 5e-6  # float32: the same sums in another order


def short_runs(plan: Plan) -> Steps:
    """Runs of the recipe side by side, each a separate process; importing takes most of their time."""
    folder = Path(tempfile.mkdtemp())
    chosen = RUNS if plan.device == "cuda" else {name: RUNS[name] for name in ("float32", "fsdp2")}
    steps = "12" if plan.device == "cuda" else "2"
    started = time.perf_counter()
    running = {}
    for name, (options, _) in chosen.items():
        command = [
            sys.executable,
            "recipes/llama2_alpaca_loldu.py",
            *RUN.split(),
            *options.split(),
            "--max-steps",
            steps,
        ]
        with (folder / f"{name}.log").open("w") as log:
            where = ["--cache", str(folder / "cache"), "--output", str(folder / name)]
            environment = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
            running[name] = subprocess.Popen([*command, *where], stdout=log, stderr=log, cwd=REPO, env=environment)
    losses: dict[str, list[float]] = {}

    def result(name: str) -> dict[str, Any]:
        code, log = running[name].wait(), (folder / f"{name}.log").read_text()
        print(f"--- {name}\n{log}", flush=True)
        if code:
            raise RuntimeError(log.strip().splitlines()[-1])
        events = [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]
        losses[name] = [event["loss"] for event in events if "loss" in event]
        found = {"loss": losses[name][-1], "s": time.perf_counter() - started, "lines": len(log.splitlines())}
        if same := chosen[name][1]:
            far = max(abs(a - b) for a, b in zip(losses[name], losses[same], strict=True))
            found["from_" + same] = far
            if far > SAME:
                raise ValueError(f"losses differ by {far:.2g} from those of {same}, allowed {SAME:g}")
        return found

    for name in chosen:
        yield name, functools.partial(result, name)
    shutil.rmtree(folder, ignore_errors=True)


def gpu_tests(plan: Plan) -> Steps:
    def run_tests() -> dict[str, Any]:
        report = Path(tempfile.mkdtemp()) / "tests.xml"
        how = ["-m", "gpu", "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
        how += ["--collect-only"] if plan.device == "cpu" else []
        code = subprocess.run([sys.executable, "-m", "pytest", *how, *GPU_TESTS], cwd=REPO, check=False).returncode
        if plan.device == "cpu":
            return {"collected": code == 0}
        return passed(report)

    yield "pytest -m gpu", run_tests


def passed(report: Path) -> dict[str, int]:
    """Counts of a JUnit file. Raises ValueError if a test failed, or none passed: then nothing was tested."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    if counts["failures"] or counts["errors"] or not counts["passed"]:
        raise ValueError(f"{counts}; tests that need ../shared/data are skipped without it")
    return counts


def training_bf16(plan: Plan) -> Steps:
    yield from training(plan, base_model(plan, plan.layers))


def training_nf4(plan: Plan) -> Steps:
    from launcher.models.layers import FourBit

    model = base_model(plan, plan.layers)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "proj" in name:
            packed = FourBit(linear, "nf4", linear.weight.dtype)
            packed.keep(nn.Parameter(packed.pack(linear.weight.detach(), linear.weight.device), requires_grad=False))
            model.set_submodule(name, packed)
    empty_cache(plan)
    yield from training(plan, model)


def training(plan: Plan, base: nn.Module) -> Steps:
    """The floor, then ours and LoRA rank by rank, on one base that each leaves as it was."""
    yield "floor", lambda: measured(plan, base)
    for r in plan.ranks:
        for method in ("loldu", *LORA):

            def step(method: str = method, r: int = r) -> dict[str, Any]:
                started = time.perf_counter()
                model = adapted(base, method, r)
                synchronize(plan)
                seconds = time.perf_counter() - started
                try:
                    return {"adapt_s": seconds} | measured(plan, model)
                finally:
                    model.unload()
                    empty_cache(plan)

            yield f"{method}-{r}", step


def one_layer(plan: Plan) -> Steps:
    """Forward and backward of one Linear of each shape, frozen and adapted, and of the adapter's products alone."""
    from adapters.functions import lower_linear

    dtype = getattr(torch, plan.dtype)
    for m, n in ((plan.hidden, plan.hidden), (plan.inner, plan.hidden), (plan.hidden, plan.inner)):
        for r in plan.ranks:

            def step(m: int = m, n: int = n, r: int = r) -> dict[str, float]:
                linear = nn.Linear(n, m, bias=False, device=plan.device, dtype=dtype).requires_grad_(False)
                model = adapted(nn.Sequential(linear), "loldu", r, ["0"])
                x = torch.randn(plan.batch, plan.length, n, device=plan.device, dtype=dtype, requires_grad=True)
                g = torch.randn(plan.batch, plan.length, m, device=plan.device, dtype=dtype)
                write, read = (torch.randn(*shape, device=plan.device) for shape in ((m, r), (r, r)))
                write = write.to(dtype)
                h, flat = torch.randn(g[..., 0].numel(), r, device=plan.device, requires_grad=True), g.view(-1, m)

                def products() -> None:
                    taken = lower_linear(h, read)
                    flat.addmm_(h.detach().to(dtype), write.T, alpha=1e-30)  # 0.0 would skip the product
                    torch.autograd.grad(taken, h, (flat @ write).float())

                bare = timed(plan, lambda: torch.autograd.grad(F.linear(x, linear.weight), x, g))
                trained = [p for p in model.parameters() if p.requires_grad]
                ours = timed(plan, lambda: torch.autograd.grad(model(x), [x, *trained], g))
                alone = timed(plan, products)
                return {
                    "bare_ms": bare,
                    "adapted_ms": ours,
                    "products_ms": alone,
                    "beside_products_ms": ours - bare - alone,
                }

            yield f"{m} x {n}, rank {r}", step
    for r in (*plan.ranks, plan.hidden // 4, plan.hidden):
        yield f"read, rank {r}", lambda r=r: read_precisions(plan, r)


def read_precisions(plan: Plan, r: int) -> dict[str, float]:
    """Time and relative error of the read map in float32, TF32 and bfloat16, against float64, inputs in the dtype.

    And in float32 by blocks, as the layer multiplies it, whose numbers are the same to rounding.
    """
    from adapters.functions import lower_linear
    from adapters.loldu import loldu_factors

    dtype = getattr(torch, plan.dtype)
    generator = torch.Generator(plan.device).manual_seed(0)
    W = torch.randn(plan.hidden, plan.hidden, device=plan.device, generator=generator)
    read = loldu_factors(W[:, :r], lambda rows: W[rows.long()]).read
    taken = torch.randn(plan.batch * plan.length, r, device=plan.device, generator=generator).to(dtype)
    exact, found = F.linear(taken.double(), read.double()), {}
    for name, tf32, kind in (
        ("float32", False, torch.float32),
        ("tf32", True, torch.float32),
        (plan.dtype, False, dtype),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        map_, into = read.to(kind), (lambda kind=kind: taken.to(kind))
        found[f"{name}_ms"] = timed(plan, lambda map_=map_, into=into: F.linear(into(), map_).to(dtype))
        error = F.linear(into(), map_).to(dtype).double() - exact
        found[f"{name}_error"] = float(error.norm() / exact.norm())
    torch.backends.cuda.matmul.allow_tf32 = False
    found["float32_blocks_ms"] = timed(plan, lambda: lower_linear(taken.float(), read).to(dtype))
    return found


def factor_times(plan: Plan) -> Steps:
    from adapters.loldu import loldu_factors

    for m, n in ((plan.hidden, plan.hidden), (plan.inner, plan.hidden)):
        for r in (*plan.ranks, plan.hidden):

            def step(m: int = m, n: int = n, r: int = r) -> dict[str, float]:
                W = torch.randn(m, n, device=plan.device)
                return {"factors_ms": timed(plan, lambda: loldu_factors(W[:, :r], lambda rows: W[rows.long()]))}

            yield f"{m} x {n}, rank {r}", step


def attention(plan: Plan) -> Steps:
    """Ours at the first rank: torch's own kernels for attention, and flash-attn if it is installed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    few = base_model(plan, plan.few_layers)
    model = adapted(few, "loldu", plan.ranks[0])
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        if plan.device == "cpu" and kernel is SDPBackend.EFFICIENT_ATTENTION:
            continue

        def step(kernel: SDPBackend = kernel) -> dict[str, Any]:
            with sdpa_kernel(kernel):
                return measured(plan, model)

        yield f"sdpa {kernel.name.lower()}", step

    def flash() -> Any:
        if plan.device == "cpu" or importlib.util.find_spec("flash_attn") is None:
            return "not measured: flash-attn is not installed" if plan.device == "cuda" else "not measured: no GPU"
        few.set_attn_implementation("flash_attention_2")
        return measured(plan, model)

    yield "flash-attn", flash


def compiled(plan: Plan) -> Steps:
    base = base_model(plan, plan.compiled_layers)
    for name in ("floor", "loldu", "lora"):
        for how in ("eager", "compiled"):

            def step(name: str = name, how: str = how) -> dict[str, Any]:
                torch.compiler.reset()
                model = copy.deepcopy(base) if name == "floor" else adapted(copy.deepcopy(base), name, plan.ranks[0])
                if how == "eager":
                    return measured(plan, model)
                breaks = torch._dynamo.explain(model)(**batch_of(plan, model)).graph_break_count
                torch.compiler.reset()
                model.compile(backend=plan.compiler)
                started = time.perf_counter()
                loss_of(plan, model).backward()
                synchronize(plan)
                seconds = time.perf_counter() - started
                return {"first_step_s": seconds, "graph_breaks": breaks} | measured(plan, model)

            yield f"{name}-{plan.ranks[0]} {how}", step


SECTIONS: dict[str, Callable[[Plan], Steps]] = {
    "parity": parity, "bf16": training_bf16, "runs": short_runs, "nf4": training_nf4, "tests": gpu_tests,
    "layer": one_layer, "attention": attention, "factors": factor_times, "compile": compiled,
}  # fmt: skip


# --- what the sections share ---


def base_model(plan: Plan, layers: int) -> Any:
    """A frozen Llama of the plan's shapes whose random weights are made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": plan.hidden, "intermediate_size": plan.inner, "vocab_size": plan.vocabulary}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, num_attention_heads=plan.heads, max_position_embeddings=plan.length
    )
    with torch.device(plan.device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, plan.dtype), attn_implementation="sdpa")
    return model.requires_grad_(False).train()


def adapted(base: nn.Module, method: str, r: int, targets: Any = "all-linear") -> Any:
    from peft import LoraConfig, get_peft_model

    from adapters import LoLDUConfig

    warnings.simplefilter("ignore")
    how: dict[str, Any] = {"r": r, "target_modules": targets}
    if targets == "all-linear":
        how["task_type"] = "CAUSAL_LM"
    if method == "loldu":
        return get_peft_model(base, LoLDUConfig(**how))
    return get_peft_model(base, LoraConfig(lora_alpha=r, **how), autocast_adapter_dtype=method == "lora")


def batch_of(plan: Plan, model: Any) -> dict[str, Any]:
    """Token ids as labels, and their embeddings, through which all contenders take the gradient."""
    generator = torch.Generator(plan.device).manual_seed(1)
    ids = torch.randint(plan.vocabulary, (plan.batch, plan.length), generator=generator, device=plan.device)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    return {"inputs_embeds": embeddings, "labels": ids, "use_cache": False}


def loss_of(plan: Plan, model: Any) -> Tensor:
    return model(**batch_of(plan, model)).loss


def measured(plan: Plan, model: Any) -> dict[str, Any]:
    """Tokens per second (median step), the spread of the steps, and the peak of the memory over them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=plan.device == "cuda") if trained else None

    def step() -> None:
        loss_of(plan, model).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):
        step()
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(plan.steps):
        synchronize(plan)
        started = time.perf_counter()
        step()
        synchronize(plan)
        seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_s": plan.batch * plan.length / median(seconds),
        "step_s_min": min(seconds),
        "step_s_max": max(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if plan.device == "cuda" else 0,
        "trained": sum(p.numel() for p in trained),
    }


def timed(plan: Plan, do: Callable[[], Any]) -> float:
    """Milliseconds of one call: the median of five batches of calls."""
    calls = 5 if plan.device == "cuda" else 1
    do()
    batches = []
    for _ in range(5):
        synchronize(plan)
        started = time.perf_counter()
        for _ in range(calls):
            do()
        synchronize(plan)
        batches.append((time.perf_counter() - started) / calls * 1e3)
    return median(batches)


def synchronize(plan: Plan) -> None:
    if plan.device == "cuda":
        torch.cuda.synchronize()


def empty_cache(plan: Plan) -> None:
    if plan.device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
