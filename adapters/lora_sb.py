"""The page of maths: LoRA-SB's frozen factors from the gradient of the weight, and the layer that carries them.

Paper: LoRA-SB, arXiv 2411.19557; the formulas are those of its authors' code. Letters: W (m, n) = out x in, r the rank,
L_i(W) the loss of sample i, a few samples standing for the data.

    G  = -sign(sum_i dL_i/dW)              the direction of full fine-tuning's first AdamW step (its size is the rate)
    G ~= U_r diag(s) V_r^T                 the leading singular vectors of G, signs as in svd.py
    W' = W + U_r R V_r^T                   R: r x r trained numbers, step * diag(s) at the start

So training starts with the best step of rank r that full fine-tuning would have made: by design not at the base model.
U_r and V_r do not follow from W: the layer reads its input through V_r, r (m + n) frozen numbers, and the adapter's
file holds them. What they cost in making is one backward pass over the samples; for m n numbers of each weight, which
is why `gradient_sums` is asked for a few weights at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.config import LoRASBConfig
from adapters.factors import Factors, probe_digest
from adapters.layer import BasePrecisionWarning, FactorLinear, FactorMap, factor_source, matrix_shape
from adapters.svd import first_step_factors

BYTES_AT_ONCE = 1 << 30  # of float32 gradient sums


@contextmanager
def gradient_sums(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within, each backward pass adds the gradient of each layer's W (m, n) to its float32 sum here.

    Taken from the layer's input and the gradient of its output, so the weight may be frozen, or quantised.
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
    """The names in their order, cut into groups whose gradient sums fit into so many bytes, one weight at least."""
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


def factors_from_gradients(
    model: nn.Module,
    names: Iterable[str],
    losses: Callable[[], Iterable[Tensor]],
    r: int,
    *,
    method: str = "auto",
    bytes_at_once: int = BYTES_AT_ONCE,
) -> Callable[[str, tuple[int, int]], Factors | None]:
    """A source for `factors_from`: factors of the named modules of this model, from the losses of a few samples.

    losses() computes them with the model, one after the other; it is called once for each group of weights.
    """
    layers = {name: model.get_submodule(name) for name in names}
    made: dict[str, Factors] = {}
    for group in groups_of({name: matrix_shape(layer, name) for name, layer in layers.items()}, bytes_at_once):
        with gradient_sums({name: layers[name] for name in group}) as sums:
            for loss in losses():
                loss.backward()
        for name in group:
            rank = min(r, *matrix_shape(layers[name], name))
            made[name] = first_step_factors(sums.pop(name), rank, method=method)
    return lambda name, shape: made.get(name)


class InputMap(FactorMap):
    """One LoRA-SB adapter on one layer. write (m, r) and read (r, n) are in its state, for nothing else tells them."""

    derived = ()

    def __init__(self, shape: tuple[int, int], r: int, config: LoRASBConfig, dtype: torch.dtype, device: torch.device):
        super().__init__(shape[0], r, config, dtype, device, embedding=False)
        del self.write, self.read
        self.register_buffer("write", torch.zeros(shape[0], r, dtype=dtype, device=device))
        self.register_buffer("read", torch.zeros(r, shape[1], dtype=dtype, device=device))
        self._filled = False

    def set_factors(self, factors: Factors) -> None:
        """Take the two maps, and start the core at the step they belong to."""
        for name in ("write", "read", "pivots", "values", "probe"):
            mine = getattr(self, name)
            setattr(self, name, getattr(factors, name).to(mine.device, mine.dtype))
        assert isinstance(self.config, LoRASBConfig)
        step = self.config.step
        if step is None:
            raise ValueError("LoRASBConfig.step is the size of the step that the factors belong to: give it a number")
        self.core.data = (step * self.values).diag()

    @property
    def filled(self) -> bool:
        """Whether it was given factors, or loaded from a file (whose probe is never all zero)."""
        self._filled = self._filled or bool(self.probe.any())
        return self._filled

    def forward(self, x: Tensor, bias: Tensor | None, onto: Tensor) -> Tensor:
        """onto + write (scale core (read x)) for the layer's input x (..., n)."""
        wide = torch.promote_types(self.read.dtype, self.core.dtype)
        h = F.linear(x.to(self.read.dtype), self.read).to(wide)
        h = self.config.multiply(h, self.scaled_core(wide))
        return onto + F.linear(h.to(self.write.dtype), self.write).to(onto.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A narrower dtype reaches the two maps alone: the core and what is saved beside it stay float32."""
        maps = {id(self.write), id(self.read)}

        def apply(old: Tensor) -> Tensor:
            new = fn(old)
            return old.to(new.device) if new.element_size() < old.element_size() and id(old) not in maps else new

        return nn.Module._apply(self, apply, recurse)


class InputLinear(FactorLinear):
    """A Linear, quantised Linear or Conv1D with LoRA-SB adapters."""

    def update_layer(self, adapter_name: str, config: Any, checkpoints: Sequence[str | None] = ()) -> int:
        """Give a new adapter its factors and its start; one that is loaded brings its own. Returns its rank."""
        weight, r = self.base.weight, min(config.r, *self.shape)
        source = None if config.inference_mode or weight.is_meta else factor_source()
        factor_map = InputMap(self.shape, r, config, self.frozen_dtype, weight.device)
        if source is not None and (factors := source(self.name, self.shape)) is not None:
            factor_map.set_factors(factors._replace(probe=probe_digest(self.matrix(), self.shape)))
        self._put(adapter_name, factor_map)
        return r

    def add_update(self, adapter_name: str, x: Tensor, y0: Tensor, onto: Tensor) -> Tensor:
        """onto and what the adapter adds, for the layer's input x (..., n)."""
        return self._ready(adapter_name)(x, None, onto=onto)

    @torch.compiler.disable
    def refresh(self, *_: Any) -> None:
        """Say once where an adapter was made on other weights; its factors hold on any."""
        if self.base.weight.is_meta or self._unmerged is not None:
            return
        for factor_map in self.maps.values():
            if factor_map.filled and factor_map._seen is not factor_map.probe:
                factor_map._seen = factor_map.probe
                if not torch.equal(probe_digest(self.matrix(), self.shape), factor_map.probe.cpu()):
                    warnings.warn("this base is not the one the adapter was made on, or in another precision",
                                  BasePrecisionWarning, stacklevel=2)  # fmt: skip

    def lora(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The adapter as a low-rank pair A (r, n), B (m, r)."""
        ready = self._ready(adapter_name)
        wide = torch.promote_types(ready.read.dtype, torch.float32)
        core = ready.scale * ready.core.detach().to(wide)
        return ready.read.to(wide), ready.write.to(wide) @ core

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's own layout."""
        A, B = self.lora(adapter_name)
        return (B @ A).T if isinstance(self.base, Conv1D) else B @ A

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Not onto the meta device: what was loaded would be lost, and nothing makes it again."""
        if not self.base.weight.is_meta:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def _ready(self, adapter_name: str) -> Any:
        factor_map: Any = self.maps[adapter_name]
        if not factor_map.filled:
            raise ValueError(
                f"adapter {adapter_name} has no factors on {self.name}: LoRA-SB's come from gradients; make it within "
                "adapters.factors_from(adapters.factors_from_gradients(model, names, losses, r)), or load a saved one"
            )
        return factor_map
