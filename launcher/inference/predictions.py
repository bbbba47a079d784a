"""What a classifier predicts for an item: as text, as JSON, and counted against its label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from launcher.inference.items import Item
from launcher.tasks.labels import SUMS, Labels, metrics, moments
from launcher.text import json_line, printable


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one item."""

    item: Item
    value: float | str  # a number, or the likeliest class
    probabilities: dict[str, float]
    truncated: bool = False  # only the beginning of the text was read

    @property
    def right(self) -> bool | None:
        return None if self.item.label is None or not self.probabilities else str(self.item.label) == self.value


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
    if each.truncated:
        line["truncated"] = True
    if each.item.label is not None:
        line["expected"] = each.item.label
        if each.probabilities:
            line["match"] = each.right
    return json_line(line)
