"""Load on `loldu serve`: 200 requests at once over 64 adapters of 1,000, through HTTP and the openai client.

    python benchmarks/serving.py [--requests 200 --used 64 --loaded 1000 --many 10000]   # ten minutes on two cores

The base is the embedded model, or --model DIR; adapters are LoLDU with random cores. Each part is printed and written
when it is done; --parts chooses:

throughput   every answer is the one PEFT gives with that adapter alone (greedy); tokens per second over many adapters
             and over one, in turn, by the clock and by the server's CPU time; tokens per forward pass
deleted      an adapter is deleted while it answers
lora_served  the same requests to as many LoRA adapters served by the same process, and to one
peft_lora    PEFT's own mixed batch of LoRA adapters, without a server
many         memory, load rate and first answer of a new one with --many adapters, on a base of SmolLM2-135M's shape

A ratio is the median over rounds, in which both loads run one after the other. Server and client share the machine's
cores, and the machine is shared: compare CPU seconds. benchmarks/serving_kills.py kills the server.

An answer that differs from PEFT's counts as a tie if PEFT's own two likeliest tokens at that place are closer than
TIE: random cores make flat distributions, and a packed batch rounds sums in another order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULT = REPO / "benchmarks" / "results" / "serving.json"
TINY = REPO / "recipes" / "tiny" / "model"
TIE = 1e-3  # in logits of about 10
PARTS = ("throughput", "deleted", "lora_served", "peft_lora", "many")
LORA_RANK = 16
DISTINCT = 1000  # adapters with numbers of their own; of more than that, the others are links to their files
QUESTIONS = (
    "Turn small letters into capitals. {}",
    "Reverse the word {}.",
    "What comes after {}?",
    "Sort the letters. {}",
)


class Server:
    """`loldu serve` in a separate process."""

    def __init__(self, model: Path, adapters: Path, port: int = 0):
        self.began = time.perf_counter()
        command = [sys.executable, "-m", "launcher", "serve", str(model), "--adapters", str(adapters)]
        command += ["--port", str(port), "--no-log-requests", "--queue", "1000", "--prompt-template", "short"]
        environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        while not any(" at http://" in line for line in self.said):
            if self.process.poll() is not None:
                raise SystemExit("the server ended:\n" + "".join(self.said))
            time.sleep(0.01)
        self.ready_s, self.cpu_started_s = time.perf_counter() - self.began, self.cpu_s()
        self.loaded_s = next(
            float(found[1]) for line in self.said if (found := re.search(r"adapters \(loaded in ([\d.]+) s\)", line))
        )
        self.url = next(found[1] for line in self.said if (found := re.search(r" at (http://\S+)", line)))

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(600)  # the machine may be busy


def make_adapters(model: Path, folder: Path, count: int, rank: int, scale: float) -> int:
    """Write LoLDU adapters with random cores; returns the numbers of one."""
    import torch
    from peft import get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from adapters import LoLDUConfig

    config = LoLDUConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    first = folder / "u00000"
    peft_model.save_pretrained(first)
    tensors = load_file(first / "adapter_model.safetensors")
    cores = [name for name in tensors if name.endswith("core")]
    for i in range(count):
        place = folder / f"u{i:05}"
        if i >= DISTINCT:
            place.mkdir()
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                os.link(folder / f"u{i % DISTINCT:05}" / file, place / file)
            continue
        generator = torch.Generator().manual_seed(i)
        for name in cores:
            tensors[name] = scale * torch.randn(tensors[name].shape, generator=generator)
        place.mkdir(exist_ok=True)
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        if i:
            shutil.copy(first / "adapter_config.json", place)
    return sum(tensors[name].numel() for name in cores)


def questions(count: int) -> list[str]:
    dice = random.Random(0)
    return [dice.choice(QUESTIONS).format("".join(dice.choices("abcdefghijk", k=5))) for _ in range(count)]


def compare(
    model: Path, folder: Path, asked: list[tuple[str, str]], answers: list[list[str]], max_tokens: int
) -> dict[str, int]:
    """How many answers are those that PEFT gives with each adapter loaded by itself: no code of the server's engine.

    answers are texts of tokens: bytes that are no UTF-8 decode differently one by one and together.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from launcher.data.templates import load_template, prompt_ids
    from launcher.inference.adapter_folder import attach
    from launcher.models.files import load_tokenizer
    from launcher.models.generation import answer
    from launcher.serving.answers import TokenTexts

    tokenizer = load_tokenizer(model)
    template, text = load_template("short", tokenizer, conversations=False), TokenTexts(tokenizer)
    found = {"equal": 0, "ties": 0, "wrong": 0}
    for name in sorted({name for name, _ in asked}):
        loaded = attach(AutoModelForCausalLM.from_pretrained(model), folder / name).eval()
        places = [place for place, (other, _) in enumerate(asked) if other == name]
        records = [{"instruction": asked[place][1], "input": "", "output": ""} for place in places]
        prompts = [prompt_ids(each, template, tokenizer) for each in records]
        for place, prompt, ids in zip(places, prompts, answer(loaded, tokenizer, prompts, max_tokens), strict=True):
            if (alone := [text(token) for token in ids]) == answers[place]:
                found["equal"] += 1
                continue
            pairs = enumerate(zip(alone, answers[place], strict=False))
            same = next((at for at, (a, b) in pairs if a != b), min(len(alone), len(answers[place])))
            with torch.no_grad():
                two = loaded(input_ids=torch.tensor([prompt + ids[:same]])).logits[0, -1].topk(2).values
            found["ties" if float(two[0] - two[1]) < TIE else "wrong"] += 1
    return found


async def load(
    url: str, asked: list[tuple[str, str]], max_tokens: int, *, tokens: bool = False
) -> tuple[list[Any], float]:
    """All requests at once: the answers (text or its tokens, and their number; or the error), and the seconds."""
    import httpx2
    from openai import APIError, AsyncOpenAI

    connections = httpx2.Limits(max_connections=None)
    http = httpx2.AsyncClient(limits=connections, timeout=600)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0) as client:

        async def one(model: str, question: str) -> Any:
            messages: Any = [{"role": "user", "content": question}]
            try:
                answer = await client.chat.completions.create(
                    model=model, messages=messages, temperature=0, max_tokens=max_tokens, logprobs=tokens
                )
            except APIError as error:
                return error
            assert answer.usage is not None
            choice = answer.choices[0]
            if tokens:
                assert choice.logprobs is not None
                return [each.token for each in choice.logprobs.content or ()], answer.usage.completion_tokens
            return choice.message.content, answer.usage.completion_tokens

        began = time.perf_counter()
        answers = await asyncio.gather(*(one(*each) for each in asked))
        return list(answers), time.perf_counter() - began


def in_turn(server: Server, loads: dict[str, list[tuple[str, str]]], options: argparse.Namespace) -> dict[str, Any]:
    """Two loads in turn, the other one first in every second round: their rates, and the ratios of the rounds."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    texts = {}
    for number in range(options.repeats):
        for name in [*loads][:: -1 if number % 2 else 1]:
            before, cpu_s = server.metrics(), server.cpu_s()
            answers, seconds = asyncio.run(load(server.url, loads[name], options.max_tokens))
            cpu_s, after = server.cpu_s() - cpu_s, server.metrics()
            lost = [each for each in answers if not isinstance(each, tuple)]
            assert not lost, f"{len(lost)} of {len(answers)} requests have no answer: {lost[0]}"
            tokens = sum(tokens for _, tokens in answers)
            passes = after["loldu_engine_forward_passes"] - before["loldu_engine_forward_passes"]
            rounds[name].append(
                {"tokens": tokens, "forward_passes": passes, "tokens_per_s": tokens / seconds,
                 "tokens_per_cpu_s": tokens / cpu_s, "load_average": os.getloadavg()[0]}
            )  # fmt: skip
            texts[name] = [text for text, _ in answers]
    return {"rounds": rounds, "texts": texts}


def ratio(rounds: dict[str, list[dict[str, float]]], above: str, below: str, rate: str) -> dict[str, float]:
    """Of two loads' rates, over the rounds."""
    found = sorted(a[rate] / b[rate] for a, b in zip(rounds[above], rounds[below], strict=True))
    return {"median": statistics.median(found), "least": found[0], "largest": found[-1]}


def ratios(rounds: dict[str, list[dict[str, float]]], above: str, below: str) -> dict[str, Any]:
    rates = {"by_cpu_time": "tokens_per_cpu_s", "by_the_clock": "tokens_per_s"}
    return {name: ratio(rounds, above, below, rate) for name, rate in rates.items()}


def throughput(server: Server, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same questions to many adapters and to one, in turn."""
    texts = questions(options.requests)
    mixed = [(f"u{i % options.used * (options.loaded // options.used):05}", text) for i, text in enumerate(texts)]
    single = [("u00000", text) for text in texts]
    asyncio.run(load(server.url, mixed[:50], options.max_tokens))  # warm
    found = in_turn(server, {"mixed": mixed, "single": single}, options)
    told, _ = asyncio.run(load(server.url, mixed, options.max_tokens, tokens=True))
    last = found["rounds"]["mixed"][-1]
    return {
        "requests": len(mixed), "adapters": options.used, "loaded": options.loaded,
        "as_alone": compare(options.model, folder, mixed, [tokens for tokens, _ in told], options.max_tokens),
        "different_answers": len(set(found["texts"]["mixed"])),
        "mixed_over_single": ratios(found["rounds"], "mixed", "single"),
        "tokens_per_pass": last["tokens"] / last["forward_passes"], "rounds": found["rounds"],
    }  # fmt: skip


def lora_config(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def lora_served(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The server with ordinary LoRA adapters beside ours: the same requests to many and to one of each kind.

    All adapters are zero, so that every load has the same answers and its cost alone differs.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    folder = work / "both"
    folder.mkdir()
    make_adapters(options.model, folder, options.used, options.rank, 0.0)
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), lora_config())
    for i in range(options.used):
        made.save_pretrained(folder / f"l{i:05}")
    server = Server(options.model, folder)
    texts = questions(options.requests)
    loads = {
        "loldu_mixed": [(f"u{i % options.used:05}", text) for i, text in enumerate(texts)],
        "loldu_single": [("u00000", text) for text in texts],
        "lora_mixed": [(f"l{i % options.used:05}", text) for i, text in enumerate(texts)],
        "lora_single": [("l00000", text) for text in texts],
    }
    asyncio.run(load(server.url, loads["lora_mixed"][:50] + loads["loldu_mixed"][:50], options.max_tokens))  # warm
    rounds = in_turn(server, loads, options)["rounds"]
    server.stop()
    pairs = (("loldu_mixed", "loldu_single"), ("lora_mixed", "lora_single"), ("lora_mixed", "loldu_mixed"))
    return {
        "adapters_of_each_kind": options.used, "lora_rank": LORA_RANK, "requests": len(texts),
        **{f"{above}_over_{below}": ratios(rounds, above, below) for above, below in pairs}, "rounds": rounds,
    }  # fmt: skip


def peft_lora(options: argparse.Namespace) -> dict[str, Any]:
    """PEFT's generate in batches of 50: `used` LoRA adapters (zero) by adapter_names, and one, in turn."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from launcher.models.files import load_tokenizer

    torch.set_num_threads(1)
    config = lora_config()
    loaded = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), config, "u0")
    for i in range(1, options.used):
        loaded.add_adapter(f"u{i}", config)
    loaded.eval()
    tokenizer = load_tokenizer(options.model)
    tokenizer.padding_side = "left"
    texts = [f"### Instruction:\n{text}\n### Response:\n" for text in questions(options.requests)]
    mixed = [f"u{i % options.used}" for i in range(len(texts))]
    loaded.set_adapter("u0")

    def generate(names: list[str] | None) -> dict[str, float]:
        began, began_cpu, made = time.perf_counter(), time.process_time(), 0
        for start in range(0, len(texts), 50):
            batch = tokenizer(texts[start : start + 50], return_tensors="pt", padding=True)
            chosen = {} if names is None else {"adapter_names": names[start : start + 50]}
            with torch.no_grad():
                ids = loaded.generate(**batch, max_new_tokens=options.max_tokens, do_sample=False, **chosen)
            made += int((ids[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())
        cpu_s, seconds = time.process_time() - began_cpu, time.perf_counter() - began
        return {"tokens": made, "tokens_per_s": made / seconds, "tokens_per_cpu_s": made / cpu_s}

    rounds: dict[str, list[dict[str, float]]] = {"mixed": [], "single": []}
    for _ in range(min(options.repeats, 2)):
        rounds["mixed"].append(generate(mixed))
        rounds["single"].append(generate(None))
    return {
        "adapters": options.used, "lora_rank": LORA_RANK, "requests": len(texts),
        "mixed_over_single": ratios(rounds, "mixed", "single"), "rounds": rounds,
    }  # fmt: skip


def deleted_while_answering(server: Server, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Delete one adapter while 64 answer; its answers end with an error, the others are what they are alone."""
    texts = questions(64)
    asked = [(f"u{i % 8:05}", text) for i, text in enumerate(texts)]

    async def run() -> list[Any]:
        work = asyncio.create_task(load(server.url, asked, 200, tokens=True))
        while (await asyncio.to_thread(server.metrics))["loldu_engine_running"] < 16 and not work.done():
            await asyncio.sleep(0.02)
        request = urllib.request.Request(f"{server.url}/v1/adapters/u00003", method="DELETE")
        await asyncio.to_thread(lambda: urllib.request.urlopen(request).read())
        return (await work)[0]

    answers = asyncio.run(run())
    gone = [each for (name, _), each in zip(asked, answers, strict=True) if name == "u00003"]
    kept = [(each, answer) for each, answer in zip(asked, answers, strict=True) if each[0] != "u00003"]
    lost = sum(not isinstance(answer, tuple) for _, answer in kept)
    whole = [(each, answer[0]) for each, answer in kept if isinstance(answer, tuple)]
    compared = compare(options.model, folder, [each for each, _ in whole], [text for _, text in whole], 200)
    ended = [each for each in gone if not isinstance(each, tuple)]
    return {
        "its_answers_that_ended_before": len(gone) - len(ended),
        "its_answers_with_an_error": len(ended),
        "errors": sorted({f"{getattr(each, 'status_code', '')} {getattr(each, 'code', '')}" for each in ended}),
        "others_lost": lost,
        "others_as_alone": compared,
    }


def smollm_shape(folder: Path) -> Path:
    """A Llama of SmolLM2-135M's shape with random weights, written as a checkpoint."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def many(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Load --many adapters: rate, memory of each, and the first answer of one that is new."""
    model, folder = smollm_shape(work / "base"), work / "many"
    folder.mkdir()
    numbers = make_adapters(model, folder, 1, options.rank, options.scale)
    one = Server(model, folder)  # with one, since the frozen maps are in memory once
    one_bytes, maps_bytes = one.rss_bytes(), one.metrics()["loldu_engine_adapter_bytes"]
    one.stop()
    shutil.rmtree(folder / "u00000")
    make_adapters(model, folder, options.many, options.rank, options.scale)
    server = Server(model, folder)
    metrics = server.metrics()
    found = {
        "model": "Llama of SmolLM2-135M's shape, random weights", "adapters": metrics["loldu_adapters"],
        "numbers_each": numbers, "numbers_bytes_each": 4 * numbers,
        "table_over_its_numbers": (metrics["loldu_engine_adapter_bytes"] - maps_bytes) / (options.many * 4 * numbers),
        "process_over_its_numbers": (server.rss_bytes() - one_bytes) / (options.many * 4 * numbers),
        "loaded_s": server.loaded_s, "loads_per_s": options.many / server.loaded_s,
        "start_cpu_s": server.cpu_s(), "start_cpu_s_with_one": one.cpu_started_s,
        "loads_per_cpu_s": options.many / (server.cpu_started_s - one.cpu_started_s),
    }  # fmt: skip
    make_adapters(model, work / "late", 2, options.rank, 2 * options.scale)
    began = time.perf_counter()
    (work / "late" / "u00000").rename(folder / "late")
    request = urllib.request.Request(
        f"{server.url}/v1/adapters", json.dumps({"name": "late"}).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).read()
    found["new_adapter_loaded_by_post_s"] = time.perf_counter() - began
    answers, _ = asyncio.run(load(server.url, [("late", "Reverse the word abc.")], 1))
    found["new_adapter_first_token_s"] = time.perf_counter() - began
    assert isinstance(answers[0], tuple), answers
    began = time.perf_counter()
    (work / "late" / "u00001").rename(folder / "watched")
    while server.metrics()["loldu_adapters"] < options.many + 2:
        time.sleep(0.05)
    found["new_adapter_found_by_watching_s"] = time.perf_counter() - began
    found["load_average"] = os.getloadavg()[0]
    server.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="base model (folder)")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--used", type=int, default=64, help="adapters that are asked")
    parser.add_argument("--loaded", type=int, default=1000, help="adapters that are loaded")
    parser.add_argument("--many", type=int, default=10_000, help="adapters of the memory test; 0 leaves it out")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--scale", type=float, default=0.3, help="size of the random cores")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, Any] = json.loads(options.results.read_text()) if options.results.is_file() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPO)

    def report(name: str, value: dict[str, Any]) -> None:
        model = options.model.relative_to(REPO) if options.model.is_relative_to(REPO) else options.model
        about = {"model": str(model), "date": datetime.now(UTC).isoformat(timespec="seconds"),
                 "commit": commit.stdout.strip(), "cores": os.cpu_count()}  # fmt: skip
        found[name] = about | value
        print(f"{name}: {json.dumps(found[name], indent=2)}", flush=True)
        options.results.write_text(json.dumps(found, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = work / "adapters"
        folder.mkdir()
        if {"throughput", "deleted"} & set(options.parts):
            make_adapters(options.model, folder, options.loaded, options.rank, options.scale)
            server = Server(options.model, folder)
            if "throughput" in options.parts:
                report("throughput", throughput(server, options, folder))
            if "deleted" in options.parts:
                report("deleted", deleted_while_answering(server, options, folder))
            assert server.stop() == 0
        if "lora_served" in options.parts:
            report("lora_served", lora_served(options, work))
        if "peft_lora" in options.parts:
            report("peft_lora", peft_lora(options))
        if "many" in options.parts:
            report("many", many(options, work))


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    main()
