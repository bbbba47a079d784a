"""Labels of texts or images: the head's settings, and metrics from sums that ranks can add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.files import read_json

CLASSES = "classes.json"  # in the folder of an adapter or model
SUMS = 7  # numbers that `moments` counts
CLASSES_ASSUMED = 2  # for a plan without data
Labels = tuple[str, ...]  # the classes, in the order of the head's outputs; empty for regression


def moments(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums (SUMS,) over samples from which `metrics` follow, so that ranks can add theirs up. float64."""
    predicted = logits.float().argmax(-1) if logits.shape[-1] > 1 else logits[:, 0]
    p, t = predicted.double(), labels.double()
    right = (predicted == labels).double().sum()
    return torch.stack([right, p.sum(), t.sum(), p @ p, t @ t, p @ t, torch.ones_like(p).sum()])


def metrics(sums: Tensor, labels: Labels) -> dict[str, float]:
    """accuracy, for classes; correlation, for two classes (then Matthews' coefficient) and numbers (Pearson's)."""
    right, p, t, pp, tt, pt, n = sums.tolist()
    result = {"accuracy": right / n} if labels else {}
    if len(labels) in (0, 2):
        spread = max((n * pp - p * p) * (n * tt - t * t), 0.0) ** 0.5
        result["correlation"] = (n * pt - p * t) / spread if spread else 0.0  # all predictions are equal
    return result


def head_settings(labels: Labels, pad_id: int | None = None) -> dict[str, Any]:
    """The head's settings in the model's config. A decoder's head reads the last token before the padding (pad_id)."""
    padding = {} if pad_id is None else {"pad_token_id": pad_id}
    if not labels:
        return {"num_labels": 1, "problem_type": "regression", **padding}
    names = dict(enumerate(labels))
    ids = {name: number for number, name in names.items()}
    kind = "single_label_classification"
    return {"id2label": names, "label2id": ids, "problem_type": kind, **padding}


def save_classes(labels: Labels, folder: Path) -> None:
    """Write the names of the classes, in the order of the head's outputs, beside an adapter or model."""
    (folder / CLASSES).write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")


def read_classes(folder: Path) -> Labels | None:
    """What `save_classes` wrote; None if there is no such file. Raises ValueError if it is damaged."""
    file = folder / CLASSES
    if not file.exists():
        return None
    try:
        names = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): copy it again") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) == 1:
        raise ValueError(f"{file} holds no list of class names: copy it again")
    return tuple(names)
