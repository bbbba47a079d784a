"""What a merged checkpoint holds: each tensor as it was, replaced, or with its adapter's update added.

Only headers are read here; a tensor is computed when it is written.
"""

from __future__ import annotations

import functools
import json
from itertools import chain
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from adapters.checkpoint_files import TensorInfo, list_tensors
from adapters.checkpoint_names import Conversion, model_tensors
from adapters.layer import FactorLayer
from launcher.factorization.targets import skeleton
from launcher.inference.adapter_folder import attach
from launcher.inference.options import Kind
from launcher.inference.sources import Source
from launcher.inference.write_model import BYTES, Entry
from launcher.models.quantize import linear_layers, transformers_config

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FLOATS = {name: dtype for dtype, name in NAMES.items()}  # as safetensors writes them


class Plan(NamedTuple):
    """All that a merged checkpoint holds; untied: input and output embeddings are no longer one tensor."""

    entries: list[Entry]
    dtype: torch.dtype  # of the merged weights; what quantised ones are computed in
    untied: bool
    quantization: dict[str, Any] | None = None  # as transformers' configs have it


def plan_merge(source: Source, dtype: torch.dtype | None, quantize: Kind = "none") -> Plan:
    """Every tensor of the merged checkpoint and how to make it, read only from headers and the adapter (if any).

    Raises ValueError if the base is quantised, or stores the tensors of an adapted module under another name.
    """
    if "quantization_config" in json.loads((source.base / "config.json").read_text(encoding="utf-8")):
        raise ValueError(
            f"{source.base} is stored quantised, and rounding it again would lose the update: give its full-precision "
            "original with --base; --quantize quantises the result"
        )
    tensors = list_tensors(source.base)
    # to("meta"): DiffLlama draws some of its numbers on the CPU
    bare: Any = skeleton(source.base, source.trust_remote_code).float().to("meta")
    by_parameter = model_tensors(bare, tensors)
    tied = bool(getattr(bare.config.get_text_config(), "tie_word_embeddings", False))
    embeddings = (bare.get_input_embeddings(), bare.get_output_embeddings())
    ends = [f"{name}.weight" for name, module in bare.named_modules() if any(module is end for end in embeddings)]
    linear = linear_layers(bare) if quantize != "none" else {}
    head = [name for name, module in bare.named_modules() if module is embeddings[1]]
    model = bare
    if source.adapter is not None:
        model = attach(bare, source.adapter, low_cpu_mem_usage=True, base=source.base).get_base_model()
    layers: dict[str, FactorLayer] = {}
    rewritten: dict[str, _Rewritten] = {}  # by the checkpoint's names: those of which changed weights are made
    for layer in adapted_layers(model):
        layer.base.weight = nn.Parameter(layer.base.weight.to("meta"), requires_grad=False)  # a copy of PEFT's, if any
        info = _weight(by_parameter, layer.name, layer.base.weight, source)
        if info.conversion is None:
            layers[info.name] = layer
        else:
            _group(rewritten, info).layers[info.name] = layer
    whole = _held_whole(model, by_parameter, rewritten)
    rounded = {_weight(by_parameter, name, module.weight, source).name: name for name, module in linear.items()}
    rounded = {tensor: name for tensor, name in rounded.items() if tensor not in whole and tensor in tensors}
    untied = tied and any(_stored_as(by_parameter, end) in whole for end in ends)
    if untied:  # the base stores one tensor for both; the one that the adapter does not change still needs it
        one = next(by_parameter[end] for end in ends if end in by_parameter)
        tensors = tensors | {name: one for end in ends if (name := _stored_as(by_parameter, end)) not in tensors}
    entries = [
        _entry(name, info, dtype, layers.get(name), whole.pop(name, None), rewritten.get(name))
        for name, info in tensors.items()
    ]
    entries += [_entry(name, None, dtype, None, value) for name, value in whole.items()]
    adapted = {*layers, *rewritten, *rounded}
    changed = {entry.dtype for entry in entries if entry.name in adapted}
    computed = FLOATS[min(changed, key=lambda name: (BYTES[name], name))]
    if quantize == "none":
        return Plan(entries, computed, untied)
    parts = [
        _quantised(entry, linear[rounded[entry.name]], quantize, computed) if entry.name in rounded else [entry]
        for entry in entries
    ]
    kept = [*head, *(linear.keys() - rounded.values())]
    return Plan(list(chain(*parts)), computed, untied, transformers_config(quantize, computed, kept))


def merged_weight(layer: FactorLayer, weight: Tensor) -> Tensor:
    """The base's weight plus the update of the layer's adapter, in float32 or wider; frees the layer's maps.

    Raises ValueError if the adapter was made for another weight, or if the sum is not finite.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    layer.base.weight = nn.Parameter(wide, requires_grad=False)
    layer.refresh()
    merged = wide + layer.get_delta_weight("default").to(wide)
    if not torch.isfinite(merged).all():
        raise ValueError(f"{layer.name}: merging gives NaN or infinite weights; was the training stable?")
    layer.base.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    layer.maps.clear()
    return merged


def adapted_layers(model: nn.Module) -> list[FactorLayer]:
    """The layers with an adapter of this project."""
    return [layer for layer in model.modules() if isinstance(layer, FactorLayer)]


def _weight(tensors: dict[str, TensorInfo], module: str, weight: Tensor, source: Source) -> TensorInfo:
    """The checkpoint's tensor of a module's weight. Raises ValueError if it is missing or has another shape."""
    info, shape = tensors.get(f"{module}.weight"), tuple(weight.shape)
    if info is None or info.dtype not in FLOATS or info.shape != shape:
        found = "nothing" if info is None else f"{info.dtype} of shape {info.shape}"
        raise ValueError(
            f"{source.base} has {found} for {module}.weight, expected floating-point numbers of shape "
            f"{shape}: give the base's original with --base, or merge in memory with PEFT's merge_and_unload"
        )
    return info


class _Rewritten:
    """Tensors of the checkpoint that change because weights which transformers makes of them do."""

    def __init__(self, conversion: Conversion):
        self.conversion = conversion
        self.layers: dict[str, FactorLayer] = {}  # by the model's names
        self.values: dict[str, Tensor] = {}  # likewise: what is replaced
        self.made: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """The tensor of that name; all are made together when the first of them is requested."""
        if not self.made:
            parameters = self.conversion.make()
            for parameter, layer in self.layers.items():
                parameters[parameter] = merged_weight(layer, parameters[parameter]).to(parameters[parameter].dtype)
            for parameter, value in self.values.items():
                parameters[parameter] = value.to(parameters[parameter].dtype)
            self.made = self.conversion.back(parameters)
            again = self.conversion.apply(self.made)
            assert all(torch.equal(again[n], parameters[n]) for n in parameters), f"{name} does not convert back"
        return self.made.pop(name)


def _group(rewritten: dict[str, _Rewritten], info: TensorInfo) -> _Rewritten:
    """The group of a converted tensor, noted under the name of each tensor that it rewrites."""
    names = [stored.name for stored in info.conversion.tensors]
    group = rewritten.get(names[0]) or _Rewritten(info.conversion)
    rewritten |= dict.fromkeys(names, group)
    return group


def _held_whole(
    model: nn.Module, tensors: dict[str, TensorInfo], rewritten: dict[str, _Rewritten]
) -> dict[str, Tensor]:
    """What the adapter replaces (modules_to_save): everything that is not on the meta device, except our maps.

    By the checkpoint's names; what is not stored as it is goes into `rewritten`.
    """
    whole = {}
    maps = [factor_map for layer in adapted_layers(model) for factor_map in layer.maps.values()]
    ours = {id(value) for factor_map in maps for value in [*factor_map.parameters(), *factor_map.buffers()]}
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if not value.is_meta and id(value) not in ours:
            name = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
            if (info := tensors.get(name)) is not None and info.conversion is not None:
                _group(rewritten, info).values[name] = value.detach().cpu()
            else:
                whole[_stored_as(tensors, name)] = value.detach().cpu()
    return whole


def _stored_as(tensors: dict[str, TensorInfo], name: str) -> str:
    """The checkpoint's name of a model's parameter; its own if the checkpoint does not hold it."""
    return tensors[name].name if name in tensors else name


def _entry(
    name: str,
    info: TensorInfo | None,
    dtype: torch.dtype | None,
    layer: FactorLayer | None,
    whole: Tensor | None,
    rewritten: _Rewritten | None = None,
) -> Entry:
    """The tensor as the merged checkpoint has it: replaced, updated or as it was; floating-point ones in dtype."""
    stored = info.dtype if info is not None else NAMES[whole.dtype]  # type: ignore[union-attr]
    written = NAMES[dtype] if dtype is not None and stored in FLOATS else stored

    def make() -> Tensor:
        if whole is not None:
            tensor = whole
        elif rewritten is not None:
            tensor = rewritten.take(name)
        else:
            assert info is not None
            with safe_open(info.file, framework="pt") as opened:
                tensor = opened.get_tensor(info.name)
            if layer is not None:
                tensor = merged_weight(layer, tensor)
        return tensor.to(FLOATS[written]) if written in FLOATS else tensor

    shape = tuple(whole.shape) if whole is not None else info.shape  # type: ignore[union-attr]
    return Entry(name, shape, written, make)


def _quantised(entry: Entry, like: Any, kind: str, dtype: torch.dtype) -> list[Entry]:
    """The tensors that represent a quantised weight, computed together when the first one is needed."""
    from launcher.models.layers import LAYERS

    made: dict[str, Tensor] = {}

    def make(part: str) -> Tensor:
        if not made:
            layer = LAYERS[kind](like, kind, dtype)
            made.update(layer.saved(layer.pack(entry.make(), torch.device("cpu"))))
        return made.pop(part)

    stem, layout = entry.name.removesuffix("weight"), LAYERS[kind](like, kind, dtype).layout()
    return [
        Entry(stem + part, shape, stored, functools.partial(make, part)) for part, (stored, shape) in layout.items()
    ]
