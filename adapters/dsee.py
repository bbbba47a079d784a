"""DSEE: a low-rank update and a few single entries, both trained.

Paper: DSEE, arXiv 2111.00160. Letters: W (m, n) = out x in, r the rank, N the number of entries.

    W' = W + s (U V + S)              U (m, r) from zero, V (r, n) from noise; S is zero but for N entries, from zero
    W ~= L + D, L of rank r, D sparse the split of the pretrained W; S's places are those of D's N largest entries

(section 3.2). The split is the alternation of the GreBsmo algorithm, L = Q Q^T (W - D) with Q from a QR of (W - D) V^T,
and D = what exceeds a threshold in W - L. The paper does not give the threshold; here it is the one that leaves N
entries, and L and D alternate ten times. As in the authors' code, s = alpha / r scales both parts; alpha is r.

The paper's third part, a pruning mask S1 on W itself for a faster inference, changes the base, which adapters never do:
prune the merged model. `S x` is computed as R (values * (C x)) with 0/1 matrices, which no order of additions changes.
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

ROUNDS = 10  # of the alternation; more do not move the places on the tests' weights


@dataclass
class DSEEConfig(TrainedConfig):
    """DSEE (arXiv 2111.00160): W' = W + alpha / r (U V + S), S with a few free entries."""

    entries: int = field(default=64, metadata={"help": "N: trained entries of S per weight"})
    alpha: float | None = field(default=None, metadata={"help": "the update is scaled by alpha / r; r if not given"})

    method = "dsee"
    reads_weights = True
    not_on_quantised = "the places of its entries come from the weights in full precision"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.entries) is not int or self.entries < 1:
            raise ValueError(f"DSEEConfig.entries is a whole number of at least 1, got {self.entries!r}")
        if self.alpha is None:
            self.alpha = float(self.r)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"DSEEConfig.alpha is a positive number, got {self.alpha}")

    def update(self, name: str, base: nn.Module, W: Tensor | None) -> SparseAndLowRank:
        return SparseAndLowRank(self, name, base, W)


class SparseAndLowRank(Update):
    """s (U V + S); rows and columns (N,) are the places of S's entries, and are saved."""

    rows: Tensor
    columns: Tensor

    def __init__(self, config: DSEEConfig, name: str, base: Any, W: Tensor | None):
        super().__init__()
        (m, n), device = matrix_shape(base, name), base.weight.device
        r, N = min(config.r, m, n), min(config.entries, m * n)
        assert config.alpha is not None
        self.scale = config.alpha / config.r
        self.U = parameter((m, r), device, std=0.0 if config.init_weights else 0.1)
        self.V = parameter((r, n), device, std=1 / math.sqrt(n))
        self.values = parameter((N,), device, std=0.0 if config.init_weights else 0.1)
        places = torch.zeros(N, dtype=torch.int64, device=device) if W is None else sparse_places(W, r, N)
        self.register_buffer("rows", (places // n).int())
        self.register_buffer("columns", (places % n).int())

    def delta(self) -> Tensor:
        A, B = self.lora()
        return B @ A

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora()
        return F.linear(F.linear(x.to(A.dtype), A), B)

    def lora(self) -> tuple[Tensor, Tensor]:
        """A = (V; C), B = s (U, R diag(values)): rank r + N."""
        (m, _), (_, n) = self.U.shape, self.V.shape
        C = F.one_hot(self.columns.long(), n).to(self.V.dtype)  # (N, n)
        R = F.one_hot(self.rows.long(), m).to(self.U.dtype)  # (N, m)
        return torch.cat([self.V, C]), self.scale * torch.cat([self.U, (R * self.values[:, None]).T], 1)


@torch.no_grad()
def sparse_places(W: Tensor, r: int, count: int) -> Tensor:
    """Flat indices (count,), in order, of the largest entries of D in W ~= L + D."""
    W = W.float()
    D = torch.zeros_like(W)
    V = torch.randn(r, W.shape[1], generator=torch.Generator().manual_seed(0)).to(W)
    for _ in range(ROUNDS):
        Q = torch.linalg.qr((W - D) @ V.T).Q
        V = Q.T @ (W - D)
        rest = W - Q @ V
        chosen = rest.abs().flatten().topk(count).indices
        bound = rest.flatten()[chosen[-1]].abs()
        D = rest.sign() * (rest.abs() - bound).clamp(min=0)  # soft thresholding
    return chosen.sort().values
