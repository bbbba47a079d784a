"""From a config to the model that trains: base, attention, adapter with factors from the cache."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftType, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

import adapters
from adapters import Factors
from adapters.checkpoint_files import TensorInfo, list_tensors, open_tensor, weight_of
from adapters.config import FactorConfig
from adapters.layer import FactorLayer
from launcher.config import ModelConfig
from launcher.training.quantize import Quantised, linear_layers, quantize_skeleton

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # called before each parameter is filled: which of how many


def choose_dtype(wanted: str) -> str:
    """The base's dtype: where auto is asked for, bfloat16 on a GPU that computes in it, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def choose_attention(wanted: str, *, on_gpu: bool, dtype: str) -> tuple[str, str]:
    """transformers' name of the attention and the reason for it."""
    installed = importlib.util.find_spec("flash_attn") is not None
    missing = (
        "flash-attn is not installed" if not installed
        else "no GPU" if not on_gpu
        else "flash-attn needs bfloat16" if dtype != "bfloat16"
        else ""
    )  # fmt: skip
    if wanted == "flash" and missing:
        raise ValueError(f"--attention flash cannot be used: {missing}; give --attention auto or sdpa")
    if wanted == "sdpa" or missing:
        return "sdpa", "as asked" if wanted == "sdpa" else missing
    return "flash_attention_2", "as asked" if wanted == "flash" else "flash-attn and a GPU are there"


def build(
    config: ModelConfig,
    folder: Path,
    adapter: PeftConfig | None,
    *,
    dtype: str,
    attention: str,
    factors: Callable[..., Any],
    device: torch.device,
    progress: Progress = lambda done, total: None,
    head: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model ready to train on one device: base frozen (unless adapter is None), cores float32.

    factors(module) hands out the frozen factors of our methods. A quantised base is filled weight by weight. head are
    settings of a classification head; what the checkpoint lacks of it starts from torch's seed.
    """
    base: Any
    if config.quantize != "none":
        base = bare_skeleton(config, folder, adapter, dtype=dtype, attention=attention, head=head)
        fill(base, folder, factors, Whole(), device, progress)
    else:
        loading: dict[str, Any] = {
            "dtype": getattr(torch, dtype),
            "attn_implementation": attention,
            "trust_remote_code": config.trust_remote_code,
            "local_files_only": True,
        }
        if head is None:
            base = AutoModelForCausalLM.from_pretrained(folder, **loading)
        else:
            loading |= {"ignore_mismatched_sizes": True, "output_loading_info": True, **head}
            base, found = AutoModelForSequenceClassification.from_pretrained(folder, **loading)
            for name, there, here in sorted(found["mismatched_keys"]):
                raise _misfit(base, folder, name, there, here)
            _check_saved(found["missing_keys"], adapter)
        _prepare(base, config, folder)
    if adapter is None:
        return base.to(device)
    with adapters.factors_from(lambda module, shape: factors(module)), warnings.catch_warnings():
        # The adapter has the fingerprint of the base's files, whatever precision the base runs in.
        warnings.filterwarnings("ignore", "this base has fingerprint", adapters.BasePrecisionWarning)
        torch.manual_seed(torch.initial_seed())  # so that no draw depends on how the base was loaded
        return get_peft_model(base, adapter, autocast_adapter_dtype=True).to(device)


def skeleton(
    config: ModelConfig,
    folder: Path,
    adapter: PeftConfig | None,
    *,
    dtype: str,
    attention: str,
    head: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model with its adapter on the meta device: shapes and names, no memory; buffers and what is drawn: real."""
    base = bare_skeleton(config, folder, adapter, dtype=dtype, attention=attention, head=head)
    if adapter is None:
        return base
    return get_peft_model(base, adapter) if isinstance(adapter, FactorConfig) else _draw_adapter(base, adapter)


def _draw_adapter(base: Any, adapter: PeftConfig) -> nn.Module:
    """One of PEFT's own adapters on a skeleton: its parameters are drawn whole on every rank, as in one process.

    Meanwhile the base's weights are NaN (a single one each, seen in its full shape), so that a start that is made from
    them shows. Raises ValueError for such a method; DoRA's norms alone can be read later, row by row.
    """
    own = {name for name, old in base.named_parameters(remove_duplicate=False) if old.is_meta}
    own |= {name for name, _ in base.named_buffers(remove_duplicate=False)}
    _exchange(base, lambda _, old: nn.Parameter(_nowhere(old), old.requires_grad) if old.is_meta else old)
    layer: Any
    for layer in base.modules():
        if isinstance(layer, Quantised) and hasattr(layer, "kind"):  # PEFT asks bitsandbytes' parameters for these
            layer.weight.compress_statistics, layer.weight.quant_type = True, layer.kind  # type: ignore[attr-defined]
    method = PeftType(adapter.peft_type).value.lower()
    refusal = (
        f"--method {method} starts from the base's weights, which no process has whole under this sharding: give "
        "--sharding ddp or zero2, or a start that is drawn"
    )
    torch.manual_seed(torch.initial_seed())
    try:
        model = get_peft_model(base, adapter, autocast_adapter_dtype=True)
    except RuntimeError as error:  # linear algebra on NaN
        raise ValueError(f"{refusal} ({error})") from error

    if getattr(adapter, "use_dora", False) and getattr(adapter, "init_lora_weights", True) is False:
        raise ValueError(f"{refusal} (DoRA's magnitudes are norms of W + B A, and this B is not zero)")

    def of_base(name: str) -> bool:
        owner, _, last = name.rpartition(".")
        return f"{PEFT_PARTS.sub('', owner)}.{last}" in own

    def check(name: str, drawn: Tensor) -> None:
        if not torch.isfinite(drawn).all():
            raise ValueError(f"{refusal} ({name} would be)")

    def sort_out(name: str, parameter: nn.Parameter) -> nn.Parameter:
        if of_base(name) or _dora_layer(model, name.rpartition(".")[0]) is not None:
            return nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        check(name, parameter)
        return parameter

    _exchange(model, sort_out)
    for name, buffer in model.named_buffers():  # DeLoRA's are the columns' norms
        if not of_base(name):
            check(name, buffer)
    return model


def _nowhere(like: Tensor) -> Tensor:
    fill = float("nan") if like.is_floating_point() else 0
    return torch.full((), fill, dtype=like.dtype).expand(like.shape)


def _exchange(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put make(name, parameter) in the place of every parameter; what was tied stays so."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old one, whose id is then not given away
    for prefix, module in model.named_modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = old, make(f"{prefix}.{name}", old)
                module._parameters[name] = made[id(old)][1]


def _dora_layer(model: nn.Module, vector: str) -> nn.Linear | None:
    """The layer whose rows' norms a DoRA magnitude holds, by the magnitude's module name; None for other modules.

    Raises ValueError where they are not those of the checkpoint's rows.
    """
    layer, found, _ = vector.partition(".lora_magnitude_vector.")
    if not found:
        return None
    adapted: Any = model.get_submodule(layer)
    base = adapted.get_base_layer()
    if type(base) is not nn.Linear:
        raise ValueError(
            f"DoRA's magnitudes of {layer}, a {type(base).__name__}, are not the norms of a checkpoint's rows, and "
            "nothing else can be read under this sharding: give --sharding ddp"
        )
    return base


def bare_skeleton(
    config: ModelConfig,
    folder: Path,
    adapter: Any,
    *,
    dtype: str,
    attention: str,
    head: Mapping[str, Any] | None = None,
) -> Any:
    """The base alone on the meta device, its linear layers quantised where asked for.

    head are settings of a classification head, which is never quantised; what the checkpoint lacks of it is real.
    """
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, **(head or {}))
    architecture = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    with init_empty_weights(include_buffers=False):
        base: Any = architecture.from_config(
            settings,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
        )
    base.tie_weights()
    if head is None and (folder / "generation_config.json").exists():  # it may name more stop tokens
        base.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if config.quantize != "none":
        layers = linear_layers(base, getattr(adapter, "modules_to_save", None) or ())
        if head is not None:
            layers = {name: layer for name, layer in layers.items() if not _in_head(base, name)}
        quantize_skeleton(base, layers, config.quantize, getattr(torch, dtype))
    if head is not None:
        _check_saved(_draw_head(base, folder), adapter)
    _prepare(base, config, folder)
    return base


def stored_base(base: Any, folder: Path) -> dict[str, TensorInfo]:
    """The checkpoint's tensors, by name, that a model for labels is made of, its head left out."""
    tensors = list_tensors(folder)
    names = [name.rpartition(".") for name, _ in base.named_parameters() if not _in_head(base, name)]
    return {info.name: info for module, _, name in names if (info := weight_of(tensors, module, name))}


def _in_head(base: Any, name: str) -> bool:
    return not name.startswith(f"{base.base_model_prefix}.")


@torch.no_grad()
def _draw_head(base: Any, folder: Path) -> list[str]:
    """Give what the checkpoint lacks of a head the values that transformers gives it, from torch's seed; their names.

    Raises ValueError where the checkpoint has a head of another size.
    """
    tensors = list_tensors(folder)
    drawn: list[str] = []
    for prefix, module in base.named_modules():
        before = len(drawn)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not _in_head(base, full := f"{prefix}.{name}"):
                continue
            if (info := weight_of(tensors, prefix, name)) is None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
                drawn.append(full)
            elif info.shape != parameter.shape:
                raise _misfit(base, folder, full, info.shape, parameter.shape)
        if len(drawn) > before:
            base._init_weights(module)  # draws nothing for what is on meta
    return drawn


def _check_saved(drawn: Iterable[str], adapter: PeftConfig | None) -> None:
    """Raises ValueError where something starts from the seed that is not saved with the adapter."""
    if adapter is None:  # all is trained and saved
        return
    saved = {"classifier", "score", *(getattr(adapter, "modules_to_save", None) or ())}  # the first two by PEFT itself
    if lost := sorted({name.rpartition(".")[0] for name in drawn if not saved & set(name.split("."))}):
        raise ValueError(
            f"the checkpoint has no {', '.join(lost)}: new ones start from the seed, and would not be saved with the "
            f"adapter. Give --modules-to-save {' '.join(sorted({name.split('.')[-1] for name in lost}))}"
        )


def _misfit(base: Any, folder: Path, name: str, there: Sequence[int], here: Sequence[int]) -> ValueError:
    """What to say of a checkpoint whose tensor has another shape than the model for labels."""
    if _in_head(base, name):
        why = f"a head of {there[0]} classes, the data have {here[0]}: give a base without a head"
        return ValueError(f"{folder} has {why}")
    return ValueError(f"{folder} has {name} as {tuple(there)}, its config.json means {tuple(here)}")


def _prepare(base: Any, config: ModelConfig, folder: Path) -> None:
    base.name_or_path = str(folder.resolve()) if Path(config.model).is_dir() else config.model
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class Parts(Protocol):
    """How a sharding engine cuts a parameter: the rows this rank reads, and the parameter made of them."""

    def rows(self, parameter: Tensor) -> slice: ...

    def place(self, like: nn.Parameter, rows: Tensor) -> nn.Parameter: ...

    def keep(self, drawn: nn.Parameter) -> nn.Parameter:
        """The parameter made of one that is whole on every rank."""
        ...


class Whole:
    """No cut: this process holds all."""

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
    progress: Progress = lambda done, total: None,
    *,
    cpu_offload: bool = False,
) -> None:
    """Give every parameter on meta its values, reading from disk only the rows that this rank holds a part of.

    factors(module, rows) hands out the frozen factors with those rows of `write`. With cpu_offload parameters stay in
    main memory; buffers are on the device always. Raises ValueError naming tensors that the checkpoint lacks or has in
    another shape.
    """
    home = torch.device("cpu") if cpu_offload else device
    done, total = itertools.count(1), sum(parameter.is_meta for parameter in model.parameters())

    def place(like: Any, rows: Tensor) -> nn.Parameter:
        progress(next(done), total)
        return parts.place(like, rows.to(home, like.dtype).clone())

    _exchange(model, lambda _, parameter: parameter if parameter.is_meta else parts.keep(parameter))
    _fill_maps(model, factors, parts, place)
    _fill_base(model, folder, parts, device, place)


def _fill_maps(
    model: nn.Module,
    factors: Callable[[str, slice], Factors],
    parts: Parts,
    place: Callable[[Any, Tensor], nn.Parameter],
) -> None:
    """The adapters of the family: their frozen maps, and cores of zero."""
    for layer in [module for module in model.modules() if isinstance(module, FactorLayer)]:
        for factor_map in layer.maps.values():
            frozen = factors(layer.name, parts.rows(factor_map.write))
            factor_map.set_origin(frozen)
            factor_map.write = place(factor_map.write, frozen.write)
            factor_map.read = place(factor_map.read, frozen.read[parts.rows(factor_map.read)])
            zeros = torch.zeros(factor_map.core.shape)
            factor_map.core = place(factor_map.core, zeros[parts.rows(factor_map.core)])


def _fill_base(
    model: nn.Module, folder: Path, parts: Parts, device: torch.device, place: Callable[[Any, Tensor], nn.Parameter]
) -> None:
    """All that is still on meta, from the checkpoint; and the buffers to the device."""
    tensors = list_tensors(folder)
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}  # a tied parameter has several
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                places.setdefault(id(parameter), []).append((module, name, prefix))
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device) if buffer is not None else None
    for shared in places.values():
        modules = [PEFT_PARTS.sub("", prefix) for _, _, prefix in shared]
        owner, name, prefix = shared[0]
        whole: Any = owner._parameters[name]
        dora = _dora_layer(model, prefix)
        if dora is not None:
            modules = [modules[0].partition(".lora_magnitude_vector.")[0]]
        info = next((found for module in modules if (found := weight_of(tensors, module, name))), None)
        packed: Any = owner if name == "weight" and isinstance(owner, Quantised) else None
        of = whole if dora is None else dora.weight
        expected = packed.from_shape if packed else tuple(getattr(of, "ds_shape", of.shape))  # ZeRO-3's has no shape
        if info is None or info.shape != expected:
            here = f"has it as {info.shape}" if info else "has no such tensor"
            quantised = any(isinstance(module, Quantised) for module in model.modules())
            asked = [*["--sharding ddp"] * (not isinstance(parts, Whole)), *["--quantize none"] * quantised]
            raise ValueError(
                f"the model's {modules[0]}.{name} {expected} cannot be filled from {folder}, which {here}: "
                f"this architecture's files are laid out differently; give {' and '.join(asked)}"
            )
        stored = open_tensor(info)
        if packed:
            stored = packed.pack(stored, device)
        elif dora is not None:
            stored = _RowNorms(stored, dora.weight.dtype)
        filled = place(whole, stored[parts.rows(whole)])
        for owner, name, _ in shared:
            setattr(owner, name, filled)
        if packed and isinstance(parts, Whole):
            packed.keep(filled)


class _RowNorms:
    """The norms of a matrix's rows, of those that are asked for."""

    def __init__(self, stored: Any, dtype: torch.dtype):
        self.stored, self.dtype = stored, dtype

    def __getitem__(self, rows: slice) -> Tensor:
        return torch.linalg.norm(self.stored[rows].to(self.dtype), dim=1)


# What PEFT puts into the names of the base model's modules.
PEFT_PARTS = re.compile(r"^base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")
