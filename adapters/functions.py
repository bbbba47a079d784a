"""What the layer's forward pass computes where autograd alone would keep more, move more or multiply by zeros.

Frozen maps get no gradient. Under torch.compile, which joins passes and chooses what to keep by itself, each is its
plain formula; torch.func and forward-mode gradients go through the functions too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# A triangle in eight blocks of rows leaves out 7/16 of the multiplications. Measured on a CPU in float32: below FROM
# rows or TOKENS it takes as long or longer; for 512 tokens 0.77 of the time at 512 rows (0.91 where they are put in
# order first), 0.65 at 1024 (0.70).
BLOCKS, SMALLEST, FROM, TOKENS = 8, 128, 512, 256


def take_rows(y0: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """y0 (..., m) itself, and its entries rows (r,)."""
    if torch.compiler.is_compiling():
        return y0, y0.index_select(-1, rows)
    return _TakeRows.apply(y0, rows)


def add_rows(onto: Tensor, added: Tensor, rows: Tensor) -> Tensor:
    """onto (..., m) with added (..., r) put on its entries rows (r,)."""
    if torch.compiler.is_compiling():
        return onto.index_add(-1, rows, added)
    return _AddRows.apply(onto, added, rows)


def lower_linear(x: Tensor, L: Tensor, rows: Tensor | None = None) -> Tensor:
    """x L^T for x (..., r) and a frozen lower triangular L (r, r), in blocks that leave out most of its zeros.

    With rows (r,) L is given out of order: its row i lies in row rows[i]. Whole where blocks do not pay.
    """
    if not in_blocks(x):
        return F.linear(x, L if rows is None else L.index_select(0, rows))
    if torch.compiler.is_compiling():
        return _lower_linear(x, L, rows)
    return _LowerLinear.apply(x, L, rows)


def in_blocks(x: Tensor) -> bool:
    """Whether taking a triangle of r rows apart pays for x (..., r)."""
    return x.shape[-1] >= FROM and x.numel() >= TOKENS * x.shape[-1]


def blocks(r: int) -> list[tuple[int, int]]:
    """(first, end) of the rows of each block of a triangle (r, r): all left of `end` is multiplied."""
    size = max(SMALLEST, -(-r // BLOCKS))
    return [(at, min(at + size, r)) for at in range(0, r, size)]


def _lower_linear(x: Tensor, L: Tensor, rows: Tensor | None) -> Tensor:
    parts = (F.linear(x[..., :end], _part(L, rows, slice(at, end), slice(end))) for at, end in blocks(len(L)))
    return _joined(parts, len(L))


def _joined(parts: Iterator[Tensor], r: int) -> Tensor:
    """Parts side by side as one (..., r), each gone once it is in its place; torch.cat would have all of them twice."""
    if torch.compiler.is_compiling():
        return torch.cat(list(parts), -1)
    first = next(parts)
    joined, at = first.new_empty((*first.shape[:-1], r)), first.shape[-1]
    joined[..., :at] = first
    for part in parts:
        joined[..., at : at + part.shape[-1]] = part
        at += part.shape[-1]
    return joined


def _part(L: Tensor, rows: Tensor | None, height: slice, width: slice) -> Tensor:
    """That part of L in order of its rows; never all of it, which would be a second map in memory."""
    return L[height, width] if rows is None else L[:, width].index_select(0, rows[height])


class _TakeRows(torch.autograd.Function):
    """Both gradients in one pass.

    Autograd alone fills a tensor of y0's size with zeros, puts the r numbers there, and adds the two into a third.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y0: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return y0.view_as(y0), y0.index_select(-1, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_taken: Tensor) -> Any:
        return g.index_add(-1, ctx.saved_tensors[0], g_taken), None

    @staticmethod
    def jvp(ctx: Any, y0: Tensor, rows: None) -> Any:
        return y0.view_as(y0), y0.index_select(-1, ctx.saved_tensors[0])


class _AddRows(torch.autograd.Function):
    """Autograd alone keeps `added`, for nothing but its shape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(onto: Tensor, added: Tensor, rows: Tensor) -> Tensor:
        return onto.index_add(-1, rows, added)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, g.index_select(-1, ctx.saved_tensors[0]), None

    @staticmethod
    def jvp(ctx: Any, onto: Tensor, added: Tensor, rows: None) -> Any:
        return onto.index_add(-1, ctx.saved_tensors[0], added)


class _LowerLinear(torch.autograd.Function):
    """Autograd alone keeps the parts of L in order, and fills a tensor of x's size for each block's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, L: Tensor, rows: Tensor | None) -> Tensor:
        return _lower_linear(x, L, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        L, rows = ctx.saved_tensors
        parts = (  # under autocast in the narrower dtype, as forward
            g[..., at:] @ _part(L, rows, slice(at, None), slice(at, end)).to(g.dtype) for at, end in blocks(len(L))
        )
        return _joined(parts, len(L)), None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, L: None, rows: None) -> Any:
        return _lower_linear(x, *ctx.saved_tensors)
