"""IncreLoRA: low-rank updates whose ranks grow during the run, where they matter most.

Paper: IncreLoRA, arXiv 2308.12043, and its authors' code. Letters: W (m, n) = out x in.

    W' = W + alpha / rank  B diag(lambda) A        A (rank, n), B (m, rank) from N(0, 0.02^2), lambda (rank,) from zero
    score = S U, smoothed S of mean |delta W * dL / d(delta W)|, and U of |mean - S|        (section 3.2, as AdaLoRA's)
    loss + gamma mean(|A A^T - I|, |B^T B - I|)                                             gamma 0.1

Every weight starts at rank 1. After a warm-up, at every `interval` steps the `top_h` weights with the highest score
get `add` more directions, until the mean rank is r. A reserve of the next `add` directions of each weight learns in
advance: its a and b are trained as if lambda were 1e-5, and once it is called up lambda starts from there (section
3.3). New parts warm up their learning rate over `restart` steps.

Where this differs from the authors' code:
- The reserve's 1e-5 acts in the backward pass alone, so the start is the base model bit for bit.
- The mean of |delta W * gradient| is the paper's; the code divides the sum by sqrt(m n).
- The penalty is that of each weight's matrices A and B; the code applies it to each part that was added on its own.
- All directions exist from the start, `capacity` of them per weight, and those not called up yet stay at their first
  values. The optimizer's moments of new parts start at zero under the run's count of steps, which the warm-up covers.

While ranks grow, each weight's gradient dL / d(delta W) (m, n) is summed in float32, and over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.schedule import Schedule
from adapters.shapes import matrix_shape
from adapters.trained import TrainedConfig, Update, UpdateLayer, parameter

STD = 0.02  # of A and B at the start
ADVANCE = 1e-5  # lambda of the reserve
WARMUP, GROWN = 0.1, 0.5  # shares of the run before the first growth and until the last, by default
UNBORN = 1 << 40  # the step at which a direction that is not called up begins


@dataclass
class IncreLoRAConfig(TrainedConfig):
    """IncreLoRA (arXiv 2308.12043): r is the mean rank at the end, every weight starts at rank 1."""

    alpha: float = field(default=32.0, metadata={"help": "the update is scaled by alpha / rank; the authors' 16 or 32"})
    capacity: int | None = field(default=None, metadata={"help": "largest rank of one weight; 2 r if not given"})
    add: int | None = field(default=None, metadata={"help": "directions a weight gets at a time; r / 2 if not given"})
    top_h: int | None = field(
        default=None, metadata={"help": "weights that grow at a time; 2, or more if the run is too short for that"}
    )
    warmup: int | None = field(
        default=None, metadata={"help": "steps before ranks grow; a tenth of the run if not given"}
    )
    interval: int | None = field(
        default=None, metadata={"help": "steps between growths; such that the last is at half of the run if not given"}
    )
    restart: int | None = field(default=None, metadata={"help": "steps of a new part's warm-up; interval if not given"})
    beta1: float = field(default=0.85, metadata={"help": "smoothing of the importance"})
    beta2: float = field(default=0.85, metadata={"help": "smoothing of its uncertainty"})
    orth_reg_weight: float = field(default=0.1, metadata={"help": "gamma: weight of the orthogonality penalty"})
    total_step: int | None = field(default=None, metadata={"help": "steps of the run, which the launcher fills in"})

    method = "increlora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.capacity = 2 * self.r if self.capacity is None else self.capacity
        self.add = max(1, self.r // 2) if self.add is None else self.add
        if self.capacity < self.r:
            raise ValueError(f"IncreLoRA's capacity {self.capacity} is below r {self.r}, the mean rank at the end")
        for name in ("add", "top_h", "interval", "restart"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"IncreLoRA's {name} is at least 1, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"IncreLoRA's {name} is between 0 and 1, got {getattr(self, name)}")
        if not (math.isfinite(self.alpha) and self.alpha > 0 and self.orth_reg_weight >= 0):
            raise ValueError(
                f"IncreLoRA's alpha is above 0 and orth_reg_weight at least 0, got {self.alpha} and "
                f"{self.orth_reg_weight}"
            )

    def update(self, name: str, base: nn.Module, W: Tensor | None) -> Directions:
        return Directions(self, name, base)

    def for_steps(self, steps: int) -> Self:
        total = self.total_step = self.total_step or steps
        self.warmup = round(WARMUP * total) if self.warmup is None else self.warmup
        if self.warmup >= total:
            raise ValueError(
                f"IncreLoRA's ranks grow after step warmup {self.warmup}, but the run has {total} steps: give more "
                "--max-steps, or --options warmup=0"
            )
        return self

    def schedule(self, model: nn.Module, adapter_name: str) -> Growth:
        return Growth(self, model, adapter_name)


class Directions(Update):
    """alpha / rank  B diag(lambda) A of the first `rank` directions; the next `reserve` ones learn in advance."""

    def __init__(self, config: IncreLoRAConfig, name: str, base: Any):
        super().__init__()
        (m, n), device = matrix_shape(base, name), base.weight.device
        saved = (config.sizes or {}).get(name) if config.inference_mode else None
        assert config.capacity is not None
        assert config.add is not None
        self.rank, self.reserve = saved or 1, 0 if saved else min(config.add, min(m, n) - 1)
        self.capacity = min(config.capacity, m, n)
        total = saved or min(self.capacity + config.add, m, n)
        self.alpha = config.alpha
        self.A = parameter((total, n), device, STD)
        self.B = parameter((m, total), device, STD)
        self.values = parameter((total,), device, std=0.0 if config.init_weights else 10.0)
        self.gradient: Tensor | None = None  # dL / d(delta W) (m, n), summed here while there is one
        if not saved:
            config.sizes = {**(config.sizes or {}), name: self.rank}

    def lora(self) -> tuple[Tensor, Tensor]:
        """A (rank, n) and alpha / rank B diag(lambda) (m, rank)."""
        return self.A[: self.rank], self.alpha / self.rank * self.B[:, : self.rank] * self.values[: self.rank]

    def in_advance(self) -> tuple[Tensor, Tensor]:
        """The same of the reserve, (reserve, n) and (m, reserve)."""
        part = slice(self.rank, self.rank + self.reserve)
        return self.A[part], self.alpha / self.rank * ADVANCE * self.B[:, part]

    def delta(self) -> Tensor:
        (A, B), (a, b) = self.lora(), self.in_advance()
        reserve = b @ a
        return B @ A + (reserve - reserve.detach())

    def forward(self, x: Tensor) -> Tensor:
        (A, B), x = self.lora(), x.to(self.A.dtype)
        y = F.linear(F.linear(x, A), B)
        if not torch.is_grad_enabled():
            return y
        if self.reserve:
            a, b = self.in_advance()
            reserve = F.linear(F.linear(x, a), b)
            y = y + (reserve - reserve.detach())  # zero, with the reserve's gradients
        if (total := self.gradient) is not None and y.requires_grad:
            seen = x.detach().flatten(0, -2)

            def add_up(g: Tensor) -> None:
                total.addmm_(g.flatten(0, -2).T, seen)

            y.register_hook(add_up)
        return y

    def kept(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {
            "A": lambda whole: whole[: self.rank],
            "B": lambda whole: whole[:, : self.rank],
            "values": lambda whole: whole[: self.rank],
        }


class Growth(Schedule):
    """Importance of the weights, growth of their ranks, warm-up of new parts."""

    def __init__(self, config: IncreLoRAConfig, model: nn.Module, adapter_name: str):
        layers = [layer for layer in model.modules() if isinstance(layer, UpdateLayer) and adapter_name in layer.maps]
        self.config, self.step = config, 0
        self.updates: dict[str, Any] = {layer.name: layer.maps[adapter_name] for layer in layers}
        self.importance = {name: [0.0, 0.0] for name in self.updates}  # smoothed, and its uncertainty
        first = {name: update.rank + update.reserve for name, update in self.updates.items()}
        # The step after which a direction's a and b, and its lambda, begin to train.
        self.born = {name: begins(len(update.values), first[name]) for name, update in self.updates.items()}
        self.called = {name: begins(len(update.values), update.rank) for name, update in self.updates.items()}
        room = sum(update.capacity for update in self.updates.values())
        self.target = min(config.r * len(self.updates), room)
        assert config.total_step is not None
        assert config.warmup is not None
        assert config.add is not None
        steps, missing = max(1, int(GROWN * config.total_step) - config.warmup), self.target - self.total
        self.top_h = config.top_h or max(2, -(-missing // (config.add * steps)))
        self.interval = config.interval or max(1, steps // max(1, -(-missing // (config.add * self.top_h))))
        self.restart = config.restart or self.interval
        self.before: dict[str, list[Tensor]] = {}
        self.watch()

    @property
    def total(self) -> int:
        return sum(update.rank for update in self.updates.values())

    @property
    def growing(self) -> bool:
        return self.total < self.target

    def watch(self) -> None:
        """Have the gradients of all updates summed while ranks grow; after that the reserves are not needed either."""
        for update in self.updates.values():
            if not self.growing:
                update.reserve, update.gradient = 0, None
            elif update.gradient is None:
                update.gradient = torch.zeros(len(update.B), update.A.shape[1], device=update.A.device)

    def warmed(self, begun: Tensor, step: int) -> Tensor:
        """The share of its learning rate that each direction has in this step; those from the start have all of it."""
        return torch.where(begun < 0, 1.0, ((step - begun) / self.restart).clamp(0, 1))

    def before_update(self) -> None:
        self.add_penalty()
        if self.growing:
            self.measure()
        self.before = {
            name: [update.A.detach().clone(), update.B.detach().clone(), update.values.detach().clone()]
            for name, update in self.updates.items()
        }

    def add_penalty(self) -> None:
        """Add the gradient of gamma times the mean distance of A A^T and B^T B from the identity."""
        if not self.config.orth_reg_weight:
            return
        distances = []
        for update in self.updates.values():
            used = update.rank + update.reserve
            for rows in (update.A[:used], update.B[:, :used].T):
                distances.append((rows @ rows.T - torch.eye(used, device=rows.device)).norm())
        (self.config.orth_reg_weight * torch.stack(distances).mean()).backward()

    @torch.no_grad()
    def measure(self) -> None:
        """Smooth the importance by this step's gradients, which the ranks add up."""
        scores = []
        for update in self.updates.values():
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(update.gradient)
            scores.append((update.delta() * update.gradient).abs().mean())
            update.gradient.zero_()
        for name, score in zip(self.updates, torch.stack(scores).tolist(), strict=True):
            mean, uncertainty = self.importance[name]
            mean = self.config.beta1 * mean + (1 - self.config.beta1) * score
            uncertainty = self.config.beta2 * uncertainty + (1 - self.config.beta2) * abs(score - mean)
            self.importance[name] = [mean, uncertainty]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        self.step = step
        for name, update in self.updates.items():
            A, B, values = self.before[name]
            share, own = (self.warmed(begun[name], step).to(A) for begun in (self.born, self.called))
            if (share < 1).any():
                update.A.copy_(torch.where(share[:, None] == 1, update.A, A.lerp(update.A, share[:, None])))
                update.B.copy_(torch.where(share == 1, update.B, B.lerp(update.B, share)))
            if (own < 1).any():
                update.values.copy_(torch.where(own == 1, update.values, values.lerp(update.values, own)))
        self.before = {}
        assert self.config.warmup is not None
        if self.growing and step > self.config.warmup and step % self.interval == 0:
            self.grow(step)

    def grow(self, step: int) -> None:
        """Give the weights with the highest scores more directions."""
        open_ = [name for name, update in self.updates.items() if update.rank < update.capacity]
        scores = {name: self.importance[name][0] * self.importance[name][1] for name in open_}
        for name in sorted(open_, key=lambda name: -scores[name])[: self.top_h]:
            update, missing = self.updates[name], self.target - self.total
            add = min(self.config.add or 1, missing, update.capacity - update.rank, update.reserve)
            fresh = slice(update.rank, update.rank + add)
            update.values[fresh] = ADVANCE
            self.called[name][fresh] = step
            update.rank += add
            last = min(update.rank + (self.config.add or 1), len(update.values))
            newborn = slice(update.rank + update.reserve - add, last)
            self.born[name][newborn] = step
            update.reserve = last - update.rank
        self.config.sizes = {name: update.rank for name, update in self.updates.items()}
        self.watch()

    def state(self) -> dict[str, Tensor]:
        state = {"importance": torch.tensor(list(self.importance.values()), dtype=torch.float64)}
        for name, update in self.updates.items():
            state[f"ranks/{name}"] = torch.tensor([update.rank, update.reserve])
            state |= {f"born/{name}": self.born[name], f"called/{name}": self.called[name]}
        return state

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        missing = [name for name in self.updates if f"ranks/{name}" not in state]
        if missing or "importance" not in state:
            raise ValueError(f"the checkpoint does not hold the ranks of {len(missing)} weights, or their importance")
        self.step = step
        self.importance = dict(zip(self.updates, state["importance"].tolist(), strict=True))
        for name, update in self.updates.items():
            update.rank, update.reserve = state[f"ranks/{name}"].tolist()
            self.born[name], self.called[name] = state[f"born/{name}"].clone(), state[f"called/{name}"].clone()
        self.config.sizes = {name: update.rank for name, update in self.updates.items()}
        self.watch()

    def summary(self) -> str:
        ranks = sorted(update.rank for update in self.updates.values())
        return (
            f"ranks: {ranks[0]} to {ranks[-1]}, {self.total / len(ranks):.1f} on average (aim {self.config.r}), "
            f"{self.top_h} weights grew every {self.interval} steps"
        )


def begins(count: int, first: int) -> Tensor:
    """The steps after which directions begin (count,): -1 for the first ones, which train from the start."""
    steps = torch.full((count,), UNBORN)
    steps[:first] = -1
    return steps
