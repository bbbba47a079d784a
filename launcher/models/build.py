"""Build a model on one device: choose dtype and attention, load the base, add the adapter with its factors."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers.utils.logging import set_tqdm_hook

import adapters
from adapters.checkpoint_files import is_pipeline
from adapters.checkpoint_names import language_model_class
from launcher.config import ModelConfig
from launcher.models import pipelines, varlen
from launcher.models.fill import OnFill, Whole, fill
from launcher.models.quantize import check_share
from launcher.models.skeleton import (
    adapted,
    bare_skeleton,
    check_weights,
    classifier_class,
    draw,
    in_head,
    misfit,
    prepare_base,
    restore_padding_rows,
    save_drawn,
    settings_of,
)
from launcher.text import first_line

FLASH = "flash_attention_2"  # transformers' name


def choose_dtype(wanted: str, *, narrow: bool | None = None) -> str:
    """The base's dtype; auto means bfloat16 on a GPU that supports it, else float32.

    narrow: whether there is such a GPU; None: look at this machine.
    """
    if wanted != "auto":
        return wanted
    if narrow is None:  # Turing and Volta emulate bfloat16, slower than float32
        narrow = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if narrow else "float32"


def choose_attention(wanted: str, *, on_gpu: bool, dtype: str) -> tuple[str, str]:
    """The attention to use, as transformers names it, and the reason.

    auto: flash-attn if it is installed, else torch's own kernel for rows of different lengths, else SDPA.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    missing = (
        "flash-attn is not installed" if not installed
        else "no GPU" if not on_gpu
        else "flash-attn needs bfloat16" if dtype != "bfloat16"
        else unusable_flash()
    )  # fmt: skip
    if wanted == "flash" and missing:
        raise ValueError(f"--attention flash cannot be used: {missing}; give --attention auto or sdpa")
    if wanted in ("sdpa", "eager"):
        return wanted, "as requested"
    if wanted == "varlen" or (wanted == "auto" and missing):
        lacking = varlen.missing(on_gpu=on_gpu, dtype=dtype)
        if wanted == "varlen" and lacking:
            raise ValueError(f"--attention varlen cannot be used: {lacking}; give --attention auto or sdpa")
        if not lacking:
            varlen.register()
            return varlen.NAME, "as requested" if wanted == "varlen" else missing
        return "sdpa", missing
    return FLASH, "as requested" if wanted == "flash" else "flash-attn and a GPU are available"


def unusable_flash() -> str:
    """Why the installed flash-attn cannot compute here; empty if it can. transformers would fail while loading."""
    if torch.cuda.get_device_capability() < (8, 0):
        return "flash-attn needs a GPU of compute capability 8.0 (Ampere) or more"
    try:
        importlib.import_module("flash_attn").flash_attn_varlen_func  # noqa: B018
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # built for another torch; another version
        return f"flash-attn is installed but does not load: {first_line(error)}"
    return ""


def settle_base(
    config: ModelConfig, folder: Path, *, dtype: str, attention: str, reason: str, labels: bool = False
) -> tuple[Any, str, str]:
    """The bare model on the meta device, its attention, and the reason for that choice.

    If the model lacks this attention, --attention auto falls back to one that it has. labels: the model gets a
    classification head. Raises ValueError if the checkpoint lacks weights of the model, or the model lacks the
    requested attention.
    """
    plain = replace(config, quantize="none")
    others: list[str] = [name for name in ("sdpa", "eager", "flex_attention") if name != attention]
    lacking = []
    for name in [attention, *(others if config.attention == "auto" else ())]:
        try:
            base = bare_skeleton(plain, folder, None, dtype=dtype, attention=name, head={} if labels else None)
        except (ValueError, ImportError) as error:
            if "attention" not in str(error).lower():
                raise
            lacking.append(f"{name}: {first_line(error.__cause__ or error).partition('. ')[0]}")
            continue
        if name == varlen.NAME and (reason_against := varlen.unsupported(base.config)):
            lacking.append(f"{name}: {reason_against}")
            continue
        check_weights(base, folder, labels=labels)
        check_share(base, config.quantize)
        return base, name, reason if name == attention else f"this model has no {attention}"
    asked = {FLASH: "flash"}.get(attention, attention)
    raise ValueError(
        f"--attention {config.attention}: {folder} has no {asked} attention ({'; '.join(lacking)}): give --attention "
        "auto, which uses one that the model has"
    )


@contextmanager
def heard(progress: OnFill) -> Iterator[None]:
    """Report each weight that transformers loads meanwhile, through the hook of its own progress bars."""

    def hook(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _counted(args[0], progress) if kwargs.get("desc") == "Loading weights" else bar(*args, **kwargs)

    before = set_tqdm_hook(hook)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _counted(items: Collection[Any], progress: OnFill) -> Iterator[Any]:
    for number, item in enumerate(items, 1):
        progress(number, len(items))
        yield item


def build(
    config: ModelConfig,
    folder: Path,
    adapter: PeftConfig | None,
    *,
    dtype: str,
    attention: str,
    factors: Callable[..., Any],
    device: torch.device,
    progress: OnFill = lambda done, total: None,
    head: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model ready to train on one device: base frozen (unless adapter is None), cores float32.

    factors(module) returns the frozen factors for our methods. A quantised base is filled weight by weight. head:
    settings of a classification head, whose missing parameters are initialised from torch's seed.
    """
    base: Any
    if config.quantize != "none":
        base = bare_skeleton(config, folder, adapter, dtype=dtype, attention=attention, head=head)
        fill(base, folder, factors, Whole(), device, progress)
    elif is_pipeline(folder):
        base = pipelines.load_base(folder, dtype=dtype, device=device, text_encoder=config.train_text_encoder)
        prepare_base(base, config, folder)
    else:
        loading: dict[str, Any] = {
            "dtype": getattr(torch, dtype),
            "attn_implementation": attention,
            "trust_remote_code": config.trust_remote_code,
            "local_files_only": True,
        }
        if device.type != "cpu" and head is None:  # a new head is drawn on the CPU
            loading["device_map"] = {"": device}  # else main memory would hold a copy in another dtype, of each process
        settings = settings_of(config, folder, head)
        loading |= {"ignore_mismatched_sizes": True, "output_loading_info": True, "config": settings}
        architecture: Any = language_model_class(settings) if head is None else classifier_class(settings)
        with heard(progress):
            base, found = architecture.from_pretrained(folder, **loading)
        for name, there, here in sorted(found["mismatched_keys"]):
            raise misfit(base, folder, name, there, here, labels=head is not None)
        if lost := sorted(name for name in found["missing_keys"] if head is None or not in_head(base, name)):
            raise ValueError(
                f"transformers finds no {', '.join(lost[:3])} in {folder}: they would be initialised at random"
            )
        if head is not None:
            save_drawn(found["missing_keys"], adapter)
            draw(base, sorted(found["missing_keys"]))
        restore_padding_rows(base, folder)
        prepare_base(base, config, folder)
    if adapter is None:
        return base.to(device)
    with adapters.factors_from(lambda module, shape: factors(module)), warnings.catch_warnings():
        # The adapter records the fingerprint of the base's files, which does not depend on the precision of the base.
        warnings.filterwarnings("ignore", "this base has fingerprint", adapters.BasePrecisionWarning)
        torch.manual_seed(torch.initial_seed())  # so that initial values do not depend on how the base was loaded
        return adapted(base, adapter, autocast_adapter_dtype=True).to(device)
