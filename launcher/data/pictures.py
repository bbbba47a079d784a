"""Pictures of a folder: found, read, and cut to squares of a model's resolution.

Pixels are uint8 (3, H, W), red, green and blue.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from launcher.data.bad_records import BadRecord
from launcher.data.image_files import bytes_of
from launcher.data.pixels import decoded
from launcher.files import user_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def find_pictures(folder: str, option: str) -> list[Path]:
    """The picture files of a folder here, or of a data set in the hub or its cache, by name.

    option: the one that named the folder, for the message. Raises ValueError if there are none.
    """
    place = user_path(folder)
    if not place.is_dir():
        place = _from_hub(folder, option)
    files = sorted(
        file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{option} {folder} holds no pictures ({', '.join(SUFFIXES)}): give a folder of them")
    return files


def _from_hub(name: str, option: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]))
    except Exception as error:  # the hub's client has many kinds of errors; a name that is a path is one of them
        raise ValueError(
            f"{option} {name} is neither a folder of pictures here nor a data set that the hub offers "
            f"({type(error).__name__}): give a folder"
        ) from None


def read_picture(file: Path, side: int) -> Tensor:
    """The picture, turned as its camera noted, its shorter side scaled to `side` pixels.

    Raises ValueError naming the file if it cannot be used, as in `launcher.data.pixels`.
    """
    try:
        turned = decoded(bytes_of(file), "RGB")
    except BadRecord as error:
        raise ValueError(f"{file} {error}: replace it, or take it out") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): replace it, or take it out") from None
    scale = side / min(turned.size)
    width, height = (max(side, round(length * scale)) for length in turned.size)
    scaled = turned.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(scaled).copy()).permute(2, 0, 1).contiguous()


def crop(pixels: Tensor, side: int, at: Callable[[int], int] = lambda room: room // 2) -> Tensor:
    """A square (3, side, side) of the picture. at(room) chooses its first row or column, 0 to room; else the middle."""
    top, left = (at(length - side) for length in pixels.shape[1:])
    return pixels[:, top : top + side, left : left + side]


def save_picture(picture: Any, file: Path) -> None:
    """Write a PIL image as a PNG file, whole or not at all."""
    partial = file.with_name(f".{file.name}.tmp")
    picture.save(partial, format="PNG")
    partial.replace(file)
