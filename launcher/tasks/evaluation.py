"""Work on held-out samples, shared among processes, with sums that are equal on all of them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from launcher.config import Config
from launcher.data.encoded import Encoded
from launcher.data.microbatches import mean_positions, plan
from launcher.progress import silent
from launcher.tasks.base import Batch, Layout, Samples, Task, on_device, padding_id

T = TypeVar("T")


class Interrupted(Exception):
    """A rank was asked to stop, and the evaluation was left unfinished on all of them."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model in eval mode, the samples, and the processes that share the work; by default one process."""

    config: Config
    samples: Samples
    model: Any
    forward: Callable[..., Any]  # the model itself, or its engine's forward
    tokenizer: Any
    device: torch.device
    layout: Layout = field(default_factory=Layout)  # of a batch, as the model was found to compute it
    rank: int = 0
    world_size: int = 1
    gathers: bool = False  # a forward pass is a collective: every rank must make the same number of them
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor  # a tensor's sum over all ranks
    interrupted: Callable[[], bool] = lambda: False  # whether any rank was asked to stop; called by all ranks
    # bar(what, total) shows the progress: `Bars.bar`
    bar: Callable[..., AbstractContextManager[Callable[..., None]]] = lambda *_, **__: nullcontext(silent)

    @property
    def held_out(self) -> Encoded:
        assert self.samples.held_out is not None
        return self.samples.held_out

    @property
    def batch_size(self) -> int:
        """Most samples in one forward pass of a process."""
        return self.config.optimizer.micro_batch_size or 16

    @property
    def micro_batches(self) -> list[list[int]]:
        """All held-out samples in micro-batches of similar length, those of most positions first."""
        lengths = self.held_out.lengths
        most_positions = self.config.optimizer.micro_batch_tokens or mean_positions(lengths, self.batch_size)
        [parts] = plan(lengths, 1, self.batch_size, most_positions, flat=self.layout.flat)
        return parts

    def batch(self, task: Task, rows: Sequence[int]) -> Batch:
        """These held-out samples, unpacked, on the device."""
        layout = replace(self.layout, pad_id=padding_id(self.tokenizer))
        batch = task.collate(self.held_out, rows, layout)
        prepare = getattr(self.forward, "prepare", None)  # of HeadLoss
        return on_device(prepare(batch) if prepare else batch, self.device)

    def total(
        self,
        items: Sequence[T],
        measure: Callable[[Sequence[T]], tuple[Tensor, ...]],
        *,
        size: int,
        one_pass: bool = True,
    ) -> list[Tensor]:
        """The sums over all items of the tensors that measure returns for up to `size` of them. Called by all ranks.

        Before: each rank has all items. After: every rank has the same sums. one_pass says that measure makes one
        forward pass, however many items it gets. A rank without items in the last round then measures the first item
        and discards the result, so that collectives match. Otherwise, if forward passes are collectives, every rank
        measures all items. Raises Interrupted on all ranks if one was asked to stop.
        """
        shares = self.world_size if one_pass or not self.gathers else 1
        sums: list[Tensor] = []
        with self.bar("evaluating", len(items), brief=True) as show:
            for start in range(0, len(items), size * shares):
                if self.interrupted():
                    raise Interrupted
                part = items[start : start + size * shares][self.rank % shares :: shares]
                with torch.no_grad():
                    found = measure(part or items[:1])
                found = found if part else tuple(map(torch.zeros_like, found))
                sums = [before + more for before, more in zip(sums, found, strict=True)] if sums else list(found)
                show(min(start + size * shares, len(items)))
        return [self.add_up(each) / (self.world_size // shares) for each in sums]
