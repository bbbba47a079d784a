"""A base model's files: its folder and its tokenizer, checked from headers before any weight is read."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from adapters.checkpoint_files import is_pipeline, list_tensors, local_folder
from launcher.files import read_json, user_path
from launcher.models.tokenizer_limits import TooMuch, check_largest_id, check_normalizer
from launcher.text import expected, first_line, needs_code

JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "model.safetensors.index.json", "adapter_config.json",
)  # fmt: skip
LAYERS, MOST_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 10_000
WRONG_FIELD = "Validation error for field"  # of transformers, in the config of a model
JSON_BYTES = 64 << 20  # of each; longer ones are damaged
UNKNOWN = "\u0378"  # a character that Unicode has not assigned, so that no vocabulary has it
TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "tekken.json",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")


def base_folder(model: str, option: str = "") -> Path:
    """The local folder of a model with complete weight files. Raises ValueError naming what is missing.

    option: the option that named the model, for the message.
    """
    path = user_path(model)
    folder = path if path.is_dir() else local_folder(model)
    if folder is None:
        raise ValueError(
            f"{option}{model} is neither a folder here nor in the hub cache: "
            + ("give a model's folder" if option else "give the folder of a model, an adapter or a run")
            + f", or fetch the model first (hf download {model})"
        )
    if recorded_run(folder) is not None:
        raise ValueError(
            f"{option}{model} is a run folder, not a base model: give it without this option, since it records its base"
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{option}{model} is an adapter, not a base model: give the model that it was trained on")
    if is_pipeline(folder):
        raise ValueError(
            f"{option}{model} is a diffusers pipeline, which makes pictures: loldu train with --task subject trains "
            "it, and loldu generate RUN --prompts TEXT uses what it learned"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{option}{folder} holds no model (config.json), no adapter (adapter_config.json) and no run: "
            "check the path"
        )
    check_json_files(folder)
    list_tensors(folder)
    return folder


def check_json_files(folder: Path) -> None:
    """Raises ValueError naming a JSON file of a model's or an adapter's folder that is no regular file, or damaged.

    transformers and PEFT would wait for ever at a FIFO, fill the memory from a device, or end in an error of their own.
    """
    for name in (*JSON_FILES, "tokenizer.json"):
        file = folder / name
        if not os.path.lexists(file):
            continue
        if not file.is_file():
            raise ValueError(f"{file} is not a regular file: fetch this file again")
        if name not in JSON_FILES:  # may be long, and its library reads it safely
            continue
        try:
            found = read_json(file, JSON_BYTES)
        except (ValueError, OSError) as error:
            raise ValueError(f"{file} is damaged ({first_line(error)}): fetch this file again") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file} is damaged (it holds no object): fetch this file again")
        for count in LAYERS:  # transformers would build them one after the other, without end
            if name == "config.json" and isinstance(layers := found.get(count), int) and not 0 <= layers <= MOST_LAYERS:
                raise ValueError(f"{file} says {count} {layers!s:.20}, supported are 0 to {MOST_LAYERS}")


def recorded_run(folder: Path) -> dict[str, Any] | None:
    """The contents of a run folder's config.json; None for another kind of folder."""
    try:
        found = read_json(folder / "config.json", JSON_BYTES)
        return found if isinstance(found["config"]["model"]["model"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder. Raises ValueError if there is none: transformers would return an empty one."""
    reason = f"it has none of {', '.join(TOKENIZER_FILES)}"
    if missing := _missing_packages(folder):
        raise ValueError(
            f"the tokenizer of {folder} has no tokenizer.json, and reading its other files takes "
            f"{' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    # The library starts its threads, one per core, with the first tokenizer: too many if processes share the cores.
    os.environ.setdefault("RAYON_NUM_THREADS", str(torch.get_num_threads()))
    if has_tokenizer(folder):
        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
            check_normalizer(found, folder)
            check_largest_id(found, folder)
            found(UNKNOWN, verbose=False)  # one without a token for what is unknown fails here, not at some record
            return found
        except TooMuch:
            raise
        except BaseException as error:  # tokenizer libraries raise bare Exceptions, and panic
            reason = needs_code(error) or first_line(expected(error))
            if WRONG_FIELD in reason:  # it is read on the way to the tokenizer
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise ValueError(
                    f"{folder / 'config.json'} is damaged ({' '.join(lines[:2])}): fetch it again"
                ) from None
    raise ValueError(f"{folder} has no tokenizer that loads ({reason}): copy the model's tokenizer files there")


def _missing_packages(folder: Path) -> list[str]:
    """The packages that transformers needs to read the folder's tokenizer and that are not installed.

    Without them it takes one format for the other, and names the wrong package or none.
    """
    files = [folder / name for name in ("tokenizer.model", "spiece.model") if (folder / name).is_file()]
    if not files or (folder / "tokenizer.json").is_file():
        return []
    with files[0].open("rb") as opened:
        is_tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", opened.read(4096)) is not None
    needed = (
        {"tiktoken": "tiktoken"} if is_tiktoken else {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    )
    return [package for module, package in needed.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        return False


def check_ids(tokenizer: Any, largest: int, rows: int, *, labels: bool = False) -> None:
    """Raises ValueError if a token of the data is beyond the `rows` of the model's embedding.

    A padding token beyond them is replaced in the tokenizer, since padding is masked. With labels it is an error,
    because the model finds the end of a text by it.
    """
    pad = tokenizer.pad_token_id
    if largest >= rows or (labels and pad is not None and pad >= rows):
        which = largest if largest >= rows else pad
        raise ValueError(
            f"the tokenizer produces token {which} ({tokenizer.convert_ids_to_tokens(which)!r}), but the embedding of "
            f"the model has {rows} rows, so the two belong to different models: give the model its own tokenizer's "
            "files, or resize its embedding (model.resize_token_embeddings) and save it again"
        )
    if pad is not None and pad >= rows:
        tokenizer.pad_token_id = 0


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the base's tokenizer, with its code if it has some, beside what was trained: other programs expect it there.

    generation_config.json names the tokens that stop generation.
    """
    settings = base / "tokenizer_config.json"
    has_code = settings.is_file() and "auto_map" in read_json(settings, JSON_BYTES)
    for pattern in (*TOKENIZER_PATTERNS, "generation_config.json", *(["*.py"] if has_code else [])):
        for file in base.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer's file."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def context_length(model: Any) -> int:
    """The model's maximum number of tokens; sys.maxsize if its config has none.

    RoBERTa numbers positions from its padding token's number plus one, so it uses 512 of 514.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    unused = [module.padding_idx + 1 for module in tables if getattr(module, "padding_idx", None) is not None]
    return positions - max(unused, default=0)
