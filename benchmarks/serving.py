"""Load on `loldu serve`: 200 requests at once over 64 adapters of 1,000, through HTTP and the openai client.

    python benchmarks/serving.py [--requests 200 --used 64 --loaded 1000 --many 10000]   # ten minutes on two cores

The base is the embedded model, or --model DIR; adapters are LoLDU with random cores. Measured, each part printed when
it is done (--parts chooses): that every answer is the one PEFT gives with that adapter alone (greedy); tokens per
second over many adapters and over one, in turn, and their ratio (by the clock, and by the server's CPU time); tokens
per forward pass; PEFT's own mixed batch of LoRA adapters; an adapter that is deleted while it answers; kill -9 and a
restart; and with --many adapters their load rate, memory, and the time of a new one's first answer. Server and client
share the machine's cores.

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
PARTS = ("throughput", "peft_lora", "deleted", "killed", "many")
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
        self.ready_s = time.perf_counter() - self.began
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
        return self.process.wait(60)


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
        generator = torch.Generator().manual_seed(i)
        for name in cores:
            tensors[name] = scale * torch.randn(tensors[name].shape, generator=generator)
        place = folder / f"u{i:05}"
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
    from launcher.inference.sources import attach
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


def throughput(server: Server, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same questions to many adapters and to one, in turn."""
    texts = questions(options.requests)
    mixed = [(f"u{i % options.used * (options.loaded // options.used):05}", text) for i, text in enumerate(texts)]
    single = [("u00000", text) for text in texts]
    asyncio.run(load(server.url, mixed[:50], options.max_tokens))  # warm
    rates: dict[str, list[float]] = {"mixed": [], "single": []}
    by_cpu: dict[str, list[float]] = {"mixed": [], "single": []}
    found: dict[str, list[Any]] = {}
    passes: dict[str, Any] = {}
    for _ in range(options.repeats):
        for kind, asked in (("mixed", mixed), ("single", single)):
            before, cpu_s = server.metrics(), server.cpu_s()
            answers, seconds = asyncio.run(load(server.url, asked, options.max_tokens))
            cpu_s, after = server.cpu_s() - cpu_s, server.metrics()
            lost = [each for each in answers if not isinstance(each, tuple)]
            assert not lost, f"{len(lost)} of {len(asked)} requests have no answer: {lost[0]}"
            rates[kind].append(sum(tokens for _, tokens in answers) / seconds)
            by_cpu[kind].append(sum(tokens for _, tokens in answers) / cpu_s)
            found[kind] = [text for text, _ in answers]
            passes[kind] = after["loldu_engine_forward_passes"] - before["loldu_engine_forward_passes"]
            passes[kind + "_tokens"] = sum(tokens for _, tokens in answers)
    told, _ = asyncio.run(load(server.url, mixed, options.max_tokens, tokens=True))
    compared = compare(options.model, folder, mixed, [tokens for tokens, _ in told], options.max_tokens)
    median = {kind: statistics.median(values) for kind, values in rates.items()}
    cpu = {kind: statistics.median(values) for kind, values in by_cpu.items()}
    return {
        "requests": len(mixed), "adapters": options.used, "loaded": options.loaded, "as_alone": compared,
        "different_answers": len(set(found["mixed"])), "tokens_per_s": rates, "median_tokens_per_s": median,
        "mixed_over_single": median["mixed"] / median["single"], "tokens_per_cpu_s": by_cpu,
        "mixed_over_single_by_cpu": cpu["mixed"] / cpu["single"], "forward_passes": passes["mixed"],
        "tokens_of_answers": passes["mixed_tokens"],
        "tokens_per_pass": passes["mixed_tokens"] / passes["mixed"],
    }  # fmt: skip


def peft_lora(model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of PEFT's generate in batches of 50: `used` LoRA adapters by adapter_names, and one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from launcher.models.files import load_tokenizer

    torch.set_num_threads(1)
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    loaded = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config, "u0")
    for i in range(1, options.used):
        loaded.add_adapter(f"u{i}", config)
    loaded.eval()
    tokenizer = load_tokenizer(model)
    tokenizer.padding_side = "left"
    texts = [f"### Instruction:\n{text}\n### Response:\n" for text in questions(options.requests)]

    def generate(names: list[str] | None) -> float:
        began, made = time.perf_counter(), 0
        for start in range(0, len(texts), 50):
            batch = tokenizer(texts[start : start + 50], return_tensors="pt", padding=True)
            chosen = {} if names is None else {"adapter_names": names[start : start + 50]}
            with torch.no_grad():
                ids = loaded.generate(**batch, max_new_tokens=options.max_tokens, do_sample=False, **chosen)
            new = ids[:, batch["input_ids"].shape[1] :]
            made += int((new != tokenizer.pad_token_id).sum())
        return made / (time.perf_counter() - began)

    mixed = generate([f"u{i % options.used}" for i in range(len(texts))])
    loaded.set_adapter("u0")
    single = generate(None)
    return {"mixed_tokens_per_s": mixed, "single_tokens_per_s": single, "mixed_over_single": mixed / single}


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


def killed(server: Server, options: argparse.Namespace, adapters: Path) -> tuple[dict[str, Any], Server]:
    """kill -9 under load, then the same command again."""
    asked = [("u00001", text) for text in questions(20)]
    before, _ = asyncio.run(load(server.url, asked, options.max_tokens))

    async def run() -> list[Any]:
        work = asyncio.create_task(load(server.url, asked * 5, 200))
        await asyncio.sleep(0.5)
        server.stop(signal.SIGKILL)
        return (await work)[0]

    failed = sum(not isinstance(each, tuple) for each in asyncio.run(run()))
    again = Server(options.model, adapters, port=int(server.url.rpartition(":")[2]))
    after, _ = asyncio.run(load(again.url, asked, options.max_tokens))
    return {"requests_cut": failed, "ready_again_s": again.ready_s, "same_answers": before == after}, again


def many(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Load --many adapters: rate, memory of each, and the first answer of one that is new."""
    folder = work / "many"
    folder.mkdir()
    none = Server(options.model, folder)
    empty_s, empty_bytes = none.ready_s, none.rss_bytes()
    none.stop()
    numbers = make_adapters(options.model, folder, options.many, options.rank, options.scale)
    server = Server(options.model, folder)
    metrics = server.metrics()
    (work / "late").mkdir()
    make_adapters(options.model, work / "late", 1, options.rank, 10 * options.scale)
    shutil.copytree(work / "late" / "u00000", folder / ".late")
    began = time.perf_counter()
    (folder / ".late").rename(folder / "late")
    body = json.dumps({"name": "late"}).encode()
    request = urllib.request.Request(f"{server.url}/v1/adapters", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).read()
    loaded_s = time.perf_counter() - began
    asyncio.run(load(server.url, [("late", "Reverse the word abc.")], 1))
    first_s = time.perf_counter() - began
    bytes_each = metrics["loldu_engine_adapter_bytes"] / options.many
    found = {
        "adapters": metrics["loldu_adapters"], "numbers_each": numbers, "bytes_each": bytes_each,
        "over_its_numbers": bytes_each / (4 * numbers), "ready_s": server.ready_s, "ready_without_s": empty_s,
        "loads_per_s": options.many / server.loaded_s,
        "process_bytes_each": (server.rss_bytes() - empty_bytes) / options.many,
        "new_adapter_loaded_s": loaded_s, "new_adapter_first_token_s": first_s,
    }  # fmt: skip
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
    found |= {"model": str(options.model), "date": datetime.now(UTC).isoformat(timespec="seconds")}

    def report(name: str, value: Any) -> None:
        found[name] = value
        print(f"{name}: {json.dumps(value, indent=2)}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = work / "adapters"
        folder.mkdir()
        if {"throughput", "deleted", "killed"} & set(options.parts):
            make_adapters(options.model, folder, options.loaded, options.rank, options.scale)
            server = Server(options.model, folder)
            if "throughput" in options.parts:
                report("throughput", throughput(server, options, folder))
            if "deleted" in options.parts:
                report("deleted", deleted_while_answering(server, options, folder))
            if "killed" in options.parts:
                result, server = killed(server, options, folder)
                report("killed", result)
            report("exit_code", server.stop())
        if "peft_lora" in options.parts:
            report("peft_lora", peft_lora(options.model, options))
        if "many" in options.parts:
            report("many", many(options, work))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPO)
    found["commit"] = commit.stdout.strip()
    options.results.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    main()
