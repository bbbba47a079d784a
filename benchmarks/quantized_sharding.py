"""bitsandbytes and torchao for a frozen quantised layer: bytes, error, time, gradient, and its use with fully_shard.

    pip install --no-deps torchao==0.18.0   # not a dependency of this project: only this comparison needs it
    python benchmarks/quantized_sharding.py  # prints a table; a minute on two cores

One 2048 x 2048 Gaussian weight, bfloat16, 256 tokens, one thread; sharded over two gloo processes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from launcher.models.layers import LAYERS  # noqa: E402

SIZE, TOKENS = 2048, 256


def ours(kind: str) -> Callable[[nn.Linear], nn.Module]:
    """The project's layer with a plain parameter, as the sharding engines get it."""

    def make(linear: nn.Linear) -> nn.Module:
        layer = LAYERS[kind](linear, kind, torch.bfloat16)
        layer.weight = nn.Parameter(layer.pack(linear.weight.data, torch.device("cpu")), requires_grad=False)
        return layer

    return make


def nf4_tensor(linear: nn.Linear) -> nn.Module:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    linear.weight = nn.Parameter(to_nf4(linear.weight.data, 64, 256), requires_grad=False)
    return linear


def by_config(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        import torchao.quantization as quantization

        quantization.quantize_(linear, getattr(quantization, name)(**options))
        return linear.requires_grad_(False)

    return make


BACKENDS = {
    "bitsandbytes nf4": ours("nf4"),
    "torchao NF4Tensor": nf4_tensor,
    "torchao int4, groups of 128": by_config("Int4WeightOnlyConfig", group_size=128),
    "bitsandbytes int8": ours("int8"),
    "torchao int8, weight only": by_config("Int8WeightOnlyConfig"),
}


def tensors_of(value: Any) -> list[Tensor]:
    """The plain tensors inside a tensor or a subclass of it, or a layer's scales."""
    if isinstance(value, DTensor):
        return tensors_of(value.to_local())
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in tensors_of(getattr(value, name))]
    return [value]


def held(layer: Any) -> int:
    """Bytes of the weight and of the scales beside it."""
    found = tensors_of(layer.weight)
    if (state := getattr(layer, "quant_state", None)) is not None:
        found += [state.absmax, state.state2.absmax]
    elif (state := getattr(layer, "state", None)) is not None:
        found.append(state.SCB)
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def seconds(act: Callable[[], Any]) -> float:
    """The median of nine."""
    act()
    times = []
    for _ in range(9):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return sorted(times)[4]


def inputs() -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
    linear.weight.data = torch.randn(SIZE, SIZE, generator=generator).bfloat16() / SIZE**0.5
    return linear, torch.randn(TOKENS, SIZE, generator=generator).bfloat16()


def alone(name: str) -> dict[str, Any]:
    """One process."""
    linear, x = inputs()
    W = linear.weight.data.float()
    layer = BACKENDS[name](linear)
    asked = x.clone().requires_grad_()
    with torch.no_grad():
        effective = layer(torch.eye(SIZE, dtype=torch.bfloat16)).float().T  # the weight that it multiplies by
    layer(asked).sum().backward()
    assert asked.grad is not None
    wanted = effective.sum(0).expand_as(asked)
    return {
        "bytes per number": round(held(layer) / SIZE**2, 4),
        "weight error": round(float((effective - W).norm() / W.norm()), 4),
        "gradient error": round(float((asked.grad.float() - wanted).norm() / wanted.norm()), 4),
        "forward ms": round(1e3 * seconds(lambda: layer(x)), 1),
        "with backward ms": round(1e3 * seconds(lambda: layer(asked).sum().backward()), 1),
    }


def sharded(rank: int, name: str, folder: str) -> None:
    """One of two processes; writes its results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    linear, x = inputs()
    layer = BACKENDS[name](linear)
    wanted = layer(x).detach()
    try:
        fully_shard(layer)
        asked = x.clone().requires_grad_()
        found = layer(asked)
        found.sum().backward()
        same = "same output" if torch.equal(found, wanted) else f"off by {float((found - wanted).abs().max()):.2g}"
        said = f"{same}, {held(layer) / SIZE**2:.4f} bytes per number on each"
    except Exception as error:  # engines and subclasses raise many kinds of errors: the table shows them
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.100}"
    Path(folder, f"{rank}").write_text(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", metavar="BACKEND", help=f"any of {', '.join(BACKENDS)}; all without it")
    chosen = parser.parse_args().backends
    torch.set_num_threads(1)
    print({name: importlib.metadata.version(name) for name in ("torch", "bitsandbytes", "torchao")})
    for name in chosen or BACKENDS:
        try:
            row: dict[str, Any] = alone(name)
        except Exception as error:  # as above
            row = {"alone": f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.100}"}
        with tempfile.TemporaryDirectory() as folder:
            try:
                mp.spawn(sharded, (name, folder), 2)
                row["fully_shard over two"] = Path(folder, "0").read_text()
            except Exception as error:  # before there was a parameter to shard
                row["fully_shard over two"] = str(error).strip().splitlines()[-1]
        print(name, row, flush=True)


if __name__ == "__main__":
    main()
