"""The gradients that LoRA-SB's factors come from: a few samples through the plain base, before training.

Each rank takes the gradients of its own weights over all samples, a few weights at a time, so that nothing travels, the
sums are the same for any number of ranks, and the gradients of all weights never exist at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.config import LoRASBConfig
from adapters.layer import matrix_shape
from adapters.lora_sb import BYTES_AT_ONCE, InputMap, gradient_sums, groups_of
from launcher.config import Config
from launcher.data.batches import epoch_order, target_tokens
from launcher.data.encode import Encoded
from launcher.tasks.base import Layout, Task, on_device
from launcher.training.checkpoint import Checkpoint

MICRO_BATCH = 8  # where the run has none


def check_frozen(model: nn.Module, identity: dict[str, Any], resume: Checkpoint | None) -> None:
    """Put the digest of what LoRA-SB freezes into identity, for the checkpoints, which hold the cores alone.

    Raises ValueError where the cores of the checkpoint to go on from belong to other factors: a cache that was lost,
    and gradients that another kernel or device rounds another way.
    """
    sha = hashlib.sha256()
    maps = [(name, module) for name, module in model.named_modules() if isinstance(module, InputMap)]
    for name, each in maps:
        sha.update(name.encode())
        for frozen in (each.write, each.read):
            sha.update(frozen.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    if maps:
        identity["factors"] = sha.hexdigest()
    if resume is not None and identity.get("factors") != resume.meta["identity"].get("factors"):
        raise ValueError(
            f"the factors that {resume.folder} belongs to are gone from the cache, and made again they differ: bring "
            "that cache back (--cache), or begin again with --resume never"
        )


class FirstStep:
    """The summed gradients of the base's weights over the first samples of epoch 0; the base is loaded when needed.

    digest names all that they depend on. Call it with the modules still to come: it returns the first one's sum (m, n)
    and keeps those of as many others as fit into bytes_at_once.
    """

    def __init__(
        self,
        config: Config,
        adapter: LoRASBConfig,
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
        self.samples: list[int] = order[: adapter.samples].tolist()
        parts = {name: identity[name] for name in ("base", "dtype", "quantize", "data")}
        parts |= {"samples": self.samples, "micro_batch": self.micro_batch}
        self.digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        self.passes = 0  # over the samples, made so far
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
        """Let go of the base."""
        self._model = None
        self._sums = {}

    def _losses(self, model: Any) -> Iterator[Tensor]:
        """Of the samples, in micro-batches: together the mean loss per target token."""
        targets = target_tokens(self.train, self.samples)
        device = next(model.parameters()).device
        for start in range(0, len(self.samples), self.micro_batch):
            rows = self.samples[start : start + self.micro_batch]
            yield self.task.loss(model, on_device(self.task.collate(self.train, rows, self.layout), device), targets)
