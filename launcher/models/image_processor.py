"""An image model's processor, from an image to the model's input: transformers' own that needs Pillow alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGES
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as TEXTS

from launcher.files import read_json
from launcher.models.files import JSON_BYTES
from launcher.text import first_line, needs_code

FILE = "preprocessor_config.json"
KEPT = {"do_resize": False, "do_center_crop": False}  # the image has its size already


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """What turns an image into numbers, as the model was trained."""

    apply: Callable[..., Any]  # transformers' processor
    size: tuple[int, int]  # height and width of the model's input
    mode: str  # RGB, or L for a model of grey images
    patches: int  # that the model makes of an image; 1 for a model without patches
    resample: Any  # Pillow's filter
    identity: str  # its settings as JSON

    def whole(self, image: Any) -> Tensor:
        """(channels, height, width), float32: resized and cut as the processor does, for evaluation."""
        return self._numbers(image)

    def resized(self, image: Any) -> Tensor:
        """The same of an image that has the model's size."""
        return self._numbers(image, **KEPT)

    def _numbers(self, image: Any, **how: Any) -> Tensor:
        return self.apply(images=image, return_tensors="pt", **how)["pixel_values"][0]


def model_type(folder: Path) -> str:
    """The kind of model that a folder's config.json names; empty if it does not."""
    try:
        return str(read_json(folder / "config.json", JSON_BYTES)["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_image_model(kind: str) -> bool:
    """Whether transformers has an image classifier, and none of texts, for this model_type."""
    return kind in IMAGES and kind not in TEXTS


def has_processor(folder: Path) -> bool:
    """Whether the folder has an image processor's file."""
    return (folder / FILE).is_file()


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> ImageProcessor:
    """The image processor of a folder. Raises ValueError if there is none, or its output does not fit the model."""
    from PIL import Image

    if not has_processor(folder):
        raise ValueError(f"{folder} has no {FILE}, which says how images are resized: copy it from the model's page")
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        loaded: Any = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers' and JSON's errors have no common class
        raise ValueError(f"{folder / FILE}: {needs_code(error) or first_line(error)}") from error
    channels = getattr(settings, "num_channels", 3)
    if channels not in (1, 3):
        raise ValueError(f"{folder}: a model of {channels} channels; images have 3 (RGB) or 1 (grey)")
    mode = "RGB" if channels == 3 else "L"
    try:
        found = loaded(images=Image.new(mode, (96, 64)), return_tensors="pt")
        numbers = found["pixel_values"]
    except Exception as error:  # a processor's own code
        raise ValueError(f"{folder / FILE}: the processor fails on an image ({first_line(error)})") from error
    if set(found) != {"pixel_values"} or numbers.ndim != 4 or numbers.shape[:2] != (1, channels):
        raise ValueError(
            f"{folder / FILE}: the processor gives {', '.join(f'{k} {tuple(v.shape)}' for k, v in found.items())}; "
            f"expected pixel_values (1, {channels}, height, width) alone: this model takes another kind of input"
        )
    size = (numbers.shape[2], numbers.shape[3])
    _check_size(settings, size, folder)
    patch = getattr(settings, "patch_size", None)
    high, wide = patch if isinstance(patch, (list, tuple)) else (patch or size[0], patch or size[1])
    return ImageProcessor(
        apply=loaded, size=size, mode=mode, patches=max(1, (size[0] // high) * (size[1] // wide)),
        resample=getattr(loaded, "resample", None) or Image.Resampling.BILINEAR,
        identity=json.dumps(_plain(loaded.to_dict()), sort_keys=True),
    )  # fmt: skip


def assumed_processor(folder: Path) -> ImageProcessor:
    """A stand-in of a model's size, for a plan without data; its output is zero."""
    settings = AutoConfig.from_pretrained(folder)
    given = getattr(settings, "image_size", None) or 224
    size = tuple(given) if isinstance(given, (list, tuple)) else (given, given)
    channels, patch = getattr(settings, "num_channels", 3), getattr(settings, "patch_size", None)
    side = patch if isinstance(patch, int) else size[0]
    blank = {"pixel_values": torch.zeros(1, channels, *size)}
    patches = max(1, (size[0] // side) * (size[1] // side))
    return ImageProcessor(
        apply=lambda **how: blank, size=size, mode="RGB" if channels == 3 else "L", patches=patches, resample=None,
        identity="",
    )  # fmt: skip


def _plain(settings: Any) -> Any:
    """Settings of the processor without what names its class or this machine's versions."""
    left = {"image_processor_type", "processor_class", "backend", "data_format", "device", "return_tensors"}
    return json.loads(json.dumps({k: v for k, v in settings.items() if k not in left}, default=str))


def _check_size(settings: Any, size: tuple[int, int], folder: Path) -> None:
    """Raises ValueError if the model has positions for images of another size."""
    given = getattr(settings, "image_size", None)
    if given is None:
        return
    wanted = tuple(given) if isinstance(given, (list, tuple)) else (given, given)
    if wanted != size:
        raise ValueError(
            f"{folder}: the processor makes images of {size[0]} x {size[1]} ({FILE}), the model takes "
            f"{wanted[0]} x {wanted[1]} (image_size in config.json): the two belong to different models"
        )
