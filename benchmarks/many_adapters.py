"""Many adapters of one base in one batch: memory, loading, forward passes, served requests, and training.

    OMP_NUM_THREADS=1 python benchmarks/many_adapters.py            # about 6 minutes, one thread
    OMP_NUM_THREADS=1 python benchmarks/many_adapters.py --only memory,training --output /tmp/some.json

    memory    10,000 LoLDU adapters of rank 64 on a Llama of SmolLM2-135M's shape with random weights: growth of the
              process against their numbers, and how many folders a second are added
    loading   adapter folders a second that the engine takes, with all its checks, and the first of a kind
    passes    16 rows of one token on the same Llama: base, one adapter, another of 1,000 in each row; PEFT's LoRA of
              rank 16, one adapter and its mixed batch. A round runs each once; a ratio is the median over rounds
    serving   64 requests of 32 tokens on the embedded model through the engine: 64 of 1,000 adapters, and one
    training  64 adapters on the embedded model, each on its own samples: in one run, and one after the other

Seconds are the process's CPU seconds (the machine is shared), but those until a first token. --only keeps the other
sections of benchmarks/results/many_adapters.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from factorization import about
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapters import LoLDUConfig, ManyAdapters
from launcher.serving.engine import load_engine
from launcher.serving.requests import Request, Sampling

PROJECT = Path(__file__).resolve().parents[1]
TINY = PROJECT / "recipes" / "tiny" / "model"
RESULTS = Path(__file__).parent / "results" / "many_adapters.json"
ROWS, ROUNDS = 16, 9
SECTIONS = ("memory", "loading", "passes", "serving", "training")


def smollm(layers: int = 30) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=2048)).eval()


def one_adapter(model: Any, r: int) -> tuple[LoLDUConfig, dict[str, Tensor]]:
    """Config and file tensors of an adapter with random cores."""
    config = LoLDUConfig(r=r, target_modules="all-linear", normalize_directions=True, init_weights=False)
    made = get_peft_model(copy.deepcopy(model), config)
    return made.peft_config["default"], get_peft_model_state_dict(made)


def memory(count: int = 10_000) -> dict[str, Any]:
    """What `count` adapters take in the process, beyond the base and the frozen maps."""
    model = smollm()
    config = LoLDUConfig(r=64, target_modules="all-linear", normalize_directions=True, init_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        made = get_peft_model(model, config)
        made.save_pretrained(folder)
        numbers = sum(core.numel() for core in made.parameters() if core.requires_grad)
        made.unload()
        many = ManyAdapters(model)
        many.add("first", folder)
        before, start = psutil.Process().memory_info().rss, time.process_time()
        for number in range(count):
            many.add(f"a{number}", folder)
        seconds = time.process_time() - start
        grown = psutil.Process().memory_info().rss - before
    return {
        "adapters": count,
        "numbers_each": numbers,
        "process_grew_bytes": grown,
        "bytes_over_numbers": grown / (count * numbers * 4),
        "table_bytes_over_numbers": many.memory()["tables"] / (count * numbers * 4),
        "maps_bytes": many.memory()["maps"],
        "folders_per_cpu_second": count / seconds,
    }


def loading(count: int = 300) -> dict[str, Any]:
    """Folders a second through the engine, which checks each file; on a base of 135M numbers, with 30 layers."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder, base = Path(place), Path(place) / "base"
        model = smollm()
        model.save_pretrained(base)
        AutoTokenizer.from_pretrained(TINY).save_pretrained(base)
        config = LoLDUConfig(r=64, target_modules="all-linear", normalize_directions=True, init_weights=False)
        get_peft_model(model, config).save_pretrained(folder / "a")
        engine, _ = load_engine(str(base), cache_bytes=500_000_000, running=4, batch_tokens=32)
        start = time.process_time()
        engine.add_adapter("first", folder / "a")
        found["first_of_its_kind_cpu_s"] = time.process_time() - start
        start = time.process_time()
        for number in range(count):
            engine.add_adapter(f"a{number}", folder / "a")
        found["folders_per_cpu_second"] = count / (time.process_time() - start)
        engine.start()
        engine.add_adapter("new", folder / "a")
        found["new_adapter_to_first_token_s"] = first_token(engine, "new")
        engine.stop(0)
    return found


def first_token(engine: Any, model: str) -> float:
    done, start = threading.Event(), time.perf_counter()
    engine.submit(Request("first", model, (5, 6, 7), Sampling(1)), lambda token: done.set())
    done.wait()
    return time.perf_counter() - start


def passes(rounds: int = ROUNDS) -> dict[str, Any]:
    """CPU seconds of a forward pass of 16 rows of one token."""
    model = smollm()
    config, tensors = one_adapter(model, r=64)
    many = ManyAdapters(model)
    for number in range(1000):
        many.add_tensors(f"a{number}", config, tensors)
    lora = get_peft_model(smollm(), LoraConfig(r=16, target_modules="all-linear"), adapter_name="l0").eval()
    for number in range(1, ROWS):
        lora.add_adapter(f"l{number}", LoraConfig(r=16, target_modules="all-linear"))
    ids = torch.randint(1000, (ROWS, 1), generator=torch.Generator().manual_seed(0))

    def ours(names: list[str | None]) -> Callable[[], Any]:
        def run() -> None:
            with many.rows(names) if any(names) else nullcontext():
                model(ids, use_cache=False)

        return run

    contenders = {
        "base": ours([None] * ROWS),
        "one adapter": ours(["a0"] * ROWS),
        "16 of 1,000": ours([f"a{61 * row}" for row in range(ROWS)]),
        "PEFT LoRA, one": lambda: lora(ids, use_cache=False),
        "PEFT LoRA, mixed 16": lambda: lora(ids, use_cache=False, adapter_names=[f"l{row}" for row in range(ROWS)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for run in contenders.values():
            run()
        for _ in range(rounds):
            for name, run in contenders.items():
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    pairs = {
        "mixed / one": ("16 of 1,000", "one adapter"),
        "LoRA mixed / LoRA one": ("PEFT LoRA, mixed 16", "PEFT LoRA, one"),
        "mixed / LoRA mixed": ("16 of 1,000", "PEFT LoRA, mixed 16"),
    }
    ratios = {
        name: median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
        for name, (one, other) in pairs.items()
    }
    return {"seconds": {name: median(each) for name, each in seconds.items()}, "ratios": ratios}


def serving(rounds: int = 5, requests: int = 64, tokens: int = 32) -> dict[str, Any]:
    """Tokens a CPU second of the engine with many adapters and with one."""
    config, tensors = one_adapter(AutoModelForCausalLM.from_pretrained(TINY), r=64)
    engine, _ = load_engine(str(TINY), cache_bytes=300_000_000)
    for number in range(1000):
        engine.many.add_tensors(f"a{number}", config, tensors)
    engine.start()
    prompt = tuple(range(5, 25))

    def run(names: list[str]) -> tuple[float, float]:
        left, before, start = threading.Semaphore(0), dict(engine.stats()), time.process_time()
        for number, name in enumerate(names):
            sampling = Sampling(tokens, temperature=30.0, seed=number)  # so that hardly any ends early
            engine.submit(
                Request(f"r{number}", name, prompt, sampling), lambda token: left.release() if token.finish else None
            )
        for _ in names:
            left.acquire()
        seconds, after = time.process_time() - start, engine.stats()
        made = after["tokens"] - before["tokens"]
        return made / seconds, after["forward_passes"] - before["forward_passes"]

    loads = {"base": [engine.base_id] * requests, "one adapter": ["a0"] * requests,
             "64 of 1,000": [f"a{15 * number}" for number in range(requests)]}  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in loads}
    for names in loads.values():
        run(names)
    for _ in range(rounds):
        for name, names in loads.items():
            found[name].append(run(names))
    engine.stop(0)
    mixed, one = (median(rate for rate, _ in found[name]) for name in ("64 of 1,000", "one adapter"))
    return {
        "tokens_per_cpu_second": {name: median(rate for rate, _ in each) for name, each in found.items()},
        "forward_passes": {name: median(count for _, count in each) for name, each in found.items()},
        "mixed / one": median(a / b for (a, _), (b, _) in zip(found["64 of 1,000"], found["one adapter"], strict=True)),
        "mixed": mixed,
        "one": one,
    }


def training() -> dict[str, Any]:
    """64 adapters, each with its own samples and losses: a row of a table each, and one after the other."""
    return {f"batches of {rows}": trained(rows=rows) for rows in (1, 4)}


def trained(rows: int, count: int = 64, steps: int = 8, rate: float = 3e-2) -> dict[str, Any]:
    """Seconds and losses of both ways; rows: samples of an adapter in each step."""
    config = LoLDUConfig(r=16, target_modules="all-linear", normalize_directions=True)
    samples = token_ids(count * steps * rows).view(steps, count, rows, -1)
    names = [f"t{number}" for number in range(count)]

    model = AutoModelForCausalLM.from_pretrained(TINY)
    many = ManyAdapters(model)
    table = many.create(names, config).table
    optimizer, together = torch.optim.AdamW([table], lr=rate, weight_decay=0), []
    start = time.process_time()
    for step in range(steps):
        with many.rows([name for name in names for _ in range(rows)]):
            logits = model(samples[step].flatten(0, 1), use_cache=False).logits
        losses = each_loss(logits.unflatten(0, (count, rows)), samples[step])
        losses.sum().backward()  # a row's gradient is that of its own loss
        optimizer.step()
        optimizer.zero_grad()
        together.append(losses.detach())
    seconds_together = time.process_time() - start

    alone_model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), copy.deepcopy(config))
    cores = [parameter for parameter in alone_model.parameters() if parameter.requires_grad]
    alone = torch.empty(steps, count)
    start = time.process_time()
    for number in range(count):
        with torch.no_grad():
            for core in cores:
                core.zero_()
        optimizer = torch.optim.AdamW(cores, lr=rate, weight_decay=0)
        for step in range(steps):
            ids = samples[step, number]
            loss = each_loss(alone_model(ids, use_cache=False).logits[None], ids[None])[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            alone[step, number] = loss.detach()
    seconds_alone = time.process_time() - start
    curves = torch.stack(together)
    return {
        "seconds_together": seconds_together,
        "seconds_one_after_the_other": seconds_alone,
        "speed_up": seconds_alone / seconds_together,
        "largest_difference_of_losses": float((curves - alone).abs().max()),
        "mean_loss_first_and_last": [float(curves[0].mean()), float(curves[-1].mean())],
    }


def token_ids(count: int, length: int = 48) -> Tensor:
    """Samples of the embedded data, cut or filled to one length (count, length)."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    records = json.loads((TINY.parent / "instructions" / "train.json").read_text())
    texts = [f"{each['instruction']} {each['input']} {each['output']}\n" for each in records]
    ids = [token for text in texts * (1 + count * length // 20_000) for token in tokenizer.encode(text)]
    return torch.tensor((ids * (1 + count * length // len(ids)))[: count * length]).view(count, length)


def each_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean loss of each adapter: logits (adapters, rows, tokens, vocabulary), ids (adapters, rows, tokens)."""
    found = F.cross_entropy(logits[:, :, :-1].flatten(0, 2), ids[:, :, 1:].flatten(), reduction="none")
    return found.view(len(ids), -1).mean(1)


def show(found: dict[str, Any]) -> None:
    table = Table("section", "measured", "value")
    for section, values in found.items():
        flat = {name: each for name, each in values.items() if not isinstance(each, dict)}
        for group, inner in values.items():
            if isinstance(inner, dict):
                flat |= {f"{group}: {name}": each for name, each in inner.items()}
        for name, each in flat.items():
            table.add_row(section, name, f"{each:.4g}" if isinstance(each, (int, float)) else str(each))
    Console().print(table)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    options.add_argument("--output", type=Path, default=RESULTS)
    given = options.parse_args()
    sections = given.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        options.error(f"--only {','.join(sorted(unknown))} is unknown: give {', '.join(SECTIONS)}")
    torch.manual_seed(0)
    found = {}
    for section in sections:
        found[section] = globals()[section]()
        show({section: found[section]})
    before = json.loads(given.output.read_text()) if given.output.exists() else {}
    for section in sections:
        found[section]["about"] = about(ROUNDS, "many adapters of one base in one batch")
    result = {section: (before | found)[section] for section in SECTIONS if section in before | found}
    given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
