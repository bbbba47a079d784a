"""Which tensors of a checkpoint make which parameters of a model: transformers' own renamings and conversions.

A checkpoint may name its tensors differently from the model's parameters (LLaVA, GPT-NeoX's `embed_out`), and may
store separately what the model holds together (the experts of Mixtral). Everything that reads a base goes through
`model_tensors`, so that factors, sharded and quantised loading, merging and transformers' loader see one model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from adapters.checkpoint_files import TensorInfo, list_tensors, local_folder, read_tensor, text_encoders

log = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Shapes:
    """What converters ask of a model: its config, and its parameters, whose shapes count."""

    def __init__(self, config: Any, state: Mapping[str, Tensor]):
        self.config = config
        self.state = {name: value.to("meta") for name, value in state.items()}

    def get_parameter(self, name: str) -> Tensor:
        """As `torch.nn.Module` has it, on the meta device."""
        return self.state[name]


@dataclass(eq=False)
class Conversion:
    """Tensors of a checkpoint that one of transformers' converters turns into parameters of a model."""

    converter: WeightConverter
    model: Shapes  # decides how some converters cut
    first: str  # the first of the parameters' names
    sources: dict[str, list[TensorInfo]] = field(default_factory=dict)  # by the converter's pattern, in order

    @property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor that is read, in the order of the converter's patterns."""
        return [info for pattern in self.converter.source_patterns for info in self.sources.get(pattern, ())]

    @property
    def by_experts(self) -> bool:
        """Whether row i of the result is made of the i-th tensor of each pattern alone."""
        first, *others = self.converter.operations
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(
                (isinstance(op, (Concatenate, Interleave)) and op.dim > 0)
                or (isinstance(op, Transpose) and op.dim0 > 0 and op.dim1 > 0)
                for op in others
            )
        )

    def make(self, experts: slice = slice(None), *, meta: bool = False) -> dict[str, Tensor]:
        """The model's parameters by name; with meta their shapes and dtypes alone."""
        return self.apply({info.name: _meta(info) if meta else read_tensor(info) for info in self._some(experts)})

    def apply(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters by name, made of those of the checkpoint's tensors that `stored` holds."""
        converter: Any = deepcopy(self.converter)
        for pattern, infos in self.sources.items():
            for info in infos:
                if info.name in stored:
                    converter.add_tensor(self.first, info.name, pattern, stored[info.name])
        return self._run(converter, self.first)

    def back(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors, by name, made of all of the model's parameters that `make` returns."""
        converter: Any = self.converter.reverse_transform()
        first = None
        for name in parameters:
            renamed, pattern = converter.rename_source_key(name)
            first = first or renamed
            converter.add_tensor(first, name, pattern, parameters[name])
        made = list(self._run(converter, first or self.first).values())
        infos = self.tensors
        assert len(made) == len(infos), f"{len(made)} tensors made of {sorted(parameters)}, stored are {len(infos)}"
        assert [tuple(tensor.shape) for tensor in made] == [info.shape for info in infos], f"{self.first}: other shapes"
        return {info.name: tensor for info, tensor in zip(infos, made, strict=True)}

    def _run(self, converter: Any, first: str) -> dict[str, Tensor]:
        made = converter.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _some(self, experts: slice) -> list[TensorInfo]:
        return [info for part in self.sources.values() for info in part[experts]]


class Converted:
    """A tensor that a conversion makes, read by slice like one of a file: only the requested experts."""

    def __init__(self, info: TensorInfo):
        self.info, self.whole = info, None

    def get_shape(self) -> list[int]:
        """As safetensors' slices have it."""
        return list(self.info.shape)

    def __getitem__(self, place: Any) -> Tensor:
        conversion: Any = self.info.conversion
        if self.whole is None:
            if isinstance(place, slice) and place != slice(None) and conversion.by_experts:
                if not range(self.info.shape[0])[place]:
                    return torch.empty(0, *self.info.shape[1:], dtype=DTYPES[self.info.dtype])
                return conversion.make(place)[self.info.name]
            self.whole = conversion.make()[self.info.name]
        assert self.whole is not None
        return self.whole[place]


def model_tensors(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by the names that the model's parameters and buffers have; unused ones are left out.

    model may be on the meta device, and carries no adapter. As transformers' loader decides it.
    """
    if folders := getattr(model, "part_folders", None):  # a model of several parts, each with its own checkpoint
        return {
            f"{part}.{name}": info
            for part, folder in folders.items()
            for name, info in model_tensors(model.get_submodule(part), list_tensors(folder)).items()
        }
    state = model.state_dict()
    if not isinstance(model, transformers.PreTrainedModel):
        return {name: info for name, info in tensors.items() if name in state}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    shapes = Shapes(model.config, state)
    found: dict[str, TensorInfo] = {}
    groups: dict[str, Conversion] = {}
    for name in sorted(tensors, key=dot_natural_key):
        prefix: Any = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": state}
        renamed, pattern = rename_source_key(name, renamings, converters, **prefix)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], **prefix)
        if renamed not in state:
            continue
        if pattern is None:
            found[renamed] = tensors[name]
        else:
            group = groups.setdefault(renamed, Conversion(of_pattern[pattern], shapes, renamed))
            group.sources.setdefault(pattern, []).append(tensors[name])
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for first, group in groups.items():
        stored = group.tensors
        try:
            made = group.make(meta=True)
        except Exception as error:  # an op that this checkpoint's tensors do not fit raises anything
            raise ValueError(
                f"{', '.join(info.name for info in stored[:3])} in {stored[0].file} cannot be converted to the model's "
                f"{first} ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}): the "
                "checkpoint lacks some of them, or config.json belongs to another model"
            ) from error
        for name, tensor in made.items():
            if name in state:
                found[name] = TensorInfo(stored[0].file, name, tuple(tensor.shape), codes[tensor.dtype], group)
    return found


def local_weights(models: Iterable[str], module: str) -> Iterator[Tensor]:
    """A module's full-precision weight from each checkpoint (folder or hub name) that is on this machine."""
    places = [place for name in models if (place := local_folder(name)) is not None]
    for folder in [each for place in places for each in (place, *text_encoders(place))]:
        try:
            tensors = list_tensors(folder)
            config = folder / "config.json"
            stamp = config.stat().st_mtime_ns if config.is_file() else 0
            tensors = {**tensors, **_by_model(folder, stamp, frozenset(info.file for info in tensors.values()))}
        except ValueError as error:
            log.warning("cannot read %s from the checkpoint %s: %s", module, folder, error)
            continue
        info = tensors.get(f"{module}.weight")
        if info is not None and info.dtype.startswith(("F", "BF")):
            yield read_tensor(info)


@lru_cache(maxsize=4)
def _by_model(folder: Path, stamp: int, files: frozenset[Path]) -> dict[str, TensorInfo]:
    """`model_tensors` of a folder, by its config.json; nothing if that describes no model known here."""
    try:
        return model_tensors(skeleton_of(folder), list_tensors(folder))
    except (OSError, KeyError, ValueError, AttributeError):
        return {}


def language_model_class(config: Any) -> Any:
    """The auto class that builds a model which writes text: one for text alone if there is one, else with vision."""
    auto: Any = transformers
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return auto.AutoModelForCausalLM
    for kind in (auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM):
        if type(config) in kind._model_mapping:
            return kind
    raise ValueError(
        f"transformers {transformers.__version__} builds no model that writes text for model_type "
        f"{config.model_type}: give a language model, or a newer transformers"
    )


def skeleton_of(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder on the meta device: a language model, or else what its config.json names."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if type(config) in transformers.AutoModelForCausalLM._model_mapping or named is None:
            return language_model_class(config).from_config(config, trust_remote_code=trust_remote_code)
        return named(config)


def ignored_when_missing(model: nn.Module, name: str) -> bool:
    """Whether transformers starts without this tensor, whose value the model makes itself."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
