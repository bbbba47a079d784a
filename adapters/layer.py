"""The adapted layer: a base layer whose output is a matrix product, plus an update through frozen factors and a core.

One class serves all methods that read the base layer's output; input_layer.py has the one that reads the input.
Shapes: W (m, n), y0 (..., m) the base layer's output.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.base import FactorConfig
from adapters.checkpoint_names import local_weights
from adapters.factor_map import FactorMap
from adapters.factors import Factors, delta_weight, lora_pair, probe_digest
from adapters.shapes import features, matrix_shape

# Below this relative distance, a quantised weight counts as a checkpoint's tensor. On two small Llamas NF4 and FP4 are
# 0.08 to 0.28 away (weights with outliers most), another model 1.4.
SAME_WEIGHT = 0.5

FactorSource = Callable[[str, tuple[int, int]], "Factors | None"]
_factor_source: ContextVar[FactorSource | None] = ContextVar("factor_source", default=None)


class BasePrecisionWarning(UserWarning):
    """The adapter was made from another precision of this base."""


@contextmanager
def factors_from(source: FactorSource) -> Iterator[None]:
    """Inside, new adapters take the factors that source(module name, (m, n)) returns; for None they make their own."""
    token = _factor_source.set(source)
    try:
        yield
    finally:
        _factor_source.reset(token)


_on_factors: ContextVar[Callable[[str], object]] = ContextVar("on_factors", default=lambda module: None)


@contextmanager
def rebuilding(on_factors: Callable[[str], object]) -> Iterator[None]:
    """Inside, on_factors(module name) is called after each time that a layer computes factors from its weight."""
    token = _on_factors.set(on_factors)
    try:
        yield
    finally:
        _on_factors.reset(token)


def factor_source() -> FactorSource | None:
    """The source set by `factors_from`, if any."""
    return _factor_source.get()


class FactorLayer(nn.Module, BaseTunerLayer):
    """A base layer with our adapters: Linear, quantised Linear, Conv1D, Conv2d with groups 1, or Embedding."""

    def __init__(self, base_layer: nn.Module, name: str, method: str):
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = (f"{method}_map",)  # PEFT knows a method's parameters by their prefix
        self.add_module(f"{method}_map", nn.ModuleDict())
        self.name = name  # in the model
        self.checkpoints: list[str] = []  # candidates for the base in full precision: folders or hub names
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None
        self.shape = matrix_shape(self.base, name)
        self.in_features, self.out_features = features(self.base, self.shape)  # as PEFT's own layers have them
        self.embedding = isinstance(self.base, nn.Embedding)
        self.quantization_backend = resolve_quantization_backend(self.base)
        self.register_load_state_dict_post_hook(type(self).refresh)

    @property
    def maps(self) -> dict[str, FactorMap]:
        """The adapters on this layer by name."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def base(self) -> Any:
        """The base layer; its attributes depend on its type."""
        return self.get_base_layer()

    @property
    def frozen_dtype(self) -> torch.dtype:
        """dtype of the frozen maps: the base's, or the one that a quantised base computes in."""
        if self.quantization_backend is None:
            return self.base.weight.dtype
        return getattr(self.base, "compute_dtype", None) or torch.float32

    def update_layer(self, adapter_name: str, config: FactorConfig, checkpoints: Sequence[str | None] = ()) -> int:
        """Give a new adapter its factors and its starting core; returns its rank."""
        self.checkpoints = list(dict.fromkeys([*self.checkpoints, *filter(None, checkpoints)]))
        weight, (m, n) = self.base.weight, self.shape
        r, source = config.rank_of(self.name, self.shape), factor_source()
        factors = source(self.name, self.shape) if source is not None else None
        if factors is None and not weight.is_meta:
            factors = self._new_factors(config, r)
        if r is None:
            if factors is None:
                raise ValueError(
                    f"the rank of {self.name} follows from its weight, which is on the meta device: set ranks"
                )
            r = len(factors.values)
        out = n if self.embedding else m
        factor_map = FactorMap(out, r, config, self.frozen_dtype, weight.device, embedding=self.embedding)
        if factors is not None:
            factor_map.set_factors(factors)
            factor_map.set_factors(self._shared_factors(factor_map) or factors)
            if not weight.is_meta:
                factor_map.start(self.name)
        self._put(adapter_name, factor_map)
        return r

    def _put(self, adapter_name: str, factor_map: FactorMap) -> None:
        self.maps[adapter_name] = factor_map
        self.set_adapter(self.active_adapters, inference_mode=factor_map.config.inference_mode)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """adapter_names, from PEFT, is the adapter of each sample; "__base__" is none."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        channels_first = isinstance(self.base, nn.Conv2d)
        y0 = y = y.movedim(1, -1) if channels_first else y
        if adapter_names is not None:
            y = self.add_updates(adapter_names, x, y0)
        else:
            for adapter_name in self.active_adapters:
                if adapter_name in self.maps:
                    y = self.add_update(adapter_name, x, y0, onto=y)
        return y.movedim(-1, 1) if channels_first else y

    def add_updates(self, adapter_names: Sequence[str], x: Tensor, y0: Tensor) -> Tensor:
        """y0 (samples, ..., m) plus the update of each sample's adapter; those with the same maps in one product."""
        if len(adapter_names) != len(y0):
            raise ValueError(f"adapter_names has {len(adapter_names)} names for a batch of {len(y0)} samples")
        self.refresh()
        y, left = y0, [name for name in dict.fromkeys(adapter_names) if name in self.maps]
        while left:
            together = [name for name in left if self.share_maps(left[0], name)]
            left = [name for name in left if name not in together]
            rows = [row for row, name in enumerate(adapter_names) if name in together]
            at = torch.tensor(rows, device=y0.device)
            which = torch.tensor([together.index(adapter_names[row]) for row in rows], device=y0.device)
            y = y.index_copy(0, at, self.add_group(together, which, x.index_select(0, at), y0.index_select(0, at)))
        return y

    def add_group(self, adapter_names: Sequence[str], which: Tensor, x: Tensor, y0: Tensor) -> Tensor:
        """y0 (rows, ..., m) plus the updates of adapters that share their maps; which (rows,) tells each row's."""
        maps = [self.maps[name] for name in adapter_names]
        cores = torch.stack([each.scaled_core(each.core.dtype) for each in maps]).index_select(0, which)
        flat = y0.reshape(len(y0), -1, y0.shape[-1])
        return maps[0](flat, getattr(self.base, "bias", None), onto=flat, cores=cores).view(y0.shape)

    def share_maps(self, one: str, other: str) -> bool:
        """Whether two adapters have the same frozen maps in memory, and cores of one shape."""
        first, second = self.maps[one], self.maps[other]
        return first is second or (
            first.write.data_ptr() == second.write.data_ptr() != 0
            and first.read.data_ptr() == second.read.data_ptr()
            and first.core.shape == second.core.shape
        )

    def add_update(self, adapter_name: str, x: Tensor, y0: Tensor, onto: Tensor) -> Tensor:
        """onto plus the adapter's update, for the layer's input x and the base's output y0 (..., m)."""
        factor_map = self.maps[adapter_name]
        if factor_map._seen is not factor_map.probe:  # the loader called no hook of ours
            self.refresh()
        return factor_map(y0, getattr(self.base, "bias", None), onto=onto)

    @torch.compiler.disable
    def refresh(self, *_: Any) -> None:
        """Rebuild the maps of loaded adapters, after checking that they belong to this base.

        Equal probes mean equal weights. If the probe is that of the named checkpoint, or the factors rebuilt from the
        saved pivots are nearly the same, this is the base in another precision: a warning. Otherwise ValueError.
        """
        if self.base.weight.is_meta:
            return
        for adapter_name, factor_map in self.maps.items():
            if factor_map.stale:
                saved = {name: getattr(factor_map, name) for name in ("pivots", "values", "probe")}
                factors = self._shared_factors(factor_map) or self._saved_factors(adapter_name, factor_map)
                factor_map.set_factors(factors._replace(**saved))

    def matrix(self) -> Tensor:
        """The unmerged W (m, n); dequantised if the base is quantised."""
        return self._as_matrix(self._unmerged if self._unmerged is not None else self.get_base_weight())

    def lora(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The adapter as a low-rank pair A, B; see `lora_pair`."""
        return lora_pair(*self._update_parts(adapter_name), embedding=self.embedding)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's update of the base weight, in the base weight's layout."""
        delta = delta_weight(*self._update_parts(adapter_name), embedding=self.embedding)
        if isinstance(self.base, nn.Conv2d):
            return delta.view(self.base.weight.shape)
        return delta.T if isinstance(self.base, Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight. All are computed from the unmerged weight, which is kept."""
        if self.quantization_backend is not None:
            raise ValueError(
                f"{self.name} is quantised, and rounding would lose the update (loss 2.94 to 3.41 at 4 bits): "
                "load the base in full precision and merge there"
            )
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.maps]
        if not names:
            return
        self.refresh()
        unmerged = self.base.weight.data.clone() if self._unmerged is None else self._unmerged
        applied = [*self.merged_adapters, *names]
        wide = torch.promote_types(unmerged.dtype, torch.float32)
        merged = unmerged.to(wide)
        for name in applied:
            merged = merged + self.get_delta_weight(name).to(wide)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"{self.name}: merging {', '.join(names)} gives NaN or infinite weights; nothing was changed"
            )
        self.base.weight.data = merged.to(unmerged.dtype)
        self._unmerged, self.merged_adapters = unmerged, applied

    def unmerge(self) -> None:
        """Restore the unmerged weight, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base.weight.data = self._unmerged.to(self.base.weight)
        self._unmerged, self.merged_adapters = None, []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not isinstance(self.base, Conv1D)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """PEFT makes whole adapter modules trainable and then calls this to freeze the rest: all but the core."""
        for factor_map in self.maps.values():
            factor_map.write.requires_grad_(False)
            factor_map.read.requires_grad_(False)

    def _update_parts(self, adapter_name: str) -> tuple[Tensor, Factors, Tensor]:
        factor_map = self.maps[adapter_name]
        core = factor_map.scale * factor_map.core.detach().to(factor_map.read.dtype)
        core = factor_map.config.core_matrix(core, len(factor_map.values))
        return self.matrix(), factor_map.factors, core

    def _new_factors(self, config: FactorConfig, r: int | None) -> Factors:
        W = self.matrix()
        if self.quantization_backend is None:
            return self._factor(config, W, r)
        for full in self._checkpoint_matrices():
            if _relative_distance(W, full) < SAME_WEIGHT:
                return self._factor(config, full, r)
        _warn("no full-precision checkpoint of this quantised base is on this machine: factors come from its weights")
        return self._factor(config, W, r)

    def _saved_factors(self, adapter_name: str, factor_map: FactorMap) -> Factors:
        W, config, saved, probe = self.matrix(), factor_map.config, factor_map.factors, factor_map.probe.cpu()
        r, how = len(saved.values), config.factorization()
        if torch.equal(probe_digest(W, self.shape), probe):
            return self._factor(config, W, r, saved)
        for full in self._checkpoint_matrices():
            if torch.equal(probe_digest(full, self.shape), probe) and _relative_distance(W, full) < SAME_WEIGHT:
                _warn("this base differs from the adapter's in precision: factors come from the checkpoint")
                return self._factor(config, full, r, saved)
        try:
            error = how.rebuilt_error(W, saved)
            why = (
                f"the factors of {self.name} rebuilt from its weight are off by {error:.2g} (at most "
                f"{how.rebuilt_bound})"
            )
        except ValueError as failed:
            error, why = math.inf, f"{self.name}: {failed}"
        if not error <= how.rebuilt_bound:
            raise ValueError(
                f"adapter {adapter_name} does not fit this base: {why}. Load it on the base it was trained on; for the "
                "same base in 4 bits keep its full-precision checkpoint on this machine (looked for: "
                f"{', '.join(self.checkpoints) or 'none named'})"
            )
        _warn("this base differs from the adapter's in precision: factors are rebuilt from its weights")
        return self._factor(config, W, r, saved)

    def _factor(self, config: FactorConfig, W: Tensor, r: int | None, saved: Factors | None = None) -> Factors:
        try:
            how = config.factorization()
            rows = lambda indices: W[indices.long()]  # noqa: E731
            made = how.factors(how.panel(W, r), r, rows=rows, embedding=self.embedding, saved=saved)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; leave the layer out (exclude_modules) or lower the rank") from None
        _on_factors.get()(self.name)
        return made._replace(probe=probe_digest(W, self.shape))

    def _shared_factors(self, factor_map: FactorMap) -> Factors | None:
        """The factors of another adapter with the same directions, so that their maps are in memory once."""
        for other in self.maps.values():
            if other is not factor_map and not other.stale and other.same_directions(factor_map):
                return other.factors
        return None

    def _checkpoint_matrices(self) -> Iterator[Tensor]:
        """What may be W (m, n) in full precision, from each of the named checkpoints that is on this machine.

        bitsandbytes makes a linear layer of a Conv1D, whose weight stands in the checkpoint transposed.
        """
        for weight in local_weights(self.checkpoints, self.name):
            W = self._as_matrix(weight.to(self.base.weight.device))
            yield from (each for each in (W, W.T) if tuple(each.shape) == self.shape)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if isinstance(self.base, Conv1D) else weight.flatten(1)


class FactorLinear(FactorLayer):
    """The same for Linear and Conv1D: PEFT's all-linear recognises adapted layers by Linear in the class name."""


def _relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _warn(text: str) -> None:
    """Warn without naming a layer, so that Python shows the warning once for all layers."""
    warnings.warn(text, BasePrecisionWarning, stacklevel=2)
