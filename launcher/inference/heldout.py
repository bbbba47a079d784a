"""Loss on held-out records, for commands that report the accuracy they cost."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from rich.console import Console

from launcher.config import Config, DataConfig, from_dict
from launcher.data.encoded import Encoded
from launcher.inference.sources import Source, tokenizer_of
from launcher.models.head_loss import HeadLoss
from launcher.progress import Bars
from launcher.tasks.base import Samples
from launcher.tasks.choose import task_of
from launcher.tasks.evaluation import Evaluation
from launcher.tasks.joining import layout_for_evaluation

AT_MOST = 200  # records that are used of a --data file


def held_out(source: Source, file: str | None) -> tuple[Encoded, Any]:
    """Encoded records that were held out of the training, or those of a file, and the tokenizer.

    Raises ValueError if there are none.
    """
    names = {field.name for field in fields(DataConfig)}
    settings = {name: value for name, value in (source.data or {}).items() if name in names}
    settings |= {"exact_match": False}  # it requires held-out records in the settings
    if file is not None:
        settings |= {"data": file, "eval_data": None}
    config = from_dict(DataConfig, settings)
    task: Any = task_of(Config(data=config))
    if task.labels:
        raise ValueError("the loss is measured for models that predict tokens, and this run trained a classifier")
    if file is not None:
        held = task.splits(replace(config, eval_records=0))[0][:AT_MOST]
    elif config.eval_records or config.eval_data:
        held = task.splits(config)[1]
    else:
        known = "the run has no held-out records" if source.data else f"{source.adapter} is not in a run folder"
        raise ValueError(f"there are no records to measure the loss on ({known}): give --data FILE")
    tokenizer = tokenizer_of(source)
    return task.encode(held, tokenizer, config, source.saved_template), tokenizer


def mean_loss(model: Any, encoded: Encoded, tokenizer: Any) -> float:
    """Loss per target token. The model's head computes losses afterwards."""
    config, forward = Config(), HeadLoss(model.eval())
    evaluation = Evaluation(
        config=config,
        samples=Samples(train=encoded, held_out=encoded),
        model=model,
        forward=forward,
        layout=layout_for_evaluation(forward, encoded.distinct_ids()),
        tokenizer=tokenizer,
        device=next(model.parameters()).device,
        bar=Bars(Console(stderr=True)).bar,
    )
    return task_of(config).evaluate(evaluation)["eval_loss"]
