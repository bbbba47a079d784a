"""An adapter's folder, of any PEFT method: its config and tensors checked, and loaded onto a model.

Damaged or wrong files raise a one-line ValueError before any weight of the base is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import adapters  # registers our methods with PEFT as well
from adapters.checkpoint_names import local_weights
from launcher.inference.patterns import check_patterns
from launcher.models.files import check_json_files
from launcher.processes import Ranks
from launcher.progress import Bars
from launcher.text import brief, first_line

MOST_COPIES = 1024  # ranges of layer_replication
ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
            bad = next((name for name in opened.keys() if not finite(opened.get_tensor(name))), None)  # noqa: SIM118
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
                f"{folder / 'adapter_config.json'} does not describe a valid adapter ({brief(error)}): copy it again"
            ) from None


def _check_added_tokens(model: Any, folder: Path) -> None:
    """Raises ValueError if the adapter was trained on a base with more tokens: PEFT then saves the whole embedding."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a UNet, a model of images
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


def _read_by_peft(model: PeftModel, config: PeftConfig, folder: Path, names: set[str]) -> set[str]:
    """The names that PEFT makes of those in an adapter's file: it renames some as transformers does a checkpoint's."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in names}
    return set(convert_peft_adapter_state_dict_for_transformers(model, config, tensors))


def foreign(folder: Path, names: list[str]) -> str:
    """The error for tensors that do not belong in an adapter file."""
    return (
        f"{folder / ADAPTER_WEIGHTS} holds tensors that are not part of the adapter and could replace weights of the "
        f"base model ({len(names)}: {', '.join(names[:3])}): get the adapter from a source you trust, or remove them"
    )


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


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
