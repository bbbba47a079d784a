"""Labels of texts or images: the head's settings, and metrics from sums that ranks can add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SUMS = 7  # numbers that `moments` counts
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
