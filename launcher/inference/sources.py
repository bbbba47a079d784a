"""What a command is pointed at (a model, an adapter or a run), and the model and tokenizer loaded from there.

Every mistake in the files is found from their headers, before any weight is read, and is a ValueError of one line.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import adapters  # registers our methods with PEFT as well
from adapters.checkpoint_files import local_folder
from launcher.config import ModelConfig
from launcher.models.files import base_folder, first_line, has_tokenizer, load_tokenizer, recorded_run
from launcher.models.quantize import check_base, check_quantize, keep_packing

Kind = Literal["none", "int8", "nf4", "fp4"]
Quantize = Literal["auto", Kind]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Folders to load from, and how the run that trained it asked its questions."""

    base: Path
    base_name: str  # as it was given: a folder or a hub name
    adapter: Path | None = None
    tokenizer: Path
    template: str | None = None  # what the run recorded; None: no run is known
    dtype: str | None = None  # likewise
    quantize: Kind = "none"  # likewise; base is in full precision
    data: dict[str, Any] | None = None  # likewise: its data settings


def find(model: str, *, adapter: str | None = None, base: str | None = None) -> Source:
    """What `model` names: a model (folder or hub name on this machine), an adapter folder or a run folder.

    With `adapter` (an adapter or run folder) the model is its base. `base` replaces the base that an adapter or a run
    names. Nothing is fetched. Raises ValueError with what was found and what to give instead.
    """
    if adapter is not None:
        if base is not None:
            raise ValueError(f"--adapter makes {model} the base, so --base {base} is one too many: leave it out")
        source = find(adapter, base=model)
        if source.adapter is None:
            raise ValueError(f"--adapter {adapter} holds a whole model: give it alone, without a base")
        return source
    place = Path(model).expanduser()
    if (place / "adapter_config.json").is_file():
        return _from_adapter(place, base, recorded_run(place.parent) if place.name == "adapter" else None)
    run = recorded_run(place)
    if run is not None:
        if (place / "adapter" / "adapter_config.json").is_file():
            return _from_adapter(place / "adapter", base, run)
        if not (place / "model" / "config.json").is_file():
            raise ValueError(f"run {place} has saved no adapter yet: its command, typed again, goes on")
        place = place / "model"
    elif base is not None:
        raise ValueError(
            f"--base {base} is for an adapter, and {model} is none: expected a folder with adapter_config.json, "
            "or a run folder"
        )
    folder = base_folder(str(place) if place.exists() else model)
    tokenizer = folder
    if run is not None and not has_tokenizer(folder):
        tokenizer = next((found for name in _bases(run) if (found := local_folder(name))), folder)
    return Source(base=folder, base_name=model, tokenizer=tokenizer, **_recorded(run))


def adapter_config(folder: Path) -> Any:
    """The PEFT config of an adapter folder whose weight file is whole. Raises ValueError naming what is not."""
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = sorted(folder.glob("adapter_model.*"))
        raise ValueError(
            f"adapter {folder} has its weights only as pickle ({pickled[0].name}), which can run code when read: "
            "load it in PEFT where you trust it and save it again"
            if pickled
            else f"adapter {folder} has no {ADAPTER_WEIGHTS}: copy the whole folder"
        )
    try:
        with safe_open(weights, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is damaged or cut short ({error}): copy it again") from None
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder / 'adapter_config.json'} is no config of a PEFT method known here ({first_line(error)}): "
            "was it written by a newer version?"
        ) from None
    if config.task_type == "SEQ_CLS":
        raise ValueError(
            f"adapter {folder} labels texts and writes none: load its base with AutoModelForSequenceClassification, "
            "then PeftModel.from_pretrained; merge_and_unload() there gives a plain model"
        )
    return config


def load(source: Source, *, dtype: str = "auto", device: str = "auto", quantize: Quantize = "auto") -> tuple[Any, Any]:
    """The model with its adapter, ready to answer, and the tokenizer.

    dtype auto: the run's, else the files' own. quantize auto: as the run trained on its base; none: in full precision.
    """
    tokenizer = load_tokenizer(source.tokenizer)
    if quantize == "auto":
        already = "quantization_config" in json.loads((source.base / "config.json").read_text(encoding="utf-8"))
        quantize = "none" if already else source.quantize
        try:
            check_quantize(quantize)
        except ValueError as error:
            raise ValueError(
                f"this run trained on its base in {quantize}. {error}; or give --quantize none, for answers on the "
                "base in full precision"
            ) from None
    if quantize == "none":
        return load_model(source, dtype=dtype, device=device), tokenizer
    return load_quantised(source, quantize, dtype=dtype, device=device), tokenizer


def load_model(source: Source, *, dtype: str = "auto", device: str = "auto") -> Any:
    """The base with its adapter, if it has one."""
    as_trained = source.dtype is not None and dtype in ("auto", source.dtype)
    dtype, device = _dtype(source, dtype), choose_device(device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.base,
            dtype=DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **({} if device == "cpu" else {"device_map": device}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{source.base} does not load as a causal language model: {first_line(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{source.base} lacks {len(missing)} of its weights ({', '.join(missing[:3])}), which would be random: "
            "fetch the model again"
        )
    if getattr(model, "is_loaded_in_8bit", False):  # each layer says at each token in which precision it computes
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if getattr(model, "is_loaded_in_4bit", False):
        keep_packing(model)
    if source.adapter is None:
        return model.eval()
    with warnings.catch_warnings():
        if as_trained:  # the files' precision may be another one: so it was in training
            for said in ("this base has fingerprint", ".*factors come from the checkpoint"):
                warnings.filterwarnings("ignore", said, adapters.BasePrecisionWarning)
        return attach(model, source.adapter).eval()


def load_quantised(source: Source, kind: Kind, *, dtype: str = "auto", device: str = "auto") -> Any:
    """The base, quantised weight by weight as it is read, with its adapter, if it has one: as a run trains on it."""
    from launcher.models.build import choose_dtype
    from launcher.models.fill import Whole, fill
    from launcher.models.skeleton import bare_skeleton

    check_quantize(kind)
    check_base(source.base, kind)
    dtype, place = _dtype(source, dtype), torch.device(choose_device(device))
    if source.dtype is None and dtype == "auto":  # a model's own, as transformers takes it
        dtype = str(AutoConfig.from_pretrained(source.base).dtype or torch.float32).removeprefix("torch.")
    dtype = choose_dtype(dtype)
    config = ModelConfig(model=str(source.base), quantize=kind)
    adapter = None if source.adapter is None else adapter_config(source.adapter)
    base = bare_skeleton(config, source.base, adapter, dtype=dtype, attention="sdpa")
    fill(base, source.base, lambda *_: None, Whole(), place)  # type: ignore[arg-type]
    return (base if source.adapter is None else attach(base, source.adapter)).eval()


def _dtype(source: Source, dtype: str) -> str:
    dtype = (source.dtype or "auto") if dtype == "auto" else dtype
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype {dtype} is unknown: give auto, {', '.join(DTYPES)}")
    return dtype


def choose_device(device: str) -> str:
    """torch's name of the device; auto is a GPU where there is one. Raises ValueError for one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device} cannot be used here ({first_line(error)}): give auto, cpu, or the name of a GPU that "
            "torch finds (cuda, cuda:1)"
        ) from None
    return device


def attach(model: Any, folder: Path, *, low_cpu_mem_usage: bool = False) -> PeftModel:
    """Put the adapter of a folder, of any PEFT method, on the model. Raises ValueError where it does not fit."""
    config = adapter_config(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            return PeftModel.from_pretrained(model, str(folder), config=config, low_cpu_mem_usage=low_cpu_mem_usage)
        except (RuntimeError, UserWarning) as error:
            reason = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), first_line(error))
            raise ValueError(
                f"adapter {folder} does not fit this base ({reason:.200}): load it on the base it was trained on, "
                f"{config.base_model_name_or_path}"
            ) from None


def _from_adapter(folder: Path, base: str | None, run: dict[str, Any] | None) -> Source:
    config = adapter_config(folder)
    names = [base] if base else [*_bases(run), *filter(None, [config.base_model_name_or_path])]
    found = next((name for name in names if local_folder(str(Path(name).expanduser())) or local_folder(name)), None)
    if found is None:
        asked = " or ".join(dict.fromkeys(names)) or "a model it does not name"
        raise ValueError(f"adapter {folder} needs its base, {asked}, which is not here: give --base MODEL")
    model = base_folder(found)
    tokenizer = folder if has_tokenizer(folder) else model
    return Source(base=model, base_name=found, adapter=folder, tokenizer=tokenizer, **_recorded(run))


def _bases(run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return []
    folder = run.get("resolved", {}).get("base_folder")
    return [run["config"]["model"]["model"], *([folder] if folder else [])]


def _recorded(run: dict[str, Any] | None) -> dict[str, Any]:
    if run is None:
        return {}
    model, data = run["config"]["model"], run["config"].get("data", {})
    setting = run.get("resolved", {}).get("prompt_template") or data.get("prompt_template")
    return {"template": setting, "dtype": model.get("dtype"), "quantize": model.get("quantize", "none"), "data": data}
