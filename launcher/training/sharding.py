"""How base, factors and trained state lie over the processes, and how a step's results meet.

    none, ddp      every process holds all; one flat all-reduce per step
    fsdp2, hsdp    rows of every parameter spread over all processes, or over those of a node (torch fully_shard)
    zero2, zero3   gradients and optimizer state spread, or all; through DeepSpeed, in zero.py

Trained cores are a few hundred kilobytes in all, so data-parallel training needs no buckets and no overlap: one float32
tensor per step, 4 bytes per trained number and 4 per number that travels along. Nothing is ever broadcast: all ranks
load the same files and compute the same step. An engine is what the loop sees of this; it knows nothing of data.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launcher.config import OptimizerConfig
from launcher.ranks import Ranks
from launcher.training.checkpoint import Checkpoint, Piece

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_sharding(
    wanted: str | None, ranks: Ranks, shard_size: int = 0, environ: Mapping[str, str] = os.environ
) -> str:
    """The sharding to use: what is wanted, else what accelerate launch was configured for, else by the world size.

    Raises ValueError, with the arithmetic, where it does not fit the number of processes or the launcher.
    """
    world, launched = ranks.world_size, launched_for(environ)
    if launched and wanted not in (None, launched) and (launched, wanted) != ("fsdp2", "hsdp"):
        raise ValueError(
            f"accelerate launch was configured for {launched}, but --sharding is {wanted}: leave --sharding out, or "
            f"give --config_file recipes/accelerate/{'ddp' if wanted == 'none' else wanted}.yaml"
        )
    wanted = wanted or launched or ("ddp" if world > 1 else "none")
    if wanted == "none" and world > 1:
        raise ValueError(f"--sharding none is for one process, but WORLD_SIZE is {world}: give --sharding ddp")
    if wanted in ("zero2", "zero3"):
        missing = [name for name in ("deepspeed", "ninja") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"--sharding {wanted} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if wanted == "hsdp" and world % (size := shard_size or ranks.local_world_size):
        raise ValueError(
            f"--sharding hsdp: {world} processes / {size} that share one copy = {world / size:.2f} copies, not a whole "
            "number: give --shard-size a divisor, or --sharding fsdp2"
        )
    if shard_size and wanted != "hsdp":
        raise ValueError(f"--shard-size {shard_size} goes with --sharding hsdp, not {wanted}")
    return wanted


def check_offload(wanted: bool, sharding: str, *, on_gpu: bool) -> None:
    """Raises ValueError where --cpu-offload would do nothing."""
    if wanted and sharding not in ("fsdp2", "hsdp", "zero2", "zero3"):
        raise ValueError(
            f"--cpu-offload goes with --sharding fsdp2, hsdp, zero2 or zero3, {sharding} keeps all on the GPU: leave "
            "it out, or change --sharding"
        )
    if wanted and not on_gpu:
        raise ValueError(
            "--cpu-offload keeps in main memory what would lie on the GPU, and torch finds no GPU here: leave it out"
        )


def launched_for(environ: Mapping[str, str]) -> str | None:
    """The sharding in the configuration of accelerate launch, None where it names none (or did not start this)."""
    if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if (version := environ.get("FSDP_VERSION", "1")) != "2":
            raise ValueError(f"accelerate's configuration has fsdp_version: {version}, only 2 is built: write 2 there")
        return "fsdp2"
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ or stage not in ("2", "3"):
            raise ValueError(
                f"accelerate's configuration asks for DeepSpeed with zero_stage {stage}: write zero_stage: 2 or 3 "
                "there and no deepspeed_config_file, whose settings would not count (see recipes/accelerate)"
            )
        return f"zero{stage}"
    return None


class Replicated:
    """Every process holds the whole model; gradients and extra numbers meet in one all-reduce."""

    averages = False  # whether gradients come out of backward averaged over ranks already
    gathers = False  # whether a forward pass is a collective, which all ranks must make the same number of

    def __init__(self, model: nn.Module, config: OptimizerConfig, ranks: Ranks):
        self.model, self.ranks, self.clip_norm = model, ranks, config.clip_norm or math.inf
        self.forward: Any = model
        # a rank's share of the global mean loss is multiplied by this
        self.loss_scale = float(ranks.world_size) if self.averages else 1.0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # What layers share stands under each of its names. Noted here: while units are gathered, fully_shard has other
        # parameters in their places.
        first = {id(p): name for name, p in self.parameters.items()}
        every = model.named_parameters(remove_duplicate=False)
        self.names = {name: first[id(p)] for name, p in every if id(p) in first}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss."""
        (loss * self.loss_scale).backward()

    def reduce(self, extra: Sequence[Tensor]) -> list[Tensor]:
        """After the last backward of a step: sum gradients and the extra numbers over all ranks."""
        mine = [] if self.averages else list(self.parameters.values())
        return sum_over_ranks(mine, extra, self.ranks.world_size)

    def update(self, learning_rate: float) -> float:
        """Clip, step, clear; returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm: Any = nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def pieces(self) -> dict[str, Piece]:
        """This rank's rows of the trained state: model/NAME, and optimizer/NAME/exp_avg and exp_avg_sq after a step."""
        pieces: dict[str, Piece] = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors = {f"model/{name}": parameter} | {f"optimizer/{name}/{m}": state[m] for m in MOMENTS if m in state}
            pieces |= {key: piece for key, tensor in tensors.items() if (piece := self._piece(tensor.detach()))}
        return pieces

    def restore(self, found: Checkpoint) -> None:
        """Put a checkpoint's state back, bit for bit, whatever number of processes wrote it."""
        for name, parameter in self.parameters.items():
            self._copy(parameter, found, f"model/{name}")
            if found.step:
                moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                for moment, tensor in moments.items():
                    self._copy(tensor, found, f"optimizer/{name}/{moment}")
                self.optimizer.state[parameter] = {"step": torch.tensor(float(found.step)), **moments}

    def whole_state(self) -> dict[str, Tensor]:
        """The trained parameters and the saved buffers in full, by name; on rank 0, nothing on the others, which all
        must call it too."""
        values: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensor = self._whole(parameter)
            if self.ranks.is_main:
                values[name] = tensor.cpu()
        if not self.ranks.is_main:
            return {}
        whole = {name: values[first] for name, first in self.names.items()}
        saved = self.model.state_dict().keys()
        buffers = self.model.named_buffers(remove_duplicate=False)
        return whole | {name: buffer for name, buffer in buffers if name in saved}

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        tensor = parameter.detach()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _piece(self, tensor: Tensor) -> Piece | None:
        return Piece.whole(tensor) if self.ranks.is_main else None

    def _copy(self, into: Tensor, found: Checkpoint, name: str) -> None:
        into.data.copy_(found.read(name))


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
    base = _base(model)  # the root, since generate() calls it and not PEFT's wrapper
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


def size(parameter: Any) -> int:
    """Numbers in the whole parameter, however it is cut."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def _base(model: Any) -> Any:
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


def sum_over_ranks(parameters: Sequence[nn.Parameter], extra: Sequence[Tensor], world_size: int) -> list[Tensor]:
    """Add up gradients and extra numbers over all ranks.

    Before: each rank holds the gradients of its own samples. After: every rank holds the sum, in parameters' .grad; the
    summed extra numbers (0-dim, float32) are returned.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size == 1:
        return [number.float() for number in extra]
    parts = [parameter.grad.reshape(-1).float() for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*parts, torch.stack([number.float() for number in extra])])
    dist.all_reduce(flat)
    at = 0
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.copy_(flat[at : at + parameter.numel()].view_as(parameter))
        at += parameter.numel()
    return list(flat[at:])
