"""Rows of every parameter spread over all processes (fsdp2), or over those of a node (hsdp): torch's fully_shard."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launcher.engines.engine import ModelSource
from launcher.engines.experts import expert_lists, refuse
from launcher.engines.registry import EngineInfo, give_first
from launcher.engines.replicated import Replicated
from launcher.main_memory import map_large_blocks
from launcher.models.fill import fill
from launcher.models.skeleton import skeleton
from launcher.processes import Ranks, open_alone
from launcher.training.checkpoint import Checkpoint, Piece


class FullyShard(Replicated):
    """torch's fully_shard: each rank holds its rows of every parameter and gathers one decoder layer at a time.

    The frozen parameters of a unit may have several dtypes, since they are gathered as bytes.
    """

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        check_layers(base)

    @classmethod
    def load(cls, source: ModelSource, info: EngineInfo) -> nn.Module:
        """The model on meta, cut into units, then filled with this rank's rows from the checkpoint."""
        config, run = source.config, source.config.run
        open_alone(source.device)
        if info.maps_large_blocks and source.device.type == "cpu":
            map_large_blocks()
        model = skeleton(config.model, source.folder, source.adapter, **source.how)
        group = (run.shard_size or source.ranks.local_world_size) if info.grouped else source.ranks.world_size
        shard(model, shard_mesh(source.ranks, source.device, group), cpu_offload=run.cpu_offload)
        fill(model, source.folder, source.factors, Rows(), source.device, source.progress, cpu_offload=run.cpu_offload)
        return model

    def restore(self, found: Checkpoint) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a pass before this one leaves the root unit gathered, with the old values
        super().restore(found)

    def _reached(self) -> list[bool]:
        """As in Replicated, but zeros stand for no gradient. LoRA's A gets zeros at first, so its layer counts."""
        layers: dict[str, bool] = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is None or isinstance(parameter.grad, DTensor)
            layer = self._layer(name)
            moved = parameter.grad is not None and bool(parameter.grad.to_local().any())
            layers[layer] = layers.get(layer, False) or moved
        return [layers[self._layer(name)] for name in self.parameters]

    def _layer(self, name: str) -> str:
        """The adapted layer that a parameter belongs to, else its own module."""
        parents = list(accumulate(name.split(".")[:-1], "{}.{}".format))
        adapted = (at for at in parents if isinstance(self.model.get_submodule(at), BaseTunerLayer))
        return next(adapted, name.rpartition(".")[0])

    def _piece(self, tensor: Tensor) -> Piece | None:
        assert isinstance(tensor, DTensor)
        if tensor.device_mesh.ndim == 2 and tensor.device_mesh.get_local_rank(0) != 0:
            return None  # rank 0 of this dimension writes the rows for all copies
        count, start = _local_rows(tensor)
        return Piece(tensor.to_local(), tuple(tensor.shape), start) if count else None

    def _copy(self, into: Tensor, found: Checkpoint, name: str) -> None:
        rows = into.data if isinstance(into, nn.Parameter) else into
        assert isinstance(rows, DTensor)
        count, start = _local_rows(rows)
        if count:
            rows.to_local().copy_(found.read(name, rows.shape, start, count))


def shard_mesh(ranks: Ranks, device: torch.device, group: int) -> DeviceMesh:
    """The mesh of groups of processes that share one copy: (world,) for one group, else (copies, group)."""
    if group == ranks.world_size:
        return init_device_mesh(device.type, (group,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (ranks.world_size // group, group), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh, *, cpu_offload: bool = False) -> None:
    """Make each decoder layer and the rest one unit, in place; parameters may still be on meta.

    Raises ValueError listing candidates if the model does not say which class its decoder layers have.
    """
    base = base_of(model)  # generate() calls the base, not PEFT's wrapper, so the base is the root unit
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    units: list[Any] = [*decoder_layers(base), base]
    seen: set[int] = set()
    for unit in units:
        own = [parameter for parameter in unit.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in own if parameter.requires_grad}
        if len(kinds) > 1:
            raise ValueError(
                f"fully_shard needs one dtype for the trained parameters of a {type(unit).__name__}, here they are "
                f"{' and '.join(sorted(kinds))}: give --dtype float32, or {give_first(lambda info: info.holds_base)}"
            )
    for unit in units:
        fully_shard(unit, mesh=mesh, offload_policy=policy)
        if mesh.device_type == "cpu":
            # Gloo gathers into its own buffer and copies from it. With the layer that torch prefetches, three layers
            # would be in memory, and gloo does not overlap anyway. So prefetch nothing (a unit that prefetches itself),
            # and free gathered bytes once they are copied (as torch does when it overlaps the next gather).
            unit.set_modules_to_backward_prefetch([unit])
            unit._set_unshard_async_op(True)
    if hasattr(base, "set_reduce_scatter_unused_params"):
        # Zeros for a parameter without a gradient. Else processes whose tokens reached other experts exchange gradients
        # of other parameters, and torch adds them up.
        base.set_reduce_scatter_unused_params(True)
    elif mesh.size() > 1:
        why = f"fully_shard of torch {torch.__version__} mixes their gradients up, torch 2.13 does not"
        refuse(expert_lists(base, trained=True), why)


def decoder_layers(base: Any) -> list[nn.Module]:
    """The modules of the classes that the model says must not be split; else its largest list of layers of one class.

    Raises ValueError if it has neither.
    """
    classes = set(getattr(base, "_no_split_modules", None) or ())
    named = [(name, module) for name, module in base.named_modules() if _class_name(module) in classes]
    inside = tuple(f"{name}." for name, _ in named)  # Mamba names its blocks and the mixers in them: blocks are units
    layers = [module for name, module in named if not name.startswith(inside)]
    if layers:
        return layers
    lists = [list(module) for module in base.modules() if isinstance(module, nn.ModuleList)]
    alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    largest = max(alike, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()), default=[])
    if not largest:
        raise ValueError(
            f"{type(base).__name__} does not name its decoder-layer class (_no_split_modules is {sorted(classes)}), "
            f"and has no list of layers of one class. Give {give_first(lambda info: info.holds_base)}"
        )
    return largest


def check_layers(base: Any) -> None:
    """Raises ValueError if a weight belongs to two decoder layers: each layer is gathered and freed separately."""
    of: dict[int, str] = {}
    layers = {id(layer) for layer in decoder_layers(base)}
    for name, layer in base.named_modules():
        if id(layer) not in layers:
            continue
        for inner, parameter in layer.named_parameters():
            if (first := of.setdefault(id(parameter), name)) != name:
                raise ValueError(
                    f"a {type(base).__name__} cannot be sharded by layers: {name} has its {inner} in common with "
                    f"{first}. Give {give_first(lambda info: info.holds_base)}"
                )


def _class_name(module: nn.Module) -> str:
    """The name of the module's own class, which fully_shard extends."""
    name = type(module).__name__
    return name.removeprefix("FSDP") if isinstance(module, FSDPModule) else name


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Rows:
    """Which rows of a parameter under fully_shard this rank holds, and the parameter made of them."""

    def rows(self, parameter: Tensor) -> slice:
        assert isinstance(parameter, DTensor)
        count, start = _local_rows(parameter)
        return slice(start, start + count)

    def place(self, like: nn.Parameter, rows: Tensor) -> nn.Parameter:
        """A parameter sharded like `like` with these rows, on the device of the rows. No communication."""
        # Not from_local, which would move rows to the GPU that --cpu-offload keeps in main memory.
        filled: Any = torch.empty_like(like, device=rows.device)
        filled.to_local().copy_(rows)
        return nn.Parameter(filled, requires_grad=like.requires_grad)

    def keep(self, drawn: nn.Parameter) -> nn.Parameter:
        return drawn  # fully_shard has cut it already


def _local_rows(tensor: DTensor) -> tuple[int, int]:
    """How many rows this rank holds, and the first of them; a rank may hold none."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return shape[0], offset[0]
