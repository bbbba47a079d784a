"""Models on the meta device: names and shapes without weights, with the adapter if there is one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftType, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from transformers.core_model_loading import build_glob_alternation

from adapters.base import FactorConfig
from adapters.checkpoint_files import TensorInfo, is_pipeline, list_tensors, open_tensor
from adapters.checkpoint_names import ignored_when_missing, language_model_class, model_tensors
from launcher.config import ModelConfig
from launcher.engines.registry import give_first
from launcher.models import pipelines
from launcher.models.image_processor import is_image_model
from launcher.models.quantize import Quantised, linear_layers, quantize_skeleton
from launcher.text import needs_code

log = logging.getLogger(__name__)


def skeleton(
    config: ModelConfig,
    folder: Path,
    adapter: PeftConfig | None,
    *,
    dtype: str,
    attention: str,
    head: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model with its adapter on the meta device, without memory; buffers and initialised values are real."""
    base = bare_skeleton(config, folder, adapter, dtype=dtype, attention=attention, head=head)
    if adapter is None:
        return base
    return adapted(base, adapter) if isinstance(adapter, FactorConfig) else _draw_adapter(base, adapter)


def adapted(base: Any, adapter: PeftConfig, **how: Any) -> nn.Module:
    """PEFT's model of this base. Raises ValueError for a kind of layer that the method does not support."""
    try:
        with same_compiler():
            return get_peft_model(base, adapter, **how)
    except TypeError as error:
        if "not supported" not in str(error):
            raise
        method = PeftType(adapter.peft_type).value.lower()
        raise ValueError(
            f"--method {method} does not support a layer that --targets names: {str(error).splitlines()[0]} Leave it "
            "out with --exclude, or give lora"
        ) from error


@contextmanager
def same_compiler() -> Iterator[None]:
    """Restore CC and CXX: PEFT's BOFT sets both to gcc and leaves them so without CUDA; C++ then does not link."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _draw_adapter(base: Any, adapter: PeftConfig) -> nn.Module:
    """Put one of PEFT's own adapters on a skeleton; every rank initialises all of its parameters, as one process does.

    The base's weights are NaN meanwhile (one number each, expanded to the full shape), which reveals a method that
    initialises itself from them. Raises ValueError for such a method, except DoRA, whose norms are read later by row.
    """
    own = {name for name, old in base.named_parameters(remove_duplicate=False) if old.is_meta}
    own |= {name for name, _ in base.named_buffers(remove_duplicate=False)}
    exchange(base, lambda _, old: nn.Parameter(_nowhere(old), old.requires_grad) if old.is_meta else old)
    layer: Any
    for layer in base.modules():
        if isinstance(layer, Quantised) and hasattr(layer, "kind"):  # PEFT reads these from bitsandbytes' parameters
            layer.weight.compress_statistics, layer.weight.quant_type = True, layer.kind  # type: ignore[attr-defined]
    method = PeftType(adapter.peft_type).value.lower()
    refusal = (
        f"--method {method} initialises its parameters from the base's weights, but under this sharding no process "
        f"holds them whole: give {give_first(lambda info: info.holds_base)}, or a random initialisation"
    )
    torch.manual_seed(torch.initial_seed())
    try:
        model: Any = adapted(base, adapter, autocast_adapter_dtype=True)
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
        if of_base(name) or dora_layer(model, name.rpartition(".")[0]) is not None:
            return nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        check(name, parameter)
        return parameter

    exchange(model, sort_out)
    for name, buffer in model.named_buffers():  # DeLoRA's are the columns' norms
        if not of_base(name):
            check(name, buffer)
    return model


def _nowhere(like: Tensor) -> Tensor:
    fill = float("nan") if like.is_floating_point() else 0
    return torch.full((), fill, dtype=like.dtype).expand(like.shape)


def exchange(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace every parameter by make(name, parameter); tied parameters stay tied."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old one, so that its id is not reused
    for prefix, module in model.named_modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = old, make(f"{prefix}.{name}", old)
                module._parameters[name] = made[id(old)][1]


def dora_layer(model: nn.Module, vector: str) -> nn.Linear | None:
    """The layer whose row norms are the DoRA magnitude of this module name; None for other modules.

    Raises ValueError if the norms are not those of the checkpoint's rows.
    """
    layer, found, _ = vector.partition(".lora_magnitude_vector.")
    if not found:
        return None
    adapted: Any = model.get_submodule(layer)
    base = adapted.get_base_layer()
    if type(base) is not nn.Linear:
        raise ValueError(
            f"DoRA's magnitudes of {layer}, a {type(base).__name__}, are not the norms of a checkpoint's rows, the "
            f"only ones that this sharding can read: give {give_first(lambda info: info.holds_base)}"
        )
    return base


def bare_skeleton(
    config: ModelConfig,
    folder: Path,
    adapter: Any,
    *,
    dtype: str,
    attention: str | None,
    head: Mapping[str, Any] | None = None,
) -> Any:
    """The base alone on the meta device, with its linear layers quantised if --quantize is given.

    attention: None takes the model's own choice. head: settings of a classification head, which is never quantised.
    Head parameters missing in the checkpoint are initialised, not on meta, and named in `drawn_head`.
    """
    base = empty_model(config, folder, dtype=dtype, attention=attention, head=head)
    base.stored = model_tensors(base, list_tensors(folder))  # names are those of the bare model, before adapters
    if head is None and (folder / "generation_config.json").exists():  # it may name more stop tokens
        base.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if config.quantize != "none":
        layers = linear_layers(base, getattr(adapter, "modules_to_save", None) or ())
        if head is not None:
            layers = {name: layer for name, layer in layers.items() if not in_head(base, name)}
        quantize_skeleton(base, layers, config.quantize, getattr(torch, dtype))
    if head:
        base.drawn_head = _new_in_head(base, folder)
        save_drawn(base.drawn_head, adapter)
        draw(base, base.drawn_head)
    prepare_base(base, config, folder)
    return base


def empty_model(
    config: ModelConfig, folder: Path, *, dtype: str, attention: str | None, head: Mapping[str, Any] | None = None
) -> Any:
    """The model that config.json describes, on the meta device. No weight file is looked at."""
    if is_pipeline(folder):
        return pipelines.empty_base(folder, dtype=dtype, attention=attention, text_encoder=config.train_text_encoder)
    settings = settings_of(config, folder, head)
    architecture = language_model_class(settings) if head is None else classifier_class(settings)
    with _own_config(folder), init_empty_weights(include_buffers=False):
        base: Any = architecture.from_config(
            settings,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
        )
    base.tie_weights()
    _keep_wide(base, getattr(torch, dtype))
    return base


def classifier_class(settings: Any) -> Any:
    """The auto class that builds a model with a classification head: for texts, or for images."""
    return (
        AutoModelForImageClassification if is_image_model(settings.model_type) else AutoModelForSequenceClassification
    )


@contextmanager
def _own_config(folder: Path) -> Iterator[None]:
    """Turn errors of transformers and torch about values in config.json into a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        if reason := needs_code(error):
            raise ValueError(f"{folder}: {reason}") from None
        raise ValueError(_damaged_config(folder, error)) from error
    except ImportError as error:  # Gemma 3n's vision tower is timm's
        lacking = re.search(r"pip install ([\w.\[\]-]+)", str(error))
        what = f"pip install {lacking[1]}" if lacking else " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: this type of model needs a package that is not installed: {what}") from error
    except Exception as error:  # these libraries have many kinds of errors with no common parent
        raise ValueError(_damaged_config(folder, error)) from error


def _damaged_config(folder: Path, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{folder / 'config.json'} does not describe a valid model ({lines[-1][:300]}): fetch this file again"


def settings_of(config: ModelConfig, folder: Path, head: Mapping[str, Any] | None = None) -> Any:
    """The model's own config, with the settings of a classification head in it. Raises ValueError if it is damaged."""
    with _own_config(folder):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, **(head or {}))
    if head and "pad_token_id" in head:  # multimodal models have it in their text config
        settings.get_text_config().pad_token_id = head["pad_token_id"]
    return settings


def _keep_wide(base: Any, dtype: torch.dtype) -> None:
    """Convert to float32, in place, the parameters that transformers keeps in float32 under every dtype."""
    plan = base._get_dtype_plan(dtype)
    if not plan:
        return
    wanted = build_glob_alternation(list(plan))[0]
    for prefix, module in base.named_modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None and value.is_floating_point() and wanted.search(f"{prefix}.{name}"):
                value.data = value.data.float()


def check_weights(base: Any, folder: Path, *, labels: bool = False) -> None:
    """Check from headers that the checkpoint holds every weight of a bare skeleton, and that tied embeddings are equal.

    labels: the model has a classification head, which may be missing. Raises ValueError naming weights that are missing
    or have another shape, and embeddings that config.json ties but the checkpoint stores as different tensors.
    """
    stored, state = base.stored, base.state_dict(keep_vars=True)
    needed = {name: value for name, value in state.items() if not (labels and in_head(base, name))}
    for name, value in needed.items():
        if (info := stored.get(name)) is not None and info.shape != tuple(value.shape):
            raise misfit(base, folder, name, info.shape, value.shape)
    there = {id(state[name]) for name in stored}
    missing = [n for n, value in needed.items() if id(value) not in there and not ignored_when_missing(base, n)]
    if missing:
        raise ValueError(_lacking(base, folder, missing, len(needed)))
    for target, source in (getattr(base, "all_tied_weights_keys", None) or {}).items():
        ends = [stored.get(name) for name in (target, source)]
        if all(ends) and not _same_numbers(*ends):
            raise ValueError(
                f"{folder / 'config.json'} ties {target} to {source} (tie_word_embeddings), but the checkpoint holds "
                "two different tensors: set tie_word_embeddings to false there if the model has a head of its own, or "
                f"remove {ends[0].name} from {ends[0].file.name} if it has none"
            )


def _lacking(base: Any, folder: Path, missing: Sequence[str], total: int) -> str:
    """The error for a checkpoint that lacks weights."""
    names = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
    text = f"{folder} lacks {len(missing)} of the {total} weights of a {type(base).__name__} ({names})"
    unused = sorted(list_tensors(folder).keys() - {info.name for info in base.stored.values()})
    wrapped = next((word for word in ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
                    if any(name.startswith(word) for name in unused)), None)  # fmt: skip
    if wrapped:
        return (
            f"{text}, because its tensors are named {unused[0]}, ...: a training framework's wrapper added "
            f"'{wrapped}'. Load it where it was trained, unwrap the model and call save_pretrained again"
        )
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    ends = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    if head is not None and all(id(base.get_parameter_or_buffer(name)) in ends for name in missing):
        return f"{text}: this model has no language modelling head. Give the checkpoint of the language model"
    hint = f" (the checkpoint has {', '.join(unused[:2])}, ..., which this model does not use)" if unused else ""
    return (
        f"{text}, which would be initialised at random{hint}: fetch the model again, or the one that fits config.json"
    )


def _same_numbers(a: TensorInfo, b: TensorInfo, rows: int = 4096) -> bool:
    """Whether two stored matrices are equal; reads a few rows at a time."""
    if a.shape != b.shape:
        return False
    one, other = open_tensor(a), open_tensor(b)
    return all(torch.equal(one[at : at + rows], other[at : at + rows]) for at in range(0, a.shape[0], rows))


def stored_base(base: Any) -> dict[str, TensorInfo]:
    """The checkpoint's tensors, by name, in a model with a classification head, without that head."""
    used = [info for name, info in base.stored.items() if not in_head(base, name)]
    raw = [one for info in used for one in (info.conversion.tensors if info.conversion else [info])]
    return {info.name: info for info in raw}


def in_head(base: Any, name: str) -> bool:
    return not name.startswith(f"{base.base_model_prefix}.")


def _new_in_head(base: Any, folder: Path) -> list[str]:
    """The names of the head's parameters that the checkpoint lacks. Raises ValueError for a head of another size."""
    drawn: list[str] = []
    for name, parameter in base.named_parameters():
        if not in_head(base, name):
            continue
        if (info := base.stored.get(name)) is None:
            drawn.append(name)
        elif info.shape != parameter.shape:
            raise misfit(base, folder, name, info.shape, parameter.shape, labels=True)
    return drawn


@torch.no_grad()
def draw(base: Any, names: Sequence[str]) -> None:
    """Initialise those parameters as this class of model does, from torch's seed, in place.

    The values do not depend on how the rest was loaded. On a skeleton the parameters move from meta to the CPU.
    """
    for name, parameter in list(base.named_parameters()):
        owner, _, last = name.rpartition(".")
        if name in names and parameter.is_meta:
            parameter = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
            base.get_submodule(owner)._parameters[last] = parameter
        parameter._is_hf_initialized = name not in names  # transformers' initialisers skip these
    owners = {name.rpartition(".")[0] for name in names}
    torch.manual_seed(torch.initial_seed())
    for prefix, module in reversed(list(base.named_modules())):  # a parent may initialise its children (ModernBERT)
        if any(owner == prefix or owner.startswith(f"{prefix}.") or not prefix for owner in owners):
            base._init_weights(module)


def save_drawn(drawn: Iterable[str], adapter: PeftConfig | None) -> None:
    """Add newly initialised modules to the adapter's modules_to_save, in place, with a warning.

    Raises ValueError if the method has no such setting.
    """
    if adapter is None:  # full fine-tuning trains and saves everything
        return
    named = list(getattr(adapter, "modules_to_save", None) or ())
    by_peft = {"classifier", "score"} if adapter.task_type == TaskType.SEQ_CLS else set()
    saved = {*by_peft, *named}

    def is_saved(module: str) -> bool:
        return bool(saved & set(module.split("."))) or any(module.endswith(name) for name in named)

    lost = sorted({module for name in drawn if not is_saved(module := name.rpartition(".")[0])})
    if not lost:
        return
    if not hasattr(adapter, "modules_to_save"):
        raise ValueError(
            f"the checkpoint has no {', '.join(lost)}, and this method cannot save new ones: give another --method, or "
            "a checkpoint with its head"
        )
    adapter.modules_to_save = [*named, *lost]
    log.warning(
        "the checkpoint has no %s: new ones are initialised from the seed, trained in full and saved", ", ".join(lost)
    )


def misfit(
    base: Any, folder: Path, name: str, there: Sequence[int], here: Sequence[int], *, labels: bool = False
) -> ValueError:
    """The error for a tensor whose shape differs from the model's; labels: the model has a classification head."""
    if labels and in_head(base, name):
        why = f"a head for {there[0]} classes, but the data have {here[0]}: give a base without a head"
        return ValueError(f"{folder} has {why}")
    return ValueError(
        f"{folder} has {name} with shape {tuple(there)}, but its config.json describes {tuple(here)}: the two belong "
        "to different models"
    )


@torch.no_grad()
def restore_padding_rows(base: Any, folder: Path) -> None:
    """Give embeddings the row of their padding token as the checkpoint has it, in place.

    Some classes (Youtu) set it to zero once transformers has loaded the checkpoint. The row can be another token's too:
    padding is often the token that ends a text, and a tied head predicts it.
    """
    embeddings = {name: module for name, module in base.named_modules() if isinstance(module, nn.Embedding)}
    rows = {f"{name}.weight": one.padding_idx for name, one in embeddings.items() if one.padding_idx is not None}
    stored = model_tensors(base, list_tensors(folder)) if rows else {}
    for name, row in rows.items():
        if (info := stored.get(name)) is not None and info.conversion is None:
            weight = base.get_parameter(name)
            weight[row] = open_tensor(info)[row].to(weight)


def keep_scale(base: Any) -> None:
    """Leave the weights as they are in evaluation, in place. From its seventh layer on, RWKV halves some of its own,
    against overflow in float16, but not the adapters on them, and it fails on quantised ones."""
    if getattr(base.config, "rescale_every", 0):
        base.config.rescale_every = 0


def prepare_base(base: Any, config: ModelConfig, folder: Path) -> None:
    keep_scale(base)
    base.name_or_path = str(folder.resolve()) if Path(config.model).is_dir() else config.model
    if config.gradient_checkpointing and hasattr(base, "enable_gradient_checkpointing"):  # of diffusers
        base.enable_gradient_checkpointing()
    elif config.gradient_checkpointing:
        try:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError:
            raise ValueError(
                f"--gradient-checkpointing: transformers does not support it for a {type(base).__name__}: leave it "
                "out, and lower --micro-batch-size if memory is short"
            ) from None


# What PEFT adds to the names of the base model's modules.
PEFT_PARTS = re.compile(r"^base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")
