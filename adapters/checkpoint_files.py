"""The tensors of a Hugging Face checkpoint on disk, listed from the files' headers and read by slice."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

log = logging.getLogger(__name__)


class TensorInfo(NamedTuple):
    """Where one tensor lies."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, ...


def local_folder(model: str) -> Path | None:
    """The folder of a model's files: model itself, or its snapshot in the hub cache; None where neither exists."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name, from headers alone.

    Raises ValueError naming the folder or file: no weights, only pickled ones, a missing or a damaged shard.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    elif (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
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
    return safe_open(info.file, framework="pt").get_slice(info.name)


def weight_of(tensors: Mapping[str, TensorInfo], module: str, parameter: str = "weight") -> TensorInfo | None:
    """The checkpoint's tensor of a module, also where one of the two names carries the base model's prefix (model.)."""
    name = f"{module}.{parameter}"
    if name in tensors:
        return tensors[name]
    _, _, shorter = name.partition(".")
    longer = [known for known in tensors if known.partition(".")[2] == name]
    return tensors.get(shorter) or (tensors[longer[0]] if len(longer) == 1 else None)


def local_weights(models: Iterable[str], module: str) -> Iterator[Tensor]:
    """A module's full-precision weight from each checkpoint (folder or hub name) that lies on this machine."""
    for model in models:
        folder = local_folder(model)
        try:
            info = weight_of(list_tensors(folder), module) if folder else None
        except ValueError as error:
            log.warning("cannot read %s from the checkpoint %s: %s", module, model, error)
            continue
        if info is not None and info.dtype.startswith(("F", "BF")):
            yield open_tensor(info)[:]


def _header(file: Path) -> list[tuple[str, tuple[int, ...], str]]:
    try:
        stat = file.stat()
        return _read_header(file, stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing although the checkpoint's index names it: fetch the model again") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): fetch this file again") from None


@lru_cache(maxsize=1024)
def _read_header(file: Path, size: int, mtime_ns: int) -> list[tuple[str, tuple[int, ...], str]]:
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return [(name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()]
