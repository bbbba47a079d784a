"""Sizes, models and clocks that the sections of `gpu_suite.py` share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

LORA = ("lora", "lora_bf16")  # with adapters in float32, as PEFT makes them, and in the base's dtype


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
