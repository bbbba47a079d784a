"""The page of maths: frozen factors from the leading singular vectors of the weight; SVFit and its relatives.

Letters: W (m, n) = out x in, k = min(m, n), r <= k the rank, y0 = W x. scale is left out of the formulas.

    W = U diag(s) V^T                          s descending; the largest entry of each u_i is positive
    V_r^T x = diag(1/s_r) U_r^T (W x)          for U_r^T W is diag(s_r) V_r^T

    SVFit (arXiv 2409.05926)      W' = W + U_r diag(delta) V_r^T         delta = s' - s: r trained numbers
    SVFT, banded (2405.19597)     W' = W + U_r M V_r^T                   M: the diagonals -b .. b
    LoRA-XS (2405.17604)          W' = W + U_r R diag(s_r) V_r^T         R: r x r

All start at zero. The adapted layer reads its own base output through the matrix it writes through: SVFit's is y = y0 +
U_r (delta * h) with h = (U_r^T y0) / s_r, and LoRA-XS needs no division. V_r is never stored, W is never written: r m
frozen numbers. Directions have norm one, so delta's unit is that of W's singular values, while R has none. At r = k
SVFit is SVFT-plain and SVF (2206.06122). LoRA-XS's s_r stands where its authors' code has it.

LoRA-SB (arXiv 2411.19557) takes the singular vectors of another matrix, the first step of full fine-tuning: lora_sb.py.

There is no panel here as for LU: the leading singular vectors follow from the whole weight.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from adapters.factors import Factors

log = logging.getLogger(__name__)

METHODS = ("auto", "exact", "block")
BLOCK_ERROR = 0.01  # largest angle by which a direction of `leading_block` may be off
BLOCK_FROM, BLOCK_SHARE = 1024, 1 / 8  # where auto tries it: weights so large, ranks up to this share of k


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

    method auto tries block where it is quicker, and takes exact where block's directions are not good enough, which the
    log says. pivots (r,) are the rows where directions are positive, saved ones: in a rounded W another entry may be
    the largest, and to all cores but a diagonal the sign matters. divide=False reads U_r^T y0.

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


def first_step_factors(gradient: Tensor, r: int, *, method: str = "auto") -> Factors:
    """LoRA-SB's factors from a weight's summed gradient (m, n): write U_r (m, r), read V_r^T (r, n), values s (r,).

    Of -sign(gradient), the direction of AdamW's first step; probe is left empty. Raises ValueError where the gradient
    is zero, is not finite, or its signs have no r directions.
    """
    step = -gradient.sign().where(gradient.isfinite(), gradient)
    if not step.any():
        raise ValueError("its gradient is zero: no sample reaches it")
    factors = svd_factors(step, r, method=method)
    return factors._replace(read=factors.read[:, None] * (factors.write.T @ step.to(factors.write)))


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

    Q (m, d) is an orthonormal basis of the span of W O, (W W^T) W O, ... for a random O, and Z = W^T Q. Where the angle
    of the best directions in it is above the bound, the basis grows once before it is given up.
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
    """How far an update through directions of this W is from one through those the values (r,) were saved with.

    Rounding a weight adds an E whose entries u_i^T E v_j are all of one size, and the diagonal ones among them are the
    changes of the singular values. So their mean size is measured on values, and what it turns each direction by, the
    sum over all others of (e / distance)^2, is known without having the saved directions. W is (m, n) or (n, m).
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
