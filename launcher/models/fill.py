"""Fill a skeleton's parameters from the checkpoint; each process reads only the rows that it keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters import Factors
from adapters.checkpoint_files import TensorInfo, open_tensor, read_tensor
from adapters.layer import FactorLayer
from launcher.engines.registry import give_first
from launcher.models.quantize import Quantised
from launcher.models.skeleton import PEFT_PARTS, dora_layer, exchange

OnFill = Callable[[int, int], None]  # called before each parameter is filled: which of how many


class Parts(Protocol):
    """How an engine shards a parameter: the rows that this rank reads, and the parameter made from them."""

    def rows(self, parameter: Tensor) -> slice: ...

    def place(self, like: nn.Parameter, rows: Tensor) -> nn.Parameter: ...

    def keep(self, drawn: nn.Parameter) -> nn.Parameter:
        """The parameter made from one that every rank has whole."""
        ...


class Whole:
    """No sharding: this process holds every parameter whole."""

    def rows(self, parameter: Tensor) -> slice:
        return slice(None)

    def place(self, like: nn.Parameter, rows: Tensor) -> nn.Parameter:
        return nn.Parameter(rows, requires_grad=like.requires_grad)

    def keep(self, drawn: nn.Parameter) -> nn.Parameter:
        return drawn


def fill(
    model: nn.Module,
    folder: Path,
    factors: Callable[[str, slice], Factors],
    parts: Parts,
    device: torch.device,
    progress: OnFill = lambda done, total: None,
    *,
    cpu_offload: bool = False,
) -> None:
    """Give every parameter on meta its values, reading only the rows from disk of which this rank holds a part.

    factors(module, rows) returns the frozen factors with those rows of `write`. With cpu_offload parameters stay in
    main memory; buffers are always on the device. Raises ValueError naming tensors that the checkpoint lacks or has
    with another shape.
    """
    home = torch.device("cpu") if cpu_offload else device
    done, total = itertools.count(1), sum(parameter.is_meta for parameter in model.parameters())

    def place(like: Any, rows: Tensor) -> nn.Parameter:
        progress(next(done), total)
        return parts.place(like, rows.to(home, like.dtype).clone())

    exchange(model, lambda _, parameter: parameter if parameter.is_meta else parts.keep(parameter))
    _fill_maps(model, factors, parts, place)
    _fill_base(model, folder, parts, device, place)


def _fill_maps(
    model: nn.Module,
    factors: Callable[[str, slice], Factors],
    parts: Parts,
    place: Callable[[Any, Tensor], nn.Parameter],
) -> None:
    """Fill the frozen maps of our adapters, and initialise their cores."""
    for layer in [module for module in model.modules() if isinstance(module, FactorLayer)]:
        for factor_map in layer.maps.values():
            frozen = factors(layer.name, parts.rows(factor_map.write))
            factor_map.set_origin(frozen)
            factor_map.write = place(factor_map.write, frozen.write)
            factor_map.read = place(factor_map.read, frozen.read[parts.rows(factor_map.read)])
            core = factor_map.starting_core(layer.name)
            factor_map.core = place(factor_map.core, core[parts.rows(factor_map.core)])


def _fill_base(
    model: nn.Module, folder: Path, parts: Parts, device: torch.device, place: Callable[[Any, Tensor], nn.Parameter]
) -> None:
    """Fill everything that is still on meta from the checkpoint, and move the buffers to the device."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    tensors: dict[str, TensorInfo] = base.stored
    tied = getattr(base, "all_tied_weights_keys", None) or {}
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}  # a tied parameter has several places
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                places.setdefault(id(parameter), []).append((module, name, prefix))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                info = tensors.get(f"{PEFT_PARTS.sub('', prefix)}.{name}".removeprefix("."))
                module._buffers[name] = (read_tensor(info).to(buffer.dtype) if info else buffer).to(device)
    for shared in places.values():
        modules = [PEFT_PARTS.sub("", prefix) for _, _, prefix in shared]
        owner, name, prefix = shared[0]
        whole: Any = owner._parameters[name]
        dora = dora_layer(model, prefix)
        if dora is not None:
            modules = [modules[0].partition(".lora_magnitude_vector.")[0]]
        full = [f"{module}.{name}" for module in modules]
        full += [tied[one] for one in full if one in tied]  # layers that share a weight may each have a copy here
        info = next((tensors[one] for one in full if one in tensors), None)
        packed: Any = owner if name == "weight" and isinstance(owner, Quantised) else None
        of = whole if dora is None else dora.weight
        expected = (
            packed.from_shape if packed else tuple(getattr(of, "ds_shape", of.shape))
        )  # under ZeRO-3 shape is empty
        if info is None or info.shape != expected:
            here = f"has it with shape {info.shape}" if info else "has no such tensor"
            quantised = any(isinstance(module, Quantised) for module in model.modules())
            sharded = not isinstance(parts, Whole)
            asked = [give_first(lambda info: info.holds_base)] * sharded + ["--quantize none"] * quantised
            raise ValueError(
                f"the model's {modules[0]}.{name} {expected} cannot be filled from {folder}, which {here}: "
                f"this architecture's files are laid out differently; give {' and '.join(asked)}"
            )
        stored: Any = open_tensor(info) if info.shape else _Scalar(read_tensor(info))
        if packed:
            stored = packed.pack(stored, device)
        elif dora is not None:
            stored = _RowNorms(stored, dora.weight.dtype)
        filled = place(whole, stored[parts.rows(whole)])
        for owner, name, _ in shared:
            setattr(owner, name, filled)
        if packed and isinstance(parts, Whole):
            packed.keep(filled)


class _Scalar:
    """A tensor without dimensions, which cannot be sliced."""

    def __init__(self, stored: Tensor):
        self.stored = stored

    def __getitem__(self, rows: slice) -> Tensor:
        return self.stored


class _RowNorms:
    """The norms of the requested rows of a stored matrix."""

    def __init__(self, stored: Any, dtype: torch.dtype):
        self.stored, self.dtype = stored, dtype

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.linalg.norm(self.stored[rows].to(self.dtype), dim=1)
