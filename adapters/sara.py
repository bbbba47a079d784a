"""SaRA: train the smallest entries of the weights, first all of them, then those that stayed small.

Paper: SaRA, arXiv 2409.06633, and its authors' code. Letters: W (m, n) = out x in, theta a threshold for all weights.

    W' = W + S, S zero where |W| >= theta      entries near zero matter least to the base, so these are free to learn
    from step p on: S is frozen where |W'| >= theta by then (progressive adjustment)
    loss + lambda |W'_M|_*                     nuclear norm of the trained entries' matrix W'_M, one weight each step

The paper gives theta (2e-3 for Stable Diffusion 1.5), whose meaning depends on the model; here theta is the one below
which a `share` of the adapted entries lies, unless it is given. Entries of the second phase keep the optimizer's
moments, where the authors' code makes a new optimizer. Their code has lambda = 0 and no second phase by default; here
p is half of the run and lambda 0. The nuclear norm visits the weights in turn, in their code one drawn at random. Saved
are the entries' places and changes, 12 bytes each.

The layer multiplies by S as a dense matrix that is made for the product and freed, so that a pass takes the time of two
base layers; only the entries have gradients, moments and room in memory (the paper's unstructured backpropagation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.schedule import Schedule
from adapters.shapes import matrix_shape
from adapters.trained import TrainedConfig, Update, UpdateLayer, parameter

SAMPLE = 1 << 22  # entries of all weights from which theta is estimated, evenly spaced


@dataclass
class SaRAConfig(TrainedConfig):
    """SaRA (arXiv 2409.06633): W' = W + S, S trained where |W| < threshold. r is not used."""

    share: float = field(default=0.05, metadata={"help": "of the entries that are trained, if threshold is not given"})
    threshold: float | None = field(default=None, metadata={"help": "theta: entries below it are trained"})
    progressive: float = field(
        default=0.5,
        metadata={"help": "share of the run after which entries that grew above theta are frozen; 1: never"},
    )
    nuclear: float = field(default=0.0, metadata={"help": "lambda: weight of the nuclear norm"})
    total_step: int | None = field(default=None, metadata={"help": "steps of the run, which the launcher fills in"})

    method = "sara"
    reads_weights = True
    low_rank = False
    not_on_quantised = "it trains the smallest entries of the weights, which quantisation rounds to zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("share", "progressive"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"SaRAConfig.{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"SaRAConfig.threshold is a positive number, got {self.threshold}")
        if not (math.isfinite(self.nuclear) and self.nuclear >= 0):
            raise ValueError(f"SaRAConfig.nuclear is at least 0, got {self.nuclear}")

    def prepare(self, weights: Callable[[], list[Tensor]]) -> None:
        """Set theta to the quantile of all adapted weights' entries at `share`."""
        if self.threshold is None and (found := weights()):
            every = max(1, sum(weight.numel() for weight in found) // SAMPLE)
            sample = torch.cat([weight.flatten()[::every].float().abs().cpu() for weight in found])
            self.threshold = float(sample.kthvalue(max(1, math.ceil(self.share * len(sample)))).values)

    def update(self, name: str, base: nn.Module, W: Tensor | None) -> SparseUpdate:
        return SparseUpdate(self, name, base, W)

    def for_steps(self, steps: int) -> Self:
        self.total_step = self.total_step or steps
        return self

    def schedule(self, model: nn.Module, adapter_name: str) -> Progression:
        return Progression(self, model, adapter_name)


class SparseProduct(torch.autograd.Function):
    """S x for x (..., n); S (m, n) has values (c,) at flat places (c,) and zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, values, places)
        ctx.shape = shape
        return F.linear(x, dense(values, places, shape))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, values, places = ctx.saved_tensors
        dx = g @ dense(values, places, ctx.shape) if ctx.needs_input_grad[0] else None
        of_matrix = g.flatten(0, -2).T @ x.flatten(0, -2)
        return dx, of_matrix.flatten().index_select(0, places), None, None


def dense(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix (m, n) with these values at these flat places."""
    return values.new_zeros(shape[0] * shape[1]).index_copy(0, places, values).view(shape)


class SparseUpdate(Update):
    """values (c,): changes of W's entries at the flat places (c,), which are saved."""

    places: Tensor

    def __init__(self, config: SaRAConfig, name: str, base: Any, W: Tensor | None):
        super().__init__()
        self.shape, device = matrix_shape(base, name), base.weight.device
        if W is None:
            count = (config.sizes or {}).get(name) or math.ceil(config.share * self.shape[0] * self.shape[1])
            places = torch.zeros(count, dtype=torch.int64, device=device)
        else:
            assert config.threshold is not None  # `prepare` set it
            places = (W.flatten().float().abs() < config.threshold).nonzero().flatten()
            if not len(places):
                raise ValueError(
                    f"{name} has no entry below the threshold {config.threshold:g}: raise it, or leave the layer out "
                    "(exclude_modules)"
                )
            config.sizes = {**(config.sizes or {}), name: len(places)}
        self.values = parameter((len(places),), device, std=0.0 if config.init_weights else 0.1)
        self.register_buffer("places", places)

    def delta(self) -> Tensor:
        return dense(self.values, self.places, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = SparseProduct.apply(x.to(self.values.dtype), self.values, self.places, self.shape)
        return y


class Progression(Schedule):
    """The second phase, and the nuclear norm."""

    def __init__(self, config: SaRAConfig, model: nn.Module, adapter_name: str):
        layers = [layer for layer in model.modules() if isinstance(layer, UpdateLayer) and adapter_name in layer.maps]
        self.config, self.layers = config, {layer.name: layer for layer in layers}
        self.updates: dict[str, Any] = {layer.name: layer.maps[adapter_name] for layer in layers}
        self.moving: dict[str, Tensor] = {}  # which entries still train, from the second phase on
        self.before: dict[str, Tensor] = {}
        self.step = 0

    @property
    def turn(self) -> int:
        """The last step of the first phase."""
        assert self.config.total_step is not None
        return round(self.config.progressive * self.config.total_step)

    @torch.no_grad()
    def before_update(self) -> None:
        """Add the nuclear norm's gradient U V^T, and no gradient to frozen entries."""
        if self.config.nuclear:
            name = list(self.updates)[self.step % len(self.updates)]  # the paper's code draws one
            update = self.updates[name]
            entries = self.base_entries(name) + update.values
            U, _, Vh = torch.linalg.svd(dense(entries, update.places, update.shape), full_matrices=False)
            update.values.grad += self.config.nuclear * (U @ Vh).flatten()[update.places]
        for name, moving in self.moving.items():
            values = self.updates[name].values
            values.grad *= moving
            self.before[name] = values.clone()

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        self.step = step
        for name, moving in self.moving.items():  # momentum and weight decay move frozen entries too
            values = self.updates[name].values
            values.copy_(torch.where(moving, values, self.before[name]))
        if step == self.turn < (self.config.total_step or 0):
            for name, update in self.updates.items():
                self.moving[name] = (self.base_entries(name) + update.values).abs() < self.config.threshold

    def base_entries(self, name: str) -> Tensor:
        """W's entries at the trained places of this layer (c,)."""
        return self.layers[name].matrix().flatten()[self.updates[name].places].float()

    def state(self) -> dict[str, Tensor]:
        return {f"moving/{name}": moving.to(torch.uint8) for name, moving in self.moving.items()}

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        self.step = step
        names = list(self.updates) if self.turn <= step and self.turn < (self.config.total_step or 0) else []
        if missing := [name for name in names if f"moving/{name}" not in state]:
            raise ValueError(f"the checkpoint does not hold which entries of {missing[0]} still train")
        self.moving = {name: state[f"moving/{name}"].bool().to(self.updates[name].places.device) for name in names}

    def summary(self) -> str:
        total = sum(len(update.places) for update in self.updates.values())
        text = f"{total:,} entries below {self.config.threshold:.3g} trained"
        if not self.moving:
            return text
        moving = sum(int(each.sum()) for each in self.moving.values())
        return f"{text}, {moving:,} of them after step {self.turn}"
