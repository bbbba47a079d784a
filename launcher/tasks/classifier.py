"""What classifiers of texts and of images share: the model's own head and loss, and the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from launcher.tasks.base import Batch, Task, by_length
from launcher.tasks.evaluation import Evaluation
from launcher.tasks.labels import metrics, moments


class Classifier(Task, Protocol):
    """Samples with one label each, of a class or a number. The samples know their `classes`."""

    labels: bool = True

    def loss(self, forward: Callable[..., Any], batch: Batch, targets: int) -> Tensor:
        return forward(**batch).loss * (len(batch["labels"]) / targets)  # the model's loss is the mean of the batch

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        held_out: Any = evaluation.held_out

        def measure(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            batch = evaluation.batch(self, rows)
            output = evaluation.forward(**batch)
            return output.loss * len(rows), moments(output.logits, batch["labels"])

        loss, sums = evaluation.total(by_length(held_out), measure, size=evaluation.batch_size)
        return {"eval_loss": float(loss) / len(held_out), **metrics(sums, held_out.classes)}
