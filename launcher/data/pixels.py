"""From the bytes of an image's file to pixels: decoding, checks, and the random changes of training."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from launcher.data.bad_records import BadRecord
from launcher.data.crew import Crew, Tick
from launcher.data.image_files import Images
from launcher.data.limits import limits
from launcher.factorization.cache import put

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
log = logging.getLogger(__name__)
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # Pillow's others may start programs
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
WIDE = ("I", "I;16", "I;16B", "I;16L", "F")  # Pillow clips these to white when it converts them
CHECKED = 1  # changes whenever another image passes the check
THREADS = 16  # at most these decode for one process
CHUNK = 64  # images checked between two ticks
TRIES = 10  # of a random crop that fits


class Augment(NamedTuple):
    """Random changes of training images; they follow from the seed, the step and the number of the sample."""

    seed: int
    least_area: float  # share of the image that a crop keeps at least; 1: no crop
    flip: bool


def check_pillow() -> None:
    """Raises ValueError if Pillow is not installed."""
    if find_spec("PIL") is None:
        raise ValueError("images are read with Pillow, which is not installed: pip install 'loldu-launcher[images]'")


@cache
def _pillow() -> Any:
    from PIL import Image

    # `opened` compares with our own limit, which is lower unless the user raises it
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits().image_pixels)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata that is damaged or unknown
    return Image


def opened(data: bytes) -> Image:
    """The image in these bytes, of which only the header is read.

    Raises BadRecord for bytes that are no image, one of too many pixels, or of 16 or more bits a channel.
    """
    try:
        image = _pillow().open(io.BytesIO(data), formats=FORMATS)
    except _pillow().DecompressionBombError:
        raise BadRecord("too many pixels", f"has too many pixels: {limits().raised('image_pixels')}") from None
    except DAMAGED:
        if not data:
            raise BadRecord("empty", "is empty") from None
        raise BadRecord("no image", f"is no image that can be read ({', '.join(FORMATS)})") from None
    width, height = image.size
    if width * height > limits().image_pixels:
        raise BadRecord("too many pixels", f"has {width} x {height} pixels: {limits().raised('image_pixels')}")
    if image.mode in WIDE:
        raise BadRecord("16 bits", f"has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits")
    return image


def decoded(data: bytes, mode: str) -> Image:
    """The upright image in RGB or L (grey). Raises BadRecord as `opened` does, and for a damaged one."""
    from PIL import ImageOps

    image = opened(data)
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert(mode)
    except DAMAGED as error:
        raise _damaged(error) from None


def _damaged(error: BaseException) -> BadRecord:
    text = str(error) or type(error).__name__
    return BadRecord("damaged", f"is damaged or cut short ({text:.100})")


def check_image(data: bytes) -> None:
    """Raises BadRecord for an image that cannot be used. A JPEG is decoded at an eighth of its size."""
    from PIL import ImageOps

    image = opened(data)
    try:
        image.draft("L", (1, 1))
        image.load()
        ImageOps.exif_transpose(image).convert("RGB")
    except DAMAGED as error:
        raise _damaged(error) from None


def read_image(images: Images, place: int, use: Callable[[bytes], T]) -> T:
    """use(the file of an image). Raises BadRecord that names the image."""
    name = images.name(place)
    try:
        return use(images.read(place))
    except BadRecord as error:
        raise BadRecord(error.kind, f"{name} {error}") from None
    except Exception as error:  # zipfile and pyarrow have errors of their own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadRecord("cannot be read", f"{name} cannot be read: {reason}") from None


def changed(image: Image, size: tuple[int, int], resample: Any, augment: Augment, step: int, sample: int) -> Image:
    """A random part of the image at this size (height, width), perhaps mirrored; without crops, the image as it is.

    The part has a random share of the area and an aspect ratio of 3:4 to 4:3, as in Szegedy et al., 2014
    (arXiv 1409.4842), and as torchvision's RandomResizedCrop chooses it.
    """
    drawn = random.Random(f"{augment.seed} {step} {sample}")
    if augment.least_area < 1:
        box = _crop(drawn, image.size, augment.least_area)
        image = image.resize(size[::-1], resample, box=box)
    if augment.flip and drawn.random() < 0.5:
        image = image.transpose(_pillow().Transpose.FLIP_LEFT_RIGHT)
    return image


def _crop(drawn: random.Random, size: tuple[int, int], least_area: float) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of a random part."""
    width, height = size
    for _ in range(TRIES):
        area = width * height * drawn.uniform(least_area, 1.0)
        ratio = math.exp(drawn.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = drawn.randint(0, width - w), drawn.randint(0, height - h)
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # its middle, nearly square
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


@cache
def _pool() -> ThreadPoolExecutor:
    """Decoders of this process; Pillow releases the interpreter's lock while it decodes and resizes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return ThreadPoolExecutor(max(1, min(THREADS, share)), thread_name_prefix="decode")


def in_threads(make: Callable[[int], T], places: Sequence[int]) -> list[T]:
    """make(place) for all places, in their order."""
    return list(_pool().map(make, places))


Bad = list[list[Any]]  # [place, kind, text] of images that cannot be used


def find_bad(images: Images, digest: str, folder: Path, crew: Crew) -> Bad:
    """The images that cannot be used, found by decoding each once, by all processes together; called by all of them.

    digest identifies the images; the result is kept in the cache's folder under it.
    """
    key = hashlib.sha256(json.dumps([CHECKED, digest, limits().image_pixels, limits().image_bytes]).encode())
    file = folder / "images" / f"{key.hexdigest()}.safetensors"
    known = crew.comm.from_main("data", lambda: _known(file))
    if known is not None:
        return [[place, kind, text.replace("\0", images.name(place))] for place, kind, text in known]
    ranks = crew.comm.ranks
    chunks = range(ranks.rank, -(-images.count // CHUNK), ranks.world_size)

    def check(tick: Tick) -> Bad:
        bad: Bad = []
        for done, chunk in enumerate(chunks, 1):
            places = range(chunk * CHUNK, min((chunk + 1) * CHUNK, images.count))
            bad += [found for found in in_threads(lambda place: _fault(images, place), places) if found]
            tick(min(done * CHUNK, images.count))
        return bad

    mine = crew.work("checking images", len(chunks) * CHUNK, check, brief=False)
    bad = sorted(found for part in crew.comm.gather("bad images", mine) for found in part)

    def keep() -> None:
        try:
            about = {
                "bad": json.dumps([[place, kind, text.replace(images.name(place), "\0")] for place, kind, text in bad])
            }
            put(folder, file, lambda partial: save_file({"checked": torch.tensor(images.count)}, partial, about))
        except ValueError as error:
            log.warning("the check of the images cannot be kept for the next start: %s", error)

    crew.comm.from_main("data", keep)
    return bad


def _known(file: Path) -> Bad | None:
    try:
        with safe_open(file, framework="pt") as kept:
            found = json.loads(kept.metadata()["bad"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):  # the cache is pruned by the time of last use
        os.utime(file)
    return found


def _fault(images: Images, place: int) -> list[Any] | None:
    try:
        read_image(images, place, check_image)
        return None
    except BadRecord as error:
        return [place, error.kind, str(error)]
