"""Load what `launcher.inference.sources` found: the base, in full precision or quantised, with its adapter."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

import adapters
from adapters.checkpoint_names import language_model_class
from launcher.config import ModelConfig
from launcher.inference.adapter_folder import adapter_config, attach, finite
from launcher.inference.options import Kind, Quantize
from launcher.inference.sources import Source, tokenizer_of
from launcher.models.quantize import check_base, check_quantize, keep_packing
from launcher.models.skeleton import keep_scale, restore_padding_rows
from launcher.processes import Ranks
from launcher.progress import Bars
from launcher.text import brief, first_line, needs_code

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(source: Source, *, dtype: str = "auto", device: str = "auto", quantize: Quantize = "auto") -> tuple[Any, Any]:
    """The model with its adapter, in evaluation mode, and the tokenizer.

    dtype auto: the run's, else the files'. quantize auto: as in training; none: full precision. Raises ValueError if
    the model's logits are not finite.
    """
    tokenizer = tokenizer_of(source)
    quantize = chosen_precision(source, quantize)
    if quantize == "none":
        model = load_model(source, dtype=dtype, device=device)
    else:
        model = load_quantised(source, quantize, dtype=dtype, device=device)
    _check_output(model, source)
    return model, tokenizer


def chosen_precision(source: Source, quantize: Quantize) -> Kind:
    """auto: as in training, unless the files are quantised already. Raises ValueError if it is not possible here."""
    if quantize != "auto":
        return quantize
    already = "quantization_config" in json.loads((source.base / "config.json").read_text(encoding="utf-8"))
    kind: Kind = "none" if already else source.quantize
    try:
        check_quantize(kind)
    except ValueError as error:
        raise ValueError(
            f"this run trained on a base in {kind}. {error}; or give --quantize none, which answers with the base in "
            "full precision"
        ) from None
    return kind


def load_model(source: Source, *, dtype: str = "auto", device: str = "auto") -> Any:
    """The base with its adapter, if it has one."""
    as_trained = source.dtype in DTYPES and dtype in ("auto", source.dtype)
    dtype, device = _dtype(source, dtype), choose_device(device)
    from launcher.models.build import heard

    try:
        architecture: Any = language_model_class(
            AutoConfig.from_pretrained(source.base, trust_remote_code=source.trust_remote_code)
        )
        with _loading() as progress, heard(progress):
            loaded = architecture.from_pretrained(
                source.base,
                dtype=DTYPES.get(dtype, "auto"),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                **({} if device == "cpu" else {"device_map": device}),
            )
    except Exception as error:  # values of config.json give transformers and torch errors of any kind
        reason = needs_code(error) or f"it does not load as a causal language model: {brief(error)}"
        raise ValueError(f"{source.base}: {reason}") from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{source.base} lacks {len(missing)} of its weights ({', '.join(missing[:3])}), which would be random: "
            "download the model again"
        )
    if getattr(model, "is_loaded_in_8bit", False):  # each layer logs its dtype at each token
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if getattr(model, "is_loaded_in_4bit", False):
        keep_packing(model)
    if "quantization_config" not in model.config.to_dict():
        restore_padding_rows(model, source.base)
    keep_scale(model)
    if source.adapter is None:
        return model.eval()
    with warnings.catch_warnings():
        if as_trained:  # the files may have another precision: they had it in training too
            for text in ("this base has fingerprint", ".*factors come from the checkpoint"):
                warnings.filterwarnings("ignore", text, adapters.BasePrecisionWarning)
        return attach(model, source.adapter).eval()


def load_quantised(source: Source, kind: Kind, *, dtype: str = "auto", device: str = "auto") -> Any:
    """The base, quantised weight by weight while it is read, with its adapter if there is one: as in training."""
    check_quantize(kind)
    check_base(source.base, kind)
    adapter = None if source.adapter is None else adapter_config(source.adapter)
    base = filled(source, kind, adapter, dtype=dtype, device=device)
    return (base if source.adapter is None else attach(base, source.adapter)).eval()


def filled(
    source: Source, kind: Kind, adapter: Any, *, dtype: str, device: str, head: Mapping[str, Any] | None = None
) -> Any:
    """The base on its device, read weight by weight as in training. head: settings of a classification head."""
    from launcher.models.build import choose_dtype
    from launcher.models.fill import Whole, fill
    from launcher.models.skeleton import bare_skeleton

    dtype, place = _dtype(source, dtype), torch.device(choose_device(device))
    try:
        config = AutoConfig.from_pretrained(source.base, trust_remote_code=source.trust_remote_code)
    except Exception as error:
        raise ValueError(f"{source.base}: {needs_code(error) or brief(error)}") from None
    if source.dtype is None and dtype == "auto":  # a model's own, as transformers takes it
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    dtype = choose_dtype(dtype)
    settings = ModelConfig(model=str(source.base), quantize=kind, trust_remote_code=source.trust_remote_code)
    base = bare_skeleton(settings, source.base, adapter, dtype=dtype, attention=None, head=head)
    with _loading() as progress:
        fill(base, source.base, lambda *_: None, Whole(), place, progress)  # type: ignore[arg-type]
    return base


@torch.no_grad()
def _check_output(model: Any, source: Source) -> None:
    """Raise ValueError if one token gives logits that are not finite: every answer would be empty or noise."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(chain(model.buffers(), model.parameters())).device)
    try:
        logits = model(input_ids=token, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # sizes that do not fit each other give any kind of error
        where = source.base if source.adapter is None else f"adapter {source.adapter} on {source.base}"
        raise ValueError(f"{where} does not compute one token ({brief(error)}): fetch its config.json again") from None
    if finite(logits):
        return
    blame = "the weights of"
    if source.adapter is not None:
        with model.disable_adapter():
            if finite(model(input_ids=token, use_cache=False).logits):
                blame = f"adapter {source.adapter} (scale and other settings are in its adapter_config.json) on"
    raise ValueError(f"the logits are NaN or infinite; the cause is {blame} {source.base}: check the files, or --dtype")


def _dtype(source: Source, dtype: str) -> str:
    dtype = (source.dtype or "auto") if dtype == "auto" else dtype
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype {dtype} is unknown: give auto, {', '.join(DTYPES)}")
    return dtype


def choose_device(device: str) -> str:
    """torch's name of the device; auto is a GPU if there is one. Raises ValueError for a device that does not exist."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device} does not work here ({first_line(error)}): give auto, cpu, or a GPU that torch finds "
            "(cuda, cuda:1)"
        ) from None
    return device


@contextmanager
def _loading() -> Iterator[Callable[[int, int], None]]:
    """A progress bar of the weights on standard error, as a function of how many are read, and of how many."""
    console = Console(stderr=True, quiet=not Ranks.from_environment().is_main)
    with Bars(console).bar("loading", brief=True) as show:
        yield lambda done, total: show(done, of=total)
