"""Whether a model computes the same for samples that stand in one row as for each alone: see `launcher.data.joined`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from launcher.data.batches import collate
from launcher.data.joined import join, shared_beginning
from launcher.models import joined
from launcher.models.files import context_length
from launcher.models.head_loss import HeadLoss
from launcher.tasks.base import Layout, on_device

PARTS = [4, 6, 3, 5]  # tokens of a beginning and of three samples behind it
# Allowed difference of outputs as a share of their norm. Attention across samples moves them by 0.01 to 1 on random
# models, a recurrent state by 1e-3 and more; rounding by 1e-6 in float32.
FLOOR, COARSE = {torch.float32: 3e-5, torch.float64: 1e-9}, 5e-3
WINDOW = re.compile(r"window|chunk|top_?k$")


def limits(settings: Any, longest: int) -> list[int]:
    """Windows and chunks below `longest` tokens that a model's config names, in its sub-configs as well."""
    return sorted(
        {value for name, value in _numbers(settings.to_dict()) if WINDOW.search(name) and 1 < value < longest}
    )


@torch.no_grad()
def check_joined(model: Any, forward: Callable[..., Any], ids: Tensor, longest: int, *, training: bool = True) -> str:
    """Why samples cannot stand in one row behind the beginning they share; nothing if they can. Called by all ranks.

    forward computes the model's output. ids are valid tokens on the model's device. training: the rows are for training
    and for evaluation; otherwise for evaluation alone, where nothing is dropped.
    """
    settings = model.config.get_text_config()
    if near := limits(model.config, longest):
        return f"this model looks {near[0]} tokens back"
    if getattr(settings, "output_router_logits", False):
        return "the loss that balances experts counts each token"
    if training and any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return "dropout is drawn for each sample"
    drawn = ids[torch.arange(sum(PARTS)) % len(ids)].cpu()
    beginning, *rests = drawn.split(PARTS)
    samples = [torch.cat([beginning, rest]) for rest in rests]
    offsets = torch.tensor([0, *itertools.accumulate(map(len, samples))])
    last = torch.zeros(int(offsets[-1]), dtype=torch.bool)
    last[offsets[1:] - 1] = True
    known: Any = SimpleNamespace(ids=torch.cat(samples).int(), loss=last, offsets=offsets)
    rows, one_row = range(len(samples)), join(known, range(len(samples)))
    shared = shared_beginning(samples, list(last.split([len(sample) for sample in samples])))
    others = slice(len(samples[0]), len(samples[0]) + len(samples[1]) - shared)  # the second sample's own places
    changed = one_row | {"input_ids": one_row["input_ids"].clone()}
    changed["input_ids"][0, others] = one_row["input_ids"][0, others].flip(0)

    def outputs(batch: dict[str, Any]) -> Tensor:
        without = {name: value for name, value in batch.items() if name != "labels"}
        return forward(**on_device(without, ids.device), use_cache=False).logits.float()

    def in_one_row(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([parts[0][:shared], *(part[shared:] for part in parts)])

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / other.norm())

    dtype, before = next(model.parameters()).dtype, model.training
    narrow, floor = dtype not in FLOOR, FLOOR.get(dtype, COARSE)
    model.train(training)  # some models build another mask there
    try:
        together, besides = outputs(one_row)[0], outputs(changed)[0]
        model.eval()
        evaluated = outputs(one_row)[0] if training else together
        padded: Any = outputs(collate(known, rows, pad_id=0)) if narrow else []
        alone = in_one_row([outputs(collate(known, [row], pad_id=0))[0] for row in rows])
    except Exception as error:  # code of a model that expects another mask may raise any error
        return f"this model does not take them so ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    finally:
        model.train(before)
    cut = [part[: len(sample)] for part, sample in zip(padded, samples, strict=False)]
    rounding = apart(in_one_row(cut), alone) if narrow else 0.0  # float32 is compared with the floor
    # Rounding differs with the shapes of products, not with the tokens of other samples: this sees what a few per mille
    # of bfloat16 would hide.
    leak = max(apart(besides[part], together[part]) for part in (slice(others.start), slice(others.stop, None)))
    if leak > max(rounding, floor):
        return f"in this model one sample's outputs change by {leak:.2g} with another's tokens"
    if (off := max(apart(found, alone) for found in (together, evaluated))) > max(5 * rounding, floor):
        return f"this model's outputs differ by {off:.2g} if samples stand in one row, by {rounding:.2g} by rounding"
    return ""


def layout_for_evaluation(forward: HeadLoss, ids: Tensor) -> Layout:
    """How batches are laid out for a model that is not trained: samples in one row on CPUs, under SDPA, if the model
    gives the same for them; otherwise padded rows. ids are tokens of the samples."""
    model = forward.model
    if forward.prompt or next(model.parameters()).device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return Layout()
    joined.register()
    longest = min(context_length(model), 1 << 20)
    return Layout() if check_joined(model, model, ids, longest, training=False) else Layout(attention="joined")


def _numbers(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value
