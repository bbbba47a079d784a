"""ZeRO-2 and ZeRO-3 through DeepSpeed's engine. Imported only by a run that uses it: DeepSpeed takes seconds to import.

    zero2   gradients and optimizer state spread over all processes; each holds the whole base
    zero3   the base and the frozen factors as well: each parameter flat, cut into equal parts

On its first use DeepSpeed compiles small operators, which needs g++ and ninja. `bf16.enabled` stays false: true would
round the float32 cores. Every parameter then keeps its dtype. ZeRO-2's engine broadcasts the base from rank 0 once at
the start, though all ranks hold the same values. A ZeRO-3 model is filled without communication: see `FlatParts`.

DeepSpeed's own checkpoints load on the same number of processes only. We write ours: the trained state, gathered.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from launcher.config import OptimizerConfig
from launcher.engines.engine import ModelSource, NonFinite
from launcher.engines.experts import expert_lists, refuse
from launcher.engines.registry import EngineInfo, give_first
from launcher.main_memory import map_large_blocks
from launcher.models.fill import fill
from launcher.models.skeleton import skeleton
from launcher.processes import Ranks, open_alone

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads this variable itself
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from launcher.engines.replicated import ADAM_STATE, Replicated  # noqa: E402
from launcher.training.checkpoint import Checkpoint, Piece  # noqa: E402


def settings(config: OptimizerConfig, ranks: Ranks, stage: int, *, cpu_offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: backward() accumulates and step() updates, so only the loop counts micro-batches.

    cpu_offload: keep the optimizer's state in main memory, at stage 3 the parameters too.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    for part in ("optimizer", "param")[: stage - 1] if cpu_offload else ():
        zero[f"offload_{part}"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config.batch_size // ranks.world_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }


class Zero2(Replicated):
    """DeepSpeed's engine behind our loop."""

    stage = 2

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, ranks: Ranks, info: EngineInfo, *, cpu_offload: bool = False
    ):
        super().__init__(model, config, ranks, info)
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in self.parameters.values()}
        if dtypes != {"float32"}:
            raise ValueError(
                f"--sharding {info.name} trains float32 parameters, these are {', '.join(sorted(dtypes))}: give "
                f"--dtype float32, or {give_first(lambda other: other.holds_base == info.holds_base)}"
            )
        if ranks.world_size > 1:
            refuse(expert_lists(model, trained=True), "DeepSpeed mixes their gradients up")
        open_alone(next(model.parameters()).device)
        self._watch()
        how = settings(config, ranks, self.stage, cpu_offload=cpu_offload)
        self.forward: Any = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=how, dist_init_required=False
        )[0]

    def backward(self, loss: Tensor) -> None:
        self.forward.backward(loss * self.loss_scale)

    def update(self, learning_rate: float, numbers: Sequence[Tensor] = ()) -> list[float]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        found = torch.stack(list(numbers)).tolist() if numbers else []  # DeepSpeed waits for the device itself
        if not all(map(math.isfinite, found)):
            raise NonFinite(self.nonfinite(), found)
        self.forward.step()  # DeepSpeed takes no step if a gradient is NaN or infinite, and drops all gradients
        norm = float(self.forward.get_global_grad_norm())
        if self.forward.optimizer.overflow or not math.isfinite(norm):
            raise NonFinite(self.nonfinite(), found)
        self._nan.zero_()
        return [norm, *found]

    def nonfinite(self) -> list[str]:
        found = super().nonfinite()
        self._nan.zero_()
        return found

    def _nonfinite(self) -> list[Tensor]:
        return list(self._nan.float())

    def _reached(self) -> list[bool]:
        return [name in self._seen for name in self.parameters]

    def _watch(self) -> None:
        """Record for each trained parameter whether it got a gradient, and whether that was finite.

        DeepSpeed flattens and cuts gradients and gives no access to them, so hooks check them in the backward pass.
        """
        self._seen: set[str] = set()
        device = next(iter(self.parameters.values())).device
        self._nan = torch.zeros(len(self.parameters), dtype=torch.bool, device=device)

        def note(gradient: Tensor, at: int, name: str) -> None:
            self._seen.add(name)
            self._nan[at] |= (~gradient.isfinite()).any().to(self._nan.device)

        for at, (name, parameter) in enumerate(self.parameters.items()):
            parameter.register_hook(functools.partial(note, at=at, name=name))

    def pieces(self) -> dict[str, Piece]:
        """The whole trained state, for rank 0 to write. Called by all ranks."""
        whole: dict[str, Piece] = {}
        for name, parameter in self.parameters.items():
            parts = {f"model/{name}": safe_get_full_fp32_param(parameter)}
            parts |= {f"optimizer/{name}/{m}": safe_get_full_optimizer_state(parameter, m) for m in ADAM_STATE}
            if self.ranks.is_main:
                whole |= {key: Piece.whole(tensor) for key, tensor in parts.items()}
        return whole

    def restore(self, found: Checkpoint) -> None:
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            value = found.read(f"model/{name}", shapes[name]).to(parameter.device)
            if self.stage == 3:
                # a pass before this one may have gathered it, and small ones stay gathered
                parameter.partition()  # type: ignore[attr-defined]
                part = _part(parameter, value)
                parameter.ds_tensor.data.copy_(part)  # type: ignore[attr-defined]
                safe_set_local_fp32_param(parameter, part)
            else:
                parameter.data.copy_(value)
                safe_set_full_fp32_param(parameter, value)
        if not found.step:
            return
        # The first step would make the moments. This engine has taken none yet.
        zero = self.forward.optimizer
        flat_parts = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flat_parts:
            moments = {moment: torch.zeros_like(flat) for moment in ADAM_STATE}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(found.step), device=flat.device), **moments}
        if self.stage == 2:
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for moment in ADAM_STATE:
                value = found.read(f"optimizer/{name}/{moment}", shapes[name]).to(parameter.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, _part(parameter, value), moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter)


class Zero3(Zero2):
    """The base and the frozen factors are spread too."""

    stage = 3

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        refuse(expert_lists(base, trained=False), "DeepSpeed gathers parts of different experts as one weight")

    @classmethod
    def load(cls, source: ModelSource, info: EngineInfo) -> nn.Module:
        """The model on meta, then filled with this rank's part of every parameter from the checkpoint."""
        config, offload = source.config, source.config.run.cpu_offload
        open_alone(source.device)
        if info.maps_large_blocks and source.device.type == "cpu":
            map_large_blocks()
        model = skeleton(config.model, source.folder, source.adapter, **source.how)
        parts = FlatParts(config.optimizer, source.ranks, source.device, cpu_offload=offload)
        fill(model, source.folder, source.factors, parts, source.device, source.progress, cpu_offload=offload)
        return model


class FlatParts:
    """Which rows a rank reads for its part of a ZeRO-3 parameter, and the parameter made of them.

    Each parameter is flattened, padded and cut into equal parts. DeepSpeed itself loads or broadcasts whole tensors;
    here a rank reads the rows that overlap its part, without communication. Making a parameter allocates it whole for
    a moment; on a CPU only the pages of the part are written.
    """

    def __init__(self, config: OptimizerConfig, ranks: Ranks, device: torch.device, *, cpu_offload: bool):
        self.ranks, self.device = ranks, device
        how = settings(config, ranks, 3, cpu_offload=cpu_offload)
        self.maker = deepspeed.zero.Init(config_dict_or_path=how)

    def rows(self, parameter: Tensor) -> slice:
        first, last, width = self._span(parameter)
        return slice(first // width, -(-last // width))

    def place(self, like: nn.Parameter, rows: Tensor) -> nn.Parameter:
        first, last, width = self._span(like)
        made: Any = nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device=self.device), like.requires_grad)
        self.maker._convert_to_deepspeed_param(made)
        made.partition()
        start = first - first // width * width
        made.ds_tensor.data.zero_()
        made.ds_tensor.data[: last - first].copy_(rows.reshape(-1)[start : start + last - first])
        return made

    def keep(self, drawn: nn.Parameter) -> nn.Parameter:
        return self.place(drawn, drawn.data[self.rows(drawn)])

    def _span(self, parameter: Tensor) -> tuple[int, int, int]:
        """First and last + 1 of this rank's numbers in the flat parameter, and how many make a row."""
        count = parameter.numel()
        part = -(-count // self.ranks.world_size)
        first = min(self.ranks.rank * part, count)
        return first, min(first + part, count), math.prod(parameter.shape[1:])


def _part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor, padded like the parameter's part."""
    part = torch.zeros_like(parameter.ds_tensor)
    mine = whole.reshape(-1)[parameter.ds_zero_partition_rank * part.numel() :][: part.numel()]
    part[: mine.numel()] = mine
    return part
