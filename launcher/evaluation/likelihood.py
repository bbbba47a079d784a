"""Losses of samples, one by one, and answers: what the scores are made of. The samples are shared among processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from launcher.config import DataConfig
from launcher.data.batches import collate
from launcher.data.crew import Tick
from launcher.data.encode import encode
from launcher.data.encoded import Encoded
from launcher.data.joined import join
from launcher.data.microbatches import plan
from launcher.data.templates import Template
from launcher.data.tokens import stop_ids
from launcher.evaluation.choices import Choice, accuracy
from launcher.models.files import context_length
from launcher.models.generation import check_known
from launcher.models.head_loss import HeadLoss
from launcher.progress import silent
from launcher.tasks.base import Layout, on_device
from launcher.tasks.joining import layout_for_evaluation

MOST_ROWS, MOST_POSITIONS = 16, 2048  # of a forward pass


def encoded(records: Sequence[Any], tokenizer: Any, model: Any, template: Template, tick: Tick = silent) -> Encoded:
    """The records as samples, tokenised as for training, up to the model's context."""
    length = min(context_length(model), 1 << 20)
    return encode(records, tokenizer, DataConfig(max_length=max(length, 8), on_bad_record="skip"), template, tick)


class Scorer:
    """A model that gives the losses of samples. It stays as it is, but for its head, which computes losses."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.forward, self.tokenizer = model, HeadLoss(model), tokenizer
        self.layout: Layout | None = None  # of a batch; not known before the first samples

    @torch.no_grad()
    def sample_losses(self, data: Encoded, samples: Sequence[int], tick: Tick) -> list[tuple[float, int]]:
        """(sum of the losses, tokens with loss) of each of these samples, in order."""
        if not samples:
            return []
        check_known(self.model, self.tokenizer, int(data.ids.max()))
        if self.layout is None:
            self.layout = layout_for_evaluation(self.forward, data.distinct_ids())
        lengths, device = data.lengths, next(self.model.parameters()).device
        [parts] = plan([lengths[sample] for sample in samples], 1, MOST_ROWS, MOST_POSITIONS, flat=self.layout.flat)
        found: dict[int, tuple[float, int]] = {}
        for part in parts:
            rows = [samples[place] for place in part]
            batch = (
                join(data, rows) if self.layout.flat else collate(data, rows, pad_id=self.tokenizer.pad_token_id or 0)
            )
            losses = self.forward.token_losses(**on_device(self.forward.prepare(batch), device), use_cache=False)
            counts = data.targets[rows].tolist()  # the losses of one sample follow those of another
            for row, own in zip(rows, losses.double().split(counts), strict=True):
                found[row] = float(own.sum()), len(own)
            tick(len(found))
        return [found[sample] for sample in samples]


def choice_scores(
    scorer: Scorer, tokenizer: Any, template: Template, questions: Sequence[Choice], mine: Sequence[int], tick: Tick
) -> list[tuple[float, float] | None]:
    """Accuracy of each of my questions, plain and by length; None for one that is longer than the context.

    A choice's likelihood is that of its own tokens: those which end an answer in training do not count.
    """
    stop, longest = stop_ids(tokenizer), min(context_length(scorer.model), 1 << 20)
    found: list[tuple[float, float] | None] = []
    for place in mine:
        question = questions[place]
        whole = encode(question.records(), tokenizer, DataConfig(max_length=1 << 20), template)
        if max(whole.lengths) > longest or len(whole) != len(question.choices):
            found.append(None)
            continue
        data = without_ends(whole, stop)
        likelihoods = [-loss for loss, _ in scorer.sample_losses(data, range(len(data)), silent)]
        if not all(map(math.isfinite, likelihoods)):
            raise ValueError(
                f"the likelihoods of the choices of {question.question['instruction']!r:.60} are NaN or infinite, so "
                "none is the likeliest: give --dtype float32, or check the model's files"
            )
        found.append(accuracy(question, likelihoods))
        tick(len(found))
    return found


def without_ends(data: Encoded, stop: Any) -> Encoded:
    """The samples without loss on the tokens at their ends that only end an answer."""
    loss, targets = data.loss.clone(), data.targets.clone()
    for sample in range(len(data)):
        at = int(data.offsets[sample + 1]) - 1
        while at > int(data.offsets[sample]) and (not loss[at] or int(data.ids[at]) in stop) and targets[sample] > 1:
            targets[sample] -= int(loss[at])
            loss[at] = False
            at -= 1
    return replace(data, loss=loss, targets=targets, known_digest=None)
