"""Rows of every parameter spread over all processes (fsdp2), or over those of a node (hsdp): torch's fully_shard."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launcher.config import OptimizerConfig
from launcher.engines.replicated import Replicated
from launcher.processes import Ranks
from launcher.training.checkpoint import Checkpoint, Piece


class FullyShard(Replicated):
    """torch's fully_shard: each rank holds its rows of every parameter and gathers one decoder layer at a time.

    The unit of a layer mixes dtypes: that is fine for frozen parameters, which are gathered as bytes.
    """

    averages = gathers = True

    def __init__(self, model: nn.Module, config: OptimizerConfig, ranks: Ranks, mesh: DeviceMesh):
        super().__init__(model, config, ranks)
        self.mesh = mesh

    def _piece(self, tensor: Tensor) -> Piece | None:
        assert isinstance(tensor, DTensor)
        if self.mesh.ndim == 2 and self.mesh.get_local_rank(0) != 0:
            return None  # another copy's row stands for it
        count, start = _local_rows(tensor)
        return Piece(tensor.to_local(), tuple(tensor.shape), start) if count else None

    def _copy(self, into: Tensor, found: Checkpoint, name: str) -> None:
        rows = into.data if isinstance(into, nn.Parameter) else into
        assert isinstance(rows, DTensor)
        count, start = _local_rows(rows)
        if count:
            rows.to_local().copy_(found.read(name, start, count))


def open_alone(device: torch.device) -> None:
    """A process group of one, for the sharding engines, where no launcher opened one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def shard_mesh(sharding: str, ranks: Ranks, device: torch.device, shard_size: int = 0) -> DeviceMesh:
    """(world,) for fsdp2; (copies, processes that share one) for hsdp."""
    if sharding == "fsdp2":
        return init_device_mesh(device.type, (ranks.world_size,), mesh_dim_names=("shard",))
    size = shard_size or ranks.local_world_size
    return init_device_mesh(device.type, (ranks.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, *, cpu_offload: bool = False) -> None:
    """Make each decoder layer and the rest one unit, in place; parameters may still be on meta.

    Raises ValueError listing candidates where the model does not say which class its decoder layers have.
    """
    base = base_of(model)  # the root, since generate() calls it and not PEFT's wrapper
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    units: list[Any] = [*decoder_layers(base), base]
    seen: set[int] = set()
    for unit in units:
        own = [parameter for parameter in unit.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in own if parameter.requires_grad}
        if len(kinds) > 1:
            raise ValueError(
                f"fully_shard wants the trained numbers of a {type(unit).__name__} in one dtype, here they are "
                f"{' and '.join(sorted(kinds))}: give --dtype float32, or --sharding ddp"
            )
    for unit in units:
        fully_shard(unit, mesh=mesh, offload_policy=policy)
        if mesh.device_type == "cpu":
            # Gloo gathers into a buffer of its own and copies: with what torch fetches ahead for overlap, which gloo
            # has none of, three layers would be in memory. So: fetch nothing ahead (a unit that fetches itself), and
            # let no gathered bytes outlive their copy (as torch does where it overlaps the next gather).
            unit.set_modules_to_backward_prefetch([unit])
            unit._set_unshard_async_op(True)


def decoder_layers(base: Any) -> list[nn.Module]:
    """The modules of the classes that the model says must not be split."""
    classes = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in classes]
    if not layers:
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
        candidates = sorted({type(child).__name__ for children in lists for child in children})
        raise ValueError(
            f"{type(base).__name__} does not name its decoder-layer class (_no_split_modules is {sorted(classes)}); "
            f"candidates in this model: {', '.join(candidates) or 'none'}. Use --sharding ddp"
        )
    return layers


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Rows:
    """Which rows of a parameter under fully_shard this rank holds, and the parameter made of them."""

    def rows(self, parameter: Tensor) -> slice:
        assert isinstance(parameter, DTensor)
        count, start = _local_rows(parameter)
        return slice(start, start + count)

    def place(self, like: nn.Parameter, rows: Tensor) -> nn.Parameter:
        """A parameter placed like `like`, with this rank's rows filled, where they lie. No communication."""
        # not from_local, which would move what --cpu-offload keeps in main memory to the GPU
        filled: Any = torch.empty_like(like, device=rows.device)
        filled.to_local().copy_(rows)
        return nn.Parameter(filled, requires_grad=like.requires_grad)

    def keep(self, drawn: nn.Parameter) -> nn.Parameter:
        return drawn  # fully_shard has taken this rank's rows of it


def _local_rows(tensor: DTensor) -> tuple[int, int]:
    """How many rows this rank holds, and the first of them; a rank may hold none."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return shape[0], offset[0]
