"""Every process holds the whole model (none, ddp); one flat all-reduce per step.

Trained cores are a few hundred kilobytes in all, so data-parallel training needs no buckets and no overlap: one float32
tensor per step, 4 bytes per trained number and 4 per extra number. Nothing is broadcast: all ranks load the same files
and compute the same step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launcher.config import OptimizerConfig
from launcher.engines.engine import ModelSource, NonFinite, shortened
from launcher.engines.registry import ENGINES, EngineInfo
from launcher.models.build import build
from launcher.optimizers import OPTIMIZERS, make
from launcher.processes import Ranks
from launcher.training.checkpoint import Checkpoint, Piece

log = logging.getLogger(__name__)
ADAM_STATE = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names


class Replicated:
    """Every process holds the whole model; one all-reduce adds up gradients and extra numbers."""

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        """Every base can be held whole."""

    @classmethod
    def load(cls, source: ModelSource, info: EngineInfo) -> nn.Module:
        """The whole model with its adapter."""
        return build(
            source.config.model, source.folder, source.adapter, factors=source.factors, device=source.device,
            progress=source.progress, **source.how,
        )  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        ranks: Ranks,
        info: EngineInfo = ENGINES["ddp"],
        *,
        cpu_offload: bool = False,
    ):
        self.info, self.model, self.ranks, self.clip_norm = info, model, ranks, config.clip_norm or math.inf
        self.forward: Any = model
        # A rank's share of the global mean loss is multiplied by this: averaging divides it again.
        self.loss_scale = float(ranks.world_size) if info.averages else 1.0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A shared parameter has several names. They are collected here: while units are gathered, fully_shard puts
        # other parameters in their places.
        first = {id(p): name for name, p in self.parameters.items()}
        every = model.named_parameters(remove_duplicate=False)
        self.names = {name: first[id(p)] for name, p in every if id(p) in first}
        self._checked = False  # whether every parameter was looked at for a gradient, after the first step
        self.optimizer = make(config, self.parameters.values())
        self.kind = config.optimizer
        self.by_rows = OPTIMIZERS[self.kind].sharded  # its state has the parameter's shape

    @property
    def gathers(self) -> bool:
        return self.info.gathers

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss."""
        (loss * self.loss_scale).backward()

    def reduce(self, extra: Sequence[Tensor]) -> list[Tensor]:
        """After the last backward of a step: sum gradients and the extra numbers over all ranks."""
        mine = [] if self.info.averages else list(self.parameters.values())
        flags = [] if self._checked else self._reached()
        # They join this collective. Under --cpu-offload parameters are on another device than the extra numbers.
        reached = [torch.tensor(float(flag), device=extra[0].device) for flag in flags]
        summed = sum_over_ranks(mine, [*extra, *reached], self.ranks.world_size)
        if not self._checked:
            self._checked = True
            self._warn_of_unreached(summed[len(extra) :])
        return summed[: len(extra)]

    def update(self, learning_rate: float, numbers: Sequence[Tensor] = ()) -> list[float]:
        """Clip, step, clear; returns the gradient norm before clipping and the numbers. Raises NonFinite instead of a
        step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total: Any = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        device = numbers[0].device if numbers else norm.device
        found = torch.stack([norm.to(device, torch.float32), *numbers]).tolist()
        if not all(map(math.isfinite, found)):
            raise NonFinite(self.nonfinite(), found[1:])
        nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_norm, total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def after_step(self, call: Callable[[], None]) -> None:
        """Call this after each update, while the parameters still have its clipped gradients."""
        self.optimizer.register_step_post_hook(lambda *_: call())

    def nonfinite(self) -> list[str]:
        """The trained parameters whose gradient is NaN or infinite on any rank; clears the gradients."""
        flags = torch.stack(self._nonfinite())
        if self.ranks.world_size > 1:
            dist.all_reduce(flags)
        self.optimizer.zero_grad()
        return [name for name, flag in zip(self.parameters, flags.tolist(), strict=True) if flag]

    def _nonfinite(self) -> list[Tensor]:
        """For each trained parameter 1 if this rank's part of its gradient is NaN or infinite, else 0."""
        nothing = torch.zeros((), device=next(iter(self.parameters.values())).device)
        gradients = [parameter.grad for parameter in self.parameters.values()]
        parts = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        return [nothing if part is None else (~part.isfinite()).any().float() for part in parts]

    def _reached(self) -> list[bool]:
        """For each trained parameter whether this rank's backward passes gave it a gradient."""
        return [parameter.grad is not None for parameter in self.parameters.values()]

    def _warn_of_unreached(self, reached: Sequence[Tensor]) -> None:
        """A layer whose weight the model reads without calling the layer never trains."""
        names = [name for name, count in zip(self.parameters, reached, strict=True) if not count]
        if names and self.ranks.is_main:
            log.warning(
                "no gradient reached %s in the first step. An expert that got no token trains later; a layer whose "
                "weight the model reads without calling the layer never trains: leave it out with --exclude",
                shortened(names),
            )

    def pieces(self) -> dict[str, Piece]:
        """This rank's rows of the trained state: model/NAME, and after a step optimizer/NAME/exp_avg and so on."""
        pieces: dict[str, Piece] = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            if self.by_rows:
                kept = {key: state[key] for key in ADAM_STATE if key in state}
            else:  # bitsandbytes' parameters share their tables, which a file of tensors cannot hold
                kept = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
            tensors = {f"model/{name}": parameter} | {f"optimizer/{name}/{key}": value for key, value in kept.items()}
            pieces |= {key: piece for key, tensor in tensors.items() if (piece := self._piece(tensor.detach()))}
        return pieces

    def restore(self, found: Checkpoint) -> None:
        """Put a checkpoint's state back, bit for bit, whatever number of processes wrote it."""
        for name, parameter in self.parameters.items():
            self._copy(parameter, found, f"model/{name}")
            if found.step and not self.by_rows:
                self.optimizer.state[parameter] = {"step": found.step, **self._state(name, parameter.device, found)}
            elif found.step:
                moments = {moment: torch.zeros_like(parameter) for moment in ADAM_STATE}
                for moment, tensor in moments.items():
                    self._copy(tensor, found, f"optimizer/{name}/{moment}")
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(found.step), device=parameter.device),
                    **moments,
                }

    def whole_state(self) -> dict[str, Tensor]:
        """The trained parameters and the saved buffers in full, by name, on rank 0; nothing on the others.

        Called by all ranks.
        """
        saved = self.model.state_dict().keys()  # by all: fully_shard cuts its root again, which the next pass gathers
        values: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensor = self._whole(parameter)
            if self.ranks.is_main:
                values[name] = tensor.cpu()
        if not self.ranks.is_main:
            return {}
        whole = {name: values[first] for name, first in self.names.items()}
        buffers = self.model.named_buffers(remove_duplicate=False)
        return whole | {name: buffer for name, buffer in buffers if name in saved}

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        tensor = parameter.detach()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _piece(self, tensor: Tensor) -> Piece | None:
        return Piece.whole(tensor) if self.ranks.is_main else None

    def _state(self, name: str, device: torch.device, found: Checkpoint) -> dict[str, Tensor]:
        """The tensors of the optimizer's state of a parameter, each whole."""
        prefix = f"optimizer/{name}/"
        state = {
            key.removeprefix(prefix): found.read(key, entry.shape).to(device)
            for key, entry in found.tensors.items()
            if key.startswith(prefix)
        }
        if OPTIMIZERS[self.kind].state not in state:
            raise ValueError(
                f"checkpoint {found.folder} has no state of this --optimizer for {name}: resume with the optimizer "
                "that the run began with"
            )
        return state

    def _copy(self, into: Tensor, found: Checkpoint, name: str) -> None:
        into.data.copy_(found.read(name, into.shape))


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
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.empty(sum(sizes) + len(extra), dtype=torch.float32, device=extra[0].device)  # filled in place
    *parts, numbers = flat.split([*sizes, len(extra)])
    for part, parameter in zip(parts, parameters, strict=True):
        assert parameter.grad is not None
        part.view_as(parameter).copy_(parameter.grad)
    numbers.copy_(torch.stack([number.float() for number in extra]))
    dist.all_reduce(flat)
    for part, parameter in zip(parts, parameters, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(part.view_as(parameter))
    return list(numbers)
