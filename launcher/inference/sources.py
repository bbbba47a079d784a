"""Find what a command was given (a model, an adapter or a run), and load its model and tokenizer.

Damaged or wrong files are found from their headers, before any weight is read, and raise a one-line ValueError. Python
code in a model's folder runs only with trust_remote_code; nothing ever asks for it on standard input.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

import adapters  # registers our methods with PEFT as well
from adapters.checkpoint_files import local_folder
from adapters.checkpoint_names import language_model_class, local_weights
from launcher.config import ModelConfig
from launcher.data.saved_template import adapter_template, read_template
from launcher.data.templates import Template
from launcher.files import user_path
from launcher.inference.options import Kind, Quantize
from launcher.inference.patterns import check_patterns
from launcher.models.files import base_folder, check_json_files, first_line, has_tokenizer, recorded_run
from launcher.models.image_processor import is_image_model, model_type
from launcher.models.quantize import check_base, check_quantize, keep_packing
from launcher.models.same_tokenizer import own_tokenizer
from launcher.models.skeleton import keep_scale, restore_padding_rows
from launcher.processes import Ranks
from launcher.progress import Bars
from launcher.text import needs_code

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_COPIES = 1024  # ranges of layer_replication
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Folders to load from, and the settings of the run that trained the model (None without a run)."""

    base: Path
    base_name: str  # as given: a folder or a hub name
    adapter: Path | None = None
    tokenizer: Path
    template: str | None = None  # the setting
    saved_template: Template | None = None  # saved beside the adapter or the model
    dtype: str | None = None
    quantize: Kind = "none"  # of the base in training; the base's files are in full precision
    data: dict[str, Any] | None = None
    trust_remote_code: bool = False  # never taken from a run's record


def find(
    model: str, *, adapter: str | None = None, base: str | None = None, trust_remote_code: bool = False,
    classifies: bool = False,
) -> Source:  # fmt: skip
    """Find a model (folder, or hub name in the local cache), an adapter folder or a run folder.

    With adapter (an adapter or run folder), model is its base. base replaces the base that an adapter or run names.
    classifies: a classifier is wanted. Nothing is downloaded. Raises ValueError with what was found and what to give
    instead.
    """
    if adapter is not None:
        if base is not None:
            raise ValueError(f"--adapter makes {model} the base model already: leave --base {base} out")
        source = find(adapter, base=model, classifies=classifies)
        if source.adapter is None:
            raise ValueError(f"--adapter {adapter} holds a whole model: give it alone, without a base")
    else:
        source = _find(model, base, classifies)
    if not classifies and is_image_model(model_type(source.base)):
        raise ValueError(
            f"{model} classifies images, and this command is for models that write text: loldu predict names the "
            f"classes. To merge, load {source.base} with AutoModelForImageClassification.from_pretrained(BASE, "
            "num_labels=N), then an adapter with PeftModel.from_pretrained, and call merge_and_unload()"
        )
    return replace(source, trust_remote_code=trust_remote_code)


def _find(model: str, base: str | None, classifies: bool) -> Source:
    place = user_path(model)
    if (place / "adapter_config.json").is_file():
        return _from_adapter(place, base, recorded_run(place.parent) if place.name == "adapter" else None, classifies)
    run = recorded_run(place)
    if run is not None:
        if (place / "adapter" / "adapter_config.json").is_file():
            return _from_adapter(place / "adapter", base, run, classifies)
        if not (place / "model" / "config.json").is_file():
            raise ValueError(f"run {place} has not saved an adapter yet: start it again to finish training")
        place = place / "model"
    elif base is not None:
        raise ValueError(
            f"--base {base} needs an adapter, and {model} is not one: give a folder with adapter_config.json, or a "
            "run folder"
        )
    folder = base_folder(str(place) if place.exists() else model)
    tokenizer = folder
    if run is not None and not has_tokenizer(folder):
        tokenizer = next((found for name in _bases(run) if (found := local_folder(name))), folder)
    template = read_template(folder)
    return Source(base=folder, base_name=model, tokenizer=tokenizer, saved_template=template, **_recorded(run))


def adapter_config(folder: Path, *, classifies: bool = False) -> Any:
    """The PEFT config of an adapter folder.

    Raises ValueError if its weight file is missing, damaged or not finite, or if it is a classifier and none is wanted,
    or the reverse.
    """
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = sorted(folder.glob("adapter_model.*"))
        raise ValueError(
            f"adapter {folder} has its weights only as a pickle ({pickled[0].name}), which can run code when it is "
            "read: if you trust it, load it in PEFT and save it again"
            if pickled
            else f"adapter {folder} has no {ADAPTER_WEIGHTS}: copy the whole folder"
        )
    try:
        with safe_open(weights, framework="pt") as opened:
            bad = next((name for name in opened.keys() if not _finite(opened.get_tensor(name))), None)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is damaged or cut short ({error}): copy it again") from None
    if bad is not None:
        raise ValueError(f"{weights}: {bad} holds NaN or infinite numbers: use an earlier checkpoint, or train again")
    check_json_files(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except ValueError:
        raise
    except Exception as error:  # PEFT's configs check nothing, or import a package
        raise ValueError(
            f"{folder / 'adapter_config.json'} is not the config of a known PEFT method ({first_line(error)}): "
            "it may come from a newer version of this project or of PEFT"
        ) from None
    base = config.base_model_name_or_path
    if not isinstance(base, (str, type(None))) or "\0" in (base or ""):
        raise ValueError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path is a name or a path, got {base!r:.60}"
        )
    copies = getattr(config, "layer_replication", None) or []
    if isinstance(copies, (list, tuple)) and len(copies) > MOST_COPIES:
        raise ValueError(
            f"{folder / 'adapter_config.json'}: layer_replication copies layers {len(copies):,} times, at most "
            f"{MOST_COPIES} are supported"
        )
    if config.task_type == "SEQ_CLS" and not classifies:
        raise ValueError(
            f"adapter {folder} is a text classifier, which generates no text: loldu predict names the classes. To "
            "merge, load its base with AutoModelForSequenceClassification, then PeftModel.from_pretrained, and call "
            "merge_and_unload()"
        )
    if config.task_type == "CAUSAL_LM" and classifies:
        raise ValueError(
            f"adapter {folder} belongs to a language model, which names no classes: loldu generate and loldu chat "
            "answer with it"
        )
    return config


def tokenizer_of(source: Source) -> Any:
    """The tokenizer beside the adapter, else the base's. Raises ValueError if neither loads."""
    return own_tokenizer(source.tokenizer, source.base, trust_remote_code=source.trust_remote_code)


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
        raise ValueError(f"{where} does not compute one token ({_short(error)}): fetch its config.json again") from None
    if _finite(logits):
        return
    blame = "the weights of"
    if source.adapter is not None:
        with model.disable_adapter():
            if _finite(model(input_ids=token, use_cache=False).logits):
                blame = f"adapter {source.adapter} (scale and other settings are in its adapter_config.json) on"
    raise ValueError(f"the logits are NaN or infinite; the cause is {blame} {source.base}: check the files, or --dtype")


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def load_model(source: Source, *, dtype: str = "auto", device: str = "auto") -> Any:
    """The base with its adapter, if it has one."""
    as_trained = source.dtype is not None and dtype in ("auto", source.dtype)
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
        reason = needs_code(error) or f"it does not load as a causal language model: {_short(error)}"
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


@contextmanager
def _loading() -> Iterator[Callable[[int, int], None]]:
    """A progress bar of the weights on standard error, as a function of how many are read, and of how many."""
    console = Console(stderr=True, quiet=not Ranks.from_environment().is_main)
    with Bars(console).bar("loading", brief=True) as show:
        yield lambda done, total: show(done, of=total)


@contextmanager
def _rebuilding(stored: Collection[str]) -> Iterator[None]:
    """A progress bar of the layers of our adapters, whose factors follow from the base and are in no file."""
    layers, done = sum(name.endswith(".probe") for name in stored), set[str]()
    console = Console(stderr=True, quiet=not Ranks.from_environment().is_main)
    with Bars(console).bar("rebuilding factors", layers, brief=True) as show:

        def on_factors(module: str) -> None:
            done.add(module)  # twice if the adapter's differ from those that its base alone would get
            show(len(done))

        with adapters.rebuilding(on_factors):
            yield


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
        raise ValueError(f"{source.base}: {needs_code(error) or _short(error)}") from None
    if source.dtype is None and dtype == "auto":  # a model's own, as transformers takes it
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    dtype = choose_dtype(dtype)
    settings = ModelConfig(model=str(source.base), quantize=kind, trust_remote_code=source.trust_remote_code)
    base = bare_skeleton(settings, source.base, adapter, dtype=dtype, attention=None, head=head)
    with _loading() as progress:
        fill(base, source.base, lambda *_: None, Whole(), place, progress)  # type: ignore[arg-type]
    return base


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


def attach(
    model: Any, folder: Path, *, low_cpu_mem_usage: bool = False, classifies: bool = False, base: Path | None = None
) -> PeftModel:
    """Load an adapter folder of any PEFT method onto the model. base: the files of a model on the meta device.

    Raises ValueError if the adapter does not fit the model, or if its file holds tensors that are not the adapter's:
    PEFT would load `...base_layer.weight` over the base's own weight without a word.
    """
    config = adapter_config(folder, classifies=classifies)
    check_patterns(config, [name for name, _ in model.named_modules()], folder)
    _check_added_tokens(model, folder)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as opened:
        stored = {name for name in opened.keys() if not _copies_base(model, name, opened.get_tensor(name), base)}  # noqa: SIM118
    # PEFT nests the adapters of one module's experts: those names too have `base_layer`, before the method's own.
    own_names = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "none of it")
    inner = {name: name.rpartition(".base_layer.")[2] for name in stored if ".base_layer." in name}
    if hidden := sorted(name for name, rest in inner.items() if not rest.startswith(own_names)):
        raise ValueError(foreign(folder, hidden))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            # PEFT would load to a GPU wherever there is one, even for a base in main memory or on meta
            places = {parameter.device.type for parameter in model.parameters()} - {"meta"}
            where: dict[str, Any] = {} if places - {"cpu"} else {"torch_device": "cpu"}
            with _rebuilding(stored):
                loaded = PeftModel.from_pretrained(
                    model, str(folder), config=config, low_cpu_mem_usage=low_cpu_mem_usage, **where
                )
            own = get_peft_model_state_dict(loaded, save_embedding_layers=False)
            if stored - own.keys() and (more := sorted(_read_by_peft(loaded, config, folder, stored) - own.keys())):
                raise ValueError(foreign(folder, more))
            return loaded
        except (RuntimeError, UserWarning) as error:
            reason = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), first_line(error))
            raise ValueError(
                f"adapter {folder} does not fit this base ({reason:.200}): load it on the base it was trained on, "
                f"{config.base_model_name_or_path}"
            ) from None
        except ValueError:
            raise
        except Exception as error:  # values of adapter_config.json give PEFT errors of any kind
            raise ValueError(
                f"{folder / 'adapter_config.json'} does not describe a valid adapter ({_short(error)}): copy it again"
            ) from None


def _check_added_tokens(model: Any, folder: Path) -> None:
    """Raises ValueError if the adapter was trained on a base with more tokens: PEFT then saves the whole embedding."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # a model of images
        return
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    if name is None or not isinstance(embedding, nn.Embedding):
        return
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as opened:
        stored = [key for key in opened.keys() if f".{name}." in key and key.endswith(".weight")]  # noqa: SIM118
        rows = max((opened.get_slice(key).get_shape()[0] for key in stored), default=0)
    if rows > embedding.num_embeddings:
        raise ValueError(
            f"adapter {folder} was trained with {rows:,} tokens and this base has {embedding.num_embeddings:,}: merge "
            f"them in PEFT (load the base, call model.resize_token_embeddings({rows}), then "
            f"PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload().save_pretrained(FOLDER)), save the "
            "adapter's tokenizer there too, and give FOLDER as the model"
        )


def _may_be_path(name: str) -> bool:
    """Whether the system accepts this as a path: no null byte, and no part that is too long."""
    try:
        os.lstat(name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        return isinstance(error, (NotADirectoryError, PermissionError))
    return True


def _short(error: BaseException) -> str:
    """The first line of a library's error, with its kind unless the message is meant for users."""
    kind = "" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}"[:300]


def _read_by_peft(model: PeftModel, config: PeftConfig, folder: Path, names: set[str]) -> set[str]:
    """The names that PEFT makes of those in an adapter's file: it renames some as transformers does a checkpoint's."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in names}
    return set(convert_peft_adapter_state_dict_for_transformers(model, config, tensors))


def _copies_base(model: Any, name: str, tensor: Tensor, base: Path | None) -> bool:
    """Whether a tensor of an adapter file is the base's own weight: PEFT saves a copy of adapted embeddings."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    try:
        held = model.get_parameter(name)
    except AttributeError:
        return False
    if held.is_meta and base is not None and name.endswith(".weight"):
        held = next(local_weights([str(base)], name.removesuffix(".weight")), held)
    return not held.is_meta and held.shape == tensor.shape and torch.equal(held.cpu(), tensor.to(held.dtype))


def foreign(folder: Path, names: list[str]) -> str:
    """The error for tensors that do not belong in an adapter file."""
    return (
        f"{folder / ADAPTER_WEIGHTS} holds tensors that are not part of the adapter and could replace weights of the "
        f"base model ({len(names)}: {', '.join(names[:3])}): get the adapter from a source you trust, or remove them"
    )


def _from_adapter(folder: Path, base: str | None, run: dict[str, Any] | None, classifies: bool) -> Source:
    config = adapter_config(folder, classifies=classifies)
    names = [base] if base else [*_bases(run), *filter(None, [config.base_model_name_or_path])]
    found = next((name for name in names if local_folder(str(user_path(name))) or local_folder(name)), None)
    if found is None:
        asked = " or ".join(dict.fromkeys(names)) or "a model that it does not name"
        raise ValueError(f"adapter {folder} needs its base model, {asked}, which is not here: give --base MODEL")
    model = base_folder(found)
    tokenizer = folder if has_tokenizer(folder) else model
    return Source(
        base=model, base_name=found, adapter=folder, tokenizer=tokenizer, saved_template=adapter_template(folder),
        **_recorded(run),
    )  # fmt: skip


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
