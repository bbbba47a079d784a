"""FLoRA: a small core tensor, and a factor for each dimension of the weight (Tucker). Linear layers and convolutions.

Paper: FLoRA, arXiv 2405.14739; settings from its authors' code. Letters: W (m, n) = out x in, or (m, c, h, w).

    linear        W' = W + s A G B^T                    A (m, r1), G (r1, r2), B (n, r2)
    convolution   W' = W + s G x1 A1 x2 A2 x3 A3 x4 A4  G (r1, r2, r3, r4), Ak (the k-th dimension, rk)

(section 3; xk is the product along dimension k.) Everything is trained: G from zero, the factors from Kaiming's normal
distribution with a = sqrt(3), that is N(0, 1 / (2 r)). r1 = r2 = r, and r3 = r4 = `kernel_rank`, each at most its
dimension. The authors' example of a convolution has s = 4 and ranks 16, 16, 2, 2; that of a linear layer was not
found, and has the same s here.

Written as a matrix (m, c h w), a convolution's update is s A1 times the rest, whose rank is at most r1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.shapes import matrix_shape
from adapters.trained import TrainedConfig, Update, parameter


@dataclass
class FLoRAConfig(TrainedConfig):
    """FLoRA (arXiv 2405.14739): W' = W + scale G x1 A1 x2 A2 ..., a Tucker decomposition of the update."""

    kernel_rank: int = field(default=2, metadata={"help": "ranks of the height and width of a convolution's kernel"})
    scale: float = field(default=4.0, metadata={"help": "factor of the whole update"})

    method = "flora"
    convolutions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.kernel_rank) is not int or self.kernel_rank < 1:
            raise ValueError(f"FLoRAConfig.kernel_rank is a whole number of at least 1, got {self.kernel_rank!r}")
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"FLoRAConfig.scale is a finite number other than 0, got {self.scale}")

    def update(self, name: str, base: nn.Module, W: Tensor | None) -> Tucker:
        return Tucker(self, name, base)


class Tucker(Update):
    """s G x1 A1 x2 A2 ...: core is G, factors[k] the matrix of dimension k."""

    def __init__(self, config: FLoRAConfig, name: str, base: Any):
        super().__init__()
        self.scale, self.convolution = config.scale, isinstance(base, nn.Conv2d)
        self.shape = tuple(base.weight.shape) if self.convolution else matrix_shape(base, name)
        if self.convolution:
            if base.padding_mode != "zeros":
                raise ValueError(
                    f"{name} pads with padding_mode={base.padding_mode}; flora supports zeros: leave the layer out "
                    "(exclude_modules)"
                )
            self.how = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        device, most = base.weight.device, (config.r, config.r, config.kernel_rank, config.kernel_rank)
        ranks = tuple(min(r, size) for r, size in zip(most, self.shape, strict=False))
        self.core = parameter(ranks, device, std=0.0 if config.init_weights else 0.1)
        factors = [
            parameter((size, r), device, math.sqrt(1 / (2 * r))) for size, r in zip(self.shape, ranks, strict=True)
        ]
        self.factors = nn.ParameterList(factors)

    def delta(self) -> Tensor:
        A, B = self.lora()
        return B @ A

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora()
        x = x.to(A.dtype)
        if self.convolution:
            return F.conv2d(x, (B @ A).view(self.shape), **self.how)
        return F.linear(F.linear(x, A), B)

    def lora(self) -> tuple[Tensor, Tensor]:
        """A = G along all dimensions but the first (r1, n or c h w), B = s A1 (m, r1)."""
        rest = self.core
        for dimension in range(1, len(self.factors)):
            rest = torch.tensordot(rest, self.factors[dimension], dims=([1], [1]))  # the product goes to the end
        return rest.flatten(1), self.scale * self.factors[0]
