"""The page of maths: LoLDU's frozen factors from a panel of the weight, and the update they carry.

Paper: LoLDU, arXiv 2410.13618. Letters: W (m, n) = out x in, k = min(m, n), r <= k the rank, y0 = W x.

    W = P L diag(d) U                                 partially pivoted LU; L and U have unit diagonals
    W' = W + P L_r diag(delta) U_r                    delta = scale * (z - z0): r trained numbers, zero at the start
    U_r x = diag(1/d_r) L11^-1 (W x)[pivots]          for the first r rows of P^T W are L11 diag(d_r) U_r

So the adapted layer reads its own base output: y = y0 + Write (delta * (Read y0[pivots])), with Write = P L_r (m, r)
and Read = diag(1/d_r) L11^-1 (r, r). U_r is never stored, W is never written. The paper's residual form,
(W - s P L_r diag(z0) U_r) + s P L_r diag(z) U_r, is the same function.

Pivoting at column j looks at columns 1..j alone, so P, L_r and d_r are those of the panel W[:, :r]: m r^2 operations
and m r numbers read, instead of m n k and m n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROBE_BLOCKS, PROBE_WIDTH = 64, 16
COLUMNS = 64  # of a panel, moved at a time: few enough for the processor's cache, and no second panel in memory


class Factors(NamedTuple):
    """The frozen maps of one weight, and what lets a reload rebuild and check them; of LoLDU or of adapters/svd.py."""

    write: Tensor  # (out, r) what the core's r numbers are written through
    read: Tensor  # (r, r) applied to r entries of the base layer's output; svd: (r,), after reading through write
    pivots: Tensor  # (r,) int32, the rows of W chosen, in order of elimination; svd: where directions are positive
    values: Tensor  # (r,) float32, d_r; svd: s_r
    probe: Tensor  # (32,) uint8, digest of the whole weight (`probe_digest`)


def lu_of_panel(panel: Tensor, pivots: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """LU of a panel W[:, :r] (m, r): P L_r (m, r), the upper triangle diag(d) U11 (r, r), the pivot rows (r,) int32.

    With pivots given, those rows are eliminated in that order: the same base in another precision may prefer other
    rows, and a saved core belongs to these. Computed in float64 for a float64 panel, else in float32.

    Raises ValueError for NaN or infinite entries, a zero pivot, or pivots that do not fit the panel.
    """
    panel, (m, r), wide = panel.detach(), panel.shape, torch.promote_types(panel.dtype, torch.float32)
    low, high = panel.aminmax()  # either is NaN where any number is
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

    rows(pivots) returns W[pivots] (r, n); it is called only where those are needed. normalize divides each direction by
    its two norms, so that one learning rate suits all (they differ about 100 times). For an embedding, whose output is
    a row of W, the parts change places: it reads its first r output features and writes through U_r^T (n, r).
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


def lora_pair(weight: Tensor, factors: Factors, core: Tensor, *, embedding: bool = False) -> tuple[Tensor, Tensor]:
    """The update as an ordinary low-rank product B A: A (r, n), B (m, r) with B A = Write core U_r (svd: V_r^T).

    weight is the unmerged W (m, n); core, (r,) or (r, r), includes the scale. For an embedding A is (r, m) and B is
    (n, r), as PEFT's LoRA has them: the update is (B A)^T.
    """
    outputs = (weight.T if embedding else weight).to(factors.read)  # a row for each output feature
    write, core = factors.write.to(outputs), core.to(outputs)
    if factors.read.ndim == 1:
        A = factors.read[:, None] * (write.T @ outputs)
    else:
        A = factors.read @ (outputs[: len(factors.read)] if embedding else outputs[factors.pivots.long()])
    return A, write * core if core.ndim == 1 else write @ core


def delta_weight(weight: Tensor, factors: Factors, core: Tensor, *, embedding: bool = False) -> Tensor:
    """What the adapter adds to the unmerged W (m, n), in the precision of the read map."""
    A, B = lora_pair(weight, factors, core, embedding=embedding)
    return (B @ A).T if embedding else B @ A


def rebuilt_error(panel: Tensor, pivots: Tensor, values: Tensor) -> float:
    """How far factors rebuilt from this panel (m, r) are from the saved ones, judged by d_r (r,) and by L alone.

    The relative distance of the two d_r plus what max |L| has above 1. Partial pivoting keeps |L| <= 1, so growth says
    that the saved rows are no longer the ones to eliminate: L and the read map are then off by more than d_r shows.
    """
    lower, upper, _ = lu_of_panel(panel, pivots)
    return float((upper.diagonal() - values).norm() / values.norm() + lower.abs().max() - 1)


def probe_digest(weight: Any, shape: Sequence[int]) -> Tensor:
    """Digest (32,) uint8 of a tensor's shape and 64 fixed blocks of up to 16 numbers, spread over rows and columns.

    weight is a tensor or a safetensors slice of that shape. The numbers are hashed as float32, so a weight stored as
    float16 and loaded as float32 keeps its digest; one rounded to another precision does not.
    """
    if len(shape) < 2:
        blocks = weight[:].reshape(1, -1)
    else:
        count, width = shape[0], min(PROBE_WIDTH, shape[1])
        places = [
            (b * (count - 1) // (PROBE_BLOCKS - 1), int(b * 0.6180339887 % 1 * (shape[1] - width + 1)))
            for b in range(PROBE_BLOCKS)
        ]
        blocks = torch.stack([weight[row : row + 1, at : at + width].reshape(-1) for row, at in places])
    payload = repr(tuple(shape)).encode() + blocks.detach().float().cpu().contiguous().numpy().tobytes()
    return torch.frombuffer(bytearray(hashlib.sha256(payload).digest()), dtype=torch.uint8)


def base_fingerprint(digests: Iterable[Tensor]) -> str:
    """One hex digest of a base model from the probe digests of its tensors with two or more dimensions.

    Names, order and repeats (tied weights) do not count: a model in memory and its files give the same.
    """
    return hashlib.sha256(b"".join(sorted({bytes(digest.tolist()) for digest in digests}))).hexdigest()


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
