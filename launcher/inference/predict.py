"""`loldu predict`: the classes of texts or images, or the numbers that a model predicts for them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor

from launcher.data import pixels, records
from launcher.data.bad_records import BadRecord
from launcher.data.image_files import Columns, Images, choose_split, held_out_split, splits_of
from launcher.files import open_regular
from launcher.inference.options import Classifying
from launcher.inference.sources import Source, adapter_config, attach, chosen_precision, filled, find
from launcher.models.files import context_length, load_tokenizer
from launcher.models.image_processor import ImageProcessor, is_image_model, load_processor, model_type
from launcher.models.quantize import check_base
from launcher.progress import Bars
from launcher.tasks.labels import SUMS, Labels, head_settings, metrics, moments, read_classes
from launcher.text import json_line, printable

MOST_TOKENS = 512  # of a text, if neither the run nor the model says


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A loaded model, what turns its input into tensors, and what its outputs mean."""

    model: Any
    classes: Labels  # empty: the model predicts a number
    tokenizer: Any = None
    processor: ImageProcessor | None = None
    max_length: int = 0


@dataclass(frozen=True, kw_only=True)
class Item:
    """One text or image to classify. `content` reads it, so that images are not all in memory."""

    name: str
    content: Callable[[], Any]  # texts, or a decoded image
    label: Any = None  # as the record has it; None if it has none


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one item."""

    item: Item
    value: float | str  # a number, or the likeliest class
    probabilities: dict[str, float]

    @property
    def right(self) -> bool | None:
        return None if self.item.label is None or not self.probabilities else str(self.item.label) == self.value


def predict(
    model: str,
    how: Classifying = Classifying(),  # noqa: B008 (frozen)
    *,
    text: Sequence[str] = (),
    images: Sequence[str] = (),
    data: str | None = None,
    limit: int = 0,
    json: bool = False,
    out: TextIO | None = None,
) -> list[Prediction]:
    """`loldu predict` (commands.py) describes the arguments. Predictions go to out, everything else to stderr."""
    out = out or sys.stdout
    check_options(how, text, images, data, limit)
    source = find(model, adapter=how.adapter, base=how.base, trust_remote_code=how.trust_remote_code, classifies=True)
    pictures = is_image_model(model_type(source.base))
    items = read_items(source, how, pictures=pictures, text=text, images=images, data=data)
    items = items[:limit] if limit else items
    classifier = load_classifier(source, how, pictures=pictures)
    check_labels(items, classifier.classes)
    sums, found = torch.zeros(SUMS, dtype=torch.float64), []
    with Bars(Console(stderr=True, quiet=len(items) <= how.batch_size)).bar("classifying", len(items)) as show:
        for predictions, logits in batches(classifier, items, how.batch_size):
            for each in predictions:
                found.append(each)
                line = as_json(each, len(found) - 1, data is not None, bool(images)) if json else as_text(each, data)
                print(line, file=out, flush=True)
            sums += counted(predictions, logits, classifier.classes)
            show(len(found))
    if sums[-1]:
        print(summary(sums, classifier.classes, len(found)), file=sys.stderr, flush=True)
    return found


def check_options(how: Classifying, text: Sequence[str], images: Sequence[str], data: str | None, limit: int) -> None:
    """Raises ValueError for options that do not go together. Touches no file."""
    given = {"--text": bool(text), "--images": bool(images), "--data": data is not None}
    named = [name for name, there in given.items() if there]
    if len(named) != 1:
        what = "there is nothing to classify" if not named else f"{' and '.join(named)} cannot be combined"
        raise ValueError(f"{what}: give one of --text TEXT, --images FILE ... and --data FILE")
    if limit < 0 or (limit and data is None):
        raise ValueError(f"--limit {limit} counts the records of --data FILE, from 0 (all): give both, or leave it out")
    if how.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {how.batch_size}")
    if how.max_length < 0:
        raise ValueError(f"--max-length must be at least 0 (the run's), got {how.max_length}")


def read_items(
    source: Source, how: Classifying, *, pictures: bool, text: Sequence[str], images: Sequence[str], data: str | None
) -> list[Item]:
    """The items that the options name. Raises ValueError if the model reads other ones."""
    run = source.data or {}
    columns = how.columns or tuple(run.get("text_columns") or ())
    label = how.label_column or run.get("label_column") or "label"
    if text or images:
        if bool(images) != pictures:
            reads, option = ("images", "--images FILE ...") if pictures else ("texts", "--text TEXT")
            raise ValueError(f"{source.base_name} classifies {reads}: give {option}")
        if text and len(text) != max(len(columns), 1) and (columns or len(text) > 2):
            raise ValueError(f"--text takes {max(len(columns), 1)} for this model, got {len(text)}")
        return [Item(name=" | ".join(text), content=lambda: list(text))] if text else list(map(_image, images))
    assert data is not None
    if len(how.columns) > (1 if pictures else 2):
        raise ValueError(f"--columns {' '.join(how.columns)}: give one column, or two with pairs of texts")
    if pictures:
        return _listed(data, Columns(how.columns[0] if how.columns else run.get("image_column") or "image", label))
    if not columns:
        raise ValueError(f"{source.base_name} is in no run folder that names them: give --columns COLUMN")
    return _rows(data, columns, label)


def _image(file: str) -> Item:
    def content() -> Any:
        try:
            with open_regular(Path(file).expanduser()) as opened:
                return opened.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"--images {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None

    return Item(name=file, content=content)


def _listed(data: str, columns: Columns) -> list[Item]:
    """The images of the held-out split of a source, or of its only one."""
    found = splits_of(data, "--data", columns)
    split = held_out_split(found) or choose_split(found, "--data")
    listing = found[split]
    read = Images([(split, listing)], columns)
    names = [listing.classes[label] if listing.classes else float(label) for label in listing.labels.tolist()]
    return [
        Item(name=read.name(place), content=lambda place=place: read.read(place), label=names[place])  # type: ignore[misc]
        for place in range(len(listing))
    ]


def _rows(data: str, columns: Sequence[str], label: str) -> list[Item]:
    items = []
    for index, row in enumerate(records.load_rows(data, "--data")):
        where = f"record {index} of {data}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}, expected an object with {', '.join(columns)}")
        texts = [records.text_of(row, column, where) for column in columns]
        items.append(Item(name=" | ".join(texts), content=lambda texts=texts: texts, label=row.get(label)))  # type: ignore[misc]
    if not items:
        raise ValueError(f"--data {data} holds no records")
    return items


def load_classifier(source: Source, how: Classifying, *, pictures: bool) -> Classifier:
    """The model with its head. Raises ValueError if the head is neither in the adapter nor in the base's files."""
    trusted = source.trust_remote_code
    classes = classes_of(source)
    kind = chosen_precision(source, how.quantize)
    if kind != "none":
        check_base(source.base, kind)
    adapter = None if source.adapter is None else adapter_config(source.adapter, classifies=True)
    if pictures:
        processor = load_processor(source.base, trust_remote_code=trusted)
        tokenizer, length = None, 0
    else:
        processor, tokenizer = None, load_tokenizer(source.tokenizer, trust_remote_code=trusted)
        if tokenizer.pad_token_id is None and how.batch_size > 1:
            raise ValueError(f"the tokenizer of {source.tokenizer} has no padding token: give --batch-size 1")
        length = how.max_length or (source.data or {}).get("max_length") or 0
    saved = tuple(getattr(adapter, "modules_to_save", None) or ())
    pad = None if tokenizer is None else tokenizer.pad_token_id
    base = filled(source, kind, adapter, dtype=how.dtype, device=how.device, head=head_settings(classes, pad))
    if missing := [name for name in base.drawn_head if not any(part in name.split(".") for part in saved)]:
        raise ValueError(
            f"{source.base_name} has no classification head ({missing[0]} is not in its files): give a run or an "
            "adapter that trained one"
        )
    model = base if source.adapter is None else attach(base, source.adapter, classifies=True)
    if how.max_length and how.max_length > context_length(base):
        raise ValueError(f"--max-length {how.max_length} is more than this model's context of {context_length(base)}")
    length = length or min(context_length(base), MOST_TOKENS)
    return Classifier(model=model.eval(), classes=classes, tokenizer=tokenizer, processor=processor, max_length=length)


def classes_of(source: Source) -> Labels:
    """The classes in the order of the head's outputs; empty for a model that predicts numbers."""
    saved = read_classes(source.adapter or source.base)
    if saved is not None:
        return saved
    if source.adapter is not None:
        raise ValueError(
            f"adapter {source.adapter} has no classes.json, so the names of its classes are not known: write one, a "
            "JSON list of the names in the order of the head's outputs ([] for a model that predicts numbers)"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.base, trust_remote_code=source.trust_remote_code)
    if config.num_labels == 1 or config.problem_type == "regression":
        return ()
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def check_labels(items: Sequence[Item], classes: Labels) -> None:
    """Raises ValueError naming the first label that the model cannot give: no class of its own, or no number."""
    for item in items:
        if item.label is None or (str(item.label) in classes if classes else _is_number(item.label)):
            continue
        knows = f"the model knows: {', '.join(classes)}" if classes else "the model predicts numbers"
        raise ValueError(
            f"{printable(item.name):.80} has the label {item.label!r:.80}, {printable(knows)}. Give another "
            "--label-column (one that does not exist: without labels)"
        )


def _is_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError, OverflowError):
        return False


@torch.no_grad()
def batches(classifier: Classifier, items: Sequence[Item], size: int) -> Iterator[tuple[list[Prediction], Tensor]]:
    """The predictions of each batch of items in order, and their logits (B, classes) or (B, 1)."""
    device = next(classifier.model.parameters()).device
    for start in range(0, len(items), size):
        chosen = items[start : start + size]
        batch = {name: each.to(device) for name, each in inputs(classifier, chosen).items()}
        logits = classifier.model(**batch).logits.float().cpu()
        if not torch.isfinite(logits).all():
            raise ValueError("the logits are NaN or infinite: check the files, or give --dtype float32")
        shares = logits.softmax(-1).tolist() if classifier.classes else [[]] * len(chosen)
        yield (
            [
                Prediction(
                    item=item,
                    value=classifier.classes[int(row.argmax())] if classifier.classes else float(row[0]),
                    probabilities=dict(zip(classifier.classes, share, strict=True)),
                )
                for item, row, share in zip(chosen, logits, shares, strict=True)
            ],
            logits,
        )


def inputs(classifier: Classifier, items: Sequence[Item]) -> Mapping[str, Tensor]:
    """The model's arguments for these items."""
    if classifier.processor is None:
        columns = [list(column) for column in zip(*(item.content() for item in items), strict=True)]
        made = classifier.tokenizer(
            *columns, truncation=True, max_length=classifier.max_length, padding=len(items) > 1, return_tensors="pt"
        )
        known = {"input_ids", "attention_mask", "token_type_ids"}
        return {name: each for name, each in made.items() if name in known}
    processor = classifier.processor

    def read(item: Item) -> Tensor:
        try:
            return processor.whole(pixels.decoded(item.content(), mode=processor.mode))
        except BadRecord as error:
            raise ValueError(f"{item.name} {error}") from None

    return {"pixel_values": torch.stack(list(map(read, items)))}


def counted(predictions: Sequence[Prediction], logits: Tensor, classes: Labels) -> Tensor:
    """Sums (SUMS,) over the items that have a label, for `metrics`."""
    labelled = [place for place, each in enumerate(predictions) if each.item.label is not None]
    if not labelled:
        return torch.zeros(SUMS, dtype=torch.float64)
    given = [predictions[place].item.label for place in labelled]
    labels = [classes.index(str(label)) for label in given] if classes else [float(label) for label in given]
    return moments(logits[labelled], torch.tensor(labels))


def summary(sums: Tensor, classes: Labels, count: int) -> str:
    right, labelled = int(sums[0]), int(sums[-1])
    found = metrics(sums, classes)
    without = f"; {count - labelled} without a label" if labelled < count else ""
    if not classes:
        return f"correlation {found['correlation']:.4f} over {labelled}{without}"
    return f"{right} of {labelled} right ({right / labelled:.1%}){without}"


def as_text(each: Prediction, data: str | None) -> str:
    shown = f"{each.value:.4f}" if isinstance(each.value, float) else printable(each.value)
    if each.probabilities:
        shown += f" ({each.probabilities[str(each.value)]:.1%})"
    if data is not None and each.item.label is not None:
        shown += f", expected {printable(str(each.item.label))}"
    name = printable(each.item.name)
    return f"{name if len(name) <= 100 else name[:97] + '...'}: {shown}"


def as_json(each: Prediction, index: int, counts: bool, named: bool) -> str:
    line: dict[str, Any] = {"index": index} if counts else {}
    if named:
        line["image"] = each.item.name
    if each.probabilities:
        line |= {"class": each.value, "probabilities": {k: round(v, 6) for k, v in each.probabilities.items()}}
    else:
        line["value"] = each.value
    if each.item.label is not None:
        line["expected"] = each.item.label
        if each.probabilities:
            line["match"] = each.right
    return json_line(line)
