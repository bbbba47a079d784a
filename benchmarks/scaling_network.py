"""The formulas of scaling.py against real runs of 2 and 4 processes behind a rate-limited network.

    OMP_NUM_THREADS=1 python benchmarks/scaling_network.py      # 2 minutes on two cores; root, Linux with iproute2

Each process runs in its own network namespace, a switch joins them, and a token bucket (tc tbf) on each one's eth0
limits what it sends. The script creates all of this and removes it at the end. Each process trains a small random Llama
with the launcher's engines and gloo. Bytes are the counters of /sys/class/net less 66 for each packet (Ethernet, IP,
TCP with time stamps): TCP's payload. For an all-reduce the prediction is exact: scaling.py's count and gloo's headers.
Predicted seconds of a step are the measured computing (in turns with the steps, by the same processes, without the
network) + scaling.py's all-reduce or gathering at the limit, with the latency measured by an all-reduce of one number.
For fsdp2, the time of gloo's all-gather over the time that the link needs for its bytes is shown too (1 is predicted).
Writes results/scaling_network.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scaling import CONTROL, all_reduce_bytes, all_reduce_s, gather_bytes

RESULTS = Path(__file__).parent / "results" / "scaling_network.json"
HEADERS = 14 + 20 + 32  # Ethernet, IP, TCP with time stamps
FRAME = 1448 / 1514  # payload of a full frame, of what the token bucket counts
BURST = 80_000  # bytes the token bucket lets through at once, after a pause: more than one packet of the kernel's own
HEADER, SEGMENT = 48, 1 << 20  # gloo sends a ring's 2 (N-1) transfers in two or more segments, each with three headers
SUBNET = "10.213.7"
GATHERED = 2_000_000  # about half a layer of the model here


def why_not() -> str | None:
    """The reason why this machine cannot have such a network."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [word for word in ("ip", "tc") if not shutil.which(word, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    return f"needs {' and '.join(missing)} (apt-get install iproute2)" if missing else None


@contextlib.contextmanager
def network(nodes: int) -> Iterator[list[str]]:
    """Namespaces joined by a switch, each with an eth0 at SUBNET.1, .2 …; removed afterwards."""
    mark = f"loldu{os.getpid()}"
    names = [f"{mark}-{node}" for node in range(nodes)]
    switch = f"{mark}-switch"
    try:
        for name in (switch, *names):
            ip("netns", "add", name)
        ip("-n", switch, "link", "add", "sw0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", switch, "link", "set", "sw0", "up")
        for node, name in enumerate(names):
            # count only our traffic, and send nothing twice: no probes, no queue that looks like a loss
            inside(name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv4.tcp_early_retrans=0",
                   "net.ipv4.tcp_wmem=4096 65536 262144")  # fmt: skip
            ip("-n", switch, "link", "add", f"p{node}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", switch, "link", "set", f"p{node}", "master", "sw0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "address", f"02:00:00:00:00:{node + 1:02x}", "up")
            ip("-n", name, "addr", "add", f"{SUBNET}.{node + 1}/24", "dev", "eth0")
            for other in range(nodes):  # static neighbours: ARP requests would be counted
                if other != node:
                    ip("-n", name, "neigh", "add", f"{SUBNET}.{other + 1}", "lladdr", f"02:00:00:00:00:{other + 1:02x}", "dev", "eth0")  # fmt: skip  # noqa: E501
        yield names
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def inside(name: str, *words: str) -> None:
    ip("netns", "exec", name, *words)


def limit(megabits: float) -> None:
    """Limit the rate at which this namespace sends; 0: no limit. The queue is long, so that nothing is dropped."""
    words = ["tc", "qdisc", "replace" if megabits else "delete", "dev", "eth0", "root"]
    words += ["tbf", "rate", f"{megabits}mbit", "burst", str(BURST), "limit", str(1 << 26)] if megabits else []
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and megabits:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()} (is sch_tbf in this kernel?)")


def sent() -> tuple[int, int]:
    """Bytes that TCP sent from this namespace, and how many segments it sent again."""
    counters = Path("/sys/class/net/eth0/statistics")
    packets, whole = (int((counters / f"tx_{name}").read_text()) for name in ("packets", "bytes"))
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    return whole - HEADERS * packets, int(values[names.index("RetransSegs")])


def measure(nodes: int, methods: Sequence[str], rates: Sequence[float], steps: int) -> list[dict[str, Any]]:
    """Start a process in each of so many namespaces; returns measurement and prediction for each case."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder, network(nodes) as names:
        words = [sys.executable, __file__, f"--worker={folder}", "--steps", str(steps), "--methods", *methods]
        words += ["--rates", *map(str, rates)]
        environ = os.environ | {
            "WORLD_SIZE": str(nodes), "MASTER_ADDR": f"{SUBNET}.1", "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with open(Path(folder) / "log", "w") as log:
            ranks = [environ | {"RANK": str(rank)} for rank in range(nodes)]
            started = [
                subprocess.Popen(["ip", "netns", "exec", name, *words], env=mine, stdout=log, stderr=log)
                for name, mine in zip(names, ranks, strict=True)
            ]
            try:
                codes = [process.wait(600) for process in started]
            finally:
                for process in started:
                    process.kill()
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}:\n{(Path(folder) / 'log').read_text()[-3000:]}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(nodes)]
    return [judge(nodes, cases) for cases in zip(*found, strict=True)]


def judge(nodes: int, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A case as measured by all ranks, and scaling.py's prediction."""
    first = ranks[0]
    carried = sum(rank["sent_bytes"] for rank in ranks)
    bandwidth = first["megabits"] * 1e6 / 8 * FRAME
    latency_s = statistics.median(rank["latency_s"] for rank in ranks)
    computing, seconds = (
        statistics.median(max(together) for together in zip(*(rank[name] for rank in ranks), strict=True))
        for name in ("computing_s", "step_s")
    )  # a step waits for the slowest rank
    if first["method"].startswith("fsdp2"):
        mine = gather_bytes(first["gathered_bytes"], nodes) + gather_bytes(first["gradient_bytes"], nodes)
        mine += all_reduce_bytes(4 * CONTROL, nodes)
        waiting = mine / bandwidth
    else:
        segments = 2 * (nodes - 1) * max(2, math.ceil(first["gradient_bytes"] / nodes / SEGMENT))
        mine = all_reduce_bytes(first["gradient_bytes"], nodes) + segments * 3 * HEADER
        waiting = all_reduce_s(first["gradient_bytes"], nodes, bandwidth, latency_s)
    predicted, waiting = nodes * mine, waiting - min(mine, BURST) / bandwidth
    if alone := first["gather_s"]:
        alone /= ((nodes - 1) * GATHERED - BURST) / bandwidth
    return {
        "processes": nodes, "method": first["method"], "megabits": first["megabits"],
        "sent_bytes_a_step": carried, "predicted_bytes": predicted,
        "segments_sent_again": sum(rank["resent"] for rank in ranks), "latency_us": round(latency_s * 1e6, 1),
        "computing_s": round(computing, 4), "step_s": round(seconds, 4),
        "predicted_s": round(computing + waiting, 4), "error": round((computing + waiting) / seconds - 1, 4),
        "all_gather_of_link": round(alone, 2) if alone else None,
    }  # fmt: skip


def worker(folder: Path, methods: Sequence[str], rates: Sequence[float], steps: int) -> None:
    """One rank: all methods, each at all rates."""
    import torch
    import torch.distributed as dist

    from launcher.processes import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    dist.init_process_group("gloo")
    found = []
    for method in methods:
        engine, gathered = build(method, ranks)
        ids = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(ranks.rank))
        for megabits in rates:
            limit(0)
            latency_s = one_number(ranks.world_size)
            one_step(engine, ids)  # opens connections
            computing, seconds, before = [], [], quiet()
            for _ in range(steps):  # in turns, as the machine may be busy
                limit(0)  # fsdp2's forward pass needs the other ranks: without a limit it counts as computing
                computing.append(one_step(engine, ids, meet=engine.gathers))
                limit(megabits)
                seconds.append(one_step(engine, ids))
            after, meetings = quiet(), steps * (2 if engine.gathers else 1)
            control = 0 if engine.info.averages else CONTROL
            gradients = 4 * (sum(p.numel() for p in engine.parameters.values()) + control)
            found.append({
                "method": method, "megabits": megabits, "step_s": seconds, "computing_s": computing,
                "latency_s": latency_s, "sent_bytes": (after[0] - before[0]) / meetings, "resent": after[1] - before[1],
                "gradient_bytes": gradients, "gathered_bytes": gathered,
                "gather_s": one_gather(ranks.world_size) if gathered else None,
            })  # fmt: skip
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def build(method: str, ranks: Any) -> tuple[Any, int]:
    """The engine of `[fsdp2 ]full | lora RANK | loldu RANK` on a random Llama, and the bytes gathered in a step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapters import LoLDUConfig
    from launcher.config import OptimizerConfig
    from launcher.engines.fsdp2 import FullyShard, decoder_layers, shard, shard_mesh
    from launcher.engines.registry import ENGINES
    from launcher.engines.replicated import Replicated

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=False,
    ))  # fmt: skip
    kind, _, rank = method.removeprefix("fsdp2 ").partition(" ")
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=int(rank), target_modules="all-linear"))
    elif kind == "loldu":
        model = get_peft_model(model, LoLDUConfig(r=int(rank), target_modules="all-linear"))
    if not method.startswith("fsdp2"):
        return Replicated(model, OptimizerConfig(), ranks), 0
    layers = 4 * sum(p.numel() for layer in decoder_layers(model) for p in layer.parameters())
    whole = 4 * sum(p.numel() for p in model.parameters())
    shard(model, shard_mesh(ranks, torch.device("cpu"), ranks.world_size))
    return FullyShard(model, OptimizerConfig(), ranks, ENGINES["fsdp2"]), layers + whole  # layers twice, the rest once


def one_step(engine: Any, ids: Any, *, meet: bool = True) -> float:
    """Seconds of a step; without meeting, everything but the all-reduce is done."""
    import torch

    began = time.perf_counter()
    loss = engine.forward(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    with contextlib.nullcontext() if meet else patch("torch.distributed.all_reduce"):
        engine.reduce([loss.detach(), torch.zeros(())])
    engine.update(1e-4)
    return time.perf_counter() - began


def one_number(world: int) -> float:
    """Seconds of one message of a ring, from an all-reduce of one number: the median of 50."""
    import torch
    import torch.distributed as dist

    taken = []
    for _ in range(50):
        number = torch.zeros(1)
        began = time.perf_counter()
        dist.all_reduce(number)
        taken.append((time.perf_counter() - began) / (2 * (world - 1)))
    return statistics.median(taken)


def one_gather(world: int) -> float:
    """Seconds of an all-gather of GATHERED bytes from each: the median of 8."""
    import torch
    import torch.distributed as dist

    mine, all_, taken = torch.zeros(GATHERED // 4), torch.zeros(world * GATHERED // 4), []
    for _ in range(8):
        dist.barrier()
        began = time.perf_counter()
        dist.all_gather_into_tensor(all_, mine)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def quiet() -> tuple[int, int]:
    """The counters once no packet is in flight."""
    before = sent()
    while True:
        time.sleep(0.3)
        now = sent()
        if now[0] == before[0]:
            return now
        before = now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--methods", nargs="+", default=["loldu 64", "lora 16", "full", "fsdp2 loldu 64"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1000, 100], help="Mb/s")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", type=Path, help="a rank of the measurement; used by the benchmark itself")
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.worker, chosen.methods, chosen.rates, chosen.steps)
        return 0
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed too
    rows = []
    for nodes in chosen.processes:
        rows += measure(nodes, chosen.methods, chosen.rates, chosen.steps)
        for row in rows[-len(chosen.methods) * len(chosen.rates) :]:
            print(row, flush=True)
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "benchmark": "scaling.py's formulas against real runs behind a rate limit", "date": date.today().isoformat(),
        "commit": commit.stdout.strip(), "machine": f"{os.cpu_count()} cores, one thread a process, gloo, tc tbf",
        "load_average": round(os.getloadavg()[0], 1), "rows": rows,
    }  # fmt: skip
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
