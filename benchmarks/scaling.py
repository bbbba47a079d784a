"""Step time and bytes on the wire of 1 to 1,024 GPUs: a model, not a measurement.

    python benchmarks/scaling.py                    # a second: the table, and results/scaling.json
    python benchmarks/scaling_network.py            # its formulas against real runs behind a rate limit

All constants of the machines are published ones, not measured by us (CONSTANTS has the sources): replace them once a
GPU was measured. The counts of bytes, and the sum of computing and waiting, are checked with real processes on a real
network by scaling_network.py, which prints the error. Each GPU has TOKENS tokens a step, so more GPUs are a larger
batch.

Collectives, payload of P bytes over N ranks (Thakur, Rabenseifner, Gropp 2005; Patarasuk, Yuan 2009):

    all-reduce, ring     each rank sends 2 (N-1)/N P in 2 (N-1) messages, one after the other
    all-reduce, tree     2 P in 2 log2(N) messages (two trees, pipelined: Sanders, Speck, Traeff 2009); NCCL has both
    all-gather           each rank sends (N-1)/N P in N-1 messages; reduce-scatter the same

An all-reduce over M nodes of g GPUs runs inside a node first: each node sends 2 (M-1)/M P, for any g.

A step of T tokens through p numbers costs 2 p T operations forward, 2 p T for the gradient of inputs and 2 p T for that
of weights (Kaplan et al., 2001.08361), which frozen ones do not need. Left out: attention's own products,
recomputation, LoLDU's float32 product with its r x r map (most zeros are skipped), unpacking of 4-bit weights,
stragglers and other users of the network.

    ddp          computing + all-reduce of the trained numbers' gradients
    fsdp2        max(computing, gathering every layer forward and backward, the rest once) + reduce-scatter
    hsdp         the same inside a node, and an all-reduce of the gradients over the nodes

LoLDU's all-reduce is one tensor after the backward pass, as built. For LoRA and full fine-tuning the model is
optimistic: as much of their all-reduce as possible overlaps the backward pass, which needs buckets and is never
perfect.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scaling.json"
TOKENS = 4096  # of each GPU in a step
CONTROL = 2  # float32 numbers sent with the gradients: the loss, and whether a rank was asked to stop
SHARDINGS = ("ddp", "fsdp2", "hsdp")
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Base:
    """A Llama. precision is bytes per number of the linear layers; the rest is bfloat16."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    key_value: int  # width of keys and values: smaller than hidden if heads share them
    vocabulary: int = 32_000
    precision: float = 2.0

    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of the linear layers of one decoder layer."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]

    @property
    def linear(self) -> int:
        """Numbers in all linear layers of the decoder."""
        return self.layers * sum(m * n for m, n in self.shapes())

    @property
    def rest(self) -> int:
        """Embedding, head and norms."""
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden


@dataclass(frozen=True)
class Method:
    """What is trained on all linear layers; rank 0 is everything."""

    name: str
    rank: int

    def trained(self, base: Base) -> int:
        """Numbers that get a gradient."""
        if self.rank == 0:
            return base.linear + base.rest
        if self.name.startswith("LoRA"):
            return base.layers * sum(self.rank * (m + n) for m, n in base.shapes())
        return base.layers * sum(min(self.rank, m, n) for m, n in base.shapes())

    def factors(self, base: Base) -> tuple[int, int]:
        """LoLDU's frozen maps: numbers in bfloat16 (write, m r) and in float32 (read, r r)."""
        if not self.name.startswith("LoLDU"):
            return 0, 0
        ranks = [(m, min(self.rank, m, n)) for m, n in base.shapes()]
        return base.layers * sum(m * r for m, r in ranks), base.layers * sum(r * r for _, r in ranks)

    def gradient_bytes(self, base: Base) -> int:
        """Of one all-reduce: float32 for adapters, bfloat16 if the whole model trains."""
        return self.trained(base) * 2 if self.rank == 0 else (self.trained(base) + CONTROL) * 4

    def operations_per_token(self, base: Base) -> tuple[float, float]:
        """Forward and backward."""
        frozen = base.linear + base.vocabulary * base.hidden + sum(self.factors(base))
        if self.rank == 0:
            return 2 * frozen, 4 * frozen
        trained = self.trained(base) if self.name.startswith("LoRA") else 0
        return 2 * (frozen + trained), 2 * frozen + 4 * trained

    def memory(self, base: Base) -> tuple[float, float]:
        """Bytes that sharding spreads (weights, factors), and bytes of the trained numbers' gradient and optimizer."""
        write, read = self.factors(base)
        frozen = base.linear * base.precision + base.rest * 2 + write * 2 + read * 4
        # float32 value, gradient and two moments; a bfloat16 model's values are counted above
        return frozen, self.trained(base) * (14 if self.rank == 0 else 16)


@dataclass(frozen=True)
class Machine:
    """A node and its GPUs."""

    gpus: int
    operations: float  # per second and GPU, bfloat16, dense, at peak
    use: float  # share of the peak that training reaches
    memory: float  # bytes of a GPU
    memory_use: float  # share for weights and optimizer; the rest is for activations
    inside: float  # bytes per second of a GPU to the others of its node, one way


@dataclass(frozen=True)
class Link:
    """The network of a node."""

    name: str
    bits: float  # per second and adapter
    adapters: int
    efficiency: float  # payload per bit
    latency_s: float  # of one message
    trees: bool = True  # NCCL; gloo has only rings

    @property
    def bandwidth(self) -> float:
        """Bytes of payload per second and node, one way."""
        return self.bits / 8 * self.adapters * self.efficiency


BASES = (
    Base("7B", 4096, 11008, 32, 4096),
    Base("13B", 5120, 13824, 40, 5120),
    Base("70B", 8192, 28672, 80, 1024),
    Base("70B, nf4", 8192, 28672, 80, 1024, precision=0.5159),
)
METHODS = (
    Method("LoLDU r 64", 64), Method("LoLDU r 1024", 1024), Method("LoRA r 16", 16), Method("LoRA r 64", 64),
    Method("full", 0),
)  # fmt: skip
H100 = Machine(gpus=8, operations=989e12, use=0.4, memory=80e9, memory_use=0.8, inside=450e9)
TCP = 1448 / 1538  # payload of an Ethernet frame of 1,500 bytes, of all it takes on the wire
LINKS = (
    Link("400 Gb/s", 400e9, 8, 0.9, 10e-6),
    Link("10 Gb/s", 10e9, 1, TCP, 50e-6),
    Link("1 Gb/s", 1e9, 1, TCP, 50e-6),
)
CONSTANTS = {
    "GPU": "published: H100 SXM data sheet, 989 TFLOP/s bfloat16 dense, 80 GB, NVLink 450 GB/s each way, 8 in a node",
    "share of the peak": "published: 0.38 to 0.43 for full training (Llama 3 report, 2407.21783, table 4); we take 0.4",
    "400 Gb/s": "a DGX H100 has one such adapter for each GPU; efficiency 0.9 assumed; latency rounded up from the "
    "table of NCCL's tuning.cc (2.7 to 9.6 us a hop of a ring, 5.0 to 8.5 of a tree)",
    "10 and 1 Gb/s": "one adapter for a node; efficiency is the arithmetic of TCP in 1,500-byte frames (checked by "
    "scaling_network.py), latency of 50 us assumed",
    "bytes of nf4": "measured: 0.5159 a number (README)",
    "bytes of a step": "measured: scaling_network.py counts them",
}


def all_reduce_bytes(payload: float, ranks: int) -> float:
    """Bytes that each rank of a ring sends, and receives."""
    return 2 * (ranks - 1) / ranks * payload


def gather_bytes(payload: float, ranks: int) -> float:
    """Bytes that each rank sends in an all-gather of the payload, or in a reduce-scatter of it."""
    return (ranks - 1) / ranks * payload


def all_reduce_s(payload: float, ranks: int, bandwidth: float, latency_s: float, *, trees: bool = False) -> float:
    """Seconds; bandwidth in bytes of payload per second."""
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) * latency_s + all_reduce_bytes(payload, ranks) / bandwidth
    tree = 2 * math.ceil(math.log2(ranks)) * latency_s + 2 * payload / bandwidth
    return min(ring, tree) if trees else ring


def step(base: Base, method: Method, sharding: str, gpus: int, machine: Machine, link: Link) -> dict[str, Any]:
    """One step: seconds in all, of computing, and of waiting for the network; bytes that each node sends to others."""
    inside, nodes = min(gpus, machine.gpus), max(1, gpus // machine.gpus)
    forward, backward = (
        work * TOKENS / (machine.operations * machine.use) for work in method.operations_per_token(base)
    )
    computing, gradients = forward + backward, method.gradient_bytes(base)
    weights, states = method.memory(base)
    held = {"ddp": weights + states, "fsdp2": (weights + states) / gpus, "hsdp": (weights + states) / inside}[sharding]
    over_nodes = all_reduce_s(gradients, nodes, link.bandwidth, link.latency_s, trees=link.trees)
    if sharding == "ddp":
        meet = all_reduce_bytes(gradients, inside) / machine.inside + over_nodes
        hidden = 0.0 if method.name.startswith("LoLDU") else min(meet, backward)
        seconds, sent = computing + meet - hidden, all_reduce_bytes(gradients, nodes)
    else:
        cores = method.trained(base) * 4 if method.rank else 0
        gathered, messages = 2 * (weights - base.rest * 2 + cores) + base.rest * 2, 2 * base.layers + 1
        far = sharding == "fsdp2" and nodes > 1
        ranks, bandwidth, latency_s = (gpus, link.bandwidth, link.latency_s) if far else (inside, machine.inside, 0.0)
        hops = (nodes - 1) * latency_s  # messages inside a node cost little compared to these
        gathering = gather_bytes(gathered, ranks) / bandwidth + messages * hops
        scattering = gather_bytes(gradients, ranks) / bandwidth + hops
        seconds = max(computing, gathering) + scattering + (over_nodes if sharding == "hsdp" else 0.0)
        sent = all_reduce_bytes(gradients, nodes)
        if sharding == "fsdp2":
            sent = gather_bytes(gathered + gradients, gpus) if far else 0.0
    return {
        "base": base.name, "method": method.name, "sharding": sharding, "gpus": gpus, "link": link.name,
        "step_s": seconds, "computing_s": computing, "waiting_s": seconds - computing,
        "sent_bytes_per_node": round(sent), "fits": held <= machine.memory * machine.memory_use,
    }  # fmt: skip


def table() -> list[dict[str, Any]]:
    """All results."""
    return [
        step(base, method, sharding, gpus, H100, link)
        for base in BASES
        for method in METHODS
        if method.rank or base.precision == 2  # a 4-bit base is never fully fine-tuned
        for sharding in SHARDINGS
        for link in LINKS
        for gpus in GPUS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=64, help="of the printed table; the file has all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    rows = table()
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    columns = list(rows[0])
    result = {
        "benchmark": "scaling: a model, not a measurement", "date": date.today().isoformat(),
        "commit": commit.stdout.strip(), "tokens_per_gpu_and_step": TOKENS, "constants": CONSTANTS,
        "machine": asdict(H100), "links": [asdict(link) for link in LINKS], "columns": columns,
    }  # fmt: skip
    head = json.dumps(result, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps([_short(row[name]) for name in columns]) for row in rows)
    chosen.out.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    show([row for row in rows if row["gpus"] == chosen.gpus])


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each base, sharding and method."""
    print(f"model, not measured: {rows[0]['gpus']} GPUs in nodes of {H100.gpus}, {TOKENS} tokens a GPU and step")
    print(
        f"{'base':<9}{'sharding':<9}{'method':<13}{'a node sends':>13}" + "".join(f"{link.name:>18}" for link in LINKS)
    )
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: SHARDINGS.index(row["sharding"])):
        lines.setdefault((row["base"], row["sharding"], row["method"]), []).append(row)
    for (base, sharding, method), found in sorted(
        lines.items(), key=lambda line: [b.name for b in BASES].index(line[0][0])
    ):
        sent = f"{found[0]['sent_bytes_per_node'] / 1e6:,.1f} MB"
        cells = (f"{row['step_s']:9.2f} s {row['waiting_s'] / row['step_s']:6.1%}" for row in found)
        said = "".join(cells) if found[0]["fits"] else "  does not fit a GPU"
        print(f"{base:<9}{sharding:<9}{method:<13}{sent:>13}{said}")
    print("for each link: seconds of a step, and the share spent waiting for the network")


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
