"""Losses of samples, one by one, and answers: what the scores are made of. The samples are shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from launcher.config import DataConfig
from launcher.data.batches import NO_LOSS, collate
from launcher.data.encode import Encoded, encode, stop_ids
from launcher.data.microbatches import plan
from launcher.data.templates import Template
from launcher.evaluation.choices import Choice, accuracy
from launcher.models.files import context_length

MOST_ROWS, MOST_POSITIONS = 16, 2048  # of a forward pass
Tick = Callable[[int], None]


def encoded(records: Sequence[Any], tokenizer: Any, model: Any, template: Template) -> Encoded:
    """The records as samples, tokenised as for training, up to the model's context."""
    length = min(context_length(model), 1 << 20)
    return encode(records, tokenizer, DataConfig(max_length=max(length, 8), on_bad_record="skip"), template)


@torch.no_grad()
def sample_losses(
    model: Any, data: Encoded, samples: Sequence[int], pad_id: int, tick: Tick
) -> list[tuple[float, int]]:
    """(sum of the losses, tokens with loss) of each of these samples, in order."""
    found: dict[int, tuple[float, int]] = {}
    lengths = data.lengths
    device = next(model.parameters()).device
    if not samples:
        return []
    [parts] = plan([lengths[sample] for sample in samples], 1, MOST_ROWS, MOST_POSITIONS)
    for part in parts:
        rows = [samples[place] for place in part]
        batch = {name: each.to(device) for name, each in collate(data, rows, pad_id=pad_id).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        chosen = labels != NO_LOSS
        losses = torch.zeros(labels.shape, dtype=torch.float64, device=device)
        losses[chosen] = F.cross_entropy(logits[chosen].float(), labels[chosen], reduction="none").double()
        for row, loss, count in zip(rows, losses.sum(1).tolist(), chosen.sum(1).tolist(), strict=True):
            found[row] = loss, count
        tick(len(found))
    return [found[sample] for sample in samples]


def choice_scores(
    model: Any, tokenizer: Any, template: Template, questions: Sequence[Choice], mine: Sequence[int], tick: Tick
) -> list[tuple[float, float] | None]:
    """Accuracy of each of my questions, plain and by length; None for one that is longer than the context.

    A choice's likelihood is that of its own tokens: those which end an answer in training do not count.
    """
    pad_id, stop = tokenizer.pad_token_id or 0, stop_ids(tokenizer)
    longest = min(context_length(model), 1 << 20)
    found: list[tuple[float, float] | None] = []
    for place in mine:
        question = questions[place]
        whole = encode(question.records(), tokenizer, DataConfig(max_length=1 << 20), template)
        if max(whole.lengths) > longest or len(whole) != len(question.choices):
            found.append(None)
            continue
        data = without_ends(whole, stop)
        losses = sample_losses(model, data, range(len(data)), pad_id, lambda done: None)
        found.append(accuracy(question, [-loss for loss, _ in losses]))
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
