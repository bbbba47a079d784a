"""Gradients of the base over a few samples, before training, for methods whose factors come from them.

Each rank computes the gradients of its own weights over all samples, a few weights at a time. So nothing travels
between ranks, the sums are the same for any number of ranks, and the gradients of all weights never exist at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.gradients import BYTES_AT_ONCE, gradient_sums, groups_of
from adapters.shapes import matrix_shape
from launcher.config import Config
from launcher.data.batches import epoch_order, target_tokens
from launcher.data.encoded import Encoded
from launcher.tasks.base import Layout, Task, on_device

MICRO_BATCH = 8  # if the run sets none


class SampleGradients:
    """The summed gradients of the base's weights over the first samples of epoch 0; the base is loaded when needed.

    digest identifies all that they depend on. Call it with the modules that remain: it returns the first one's sum (m,
    n) and keeps those of as many others as fit into bytes_at_once.
    """

    def __init__(
        self,
        config: Config,
        samples: int,
        task: Task,
        train: Encoded,
        identity: Mapping[str, Any],
        load: Callable[[], nn.Module],
        pad_id: int,
        bytes_at_once: int = BYTES_AT_ONCE,
    ):
        self.task, self.train, self.load, self.bytes_at_once = task, train, load, bytes_at_once
        self.layout = Layout(pad_id=pad_id)
        self.micro_batch = config.optimizer.micro_batch_size or MICRO_BATCH
        order = epoch_order(config.optimizer.seed, 0, len(train))
        self.samples: list[int] = order[:samples].tolist()
        parts = {name: identity[name] for name in ("base", "dtype", "quantize", "data")}
        parts |= {"samples": self.samples, "micro_batch": self.micro_batch}
        self.digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        self.passes = 0  # over the samples, so far
        self._model: nn.Module | None = None
        self._sums: dict[str, Tensor] = {}

    def __call__(self, modules: Sequence[str]) -> Tensor:
        if modules[0] not in self._sums:
            if self._model is None:
                self._model = self.load().eval().requires_grad_(False)
            layers = {name: self._model.get_submodule(name) for name in modules}
            shapes = {name: matrix_shape(layer, name) for name, layer in layers.items()}
            group = next(groups_of(shapes, self.bytes_at_once))
            with torch.enable_grad(), gradient_sums({name: layers[name] for name in group}) as self._sums:
                for loss in self._losses(self._model):
                    loss.backward()
            self.passes += 1
        return self._sums.pop(modules[0])

    def free(self) -> None:
        """Release the base and the sums."""
        self._model = None
        self._sums = {}

    def _losses(self, model: Any) -> Iterator[Tensor]:
        """The losses of the samples' micro-batches; together they are the mean loss per target token."""
        targets = target_tokens(self.train, self.samples)
        device = next(model.parameters()).device
        for start in range(0, len(self.samples), self.micro_batch):
            rows = self.samples[start : start + self.micro_batch]
            yield self.task.loss(model, on_device(self.task.collate(self.train, rows, self.layout), device), targets)
