"""Operations of the layer's forward pass, where plain autograd would keep or move more data, or multiply by zeros.

Frozen maps get no gradient. Under torch.compile, which fuses operations and decides what to keep, each is its plain
formula. The functions support torch.func and forward-mode gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# Eight blocks of rows of a triangle need 9/16 of the multiplications. Measured on a CPU in float32: below FROM rows or
# TOKENS it is not faster; for 512 tokens it takes 0.77 of the time at 512 rows (0.91 if rows are reordered first), 0.65
# at 1024 (0.70).
BLOCKS, SMALLEST, FROM, TOKENS = 8, 128, 512, 256


def take_rows(y0: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """y0 (..., m), and its entries at rows (r,)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the call of a Function costs more than its work
        return y0, y0.index_select(-1, rows)
    return _apply(_TakeRows, y0, rows)


def add_rows(onto: Tensor, added: Tensor, rows: Tensor) -> Tensor:
    """onto (..., m) plus added (..., r) at its entries rows (r,)."""
    if torch.compiler.is_compiling():
        return onto.index_add(-1, rows, added)
    return _apply(_AddRows, onto, added, rows)


def lower_linear(x: Tensor, L: Tensor, rows: Tensor | None = None) -> Tensor:
    """x L^T for x (..., r) and a frozen lower triangular L (r, r), in blocks that skip most of its zeros.

    With rows (r,), the rows of L are permuted: row i is at rows[i]. One product if blocks would not be faster.
    """
    if not in_blocks(x):
        return F.linear(x, L if rows is None else L.index_select(0, rows))
    if torch.compiler.is_compiling():
        return _lower_linear(x, L, rows)
    return _apply(_LowerLinear, x, L, rows)


def in_blocks(x: Tensor) -> bool:
    """Whether blocks are faster for x (..., r) and a triangle of r rows."""
    return x.shape[-1] >= FROM and x.numel() >= TOKENS * x.shape[-1]


def blocks(r: int) -> list[tuple[int, int]]:
    """(first, end) of the rows of each block of a triangle (r, r): the columns before `end` are multiplied."""
    size = max(SMALLEST, -(-r // BLOCKS))
    return [(at, min(at + size, r)) for at in range(0, r, size)]


def _lower_linear(x: Tensor, L: Tensor, rows: Tensor | None) -> Tensor:
    parts = (F.linear(x[..., :end], _part(L, rows, slice(at, end), slice(end))) for at, end in blocks(len(L)))
    return _joined(parts, len(L))


def _joined(parts: Iterator[Tensor], r: int) -> Tensor:
    """The parts concatenated to (..., r), each freed once it is copied; torch.cat would hold all of them twice."""
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
    """That part of L with its rows in order; never all of L, which would be a second map in memory."""
    return L[height, width] if rows is None else L[:, width].index_select(0, rows[height])


def _apply(function: type[Function], *inputs: Any) -> Any:
    """function.apply(*inputs), for half of its time on the host outside torch.func's transforms (5 us, not 14): there a
    function needs no setup_context, for which torch binds the inputs to forward's signature in each call."""
    transformed = torch._C._are_functorch_transforms_active()
    return (function if transformed else _plain(function)).apply(*inputs)


@cache
def _plain(function: type[Function]) -> type[Function]:
    """The same function without setup_context."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    parts = {"forward": forward, "backward": function.backward, "jvp": function.jvp}
    return type(function.__name__, (Function,), {name: staticmethod(part) for name, part in parts.items()})


class _TakeRows(Function):
    """Both gradients in one pass.

    Autograd alone fills a tensor of y0's size with zeros, writes the r numbers into it, and adds both into a third.
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


class _AddRows(Function):
    """Autograd alone keeps `added` only for its shape."""

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


class _LowerLinear(Function):
    """Autograd alone keeps the reordered parts of L, and fills a tensor of x's size for each block's gradient."""

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
