"""`loldu merge`: write base and adapter as a plain Hugging Face model, with one weight in memory at a time.

The base is never loaded as a whole. A skeleton of it with the adapter is on the meta device. For each adapted weight,
the weight is read, the update is computed from factors rebuilt from the saved pivots (checked as on any load), and the
sum is written to its place in a safetensors file, whose header is known in advance. Adapters of PEFT's other methods
are merged by PEFT, in memory.

With --quantize, the update is added to the full-precision weight and the sum is rounded once to 8 or 4 bits. On an nf4
run of babyllama (held-out loss 2.637) this gives 2.672; adding to the nf4 weight and rounding again gives 2.688
(float32: 2.618).
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from adapters.base import FactorConfig
from adapters.checkpoint_files import TensorInfo, list_tensors
from adapters.checkpoint_names import Conversion, model_tensors
from adapters.layer import FactorLayer
from launcher.data.saved_template import CHAT_TEMPLATE, PROMPT_TEMPLATE, drop_older
from launcher.factorization.targets import skeleton
from launcher.files import allow_by_umask, disk_errors, user_path
from launcher.inference.adapter_folder import adapter_config, attach
from launcher.inference.checks import compare, loss_change, plain
from launcher.inference.heldout import held_out
from launcher.inference.load import DTYPES, choose_device, load_model
from launcher.inference.options import Kind
from launcher.inference.sources import Source, find
from launcher.models.files import TOKENIZER_PATTERNS
from launcher.models.quantize import check_quantize, linear_layers, transformers_config
from launcher.progress import Bars, growth
from launcher.text import first_line, printable

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FLOATS = {name: dtype for dtype, name in NAMES.items()}  # as safetensors writes them
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
BESIDE_WEIGHTS = (
    "generation_config.json", "chat_template*", PROMPT_TEMPLATE, "*processor_config.json", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor to write; dtype as safetensors names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


class Plan(NamedTuple):
    """All that a merged checkpoint holds; untied: input and output embeddings are no longer one tensor."""

    entries: list[Entry]
    dtype: torch.dtype  # of the merged weights; what quantised ones are computed in
    untied: bool
    quantization: dict[str, Any] | None = None  # as transformers' configs have it


def merge(
    adapter: str,
    *,
    out: str,
    base: str | None = None,
    dtype: str = "auto",
    quantize: Kind = "none",
    data: str | None = None,
    shard_gb: float = 5.0,
    check: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write base and adapter as one plain Hugging Face model; `loldu merge` (commands.py) describes the arguments.

    Returns the folder. Raises ValueError before anything is written if the request cannot work, and Failed if the
    merged model does not compute what base and adapter compute; nothing is left in out then.
    """
    check_quantize(quantize)
    if quantize != "none" and not check:
        raise ValueError("--quantize always measures the accuracy that it costs: leave --no-check out")
    if quantize == "none" and data is not None:
        raise ValueError(f"--data {data} is only used by --quantize, which measures a loss on it: give both")
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype {dtype} is unknown: give auto, {', '.join(DTYPES)}")
    if not shard_gb > 0:
        raise ValueError(f"--shard-gb must be above 0, got {shard_gb}")
    device = choose_device(device)  # checked before an hour of writing
    source = replace(find(adapter, base=base, trust_remote_code=trust_remote_code), dtype=None)
    if source.adapter is None:
        raise ValueError(f"{adapter} holds a whole model and no adapter: there is nothing to merge")
    config = adapter_config(source.adapter)
    held = held_out(source, data) if quantize != "none" else None
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with new_folder(user_path(out), "--out") as partial:
        whole = source
        if not isinstance(config, FactorConfig):
            console.print(f"PEFT merges {config.peft_type.value} adapters with the whole model in memory")
            place = partial if held is None else partial / "whole"
            written = _merge_in_memory(source, place, dtype, shard_gb, console)
            whole = plain(source, place)
        if isinstance(config, FactorConfig) or held is not None:
            plan = plan_merge(whole, DTYPES.get(dtype), quantize)
            _write_checkpoint(plan, partial, shard_gb, console)
            _write_config(whole.base, partial, plan)
            written = plan.dtype
        if whole is not source and held is not None:
            shutil.rmtree(whole.base)
        _copy_beside(source, partial)
        if held is not None:
            console.print(loss_change(source, partial, written, quantize, held, device))
        elif check:
            console.print(compare(source, partial, written, device))
    console.print(f"merged model in {printable(str(out))}")
    return user_path(out)


def _copy_beside(source: Source, folder: Path) -> None:
    """Copy all but weights and config: the adapter's before the base's, and the tokenizer's from one folder alone.

    A special_tokens_map.json of the base would change the tokens that an adapter's own tokenizer_config.json names.
    """
    template = source.saved_template  # of an adapter, it may be in its tokenizer_config.json
    if template is not None and template.jinja is not None:
        (folder / CHAT_TEMPLATE).write_text(template.jinja, encoding="utf-8")
    code = ["*.py"] if source.trust_remote_code else []
    for origin in dict.fromkeys((source.adapter or source.base, source.tokenizer, source.base)):
        for pattern in (*BESIDE_WEIGHTS, *(TOKENIZER_PATTERNS if origin == source.tokenizer else ()), *code):
            for file in origin.glob(pattern):
                if file.is_file() and not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)
    drop_older(folder)


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
    bare: Any = (
        skeleton(source.base, source.trust_remote_code).float().to("meta")
    )  # DiffLlama draws some of its numbers on the CPU
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


@contextmanager
def new_folder(out: Path, option: str) -> Iterator[Path]:
    """A folder to fill. It is renamed to `out` when the block succeeds, and removed when it raises.

    Raises ValueError if `out` is not empty, also if another start has just filled it, or the disk is full.
    """
    out = user_path(out).absolute()
    try:
        os.lstat(out)
    except OSError as error:  # a name that is too long, a folder that may not be read
        if not isinstance(error, FileNotFoundError):
            raise ValueError(f"{option} {out} cannot be made ({error.strerror}): give another folder") from None
    taken = ValueError(f"{option} {out} exists and is not empty: give another folder, or remove it first")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise taken
    partial = out.with_name(f".{out.name[:200]}.{uuid.uuid4().hex}.tmp")
    try:
        with disk_errors("the result", out, f"give another folder with {option}", reads=True):
            partial.mkdir(parents=True)
            yield partial
            allow_by_umask(partial)
            try:
                os.rename(partial, out)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise taken from None
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_safetensors(file: Path, entries: list[Entry], tick: Callable[[int], None]) -> None:
    """Write tensors one at a time. The safetensors library can only write tensors that are all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in sorted(entries, key=lambda entry: -BYTES.get(entry.dtype, 1)):  # keeps every tensor aligned
        places = [at, at + entry.size]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": places}
        at += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.make()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)}, planned {entry.shape}"
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            assert len(data) == entry.size, f"{entry.name}: {len(data)} bytes, planned {entry.size}"
            opened.seek(8 + len(text) + header[entry.name]["data_offsets"][0])
            opened.write(data)
            tick(entry.size)
        opened.flush()
        os.fsync(opened.fileno())


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


def _write_checkpoint(plan: Plan, folder: Path, shard_gb: float, console: Console) -> None:
    total = sum(entry.size for entry in plan.entries)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(
            f"the merged model takes {total / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB free: "
            "free some, or give --out on another disk"
        )
    by_name = {entry.name: entry for entry in plan.entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(shard_gb * 1e9),
    )
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        show(done)

    with Bars(console).bar("merging", total, unit="bytes") as show:
        for file, names in split.filename_to_tensors.items():
            write_safetensors(folder / file, [by_name[name] for name in names], tick)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(base: Path, folder: Path, plan: Plan) -> None:
    """Write the base's config.json with the new dtype, and without weight tying if the embeddings now differ."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or {"dtype", "torch_dtype"} & part.keys():
            part.pop("torch_dtype", None)
            part["dtype"] = str(plan.dtype).removeprefix("torch.")
        if plan.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if plan.quantization:
        config["quantization_config"] = plan.quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merge_in_memory(source: Source, folder: Path, dtype: str, shard_gb: float, console: Console) -> torch.dtype:
    model = load_model(source, dtype=dtype, device="cpu")
    method = next(iter(model.peft_config.values())).peft_type.value
    _untie(model.get_base_model())
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError) as error:  # PEFT raises any of these
        raise ValueError(
            f"PEFT cannot merge {method} adapters into weights ({first_line(error)}): use it as an adapter"
        ) from error
    ends = (merged.get_input_embeddings(), merged.get_output_embeddings())
    if all(ends) and ends[0].weight is not ends[1].weight:
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    total = sum(tensor.nbytes for tensor in merged.state_dict().values())
    with Bars(console).bar("saving", total, unit="bytes") as show, growth(show, folder, total):
        merged.save_pretrained(folder, max_shard_size=int(shard_gb * 1e9))
    return merged.dtype


def _untie(base: Any) -> None:
    """Give the head a weight of its own if one of the tied embeddings has an adapter: PEFT adds the update in place."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if None in ends or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    first, head = (getattr(end, "base_layer", end) for end in ends)
    if first.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
