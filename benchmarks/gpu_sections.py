"""The sections of `gpu_suite.py`: each yields the name of a measurement, and what to do for it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu_measuring import (
    LORA,
    Plan,
    adapted,
    base_model,
    batch_of,
    empty_cache,
    loss_of,
    measured,
    synchronize,
    timed,
)  # fmt: skip

REPO = Path(__file__).resolve().parents[1]
RUN_NEEDS = ("docstring_parser", "pydantic")  # of the project's packages, those that few machines have by themselves
NEEDS = {"runs": RUN_NEEDS, "tests": RUN_NEEDS, "nf4": ("bitsandbytes",)}  # section -> packages, beside torch and PEFT
GPU_TESTS = {  # file -> packages
    "tests/models/test_varlen.py": (), "tests/training/test_ahead.py": (), "tests/data/test_batches.py": (),
    "tests/models/test_quantize.py": ("bitsandbytes",), "tests/engines/test_quantized_methods.py": ("bitsandbytes",),
    "tests/engines/test_offload.py": (),
}  # fmt: skip
LIMIT_S = 90.0  # of runs and of tests, within their section's time: what has ended by then is reported

Steps = Iterator[tuple[str, Callable[[], Any]]]


def lacking(packages: Iterable[str]) -> str:
    """What to write about a measurement if any of these packages is not installed; nothing if all are."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"not measured: {' and '.join(missing)} not installed" if missing else ""


def limit_s(plan: Plan) -> float:
    return LIMIT_S if plan.device == "cuda" else 5 * LIMIT_S


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
    steps = ["--max-steps", "12" if plan.device == "cuda" else "2"]
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    running, started = {}, time.perf_counter()
    for name, (options, _) in chosen.items():
        if "--quantize" in options and lacking(["bitsandbytes"]):
            continue
        command = [sys.executable, "recipes/llama2_alpaca_loldu.py", *RUN.split(), *options.split(), *steps]
        where = ["--cache", str(folder / "cache"), "--output", str(folder / name)]
        with (folder / f"{name}.log").open("w") as log:
            running[name] = subprocess.Popen([*command, *where], stdout=log, stderr=log, cwd=REPO, env=environment)
    losses: dict[str, list[float]] = {}

    def result(name: str) -> Any:
        if name not in running:
            return lacking(["bitsandbytes"])
        code = ended(running[name], limit_s(plan) - (time.perf_counter() - started))
        log = (folder / f"{name}.log").read_text(errors="replace")
        print(f"--- {name}\n{log}", flush=True)
        last = (log.strip().splitlines() or ["its log is empty"])[-1]
        if code is None:
            raise TimeoutError(f"not ended after {limit_s(plan):g} s: {last}")
        if code:
            raise RuntimeError(f"exit code {code}: {last}")
        events = [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]
        losses[name] = [event["loss"] for event in events if "loss" in event]
        found = {"loss": losses[name][-1], "s": time.perf_counter() - started, "lines": len(log.splitlines())}
        if same := chosen[name][1]:
            if same not in losses:
                raise ValueError(f"its loss is {found['loss']:.6f}; {same}, whose losses it must have, failed")
            far = max(abs(a - b) for a, b in zip(losses[name], losses[same], strict=True))
            found["from_" + same] = far
            if far > SAME:
                raise ValueError(f"losses differ by {far:.2g} from those of {same}, allowed {SAME:g}")
        return found

    for name in chosen:
        yield name, functools.partial(result, name)
    shutil.rmtree(folder, ignore_errors=True)


def ended(process: subprocess.Popen[Any], within_s: float) -> int | None:
    """The exit code; None, and the process is killed, if it does not end within this time."""
    try:
        return process.wait(max(0.1, within_s))
    except subprocess.TimeoutExpired:
        process.kill()
        return None


def gpu_tests(plan: Plan) -> Steps:
    files = [file for file, packages in GPU_TESTS.items() if not lacking(packages)]

    def run_tests() -> dict[str, Any]:
        how = ["-m", "gpu", "-v", "-p", "no:cacheprovider", *(["--collect-only"] if plan.device == "cpu" else [])]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen([sys.executable, "-m", "pytest", *how, *files], cwd=REPO, stdout=log, stderr=log)
            code = ended(process, limit_s(plan))
            log.seek(0)
            text = log.read()
        print(text, flush=True)
        return {"collected": code == 0} if plan.device == "cpu" else passed(text, whole=code is not None)

    yield "pytest -m gpu", run_tests
    for file, packages in GPU_TESTS.items():
        if file not in files:
            yield file, functools.partial(lacking, packages)


OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def passed(text: str, *, whole: bool) -> dict[str, Any]:
    """Counts of what `pytest -v` wrote, whole or until it was stopped. Raises ValueError if a test failed, a file could
    not be imported, or none passed: then nothing was tested."""
    outcomes = OUTCOME.findall(text)
    counts = {word.lower(): count for word, count in sorted(Counter(word for _, word in outcomes).items())}
    bad = [name for name, word in outcomes if word in ("FAILED", "ERROR")] + re.findall(r"^ERROR (\S+)", text, re.M)
    if bad or not counts.get("passed"):
        more = f"bad: {', '.join(dict.fromkeys(bad))}" if bad else "tests that need ../shared/data skip without it"
        raise ValueError(f"{counts}; {more}")
    return counts if whole else {**counts, "stopped": "before the last test"}


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
