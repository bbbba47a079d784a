"""GradNormLoRP: AdamW in a low-rank subspace of weight-normalised gradients (arXiv 2412.19616, algorithm 1).

Each row of a weight W (m, n) is written as g_i v_i / |v_i|. The magnitudes g (m,) are trained whole; the gradient of
the directions V (m, n) is projected to rank r, as in GaLore (arXiv 2403.03507), and AdamW's moments live in the
projection: about r (m + 2 n) numbers of state for m <= n, instead of 2 m n. Weights stay dense, vectors get AdamW.

The paper reparametrises the module; here W itself stays the parameter, and each step computes g and V from it, takes
the step on both, and writes W back. Since V is only defined up to each row's length, v_i = W_i and g_i = |W_i|.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-8


class GradNormLoRP(torch.optim.Optimizer):
    """rank, scale: of the projected update. every: steps between two decompositions of the gradient."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        rank: int = 8,
        scale: float = 1.0,
        every: int = 250,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.rank, self.scale, self.every = rank, scale, every

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on all parameters with a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("step", torch.zeros((), dtype=torch.int64))
                state["step"] += 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if parameter.ndim == 2 and min(parameter.shape) > self.rank:
                    self._matrix(parameter, parameter.grad, state, group)
                else:
                    update = adam(parameter.grad.float(), state, "", group["betas"], int(state["step"]))
                    parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])

    def _matrix(self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        step, betas, lr = int(state["step"]), group["betas"], group["lr"]
        weight, grad = parameter.float(), grad.float()
        g = weight.norm(dim=1).clamp_min(EPS)  # (m,)
        unit = weight / g[:, None]
        along = (grad * unit).sum(1)  # (m,) the gradient of the magnitudes
        across = grad - along[:, None] * unit  # (m, n) that of the directions, where v_i = W_i

        wide = weight.shape[1] >= weight.shape[0]
        if "projection" not in state or (step - 1) % self.every == 0:
            left, _, right = torch.linalg.svd(across, full_matrices=False)
            state["projection"] = (left[:, : self.rank] if wide else right[: self.rank]).contiguous()
        projection = state["projection"]  # (m, r), or (r, n) if the weight is tall
        low = projection.T @ across if wide else across @ projection.T
        update = adam(low, state, "direction_", betas, step)
        direction = weight - lr * self.scale * (projection @ update if wide else update @ projection)
        g = g - lr * adam(along, state, "magnitude_", betas, step)
        parameter.copy_(g[:, None] * direction / direction.norm(dim=1, keepdim=True).clamp_min(EPS))


def adam(grad: Tensor, state: dict[str, Any], prefix: str, betas: tuple[float, float], step: int) -> Tensor:
    """AdamW's step for a learning rate of 1, without weight decay; moments are kept in state under the prefix."""
    first = state.setdefault(f"{prefix}exp_avg", torch.zeros_like(grad))
    second = state.setdefault(f"{prefix}exp_avg_sq", torch.zeros_like(grad))
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    size = (second / (1 - betas[1] ** step)).sqrt_().add_(EPS)
    return first / (1 - betas[0] ** step) / size
