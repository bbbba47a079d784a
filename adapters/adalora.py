"""AdaLoRA: PEFT's, with its rank allocation in the training loop. Saved as plain AdaLoRA, which stock PEFT loads.

Paper: AdaLoRA, arXiv 2303.10512; sections and equations are the paper's. Letters: W (m, n) = out x in.

    W' = W + alpha / r  P diag(lambda) Q             P (m, r), Q (r, n) trained from noise, lambda (r,) from zero   (3)
    loss + gamma mean(|P^T P - I|, |Q Q^T - I|)      the mean over all of these matrices, as in PEFT's code         (4)
    budget: all ranks until step tinit, then falling with the cube of what is left, the target from T - tfinal on
    every deltaT steps, lambda = 0 for the triplets with the lowest importance beyond the budget                    (9)

The importance of a triplet comes from smoothed |w dL/dw| of its numbers and their uncertainty (section 3.2). PEFT
computes all of this. Here are the settings, the paper's shares of a run (tinit about a tenth, tfinal about half), the
state that a checkpoint holds, and one change: PEFT adds the penalty to the loss of each forward pass with labels, in
evaluation too. The training loop adds its gradient once a step, so losses are those of the task alone.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from peft import AdaLoraConfig
from torch import Tensor, nn

from adapters.schedule import Schedule

WARMUP, FINAL = (
    0.1,
    0.5,
)  # shares of the run before and after the allocation; 0.09 to 0.16 and 0.44 to 0.58 in the paper
# PEFT takes the names of the masks in a saved config for ranks by module, and warns that there are no such modules.
warnings.filterwarnings("ignore", r"The following rank_pattern keys did not match.*lora_E", RuntimeWarning)
# It also takes a weight that lost all of its directions for one that was sharded.
warnings.filterwarnings("ignore", r"Adapter '.*': \d+ LoRA tensor\(s\) have invalid shape: \S*:\(\d+, \d+\)")

ALLOCATIONS = 1000  # most allocations of a run by default: the paper allocates every 1 to 100 steps


@dataclass
class AdaLoRAConfig(AdaLoraConfig):
    """AdaLoRA (arXiv 2303.10512): r is the mean rank at the end, and training starts at 1.5 times that."""

    target_r: int | None = field(default=None, metadata={"help": "mean rank at the end; r if not given"})  # type: ignore[assignment]
    init_r: int | None = field(default=None, metadata={"help": "rank at the start; 1.5 target_r if not given"})  # type: ignore[assignment]
    tinit: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "steps before the first allocation; a tenth of the run if not given"}
    )
    tfinal: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "steps after the last allocation; half of the run if not given"}
    )
    deltaT: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "steps between two allocations; a thousandth of the run if not given"}
    )
    total_step: int | None = field(default=None, metadata={"help": "steps of the run, which the launcher fills in"})
    method: ClassVar[str] = "adalora"
    not_on_quantised: ClassVar[str] = ""  # why it cannot be trained on packed weights: PEFT's layer calls the base's

    def __post_init__(self) -> None:
        if self.target_r is None:
            self.target_r = self.r
        if self.init_r is None:
            self.init_r = math.ceil(1.5 * self.target_r)
        if not 1 <= self.target_r < self.init_r:
            raise ValueError(
                f"AdaLoRA lowers the rank from init_r to target_r (--rank, if it is not given): init_r {self.init_r} "
                f"must be above target_r {self.target_r}, and that at least 1"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"AdaLoRA's {name} is between 0 and 1, got {getattr(self, name)}")
        self.r = 8  # PEFT's default: it warns of any other, since its AdaLoRA does not use r
        steps, tinit, tfinal = self.total_step, self.tinit, self.tfinal
        self.total_step = steps or sys.maxsize  # PEFT refuses a config without; `for_steps` sets it
        self.tinit, self.tfinal = tinit or 0, tfinal or 0
        super().__post_init__()
        self.total_step, self.tinit, self.tfinal = steps, tinit, tfinal

    def for_steps(self, steps: int) -> Self:
        """Fill in the schedule of a run of this many steps. Raises ValueError if it leaves none for the allocation."""
        total = self.total_step = self.total_step or steps
        self.tinit = round(WARMUP * total) if self.tinit is None else self.tinit
        self.tfinal = round(FINAL * total) if self.tfinal is None else self.tfinal
        self.deltaT = max(1, total // ALLOCATIONS) if self.deltaT is None else self.deltaT
        if min(self.tinit, self.tfinal) < 0 or self.deltaT < 1:
            raise ValueError(
                f"AdaLoRA's tinit and tfinal are at least 0 and deltaT at least 1, got {self.tinit}, {self.tfinal} and "
                f"{self.deltaT}"
            )
        last = total - self.tfinal  # importance is measured in the steps before this one
        if last < 2 or self.tinit >= last:
            raise ValueError(
                f"AdaLoRA allocates ranks after step tinit {self.tinit} and until total_step {total} - tfinal "
                f"{self.tfinal} = {last}, which must be larger than tinit and at least 2: give more --max-steps, or "
                "--options with a smaller tinit or tfinal"
            )
        return self

    def schedule(self, model: nn.Module, adapter_name: str) -> RankAllocation:
        """What the training loop calls between steps."""
        return RankAllocation(model, adapter_name)


class RankAllocation(Schedule):
    """PEFT's rank allocator of an AdaLoRA model, with a state that can be saved."""

    def __init__(self, model: Any, adapter_name: str):
        self.tuner, self.adapter_name = model.base_model, adapter_name
        self.config, self.allocator = self.tuner.peft_config[adapter_name], self.tuner.rankallocator
        self.tuner.forward = self.tuner.model.forward  # without PEFT's penalty, which `before_update` adds once a step
        self.trained = {
            name: parameter
            for name, parameter in self.tuner.model.named_parameters()
            if "lora_" in name and adapter_name in name and parameter.requires_grad
        }

    def before_update(self) -> None:
        """gamma times the mean distance of P^T P and Q Q^T from the identity (equation 4)."""
        if not self.config.orth_reg_weight:
            return
        distances = []
        for name, parameter in self.trained.items():
            if "lora_A" in name or "lora_B" in name:
                gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                distances.append((gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).norm())
        (self.config.orth_reg_weight * torch.stack(distances).mean()).backward()

    def after_update(self, step: int) -> None:
        self.tuner.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        smoothed = {"sensitivity": self.allocator.exp_avg_ipt, "uncertainty": self.allocator.exp_avg_unc}
        state = {f"{kind}/{name}": value for kind, values in smoothed.items() for name, value in values.items()}
        kept = self.config.rank_pattern or {}
        return state | {f"kept/{name}": torch.tensor(each, dtype=torch.uint8) for name, each in kept.items()}

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        self.allocator.reset_ipt()
        for name, parameter in self.trained.items():
            if not 0 < step < self.config.total_step - self.config.tfinal:
                break  # the ranks are final, and importance is not measured any more
            for kind, into in (
                ("sensitivity", self.allocator.exp_avg_ipt),
                ("uncertainty", self.allocator.exp_avg_unc),
            ):
                value = state.get(f"{kind}/{name}")
                if value is None or value.shape != parameter.shape:
                    raise ValueError(f"the checkpoint has no {kind} of {name} as {tuple(parameter.shape)}")
                into[name] = value.to(parameter)
            self.allocator.ipt[name] = torch.zeros_like(parameter)  # of the last step, which the next one replaces
        kept = {name.removeprefix("kept/"): each for name, each in state.items() if name.startswith("kept/")}
        self.config.rank_pattern = {name: each.bool().tolist() for name, each in kept.items()} or None

    def summary(self) -> str:
        ranks = sorted(sum(kept) for kept in (self.config.rank_pattern or {}).values())
        if not ranks:
            return f"ranks: {self.config.init_r} on every weight, not allocated yet"
        return f"ranks after the allocation: {ranks[0]} to {ranks[-1]}, {sum(ranks) / len(ranks):.1f} on average"
