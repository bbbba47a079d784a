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
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.base import FactorConfig
from adapters.checkpoint_names import local_weights
from adapters.factors import Factors, delta_weight, lora_pair, probe_digest
from adapters.functions import add_rows, in_blocks, lower_linear, take_rows

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


class FactorMap(nn.Module):
    """One adapter on one layer: read r numbers from y0, multiply them by the trained core, write them back.

    core, of the config's core_shape, is float32 and the only trained parameter. write (out, r) and read are frozen
    parameters, so that sharding engines shard them; they follow from the base and are in no state dict. pivots, values
    and probe identify what they follow from.
    """

    derived: ClassVar[tuple[str, ...]] = ("write", "read")  # left out of state dicts

    core: nn.Parameter
    write: nn.Parameter
    read: nn.Parameter
    pivots: Tensor
    values: Tensor
    probe: Tensor
    rows: Tensor

    def __init__(
        self, out: int, r: int, config: FactorConfig, dtype: torch.dtype, device: torch.device, *, embedding: bool
    ):
        super().__init__()
        self.config, self.scale, self.embedding = config, config.scale, embedding
        wide = torch.promote_types(dtype, torch.float32)
        place = torch.device("cpu") if device.type == "meta" else device
        self.core = nn.Parameter(torch.zeros(config.core_shape(r), device=device))
        self.write = nn.Parameter(torch.empty(out, r, dtype=dtype, device=device), requires_grad=False)
        self.read = nn.Parameter(
            torch.empty((r,) if config.through_write else (r, r), dtype=wide, device=device), False
        )
        self.register_buffer("pivots", torch.zeros(r, dtype=torch.int32, device=place))
        self.register_buffer("values", torch.zeros(r, device=place))
        self.register_buffer("probe", torch.zeros(32, dtype=torch.uint8, device=place))
        self.register_buffer("rows", torch.arange(r, device=place), persistent=False)  # entries of y0 that are read
        self._made_from: bytes | None = None
        self._seen: Tensor | None = None

    @property
    def factors(self) -> Factors:
        """The frozen maps and what they follow from."""
        return Factors(*(getattr(self, name).detach() for name in Factors._fields))

    def set_factors(self, factors: Factors) -> None:
        """Set the two maps and what they follow from; the core is not changed."""
        device = self.probe.device
        self.write = nn.Parameter(factors.write.to(device, self.write.dtype).contiguous(), requires_grad=False)
        self.read = nn.Parameter(factors.read.to(device, self.read.dtype), requires_grad=False)
        self.set_origin(factors)

    def start(self, name: str) -> None:
        """Set the core of the module of this name to what training starts from."""
        self.core.data = self.starting_core(name).to(self.core)

    def starting_core(self, name: str) -> Tensor:
        """What training starts from, whole and on the CPU."""
        if not self.config.init_weights:
            return self.config.random_core(len(self.values), name)
        return self.config.start_core(self.values.cpu())

    def set_origin(self, factors: Factors) -> None:
        """Set what the maps follow from, for maps that are filled separately, shard by shard."""
        device = torch.device("cpu") if self.probe.is_meta else self.probe.device  # PEFT moves 8-bit layers whole
        for name in ("pivots", "values", "probe"):
            setattr(self, name, getattr(factors, name).to(device))
        self.rows = torch.arange(len(self.pivots), device=device) if self.embedding else self.pivots.long()
        self._made_from, self._seen = self._origin(), self.probe

    @property
    def stale(self) -> bool:
        """Whether a loader replaced pivots or probe, so that the maps no longer belong to them."""
        if self._seen is not self.probe:
            if self.write.is_meta or self._made_from != self._origin():
                return True
            self._seen = self.probe
        return False

    def same_directions(self, other: FactorMap) -> bool:
        """Whether the maps of both follow from the same weight, pivots and settings."""
        return (
            self.config.factorization() == other.config.factorization()
            and (self.write.shape, self.write.dtype) == (other.write.shape, other.write.dtype)
            and torch.equal(self.pivots, other.pivots)
            and torch.equal(self.probe, other.probe)
        )

    def _origin(self) -> bytes:
        return torch.cat([self.pivots.cpu().view(torch.uint8), self.probe.cpu()]).numpy().tobytes()

    def forward(self, y0: Tensor, bias: Tensor | None, onto: Tensor, cores: Tensor | None = None) -> Tensor:
        """onto + Write (scale core * Read (y0 - bias)); y0 (..., out) is the base output with its bias.

        cores (rows, *core_shape), with the scale in them, replace the layer's own core: y0 is then (rows, tokens, out).
        y0 is not overwritten, which would save a tensor of its size: other code may keep it (selective activation
        checkpointing does), and on a CPU the step was not faster.
        """
        if self.config.through_write:
            offset = None if bias is None else -torch.mv(self.write.T, bias)
            h = F.linear(y0, self.write.T, offset).to(self.read.dtype) * self.read
        else:
            if onto is y0:
                onto, taken = take_rows(y0, self.rows)
            else:
                taken = y0.index_select(-1, self.rows)
            if bias is not None:
                taken = taken - bias[self.rows]
            h = lower_linear(taken.to(self.read.dtype), self.read)
        if cores is None:
            core = self.scaled_core(h.dtype)
        else:  # a vector core is the same for all tokens of its row
            core = (cores if self.core.ndim == 2 else cores.unsqueeze(1)).to(h.dtype)
        h = self.config.multiply(h, core).to(self.write.dtype)
        if y0.dtype != self.write.dtype:  # under autocast
            return onto + F.linear(h, self.write).to(onto.dtype)
        at_full_rank = len(self.rows) == onto.shape[-1] and not self.config.through_write
        if at_full_rank and in_blocks(h):  # then Write is triangular too
            return add_rows(onto, lower_linear(h, self.write, self.rows).to(onto.dtype), self.rows)
        return torch.addmm(onto.reshape(-1, onto.shape[-1]), h.reshape(-1, h.shape[-1]), self.write.T).view(onto.shape)

    def scaled_core(self, dtype: torch.dtype) -> Tensor:
        """scale * core; the core itself if scale is 1."""
        core = self.core.to(dtype)
        return core if self.scale == 1 else self.scale * core

    def train(self, mode: bool = True) -> Any:
        """Keep the core in float32: TRL casts trained parameters on a 4-bit base to bf16, without calling any hook."""
        if self.core.element_size() < 4:
            self.core.data = self.core.data.float()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Only write takes a narrower dtype (half(), PEFT's casts); core, read and what is saved stay float32."""

        def apply(old: Tensor) -> Tensor:
            new = fn(old)
            return old.to(new.device) if new.element_size() < old.element_size() and old is not self.write else new

        super()._apply(apply, recurse)
        if self.write.is_meta:
            self._made_from = None  # moved to meta: the maps have to be made again
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.derived:
            if not getattr(getattr(self, name), "_fsdp_flattened", False):  # FSDP1 requires all of its parameters here
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "values")
        if saved is not None:
            if saved.shape != self.values.shape:
                raise ValueError(
                    f"{prefix.rstrip('.')} was saved at rank {len(saved)} but has rank {len(self.values)} here: the "
                    f"config's r is not the saved {len(saved)}, or this is another base model"
                )
            self._seen = None  # loading in place keeps the buffer's identity
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing: list[str] = rest[2]
        missing[:] = [name for name in missing if name not in [prefix + each for each in self.derived]]


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


def matrix_shape(base: nn.Module, name: str) -> tuple[int, int]:
    """(m, n) of a layer's W. Raises ValueError for a type of layer that is not supported."""
    if isinstance(base, nn.Linear):  # quantised ones too, whose weight is packed
        return base.out_features, base.in_features
    if isinstance(base, Conv1D):
        return base.weight.shape[1], base.weight.shape[0]
    if isinstance(base, nn.Embedding) or (isinstance(base, nn.Conv2d) and base.groups == 1):
        return base.weight.shape[0], base.weight[0].numel()
    groups = f" with groups {base.groups}" if isinstance(base, nn.Conv2d) else ""
    raise ValueError(
        f"{name} is a {type(base).__name__}{groups}; supported are Linear, Conv1D, Embedding and Conv2d "
        "with groups 1: leave it out (exclude_modules) or name other target_modules"
    )


def features(base: nn.Module, shape: tuple[int, int]) -> tuple[int, int]:
    """(in, out) as PEFT's LoRA layers name them: rows and width of an embedding, channels of a convolution."""
    if isinstance(base, nn.Conv2d):
        return base.in_channels, base.out_channels
    m, n = shape
    return (m, n) if isinstance(base, nn.Embedding) else (n, m)


def _relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _warn(text: str) -> None:
    """Warn without naming a layer, so that Python shows the warning once for all layers."""
    warnings.warn(text, BasePrecisionWarning, stacklevel=2)
