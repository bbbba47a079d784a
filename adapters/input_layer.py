"""The layer for methods whose frozen maps do not follow from the weight: it reads its input and saves its maps.

Shapes: W (m, n), x (..., n) the layer's input: r (m + n) frozen numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.base import FactorConfig
from adapters.factor_map import FactorMap
from adapters.factors import Factors, probe_digest
from adapters.layer import BasePrecisionWarning, FactorLinear, factor_source


class InputMap(FactorMap):
    """One adapter on one layer. write (m, r) and read (r, n) are in its state dict: they do not follow from W."""

    derived = ()

    def __init__(self, shape: tuple[int, int], r: int, config: FactorConfig, dtype: torch.dtype, device: torch.device):
        super().__init__(shape[0], r, config, dtype, device, embedding=False)
        del self.write, self.read
        self.register_buffer("write", torch.zeros(shape[0], r, dtype=dtype, device=device))
        self.register_buffer("read", torch.zeros(r, shape[1], dtype=dtype, device=device))
        self._filled = False

    def set_factors(self, factors: Factors) -> None:
        """Take the two maps and what they follow from; the core stays."""
        for name in Factors._fields:
            mine = getattr(self, name)
            setattr(self, name, getattr(factors, name).to(mine.device, mine.dtype))

    @property
    def filled(self) -> bool:
        """Whether it has factors, made or loaded from a file: their probe is never all zero."""
        self._filled = self._filled or bool(self.probe.any())
        return self._filled

    def forward(self, x: Tensor, bias: Tensor | None, onto: Tensor, cores: Tensor | None = None) -> Tensor:
        """onto + write (scale core (read x)) for the layer's input x (..., n)."""
        wide = torch.promote_types(self.read.dtype, self.core.dtype)
        h = F.linear(x.to(self.read.dtype), self.read).to(wide)
        h = self.config.multiply(h, self.scaled_core(wide) if cores is None else cores.to(wide))
        return onto + F.linear(h.to(self.write.dtype), self.write).to(onto.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Only the two maps take a narrower dtype; the core and what is saved beside it stay float32."""
        maps = {id(self.write), id(self.read)}

        def apply(old: Tensor) -> Tensor:
            new = fn(old)
            return old.to(new.device) if new.element_size() < old.element_size() and id(old) not in maps else new

        return nn.Module._apply(self, apply, recurse)


class InputLinear(FactorLinear):
    """A Linear, quantised Linear or Conv1D whose adapters read its input."""

    def update_layer(self, adapter_name: str, config: Any, checkpoints: Sequence[str | None] = ()) -> int:
        """Give a new adapter its factors and its starting core; a loaded one brings its own. Returns its rank."""
        weight, r = self.base.weight, min(config.r, *self.shape)
        source = None if config.inference_mode or weight.is_meta else factor_source()
        factor_map = InputMap(self.shape, r, config, self.frozen_dtype, weight.device)
        if source is not None and (factors := source(self.name, self.shape)) is not None:
            factor_map.set_factors(factors._replace(probe=probe_digest(self.matrix(), self.shape)))
            factor_map.start(self.name)
        self._put(adapter_name, factor_map)
        return r

    def add_update(self, adapter_name: str, x: Tensor, y0: Tensor, onto: Tensor) -> Tensor:
        """onto plus the adapter's update, for the layer's input x (..., n)."""
        return self._ready(adapter_name)(x, None, onto=onto)

    def add_group(self, adapter_names: Sequence[str], which: Tensor, x: Tensor, y0: Tensor) -> Tensor:
        """y0 (rows, ..., m) plus the update of the one adapter in this group: each has its own maps."""
        return self.add_update(adapter_names[0], x, y0, onto=y0)

    def share_maps(self, one: str, other: str) -> bool:
        return one == other

    @torch.compiler.disable
    def refresh(self, *_: Any) -> None:
        """Warn once if an adapter was made on other weights; its factors are valid on any."""
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
        """The adapter's update of the base weight, in the base weight's layout."""
        A, B = self.lora(adapter_name)
        return (B @ A).T if isinstance(self.base, Conv1D) else B @ A

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Never onto the meta device: loaded maps would be lost, and nothing can make them again."""
        if not self.base.weight.is_meta:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def _ready(self, adapter_name: str) -> Any:
        factor_map: Any = self.maps[adapter_name]
        if not factor_map.filled:
            raise ValueError(
                f"adapter {adapter_name} has no factors on {self.name}: {factor_map.config.method}'s come from "
                "gradients; make it inside adapters.factors_from(adapters.factors_from_gradients(model, names, losses, "
                "r)), or load a saved one"
            )
        return factor_map
