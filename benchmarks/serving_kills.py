"""Kill `loldu serve` again and again, start it again, and check that nothing is lost, mixed up or left behind.

    python benchmarks/serving_kills.py [--kills 20 --seed 0]        # about ten minutes on two shared cores

Each life of the server ends with kill -9 at a seeded random moment: while it starts, under 60 requests (half of them
streamed) to 8 adapters, or while an adapter is loaded by POST, replaced, or half copied into the watched folder. Then
the same command is started on the same port. After each start

- every adapter answers a fixed question as before the first kill, and the half copied one is not served;
- the folder of adapters and the folder for temporary files (TMPDIR) hold exactly what they held;
- requests that were cut ended with an error at the client: no stream that was cut ends with [DONE].

Adapters are LoLDU with random cores on the embedded model. Writes benchmarks/results/serving_kills.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving import REPO, TINY, Server, make_adapters, questions

RESULT = REPO / "benchmarks" / "results" / "serving_kills.json"
USED, REQUESTS = 8, 60
MOMENTS = ("starting", "answering", "loading", "replacing", "half copied")


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def known_answers(url: str) -> dict[str, str]:
    """The greedy answer of each model to one question; they differ."""
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        models = [model["id"] for model in json.load(response)["data"]]
    messages = [{"role": "user", "content": "Reverse the word stone."}]
    fields = {"messages": messages, "temperature": 0, "max_tokens": 24}
    answers = {model: post(url, "/v1/chat/completions", {"model": model, **fields}) for model in models}
    return {model: answer["choices"][0]["message"]["content"] for model, answer in answers.items()}


async def cut_load(url: str, cut: threading.Event) -> Counter[str]:
    """Many requests at once until the server is gone: how each ended. Sets `cut` when the first answer has begun."""
    import httpx2

    async def one(client: Any, number: int, text: str) -> str:
        stream = number % 2 == 1
        body = {"model": f"u{number % USED:05}", "messages": [{"role": "user", "content": text}], "max_tokens": 200,
                "temperature": 1, "seed": number, "stream": stream}  # fmt: skip
        got = b""
        try:
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                async for piece in response.aiter_bytes():
                    cut.set()
                    got += piece
        except httpx2.HTTPError:
            assert b"[DONE]" not in got, "a stream that was cut claims to be whole"
            return "cut"
        if stream:
            return "whole" if got.endswith(b"data: [DONE]\n\n") else "cut without an error"
        return "whole" if json.loads(got)["choices"][0]["finish_reason"] else "cut without an error"

    async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None), timeout=600) as client:
        ended = await asyncio.gather(*(one(client, n, text) for n, text in enumerate(questions(REQUESTS))))
    return Counter(ended)


def cut_load_in_thread(url: str, begun: threading.Event, found: list[Counter[str]]) -> None:
    found.append(asyncio.run(cut_load(url, begun)))


def files_of(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its size."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def act(moment: str, server: Server, folder: Path, spare: Path) -> None:
    """What happens to the adapters just before the kill; returns at once."""
    with contextlib.suppress(OSError):
        if moment == "loading":
            shutil.copytree(spare, folder / "late")
            threading.Thread(target=attempt, args=(server.url, "late"), daemon=True).start()
        elif moment == "replacing":
            file = folder / "u00001" / "adapter_model.safetensors"
            shutil.copy(file, folder / ".new")
            (folder / ".new").rename(file)
            threading.Thread(target=attempt, args=(server.url, "u00001"), daemon=True).start()
        elif moment == "half copied":
            (folder / "late").mkdir()
            shutil.copy(spare / "adapter_config.json", folder / "late")
            (folder / "late" / "adapter_model.safetensors").write_bytes(
                (spare / "adapter_model.safetensors").read_bytes()[:9000]
            )


def attempt(url: str, name: str) -> None:
    with contextlib.suppress(OSError):  # the server is killed meanwhile
        post(url, "/v1/adapters", {"name": name})


def kill_while_starting(folder: Path, port: int, after_s: float) -> None:
    command = [sys.executable, "-m", "launcher", "serve", str(TINY), "--adapters", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(REPO)})
    time.sleep(after_s)
    process.kill()
    process.wait()


def campaign(kills: int, seed: int, work: Path) -> dict[str, Any]:
    dice, moments, ended = random.Random(seed), Counter[str](), Counter[str]()
    folder, temporary = work / "adapters", work / "tmp"
    for each in (folder, temporary):
        each.mkdir()
    os.environ |= {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    make_adapters(TINY, folder, USED, 64, 0.3)
    make_adapters(TINY, work / "spare", 1, 64, 0.5)
    spare = work / "spare" / "u00000"
    server, ready = Server(TINY, folder), []
    port, whole, left = int(server.url.rpartition(":")[2]), known_answers(server.url), files_of(temporary)
    assert len(set(whole.values())) > USED // 2, "the adapters do not differ"
    while moments.total() < kills:
        moment = MOMENTS[moments.total() % len(MOMENTS)]
        if moment == "starting":
            server.stop(signal.SIGTERM)
            kill_while_starting(folder, port, dice.uniform(1, 15))
        else:
            begun, found = threading.Event(), list[Counter[str]]()
            load = threading.Thread(target=cut_load_in_thread, args=(server.url, begun, found))
            load.start()
            assert begun.wait(600), "no answer began"
            time.sleep(dice.uniform(0, 1.0))
            act(moment, server, folder, spare)
            time.sleep(dice.uniform(0, 0.05))
            server.stop(signal.SIGKILL)
            load.join()
            ended += found[0]
        moments[moment] += 1
        server = Server(TINY, folder, port)  # asserts that the port is free
        ready.append(server.ready_s)
        answers = known_answers(server.url)
        late = answers.pop("late", None)
        assert (late is not None) == (moment == "loading"), f"late is served: {late is not None}, after {moment}"
        assert answers == whole, f"after a kill while {moment} answers differ"
        shutil.rmtree(folder / "late", ignore_errors=True)
        assert files_of(temporary) == left, f"left behind: {files_of(temporary).keys() - left.keys()}"
        expected = {f"u{n:05}" for n in range(USED)}
        assert {file.partition("/")[0] for file in files_of(folder)} == expected, files_of(folder)
        print(f"kill {moments.total()}: {moment}, ready again after {server.ready_s:.1f} s", flush=True)
    assert ended["cut without an error"] == 0
    assert server.stop() == 0
    return {
        "kills": moments.total(),
        "moments": dict(moments),
        "requests_that_ended": dict(ended),
        "answers_differing": 0,  # asserted above
        "files_left": 0,
        "port_taken": 0,
        "ready_again_s": {"median": sorted(ready)[len(ready) // 2], "most": max(ready)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPO)
    about = {"model": str(TINY.relative_to(REPO)), "date": datetime.now(UTC).isoformat(timespec="seconds"),
             "commit": commit.stdout.strip(), "cores": os.cpu_count(), "seed": options.seed}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        found = about | campaign(options.kills, options.seed, Path(name))
    print(json.dumps(found, indent=2))
    options.results.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    main()
