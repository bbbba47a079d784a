"""The tensors of a Hugging Face checkpoint on disk, listed from the files' headers and read by slice."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model_index.json"  # of a diffusers pipeline
STEMS = ("model", "diffusion_pytorch_model")  # file names of weights in transformers and in diffusers


class TensorInfo(NamedTuple):
    """Where one tensor lies."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, ...
    conversion: Any = None  # of adapters/checkpoint_names.py: how the tensor is made of those of the files


def local_folder(model: str) -> Path | None:
    """The folder of a model's files: model itself, or its snapshot in the hub cache; None if neither exists."""
    if os.path.isdir(model):  # unlike pathlib's, it answers for every name
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
        if not isinstance(found, str):
            found = try_to_load_from_cache(model, INDEX)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a diffusers pipeline, each part in a folder of its own."""
    return (folder / INDEX).is_file()


def text_encoders(folder: Path) -> list[Path]:
    """The folders of a pipeline's text encoders, which may be adapted too."""
    return sorted(folder.glob("text_encoder*")) if is_pipeline(folder) else []


def config_file(folder: Path) -> Path:
    """The config.json of a base: a model's, or that of the UNet in a pipeline."""
    return folder / "unet" / "config.json" if is_pipeline(folder) else folder / "config.json"


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name, from headers alone; of a diffusers pipeline those of its UNet.

    Raises ValueError naming the folder or file: no weights, only pickled ones, a missing or a damaged shard.
    """
    if is_pipeline(folder):
        return list_tensors(folder / "unet")
    stem = next((stem for stem in STEMS if any(folder.glob(f"{stem}.safetensors*"))), STEMS[0])
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"{outside[0]!r} is not the name of a file beside it")
            files = sorted(folder / name for name in names)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of weight files ({error!r}): fetch this file again") from None
        if single.exists() and single not in files:
            raise ValueError(
                f"{folder} holds its weights twice, in {single.name} and in the {len(files)} files that {index.name} "
                "names, and tools differ in which they read: remove one of the two"
            )
    elif single.exists():
        files = [single]
    elif pickled := sorted(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds its weights only as pickle ({pickled[0].name}), which can run code when read. Convert it "
            'where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" and give that folder"
        )
    else:
        raise ValueError(f"{folder} holds no weights: expected model.safetensors or model.safetensors.index.json there")
    tensors = {}
    for file in files:
        for name, shape, dtype in _header(file):
            tensors[name] = TensorInfo(file, name, shape, dtype)
    return tensors


def open_tensor(info: TensorInfo) -> Any:
    """A safetensors slice: indexing reads only the rows and columns asked for."""
    if info.conversion is not None:
        from adapters.checkpoint_names import Converted

        return Converted(info)
    return safe_open(info.file, framework="pt").get_slice(info.name)


def read_tensor(info: TensorInfo) -> Tensor:
    """The whole tensor; one without dimensions has no slices."""
    if info.conversion is not None:
        return open_tensor(info)[:]
    with safe_open(info.file, framework="pt") as opened:
        return opened.get_tensor(info.name)


def _header(file: Path) -> list[tuple[str, tuple[int, ...], str]]:
    try:
        stat = file.stat()
        return _read_header(file, stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing although the checkpoint's index names it: fetch the model again") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): fetch this file again") from None


@lru_cache(maxsize=1024)
def _read_header(file: Path, size: int, mtime_ns: int) -> list[tuple[str, tuple[int, ...], str]]:
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return [(name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()]
