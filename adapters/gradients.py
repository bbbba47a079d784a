"""Gradients of frozen weights over a few samples, for methods whose factors come from them.

One backward pass over the samples costs m n numbers for each weight W (m, n), so `gradient_sums` is called for a few
weights at a time, as grouped by `groups_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.shapes import matrix_shape

BYTES_AT_ONCE = 1 << 30  # of float32 gradient sums


@contextmanager
def gradient_sums(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, each backward pass adds the gradient of each layer's W (m, n) to its float32 sum here.

    Computed from the layer's input and the gradient of its output, so the weight may be frozen or quantised.
    """
    for name, layer in layers.items():
        if not isinstance(layer, (nn.Linear, Conv1D)):
            raise ValueError(f"{name} is a {type(layer).__name__}; gradients are taken on Linear and Conv1D")
    devices = {name: next(layer.parameters()).device for name, layer in layers.items()}
    sums = {name: torch.zeros(matrix_shape(layer, name), device=devices[name]) for name, layer in layers.items()}

    def watch(total: Tensor) -> Callable[..., None]:
        def after_forward(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            if not output.requires_grad:
                output.requires_grad_()

            def after_backward(g: Tensor) -> None:
                total.addmm_(g.flatten(0, -2).float().T, x.float())

            output.register_hook(after_backward)

        return after_forward

    hooks = [layer.register_forward_hook(watch(sums[name])) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def groups_of(shapes: Mapping[str, Sequence[int]], bytes_at_once: int = BYTES_AT_ONCE) -> Iterator[list[str]]:
    """The names in order, in groups of at least one weight whose gradient sums fit into bytes_at_once."""
    group: list[str] = []
    size = 0
    for name, (m, n) in shapes.items():
        if group and size + 4 * m * n > bytes_at_once:
            yield group
            group, size = [], 0
        group.append(name)
        size += 4 * m * n
    if group:
        yield group
