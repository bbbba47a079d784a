"""LoLDU: train only a diagonal between the frozen triangular factors of the weight. Maths, factors and configs.

Paper: LoLDU, arXiv 2410.13618. Letters: W (m, n) = out x in, k = min(m, n), r <= k the rank, y0 = W x.

    W = P L diag(d) U                                 partially pivoted LU; L and U have unit diagonals
    W' = W + P L_r diag(delta) U_r                    delta = scale * (z - z0): r trained numbers, zero at the start
    U_r x = diag(1/d_r) L11^-1 (W x)[pivots]          because the first r rows of P^T W are L11 diag(d_r) U_r

The adapted layer reads its own base output: y = y0 + Write (delta * (Read y0[pivots])), with Write = P L_r (m, r)
and Read = diag(1/d_r) L11^-1 (r, r). U_r is never stored and W is never written. The paper's residual form,
(W - s P L_r diag(z0) U_r) + s P L_r diag(z) U_r, is the same function.

Pivoting at column j looks at columns 1..j alone, so P, L_r and d_r are those of the panel W[:, :r]: m r^2 operations
and m r numbers read, instead of m n k and m n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.base import DenseCore, FactorConfig, Factorization
from adapters.factors import Factors, fresh_draws, signs

COLUMNS = 64  # of a panel, moved at a time: they fit the processor's cache, and no second panel is in memory
SAMPLE, VECTORS = 128, 4  # rows and random vectors on which `lu_misfit` compares factors with a weight
NORMALIZED_LEARNING_RATE = 3e-2  # trained best if directions have norm one

# The paper's starting values of z that keep the function. Our core is the difference z - z0, so all of these start at
# zero. (In the paper they differ in weight decay, which pulls z towards zero; ours pulls towards the base model.)
KEEPS_FUNCTION = ("lu", "uniform", "normal", "constant")
# The paper's other starts keep the residual but replace d: the network is destroyed at step 0 (relative output error
# 0.98 to 21.6).
BREAKS_FUNCTION = ("s_uniform", "s_normal", "ones", "zeros")


@dataclass(frozen=True)
class PanelLU(Factorization):
    """LU of the panel W[:, :r]. normalize divides each direction by its norm, which reads all of W."""

    normalize: bool = False

    name = "loldu"
    algorithm = ("loldu-panel-lu", 3)
    # Measured on two small Llamas and Gaussian weights at ranks 1, 8, 64 and full: bf16 stays below 0.05, int8 below
    # 0.1 on 96 % of the weights, NF4 exceeds it on nearly all from rank 8 up and another base on all. A bound of 0.25
    # cost an NF4 base 70 % of what a trained rank 8 had gained, one of 1 all of it at rank 64, and full rank was left
    # worse than no adapter (loss 5.1, 3.6, true factors 3.2).
    rebuilt_bound = 0.1

    def needs_whole_weight(self, *, embedding: bool = False) -> bool:
        return self.normalize or embedding

    def panel(self, W: Tensor, r: int | None) -> Tensor:
        return W[:, :r]

    def factors(
        self,
        panel: Tensor,
        r: int | None,
        *,
        rows: Callable[[Tensor], Tensor],
        embedding: bool = False,
        saved: Factors | None = None,
    ) -> Factors:
        pivots = saved.pivots if saved else None
        return loldu_factors(panel, rows, pivots=pivots, normalize=self.normalize, embedding=embedding)

    def cost(self, shape: tuple[int, int], r: int, *, embedding: bool = False) -> float:
        """m r^2 for the panel's LU, n r^2 for norms, and m n because a disk reads whole pages anyway."""
        m, n = shape
        return m * r**2 + m * n + (n * r**2 if self.needs_whole_weight(embedding=embedding) else 0)

    def residual(self, panel: Tensor, factors: Factors, *, embedding: bool = False) -> float:
        """max |L11 diag(d) L11^-1 C - C| / max |C| for up to 64 columns C of panel[pivots], first and last included.

        diag(1/d) L11^-1 is the read map.
        """
        pivots, r = factors.pivots.long(), len(factors.values)
        some = torch.linspace(0, r - 1, min(r, 64), device=pivots.device).long()
        if embedding:
            C, square = panel[pivots[some]].T.to(factors.read), factors.write[:r]
        else:
            C, square = panel[pivots[:, None], some].to(factors.read), factors.write.T.index_select(1, pivots).T
        scale = square.diagonal() * factors.read.diagonal()  # 1/d; divided by the norms if normalize is set
        again = square @ (factors.read @ C / scale[:, None])
        return float((again - C).abs().max() / C.abs().max())

    def misfit(self, W: Tensor, factors: Factors, *, embedding: bool = False) -> str | None:
        return lu_misfit(W, factors, normalize=self.normalize, embedding=embedding)

    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        return rebuilt_error(W[:, : len(saved.pivots)], saved.pivots, saved.values)


@dataclass
class LoLDUConfig(FactorConfig):
    """LoLDU (arXiv 2410.13618): W' = W + scale P L_r diag(delta) U_r, delta (r,) trained from zero."""

    init_delta: str = field(
        default="lu",
        metadata={"help": f"the paper's start of z; those that keep the function: {', '.join(KEEPS_FUNCTION)}"},
    )
    normalize_directions: bool = field(
        default=False, metadata={"help": "divide each direction by its norm, so that one learning rate suits all"}
    )

    method = "loldu"
    through_write = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_delta not in KEEPS_FUNCTION:
            why = "replaces the pretrained function at step 0" if self.init_delta in BREAKS_FUNCTION else "is unknown"
            raise ValueError(f"init_delta={self.init_delta!r} {why}; choose one of {', '.join(KEEPS_FUNCTION)}")

    def factorization(self) -> PanelLU:
        return PanelLU(normalize=self.normalize_directions)

    @property
    def usual_learning_rate(self) -> float | None:
        return NORMALIZED_LEARNING_RATE if self.normalize_directions else 1e-3


@dataclass
class LoLDUXSConfig(DenseCore, LoLDUConfig):
    """LoRA-XS's core between LoLDU's directions: W' = W + scale P L_r R U_r, R (r, r) trained from zero."""

    method = "lolduxs"

    @property
    def usual_learning_rate(self) -> float | None:
        return NORMALIZED_LEARNING_RATE if self.normalize_directions else None


def lu_of_panel(panel: Tensor, pivots: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """LU of a panel W[:, :r] (m, r): P L_r (m, r), the upper triangle diag(d) U11 (r, r), the pivot rows (r,) int32.

    With pivots given, those rows are eliminated in that order: in another precision the same base may choose other
    rows, and a saved core belongs to these. Computed in float64 for a float64 panel, else in float32.

    Raises ValueError for NaN or infinite entries, a zero pivot, or pivots that do not fit the panel.
    """
    panel, (m, r), wide = panel.detach(), panel.shape, torch.promote_types(panel.dtype, torch.float32)
    low, high = panel.aminmax()  # either is NaN if any number is
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(panel)).sum())
        raise ValueError(f"{bad} of the {panel.numel()} numbers in its first {r} columns are NaN or infinite")
    # LAPACK works by columns and in place: one copy of the panel in that order, which becomes P L_r
    lower = torch.empty(r, m, dtype=wide, device=panel.device).T
    for at in range(0, r, COLUMNS):
        lower.T[at : at + COLUMNS] = panel[:, at : at + COLUMNS].to(wide).T
    swaps, info = (torch.empty(size, dtype=torch.int32, device=panel.device) for size in (r, ()))
    torch.linalg.lu_factor_ex(lower, out=(lower, swaps, info))
    order = _permutation(swaps, m)
    if pivots is None or pivots.tolist() == order[:r].tolist():
        pivots, upper, place = order[:r], lower[:r].triu(), order.argsort()
        lower[:r].tril_(-1).fill_diagonal_(1)
        for columns in lower.T.split(COLUMNS):
            columns.copy_(columns.index_select(1, place))
    else:
        pivots = pivots.to(panel.device, torch.long)
        if not len(set(pivots.tolist())) == len(pivots) == r or int(pivots.min()) < 0 or int(pivots.max()) >= m:
            raise ValueError(f"its {len(pivots)} saved pivots are not {r} different rows out of {m}")
        square = _eliminate(panel[pivots].to(wide))
        upper = square.triu()
        lower = torch.linalg.solve_triangular(upper, panel.to(wide), upper=True, left=False)
        lower[pivots] = square.tril(-1).fill_diagonal_(1)
    tiny = m * torch.finfo(wide).eps * largest
    zeros = (~(upper.diagonal().abs() > tiny)).nonzero()  # written so that NaN counts
    if len(zeros):
        raise ValueError(
            f"zero pivot in column {int(zeros[0])}: the columns up to there depend on each other, so it has no factors "
            f"with unit diagonals beyond rank {int(zeros[0])}"
        )
    return lower, upper, pivots.to(torch.int32)


def loldu_factors(
    panel: Tensor,
    rows: Callable[[Tensor], Tensor],
    *,
    pivots: Tensor | None = None,
    normalize: bool = False,
    embedding: bool = False,
) -> Factors:
    """LoLDU's factors of W (m, n) from its panel W[:, :r]; probe is left empty.

    rows(pivots) returns W[pivots] (r, n); it is called only if those are needed. normalize divides each direction by
    its two norms, so that one learning rate suits all (they differ about 100 times). For an embedding, whose output is
    a row of W, the two sides change places: it reads its first r output features and writes through U_r^T (n, r).
    """
    lower, upper, pivots = lu_of_panel(panel, pivots)
    d, square = upper.diagonal().clone(), lower.T.index_select(1, pivots).T  # L11, by columns: quicker than by rows
    write, read = lower, torch.eye(len(d)).to(upper).T
    torch.linalg.solve_triangular(square, read, upper=False, unitriangular=True, left=False, out=read)
    read /= d[:, None]
    if normalize or embedding:
        right = (read @ rows(pivots).to(read)).triu_()  # U_r (r, n); below its diagonal there is rounding alone
    if embedding:
        write, read = right.T, torch.linalg.solve_triangular(upper, torch.eye(len(d)).to(upper), upper=True).T
    if normalize:
        norms = (lower.norm(dim=0), right.norm(dim=1))
        written, reads = norms[::-1] if embedding else norms
        write, read = write / written, read / reads[:, None]
    return Factors(write, read.contiguous(), pivots, d.float(), torch.zeros(32, dtype=torch.uint8))


def lu_misfit(W: Tensor, factors: Factors, *, normalize: bool = False, embedding: bool = False) -> str | None:
    """Why these are not the factors of W (m, n); None if they agree on SAMPLE rows and on VECTORS random vectors.

    Read is lower triangular, and C = W[pivots, :r] has one LU: so Read C is upper triangular only for the right Read.
    Then W[:, :r] w = Write diag(d) (Read C w) for a random w only for the right Write. Costs O(r^2 + SAMPLE r).
    """
    write, read, pivots, d, _ = (part.cpu() for part in factors)
    pivots, read, r, eps = pivots.long(), read.float(), len(d), 64 * torch.finfo(torch.float32).eps
    draw = fresh_draws()
    if len(set(pivots.tolist())) < r:
        return "it chooses a row twice"
    chosen = W[pivots, : None if normalize or embedding else r].float()
    some = torch.randperm(len(write), generator=draw)[:SAMPLE].sort().values
    if embedding:  # the two sides change places: its panel is W[pivots]^T
        C, square, panel = chosen[:, :r].T, write[:r].float(), chosen[:, some].T
    else:
        C, square, panel = chosen[:, :r], write[pivots].float(), W[some, :r].float()
    if read.triu(1).any() or square.triu(1).any():
        return "its maps are not triangular"
    written, reads = square.diagonal(), d * read.diagonal()  # one over the norms, or one
    norms = torch.cat([written, reads])
    if not (norms > 0).all() or (not normalize and (norms - 1).abs().max() > 0.01):
        return "its diagonals are not those of an LU"
    right = (read * C.T).sum(1)  # the diagonal of Read C
    if ((right - reads).abs() > 0.02 * reads + eps * (read * C.T).abs().sum(1)).any():
        return "its read map is not that of the weight"
    for w in torch.randn(VECTORS, r, generator=draw):
        left = (C * w).cumsum(1)[:, :-1].T  # row i: C[:, :i+1] w[:i+1], which Read's row i+1 must map to zero
        parts = read[1:] * left
        if (parts.sum(1).abs() > 0.01 * parts.norm(dim=1) + eps * parts.abs().sum(1)).any():
            return "its read map is not that of the weight"
    w = torch.randn(r, VECTORS, generator=draw)
    v, rows = (d / (written * reads))[:, None] * (read @ (C @ w)), write[some].float()
    y, size = panel @ w, (rows.square() @ v.square()).sqrt()
    if ((rows @ v - y).abs() > 0.1 * size + 1e-3 * y.abs().max()).any():
        return "it does not multiply back to the weight"
    lower = (W[some[:16] % len(W), :r].float() @ read.T) / reads if embedding else rows / written
    if lower.abs().max() > 1.01 + (eps * size.max() if embedding else 0):
        return "its pivots are not the largest numbers of their columns"
    if normalize:
        sketch = chosen @ signs(chosen.shape[1], 64)  # keeps norms to some 10 %
        other = (read @ sketch).norm(dim=1) / 8 if not embedding else torch.ones(1)
        norms = torch.cat([write.float().norm(dim=0), other])
        if norms.min() < 0.5 or norms.max() > 2:
            return "its directions do not have norm one"
    return None


def rebuilt_error(panel: Tensor, pivots: Tensor, values: Tensor) -> float:
    """Estimated error of factors rebuilt from this panel (m, r) against the saved ones, from d_r (r,) and L alone.

    The relative distance of the two d_r, plus max |L| - 1. Partial pivoting keeps |L| <= 1, so growth shows that the
    saved rows are no longer the right ones to eliminate: L and the read map are then off by more than d_r shows.
    """
    lower, upper, _ = lu_of_panel(panel, pivots)
    values = values.to(upper)  # saved ones are in main memory while an adapter is loaded
    return float((upper.diagonal() - values).norm() / values.norm() + lower.abs().max() - 1)


def _permutation(swaps: Tensor, m: int) -> Tensor:
    """LAPACK's successive swaps (r,), counted from 1, as one order of the m rows; lu_unpack would build P as m x m."""
    order = list(range(m))
    for i, j in enumerate((swaps - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order, device=swaps.device)


def _eliminate(square: Tensor) -> Tensor:
    """LU of a square matrix without pivoting, packed in one (torch has that on CUDA alone); recursive, so in GEMMs."""
    n = len(square)
    if n == 1:
        return square.clone()
    h = n // 2
    first = _eliminate(square[:h, :h])
    above = torch.linalg.solve_triangular(first, square[:h, h:], upper=False, unitriangular=True)
    below = torch.linalg.solve_triangular(first.triu(), square[h:, :h], upper=True, left=False)
    rest = _eliminate(square[h:, h:] - below @ above)
    return torch.cat([torch.cat([first, above], 1), torch.cat([below, rest], 1)])
