"""A model with a classification head: loaded, and computed on batches of items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.data import pixels
from launcher.data.bad_records import BadRecord
from launcher.inference.adapter_folder import adapter_config, attach
from launcher.inference.items import Item
from launcher.inference.load import chosen_precision, filled
from launcher.inference.options import Classifying
from launcher.inference.predictions import Prediction
from launcher.inference.sources import Source, tokenizer_of
from launcher.models.files import context_length
from launcher.models.image_processor import ImageProcessor, load_processor
from launcher.models.quantize import check_base
from launcher.tasks.labels import Labels, head_settings, read_classes

MOST_TOKENS = 512  # of a text, if neither the run nor the model says


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A loaded model, what turns its input into tensors, and what its outputs mean."""

    model: Any
    classes: Labels  # empty: the model predicts a number
    tokenizer: Any = None
    processor: ImageProcessor | None = None
    max_length: int = 0


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
        processor, tokenizer = None, tokenizer_of(source)
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
    if config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{source.base_name} gives each text several labels ({config.problem_type}), which is not supported: give "
            "a model with one class for each text"
        )
    if config.num_labels == 1 or config.problem_type == "regression":
        return ()
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


@torch.no_grad()
def batches(classifier: Classifier, items: Sequence[Item], size: int) -> Iterator[tuple[list[Prediction], Tensor]]:
    """The predictions of each batch of items in order, and their logits (B, classes) or (B, 1)."""
    device = next(classifier.model.parameters()).device
    for start in range(0, len(items), size):
        chosen = items[start : start + size]
        made = inputs(classifier, chosen)
        short = truncated(classifier, chosen, made)
        batch = {name: each.to(device) for name, each in made.items()}
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
                    truncated=cut,
                )
                for item, row, share, cut in zip(chosen, logits, shares, short, strict=True)
            ],
            logits,
        )


def truncated(classifier: Classifier, items: Sequence[Item], made: Mapping[str, Tensor]) -> list[bool]:
    """Which of the items have more tokens than the model reads of them."""
    if classifier.processor is not None:
        return [False] * len(items)
    filled = made["attention_mask"].sum(-1) >= classifier.max_length
    return [
        bool(full) and len(classifier.tokenizer(*item.content(), verbose=False)["input_ids"]) > classifier.max_length
        for item, full in zip(items, filled, strict=True)
    ]


def inputs(classifier: Classifier, items: Sequence[Item]) -> Mapping[str, Tensor]:
    """The model's arguments for these items."""
    if classifier.processor is None:
        columns = [list(column) for column in zip(*(item.content() for item in items), strict=True)]
        made = classifier.tokenizer(
            *columns, truncation=True, max_length=classifier.max_length, padding=len(items) > 1, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        known = {"input_ids", "attention_mask", "token_type_ids"}
        return {name: each for name, each in made.items() if name in known}
    processor = classifier.processor

    def read(item: Item) -> Tensor:
        try:
            return processor.whole(pixels.decoded(item.content(), mode=processor.mode))
        except BadRecord as error:
            raise ValueError(f"{item.name} {error}") from None

    return {"pixel_values": torch.stack(list(map(read, items)))}
