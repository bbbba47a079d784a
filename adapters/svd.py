"""SVFit and its relatives: frozen factors from the leading singular vectors of the weight. Maths, factors and configs.

Letters: W (m, n) = out x in, k = min(m, n), r <= k the rank, y0 = W x. The factor scale is left out of the formulas.

    W = U diag(s) V^T                          s descending; the largest entry of each u_i is positive
    V_r^T x = diag(1/s_r) U_r^T (W x)          because U_r^T W is diag(s_r) V_r^T

    SVFit (arXiv 2409.05926)      W' = W + U_r diag(delta) V_r^T         delta = s' - s: r trained numbers
    SVFT, banded (2405.19597)     W' = W + U_r M V_r^T                   M: the diagonals -b .. b
    LoRA-XS (2405.17604)          W' = W + U_r R diag(s_r) V_r^T         R: r x r

All start at zero. The adapted layer reads its own base output through the matrix it writes through: SVFit's is y = y0 +
U_r (delta * h) with h = (U_r^T y0) / s_r, and LoRA-XS needs no division. V_r is never stored and W is never written:
r m frozen numbers. Directions have norm one, so delta has the unit of W's singular values, while R has none. At r = k
SVFit is SVFT-plain and SVF (2206.06122). LoRA-XS's s_r is placed as in its authors' code.

Unlike LU, which needs a panel, leading singular vectors need the whole weight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapters.base import DenseCore, FactorConfig, Factorization
from adapters.factors import Factors, fresh_draws, signs

log = logging.getLogger(__name__)

ALGORITHMS = ("auto", "exact", "block")
BLOCK_ERROR = 0.01  # largest angle by which a direction of `leading_block` may be off
SAMPLE = 128  # rows on which `svd_misfit` compares factors with a weight
BLOCK_FROM, BLOCK_SHARE = 1024, 1 / 8  # auto tries block on weights of at least this side, up to this share of k


@dataclass(frozen=True)
class LeadingSVD(Factorization):
    """The leading singular vectors of W; for an embedding those of W^T."""

    energy: float | None = None  # choose the least rank that holds this share of |W|^2
    svd: str = "auto"
    divide: bool = True  # whether the read map divides by s_r; without it the update is U_r M diag(s_r) V_r^T

    algorithm = ("svd", 1)
    # Measured as for PanelLU (71 weights): the error is the predicted one to a factor of 2. bf16 stays below 0.13 (and
    # the update's true error below 0.07), NF4 exceeds 0.19 on all weights from rank 8 up, another base is at 1.4. int8
    # is accepted on two weights of three, with a true error of up to 0.2.
    rebuilt_bound = 0.2

    def recipe(self) -> dict[str, Any]:
        """Named after the two methods that divide and do not, as in every cache so far."""
        how = "svfit" if self.divide else "loraxs"
        return {"method": how, "algorithm": list(self.algorithm), "energy": self.energy, "svd": self.svd}

    @property
    def chooses_rank(self) -> bool:
        return self.energy is not None

    def factors(
        self,
        panel: Tensor,
        r: int | None,
        *,
        rows: Callable[[Tensor], Tensor],
        embedding: bool = False,
        saved: Factors | None = None,
    ) -> Factors:
        W, pivots = panel.T if embedding else panel, saved.pivots if saved else None
        return svd_factors(W, r, energy=self.energy or 1.0, method=self.svd, pivots=pivots, divide=self.divide)

    def cost(self, shape: tuple[int, int], r: int, *, embedding: bool = False) -> float:
        return svd_cost(shape, r, exact=self.chooses_rank or self.svd == "exact")

    def residual(self, panel: Tensor, factors: Factors, *, embedding: bool = False) -> float:
        return svd_residual(panel.T if embedding else panel, factors)

    def misfit(self, W: Tensor, factors: Factors, *, embedding: bool = False) -> str | None:
        return svd_misfit(W.T if embedding else W, factors, divide=self.divide)

    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        return rebuilt_error(W, saved.values)


@dataclass
class SVDConfig(FactorConfig):
    """What the methods on singular vectors share."""

    energy: float | None = field(
        default=None,
        metadata={"help": "choose each weight's rank instead of r: the least that holds this share of its |W|^2"},
    )
    normalize_directions: bool = field(
        default=True, metadata={"help": "u v^T has norm one; without, LoRA-XS takes the paper's u s v^T"}
    )
    svd: str = field(default="auto", metadata={"help": f"algorithm of the SVD: {', '.join(ALGORITHMS)}"})
    ranks: dict[str, int] | None = field(default=None, metadata={"help": "the ranks that energy chose, by module"})

    may_keep_norms: ClassVar[bool] = False  # whether normalize_directions=False is supported

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(
                f"{type(self).__name__}.energy is a share between 0 and 1, got {self.energy}; give r for all of it"
            )
        if not (self.normalize_directions or self.may_keep_norms):
            raise ValueError(
                "normalize_directions=false works only with loraxs: these singular vectors already have norm one"
            )
        check_algorithm(self)

    def factorization(self) -> LeadingSVD:
        return LeadingSVD(energy=self.energy, svd=self.svd, divide=self.normalize_directions)

    @property
    def usual_learning_rate(self) -> float | None:
        return 3e-2

    def rank_of(self, module: str, shape: tuple[int, int]) -> int | None:
        return super().rank_of(module, shape) if self.energy is None else (self.ranks or {}).get(module)

    def note_rank(self, module: str, r: int) -> None:
        if self.energy is not None:
            self.ranks = {**(self.ranks or {}), module: r}


@dataclass
class SVFitConfig(SVDConfig):
    """SVFit (arXiv 2409.05926): W' = W + scale U_r diag(delta) V_r^T, delta (r,) trained from zero.

    delta is the paper's s' - s: its unit is that of the singular values, and every direction has norm one.
    """

    method = "svfit"


@dataclass
class SVFTConfig(SVDConfig):
    """SVFT, banded (arXiv 2405.19597): W' = W + scale U_r M V_r^T, M's diagonals -b .. b trained from zero.

    The core holds them one after the other, r (2 b + 1) - b (b + 1) numbers. The paper has r = k.
    """

    off_diagonals: int = field(default=2, metadata={"help": "b: diagonals on either side of the main one"})

    method = "svft"

    @property
    def usual_learning_rate(self) -> float | None:
        return 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.off_diagonals) is not int or self.off_diagonals < 0:
            raise ValueError(f"SVFTConfig.off_diagonals is a whole number of at least 0, got {self.off_diagonals!r}")

    def _bands(self, r: int) -> list[tuple[int, int]]:
        """(offset above the main diagonal, numbers) of each diagonal that an r x r matrix has."""
        b = min(self.off_diagonals, r - 1)
        return [(above, r - abs(above)) for above in range(-b, b + 1)]

    def core_shape(self, r: int) -> tuple[int, ...]:
        return (sum(count for _, count in self._bands(r)),)

    def multiply(self, h: Tensor, core: Tensor) -> Tensor:
        r, total = h.shape[-1], torch.zeros_like(h)
        bands = self._bands(r)
        for (above, count), band in zip(bands, core.split([count for _, count in bands], -1), strict=True):
            row, column = max(0, -above), max(0, above)
            total[..., row : row + count] += h[..., column : column + count] * band
        return total

    def core_matrix(self, core: Tensor, r: int) -> Tensor:
        return self.multiply(torch.eye(r).to(core), core).T


@dataclass
class LoRAXSConfig(DenseCore, SVDConfig):
    """LoRA-XS (arXiv 2405.17604): W' = W + scale U_r R diag(s_r) V_r^T, R (r, r) trained from zero.

    The paper draws R from N(0, 1e-10); zero is the same start to rounding, and keeps the function exactly.
    """

    normalize_directions: bool = field(default=False, metadata={"help": "leave diag(s_r) out"})

    method = "loraxs"
    may_keep_norms = True


def check_algorithm(config: Any) -> None:
    """Raises ValueError if a config's svd is none of `ALGORITHMS`."""
    if config.svd not in ALGORITHMS:
        raise ValueError(f"{type(config).__name__}.svd is one of {', '.join(ALGORITHMS)}, got {config.svd!r}")


def svd_cost(shape: tuple[int, int], r: int, *, exact: bool) -> float:
    """About 10 m n k multiplications, or 16 m n r by the block method, which auto takes up to an eighth of k."""
    m, n = shape
    return m * n * (10 * min(m, n) if exact or 8 * r > min(m, n) else 16 * r)


def svd_residual(W: Tensor, factors: Factors) -> float:
    """The largest |W v - s u| over s_1, with v = W^T u / s."""
    W = W.to(factors.write)
    s = factors.values.to(W)
    return float((W @ (W.T @ factors.write) / s - factors.write * s).norm(dim=0).max() / s[0])


def svd_misfit(W: Tensor, factors: Factors, *, divide: bool = True) -> str | None:
    """Why these are not leading factors of W (m, n), by two equations for random signs g.

    |W^T U g| = |s|, and W (W^T U g) = U diag(s^2) g on SAMPLE rows. Costs m n multiplications, and reads W once.

    U_r may be rounded to bfloat16, and the block method's directions are off by BLOCK_ERROR.
    """
    U, s = factors.write.float(), factors.values.float()
    if not (s > 0).all() or (s[1:] > 1.01 * s[:-1]).any():
        return "its singular values are not positive, the largest first"
    if (factors.read * (s if divide else 1) - 1).abs().max() > 0.01:
        return "its read map does not belong to its singular values"
    largest = U.gather(0, factors.pivots.long().to(U.device)[None])[0]
    if (largest < 0.98 * U.abs().amax(dim=0)).any():
        return "the entries that should be the largest of its directions are not"
    g = signs(len(s)).to(U)
    if not_orthonormal(U, g):
        return "its directions are not orthonormal"
    u, blocks = U @ g, range(0, len(W), 512)  # no float32 copy of W; one vector, because two take ten times as long
    h = torch.stack([W[at : at + 512].to(U).T @ u[at : at + 512] for at in blocks]).sum(0)
    some = torch.randperm(len(W), generator=fresh_draws())[:SAMPLE].sort().values
    z, expected = W[some].to(U) @ h, U[some.to(U.device)] @ (s.square() * g)
    size = max(expected.norm(), s.square().norm() * (len(some) / len(W)) ** 0.5)
    if abs(h.norm() - s.norm()) > 0.02 * s.norm() or (z - expected).norm() > 0.05 * size:
        return "its directions are not singular vectors of the weight"
    return None


def not_orthonormal(U: Tensor, g: Tensor) -> bool:
    """Whether the columns of U (m, r) are not orthonormal, from U^T U g = g for a random g (r,)."""
    return bool((U.T @ (U @ g) - g).abs().max() > 0.05)


def svd_factors(
    W: Tensor,
    r: int | None,
    *,
    energy: float = 1.0,
    method: str = "auto",
    pivots: Tensor | None = None,
    divide: bool = True,
) -> Factors:
    """Factors of W (m, n), probe left empty; r None: of the least rank that holds this share of |W|^2.

    method auto tries block if it is quicker and falls back to exact, logging why, if block's directions are not
    accurate enough. pivots (r,) are saved rows if directions are positive: in a rounded W another entry may be the
    largest, and the sign matters to every core but a diagonal. divide=False reads U_r^T y0.

    Raises ValueError for NaN or infinite entries, a rank above that of W, or too large an error of method block.
    """
    if not (good := torch.isfinite(W)).all():
        raise ValueError(f"{int((~good).sum())} of its {W.numel()} numbers are NaN or infinite")
    k, error = min(W.shape), math.inf
    large = r is not None and k >= BLOCK_FROM and r <= BLOCK_SHARE * k
    if r is not None and (method == "block" or (method == "auto" and large)):
        U, s, error = leading_block(W, r)
        said = f"by the block method the directions at rank {r} are off by at most {error:.1e} (bound {BLOCK_ERROR})"
        if not error <= BLOCK_ERROR and method == "block":
            raise ValueError(f"{said}: choose method exact")
        log.info("%s x %s: %s%s", *W.shape, said, "" if error <= BLOCK_ERROR else "; now exactly")
    if not error <= BLOCK_ERROR:
        U, s = leading_exact(W, r, energy)
    # below float32's rounding of W a direction is made of noise
    zeros = (~(s > torch.finfo(torch.float32).eps * k**0.5 * s[0])).nonzero()
    if len(zeros):
        raise ValueError(f"its singular value {int(zeros[0])} is zero: it has only {int(zeros[0])} directions")
    chosen = U.abs().argmax(dim=0) if pivots is None else pivots.to(U.device, torch.long)
    U = U * torch.where(U.gather(0, chosen[None]) < 0, -1.0, 1.0)
    dtype = torch.promote_types(W.dtype, torch.float32)
    read = 1 / s if divide else torch.ones_like(s)
    probe = torch.zeros(32, dtype=torch.uint8)
    return Factors(U.to(dtype).contiguous(), read.to(dtype), chosen.to(torch.int32), s.float(), probe)


def leading_exact(W: Tensor, r: int | None, energy: float = 1.0) -> tuple[Tensor, Tensor]:
    """U_r (m, r) and s_r (r,) in float64, from the symmetric eigenproblem of the smaller Gram matrix; r as above.

    Squaring halves the digits of small singular values, to 1e-8 of the largest: in float64 no loss for a float32 W.
    """
    squares, vectors = (part.flip(-1) for part in torch.linalg.eigh(_gram(W)))
    squares = squares.clamp(min=0)
    if r is None:
        r = 1 + int((squares.cumsum(0) < energy * squares.sum()).sum())
    s, vectors = squares[:r].sqrt(), vectors[:, :r]
    return (W.double() @ vectors / s if len(W) > W.shape[1] else vectors), s


def leading_block(W: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """U_r (m, r) and s_r (r,) in float64 from a block Krylov space, and the largest angle a direction may be off.

    Q (m, d) is an orthonormal basis of the span of W O, (W W^T) W O, ... for a random O, and Z = W^T Q. If the angle
    of the best directions in it is above the bound, the basis is enlarged once.
    """
    A, (m, n) = W.float(), W.shape
    small = min(max(7 * r // 2, 2 * r + 128), m, n)
    large = min(max(6 * r, small), m, n)
    width = 16 * max(1, small // 14 // 16)  # products of odd widths are slow
    Q, Z = A.new_empty(m, large), A.new_empty(n, large)
    Y = A @ torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(A)
    last = at = 0
    for d in sorted({small, large}):
        while at < d:
            Y = (A @ Z[:, last:at] if at else Y)[:, : d - at]
            for _ in range(2):  # once leaves the rounding of what was taken away
                Y = torch.linalg.qr(Y - Q[:, :at] @ (Q[:, :at].T @ Y)).Q
            last, at = at, at + Y.shape[1]
            Q[:, last:at], Z[:, last:at] = Y, A.T @ Y
        U, s, error = _best_within(A, Q[:, :d], Z[:, :d], W, r)
        if error <= BLOCK_ERROR:
            break
    return U, s, error


def _best_within(A: Tensor, Q: Tensor, Z: Tensor, W: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """The best r directions of the span of Q (m, d), refined in float64, their s, and the largest angle; Z = W^T Q.

    The angle follows from each residual |W W^T u - s^2 u|: divided by the distance of s^2 from the eigenvalues outside
    the basis it is what the basis lacks, and from its neighbours', what is mixed within.
    """
    d = Q.shape[1]
    kept = min(r + -(-r // 8), d)
    squares, C = torch.linalg.eigh((Z.T @ Z).double())
    outside = float(squares[-kept - 1]) if d > kept else 0.0
    X = torch.linalg.qr((Q @ C[:, -kept:].to(A)).double()).Q
    Z = (X.T @ W.double()).T
    squares, C = (part.flip(-1) for part in torch.linalg.eigh(Z.T @ Z))
    U, V = X @ C, Z @ C
    residual = (A @ V[:, :r].to(A) - U[:, :r] * squares[:r]).norm(dim=0)
    lacking = residual / (squares[:r] - outside).clamp(min=0)
    steps = -torch.cat([squares.new_tensor([math.inf]), squares, squares.new_tensor([outside])]).diff()
    mixed = residual * lacking.max() / torch.minimum(steps[:r], steps[1 : r + 1])
    return U[:, :r], squares[:r].clamp(min=0).sqrt(), float((lacking + mixed).max())


def rebuilt_error(W: Tensor, values: Tensor) -> float:
    """Estimated error of an update through directions of this W against one through those saved with values (r,).

    Rounding a weight adds an E whose entries u_i^T E v_j are all of about one size e, and the diagonal entries are the
    changes of the singular values. So e is measured on the values, and the angle by which it turns each direction, the
    sum over all others of (e / distance)^2, follows without the saved directions. W is (m, n) or (n, m).
    """
    s = torch.linalg.eigvalsh(_gram(W)).flip(0).clamp(min=0).sqrt()
    saved, r = values.to(s), len(values)
    e = (s[:r] - saved).square().mean().sqrt()
    squares = saved.square()[:, None] - torch.cat([saved, s[r:]]).square()[None]
    turned = 2 * (e * (saved.square()[:, None] + s.square()[None]).sqrt() / squares).square()
    turned[torch.arange(r), torch.arange(r)] = 0
    return float(turned.clamp(max=2).sum(1).clamp(max=2).mean().sqrt())


def _gram(W: Tensor) -> Tensor:
    """The smaller of W^T W and W W^T, in float64."""
    W = W.double()
    return W.T @ W if len(W) > W.shape[1] else W @ W.T
