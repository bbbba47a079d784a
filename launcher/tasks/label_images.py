"""Image classification: the images of a folder, an archive or a dataset, each with a class or a number to predict.

A data set of images is never in memory: the files are listed, checked once, and decoded batch by batch in threads.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor

from launcher.config import Config, DataConfig
from launcher.data import pixels, records
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.crew import ALONE, Crew
from launcher.data.encoded import DataReport, Encoded
from launcher.data.files import source_of
from launcher.data.image_files import (
    Columns,
    Images,
    Listing,
    Split,
    choose_split,
    held_out_split,
    load_listing,
    splits_of,
)
from launcher.models.image_processor import (
    ImageProcessor,
    assumed_processor,
    has_processor,
    is_image_model,
    load_processor,
    model_type,
)
from launcher.models.own_head import in_rows_order
from launcher.tasks.base import Batch, Layout, Sampled, Samples, Task
from launcher.tasks.classifier import Classifier
from launcher.tasks.labels import CLASSES, CLASSES_ASSUMED, Labels, head_settings, save_classes


@dataclass(frozen=True)
class ImageReport(DataReport):
    """Counts of images."""

    classes: int = 0  # 0: numbers are predicted
    size: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        what = f"{self.classes} classes" if self.classes else "numbers"
        line = (
            f"{self.kept:,} images labelled with {what}, {self.size[0]} x {self.size[1]} pixels as the model sees them"
        )
        return line + (f"; {self.dropped:,} left out, they cannot be used" if self.dropped else "")


@dataclass(frozen=True, eq=False)
class Pictured(Encoded):
    """Images by number, each with one label. Each counts as one target, and its patches as tokens."""

    classes: Labels
    labels: Tensor  # (S,) int64 indices into classes, or float32 for regression
    places: Tensor  # (S,) int64 places in images
    numbers: Tensor  # (S,) int64 places among the images of its own part, which other held-out images do not move
    images: Images | None  # None: blank ones, for a plan
    processor: ImageProcessor
    augment: pixels.Augment | None  # None: each image as it is, for evaluation
    source: str  # digest of its part's files

    def digest(self) -> str:
        about = [self.source, self.classes, self.processor.identity]
        sha = hashlib.sha256(json.dumps(about).encode())
        for tensor in (self.labels, self.numbers):
            sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()


class LabelImages(Classifier):
    """Classification of images, or regression with one output."""

    peft_type = None  # PEFT has no name for it
    text = False
    counts = "patches"

    def check(self, config: Config, adapter: PeftConfig | None) -> None:
        pixels.check_pillow()
        data = config.data
        if data.text_columns:
            raise ValueError("--image-column and --text-columns ask for different models: give one of them")
        if data.packing or data.exact_match or config.run.show_samples:
            raise ValueError(
                "--image-column asks for labels of images: leave --packing, --exact-match and --show-samples out"
            )
        if getattr(adapter, "factors_from_gradients", False):
            raise ValueError(
                f"--method {config.adapter.method} takes gradients before training, when the new head is still "
                "random: choose another method"
            )

    def check_folder(self, folder: Path) -> None:
        if not is_image_model(model_type(folder)):
            raise ValueError(
                f"{folder} is a {model_type(folder)}, which transformers has no image classifier for: give an image "
                "model such as google/vit-base-patch16-224-in21k; for texts, leave --image-column out"
            )

    def has_tokenizer(self, base: Path) -> bool:
        return has_processor(base)

    def tokenizer(self, base: Path, *, trust_remote_code: bool = False) -> ImageProcessor:
        return load_processor(base, trust_remote_code=trust_remote_code)

    def read(self, config: Config, tokenizer: Any, cache: Path) -> Samples:
        return self.read_together(config, tokenizer, cache, ALONE)

    def read_together(self, config: Config, tokenizer: Any, cache: Path, crew: Crew) -> Samples:
        with crew.folder(cache) as work:
            crew.work("listing images", 0, lambda tick: _list(config.data, work) if crew.leads else None)
            found = crew.comm.each("data", lambda: _Found(work, config.data))
            bad = pixels.find_bad(found.images, found.digest, cache, crew)
            return crew.comm.each("data", lambda: _samples(found, config, tokenizer, bad))

    def sample(self, config: Config, tokenizer: Any, cache: Path, most: int) -> Sampled:
        with ALONE.folder(cache) as work:
            _list(config.data, work)
            train = _samples(_Found(work, config.data), config, tokenizer, []).train
        return Sampled(train, len(train), "all images, listed and not decoded")

    def assumed(self, config: Config, base: Path, count: int) -> Encoded:
        labels = torch.arange(count) % CLASSES_ASSUMED
        classes = tuple(map(str, range(CLASSES_ASSUMED)))
        places = torch.arange(count)
        return _pictured(labels, places, places, None, classes, assumed_processor(base), "")

    def head(self, train: Encoded, tokenizer: Any) -> dict[str, Any]:
        assert isinstance(train, Pictured)
        return head_settings(train.classes)

    def collate(self, data: Encoded, rows: Sequence[int], layout: Layout) -> Batch:
        """pixel_values (B, channels, height, width) and labels (B,)."""
        assert isinstance(data, Pictured)
        images = pixels.in_threads(partial(_pixels, data, layout.step), rows)
        return {"pixel_values": torch.stack(images), "labels": data.labels[torch.tensor(rows)]}

    def add_files(self, samples: Samples, tokenizer: Any, folder: Path) -> None:
        """The names of the classes, in the order of the head's outputs, and the image processor."""
        assert isinstance(samples.train, Pictured)
        save_classes(samples.train.classes, folder)
        tokenizer.apply.save_pretrained(folder)

    def next_steps(self, config: Config, output: Path, saved: Path) -> list[str]:
        files = " ".join(["loldu predict", shlex.quote(str(output)), "--images FILE ..."])
        load = "Load it with" if config.adapter.method == "full" else "Load the base with"
        more = (
            ""
            if config.adapter.method == "full"
            else " (num_labels=the number of classes), then peft.PeftModel.from_pretrained"
        )
        return [
            f"Name the classes of images: {files}",
            f"{load} transformers.AutoModelForImageClassification{more}; the classes are in {saved / CLASSES}.",
        ]


TASK: Task = LabelImages()


def _pixels(data: Pictured, step: int, row: int) -> Tensor:
    """(channels, height, width) of a sample, randomly changed if data.augment is set."""
    processor, place = data.processor, int(data.places[row])
    if data.images is None:
        return processor.whole(None)
    try:
        image = pixels.read_image(data.images, place, partial(pixels.decoded, mode=processor.mode))
    except BadRecord as error:  # it was read when the run began
        raise ValueError(f"{error}: it has changed since it was checked, or its disk fails") from None
    if data.augment is None:
        return processor.whole(image)
    image = pixels.changed(image, processor.size, processor.resample, data.augment, step, row)
    return processor.resized(image) if data.augment.least_area < 1 else processor.whole(image)


def _list(data: DataConfig, work: Path) -> None:
    """List the sources of a run into a folder, for `_Found`."""
    columns, plan = Columns(data.image_column or "", data.label_column), []
    skip = data.on_bad_record == "skip"
    sources = [data.data] if isinstance(data.data, str) else list(data.data)
    chosen: list[tuple[str, float, Split, Listing]] = []
    held: Split | None = None
    for text in sources:
        name, weight = source_of(text)
        found = splits_of(name, "--data", columns, skip=skip)
        split = choose_split(found, "--data")
        chosen.append(("train", weight, split, found[split]))
        apart = held_out_split(found)
        if data.eval_data is None and apart is not None and apart != split:
            chosen.append(("held out", 1.0, apart, found[apart]))
            held = apart
    if data.eval_data is not None:
        found = splits_of(data.eval_data, "--eval-data", columns, skip=skip)
        held = choose_split(found, "--eval-data")
        chosen.append(("held out", 1.0, held, found[held]))
    for number, (part, weight, split, listing) in enumerate(chosen):
        listing.save(work / f"listing-{number}")
        plan.append([part, weight, *split])
    (work / "sources.json").write_text(json.dumps(plan))


class _Found:
    """The listed images of a run, mapped into memory."""

    def __init__(self, work: Path, data: DataConfig):
        plan = json.loads((work / "sources.json").read_text())
        self.parts = [part for part, *_ in plan]
        self.weights = [weight for _, weight, *_ in plan]
        self.splits = [Split(*rest) for _, _, *rest in plan]
        self.listings = [load_listing(work / f"listing-{number}") for number in range(len(plan))]
        columns = Columns(data.image_column or "", data.label_column)
        self.images = Images(list(zip(self.splits, self.listings, strict=True)), columns)
        self.digest = self.digest_of(range(len(self.listings)))

    def of(self, part: str) -> list[int]:
        """The numbers of the splits that train, or are held out."""
        return [number for number, found in enumerate(self.parts) if found == part]

    def digest_of(self, numbers: Iterable[int]) -> str:
        """sha256 of the files of some splits."""
        digests = [self.listings[number].digest() for number in numbers]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def within(self, numbers: Sequence[int], places: np.ndarray) -> np.ndarray:
        """Places in all images as places in those of some splits alone."""
        sizes = [len(self.listings[number]) for number in numbers]
        starts = np.array([self.images.starts[number] for number in numbers])
        before = np.cumsum([0, *sizes[:-1]])
        split = np.searchsorted(starts, places, side="right") - 1
        return places - starts[split] + before[split]


def _samples(found: _Found, config: Config, processor: ImageProcessor, bad: pixels.Bad) -> Samples:
    """Training and held-out images, without those that are bad. Raises ValueError for labels that do not fit."""
    data, good = config.data, _good(found, bad, config.data)
    classes = in_rows_order(_classes(found, good), config.model.model)
    train_parts, held_parts = found.of("train"), found.of("held out")
    places = np.concatenate([good[number] for number in train_parts])
    sources = [
        (source_of(found.splits[number].source)._replace(weight=found.weights[number]), len(good[number]))
        for number in train_parts
    ]
    others = np.concatenate([good[number] for number in held_parts]) if held_parts else None
    train, held_out = records.chosen_places(
        sources, data.eval_records, None if others is None else len(others), fewer=data.fewer_eval_records
    )
    labels = _labels(found, classes)
    trained, tested = places[train], (places if others is None else others)[held_out]

    def make(places: np.ndarray, part: list[int], dropped: int = 0) -> Pictured:
        return _pictured(
            labels[places], torch.from_numpy(places), torch.from_numpy(found.within(part, places)), found.images,
            classes, processor, found.digest_of(part), dropped,
        )  # fmt: skip

    dropped = len(labels) - sum(map(len, good))
    augment = pixels.Augment(config.optimizer.seed, data.random_crop, data.random_flip)
    return Samples(
        train=replace(make(trained, train_parts, dropped), augment=augment),
        held_out=make(tested, held_parts or train_parts) if len(tested) else None,
    )


def _good(found: _Found, bad: pixels.Bad, data: DataConfig) -> list[np.ndarray]:
    """The places of each split's images that can be used. Raises ValueError for others, unless they are skipped."""
    kept = []
    for start, split, listing in zip(found.images.starts, found.splits, found.listings, strict=True):
        here = [fault for fault in bad if start <= fault[0] < start + len(listing)]
        faults = BadRecords(data.on_bad_record)
        for _, kind, text in here:
            faults.add(BadRecord(kind, text))
        left_out = np.array([place for place, *_ in here], dtype=np.int64)
        without = np.setdiff1d(listing.unlabelled + start, left_out)
        for place in without.tolist():
            faults.add(BadRecord("no label", f"{found.images.name(place)} has no label that can be used"))
        records.warn(faults.tell(f"the images of {split.source}", len(listing)))
        kept.append(np.setdiff1d(np.arange(start, start + len(listing)), [*left_out, *without]))
    return kept


def _classes(found: _Found, good: Sequence[np.ndarray]) -> Labels:
    """The classes of the training images. Raises ValueError if there is one only, or held-out images have others."""
    known: dict[str, None] = {}
    numbers = [not found.listings[number].classes for number in range(len(found.listings))]
    if any(numbers):
        if not all(numbers):
            raise ValueError("some sources have numbers for labels, others classes: give one kind of label")
        return ()
    used = [_used(found, number, good[number]) for number in range(len(good))]
    train = found.of("train")
    for number in train:
        known |= dict.fromkeys(found.listings[number].classes)
    trained = {name for number in train for name in used[number]}
    where = " ".join(found.splits[number].source for number in train)
    if len(trained) < 2:
        raise ValueError(
            f"--data {where}: all training images have the class {next(iter(trained))!r}: give data with at least two"
        )
    for number in found.of("held out"):
        if strange := sorted(used[number] - trained):
            split = found.splits[number]
            named = f"{split.source} ({split.split})" if split.split else split.source
            raise ValueError(
                f"the held-out images of {named} have {_some(strange)}, which no training image has; the training "
                f"images have {_some(list(known))}: give both the same classes"
            )
    if len(train) == 1:
        return tuple(known)
    return tuple(sorted(known, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))


def _used(found: _Found, number: int, places: np.ndarray) -> set[str]:
    listing, start = found.listings[number], found.images.starts[number]
    return {listing.classes[i] for i in np.unique(listing.labels[places - start])}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{'the class' if len(names) == 1 else 'the classes'} {', '.join(names[:8])}{more}"


def _labels(found: _Found, classes: Labels) -> Tensor:
    """The label of each place: an index into classes (-1: no training image has it), or a number."""
    if not classes:
        return torch.from_numpy(np.concatenate([listing.labels for listing in found.listings]).astype(np.float32))
    place = {name: number for number, name in enumerate(classes)}
    parts = []
    for listing in found.listings:
        mapped = np.array([place.get(name, -1) for name in listing.classes], dtype=np.int64)
        parts.append(mapped[listing.labels])
    return torch.from_numpy(np.concatenate(parts))


def _pictured(
    labels: Tensor, places: Tensor, numbers: Tensor, images: Images | None, classes: Labels, processor: ImageProcessor,
    source: str, dropped: int = 0,
) -> Pictured:  # fmt: skip
    count, patches = len(labels), processor.patches
    return Pictured(
        ids=torch.zeros(0, dtype=torch.int32),
        loss=torch.zeros(0, dtype=torch.bool),
        offsets=torch.arange(count + 1) * patches,
        targets=torch.ones(count, dtype=torch.int64),
        report=ImageReport(
            count + dropped, count, 0, dropped, count * patches, count, 0, classes=len(classes), size=processor.size
        ),
        classes=classes, labels=labels, places=places, numbers=numbers, images=images, processor=processor,
        augment=None, source=source,
    )  # fmt: skip
