"""`loldu predict`: the classes of texts or images, or the numbers that a model predicts for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TextIO

import torch
from rich.console import Console

from launcher.inference.classifier import batches, load_classifier
from launcher.inference.items import check_labels, read_items
from launcher.inference.options import Classifying
from launcher.inference.predictions import Prediction, as_json, as_text, counted, summary
from launcher.inference.sources import find
from launcher.models.image_processor import is_image_model, model_type
from launcher.progress import Bars
from launcher.tasks.labels import SUMS
from launcher.text import printable


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
    items = read_items(source, how, pictures=pictures, text=text, images=images, data=data, say=_note)
    items = items[:limit] if limit else items
    how = replace(how, batch_size=min(how.batch_size, len(items)))  # one alone needs no padding
    classifier = load_classifier(source, how, pictures=pictures)
    check_labels(items, classifier.classes, pictures=pictures)
    sums, found = torch.zeros(SUMS, dtype=torch.float64), []
    with Bars(Console(stderr=True, quiet=len(items) <= how.batch_size)).bar("classifying", len(items)) as show:
        for predictions, logits in batches(classifier, items, how.batch_size):
            for each in predictions:
                found.append(each)
                line = as_json(each, len(found) - 1, data is not None, bool(images)) if json else as_text(each, data)
                print(line, file=out, flush=True)
            sums += counted(predictions, logits, classifier.classes)
            show(len(found))
    if cut := sum(each.truncated for each in found):
        most = classifier.max_length
        _note(f"{cut} of {len(found)} texts have more than {most} tokens (--max-length): the rest was not read")
    if sums[-1]:
        _note(summary(sums, classifier.classes, len(found)))
    return found


def _note(text: str) -> None:
    """Print to standard error: standard output carries only predictions."""
    print(printable(text), file=sys.stderr, flush=True)


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
