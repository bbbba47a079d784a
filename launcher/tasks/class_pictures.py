"""Pictures of a subject's class, made by the base itself before training and kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from launcher.config import DataConfig
from launcher.data.pictures import save_picture
from launcher.models import pipelines
from launcher.progress import silent

STEPS, GUIDANCE = 50, 7.5  # as diffusers' pipelines have them
AT_ONCE = 4  # pictures in one pass

Bar = Callable[..., AbstractContextManager[Callable[..., None]]]


def class_pictures(
    folder: Path,
    data: DataConfig,
    side: int,
    cache: Path,
    *,
    seed: int,
    device: torch.device,
    dtype: str,
    bar: Bar = lambda *_, **__: nullcontext(silent),
    check: Callable[[], None] = lambda: None,
) -> list[Path]:
    """The files of data.class_pictures pictures of the class; those that the cache lacks are made.

    Picture i follows from the base, the prompt, the side and seed + i alone, so a run that needs more keeps the others.
    """
    place = cache / "class_pictures" / _key(folder, data.class_prompt, side, seed, dtype)
    files = [place / f"{number:05d}.png" for number in range(data.class_pictures)]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if not missing:
        return files
    place.mkdir(parents=True, exist_ok=True)
    pipeline = pipelines.load_pipeline(folder, dtype=getattr(torch, dtype), device=device)
    with bar("class pictures", len(files)) as show:
        for start in range(0, len(missing), AT_ONCE):
            check()
            some = missing[start : start + AT_ONCE]
            show(len(files) - len(missing) + start)
            made = pipelines.draw(
                pipeline, [data.class_prompt] * len(some), seeds=[seed + number for number in some], side=side,
                steps=STEPS, guidance=GUIDANCE,
            )  # fmt: skip
            for number, picture in zip(some, made, strict=True):
                save_picture(picture, files[number])
    return files


def _key(folder: Path, *settings: Any) -> str:
    parts = pipelines.digest_of_parts(folder, ("unet", "vae", "text_encoder"))
    return hashlib.sha256(json.dumps([parts, *settings, STEPS, GUIDANCE]).encode()).hexdigest()[:32]
