"""Preferences: the model learns to prefer a chosen answer to a rejected one. Selected by --task prefer.

DPO (arXiv 2305.18290, equation 7). The reference is the same model with its adapter disabled, so there is no second
model. ORPO (arXiv 2403.07691, equations 6 and 7), which needs no reference.

Shapes: b pairs of a micro-batch, B = 2 b rows (chosen ones, then rejected ones), T tokens that carry loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor

from adapters.base import start_in_base
from launcher.config import Config, DataConfig
from launcher.data import records, templates
from launcher.data.bad_records import BadRecord, BadRecords
from launcher.data.batches import NO_LOSS, collate
from launcher.data.chat import many
from launcher.data.crew import Crew
from launcher.data.encode import Encoder
from launcher.data.encoded import DataReport, Encoded, Part, Tally, encoded
from launcher.data.pairs import load_pairs
from launcher.data.token_cache import encode_once, encoded_before
from launcher.tasks.base import Batch, Layout, Sampled, Samples, Task, sampled
from launcher.tasks.evaluation import Evaluation
from launcher.tasks.instruct import Instruct, questions_of

WHOLE = 2**31 - 1  # a max_length that cuts nothing


class Preference(NamedTuple):
    """Which loss, and its weight."""

    loss: str  # dpo or orpo
    beta: float


@dataclass(frozen=True, eq=False)
class Pairs(Encoded):
    """Samples as in `Encoded`, each a chosen answer with its prompt and then a rejected one with the same prompt.

    Each pair counts as one target.
    """

    borders: Tensor  # (2 S + 1,) int64: offsets of all answers, chosen and rejected in turn
    preference: Preference

    @cached_property
    def answers(self) -> Encoded:
        """The answers as separate samples: of pair i the chosen one is 2 i, the rejected one 2 i + 1."""
        return Encoded(self.ids, self.loss, self.borders, torch.ones(len(self.borders) - 1).long(), self.report)

    def digest(self) -> str:
        setting = f"{self.preference.loss} {self.preference.beta}".encode()
        return hashlib.sha256(super().digest().encode() + self.borders.numpy().tobytes() + setting).hexdigest()


class PairReport(DataReport):
    """Counts of pairs and tokens."""

    def __str__(self) -> str:
        line = f"{self.kept:,} of {self.records:,} pairs, {self.tokens:,} tokens, {self.loss_share:.1%} are of answers"
        if self.truncated:
            line += f"; {self.truncated:,} answers lost their end at {self.max_length} tokens"
        if self.dropped:
            line += f"; {self.dropped:,} dropped, their prompt alone fills {self.max_length} tokens"
        return line


class PairEncoder:
    """Pairs {chosen, rejected} as two samples each, one after the other; an answer over max_length loses its end.

    A pair of which an answer keeps no token is dropped and counted. Raises ValueError when none is left, and for pairs
    that the template cannot carry, unless on_bad_record is skip.
    """

    report_type: type[DataReport] = PairReport

    def __init__(
        self, first: records.Record, tokenizer: Any, config: DataConfig, template: templates.Template | None = None
    ):
        self.answers = Encoder(first["chosen"], tokenizer, replace(config, max_length=WHOLE), template)
        self.config = config

    @classmethod
    def key(cls, first: records.Record, tokenizer: Any, config: DataConfig) -> list[Any]:
        return [f"{cls.__module__}.{cls.__qualname__}", *Encoder.key(first["chosen"], tokenizer, config)]

    def part(self, pairs: Sequence[records.Record]) -> Part:
        bad, usable = BadRecords(self.config.on_bad_record), []
        with many("rendering the chat template"):
            for pair in pairs:
                try:
                    for record in pair.values():
                        if len(templates.render(record, self.answers.template, self.answers.tokenizer).samples) > 1:
                            raise BadRecord("several answers", _several(record))
                    usable.append(pair)
                except BadRecord as error:
                    bad.add(error)
        whole = self.answers.part([record for pair in usable for record in (pair["chosen"], pair["rejected"])])
        ends = whole.lengths.cumsum()
        starts = ends - whole.lengths
        kept = np.minimum(ends, starts + self.config.max_length)
        learned = np.concatenate([[0], whole.loss.cumsum()])
        both = ((learned[kept] - learned[starts]).reshape(-1, 2) > 0).all(1)  # an answer of each is left
        chosen = np.repeat(both, 2)
        spans = [slice(*span) for span in zip(starts[chosen].tolist(), kept[chosen].tolist(), strict=True)]
        ids, loss = (
            np.concatenate([tokens[:0], *(tokens[span] for span in spans)]) for tokens in (whole.ids, whole.loss)
        )
        lengths = (kept - starts)[chosen]
        tally = replace(
            whole.tally, bad=bad.first, bad_kinds=dict(bad.kinds), samples=len(usable), kept=len(lengths),
            tokens=len(ids), target_tokens=int(loss.sum()), truncated=int((kept < ends)[chosen].sum()),
        )  # fmt: skip
        return Part(lengths, np.ones_like(lengths), ids, loss, tally)

    def report(self, tallies: Iterable[Tally], count: int) -> DataReport:
        total, most = Tally(), self.config.max_length
        for tally in tallies:
            total.add(tally)
        bad = BadRecords(self.config.on_bad_record, total.bad, total.bad_kinds)
        left_out, kept = bad.tell("the pairs", count), total.kept // 2
        if not kept:
            raise ValueError(f"no pair is left: the prompt alone of each fills --max-length {most}")
        notes = (*([left_out] if left_out else []), *self.answers.seen.notes(total, self.answers.template))
        return PairReport(
            total.samples, kept, total.truncated, total.samples - kept, total.tokens, total.target_tokens, most, notes
        )


class Prefer(Instruct):
    """Preference optimisation. Held-out questions can be answered as in instruction tuning (--show-samples)."""

    flattens = False  # pairs are compared row by row

    def wants(self, config: Config) -> bool:
        return False

    def check(self, config: Config, adapter: PeftConfig | None) -> None:
        data = config.data
        if data.packing or data.exact_match or data.loss_on != "answers":
            raise ValueError(
                "--task prefer compares whole answers: leave --packing, --exact-match and --loss-on all out"
            )
        if adapter is None and data.preference_loss == "dpo":
            raise ValueError(
                "--preference-loss dpo compares with the model whose adapter is disabled, which --method full does "
                "not have: give --preference-loss orpo, or another method"
            )
        if data.preference_loss == "dpo" and (start := start_in_base(adapter)):
            raise ValueError(
                "--preference-loss dpo compares with the model whose adapter is disabled, and init_lora_weights="
                f"{start} changes the weights of the base too: give --preference-loss orpo, or another method"
            )
        if getattr(adapter, "factors_from_gradients", False) or getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"--method {config.adapter.method} does not support --task prefer: choose a method whose adapter "
                "changes weights and needs no gradients before training"
            )

    def read_together(self, config: Config, tokenizer: Any, cache: Path, crew: Crew) -> Samples:
        data, each = config.data, crew.comm.each
        train, held_out = each("data", lambda: self._pairs(data))
        if crew.leads:
            records.warn_of_overlap(*(map(records.as_bytes, some) for some in (train, held_out)))
        template = each("data", lambda: templates.template_of(data, train[0]["chosen"], tokenizer))
        tokens = partial(encode_once, tokenizer=tokenizer, config=data, folder=cache, crew=crew, kind=PairEncoder)
        asked = [pair["chosen"] for pair in held_out] if config.run.show_samples else []
        return Samples(
            train=pairs_of(tokens(train), data),
            held_out=pairs_of(tokens(held_out), data) if held_out else None,
            template=template,
            questions=each("data", lambda: list(questions_of(asked, template, tokenizer))),
        )

    def sample(self, config: Config, tokenizer: Any, cache: Path, most: int) -> Sampled:
        data = config.data
        train, _ = self._pairs(data)
        template = templates.template_of(data, train[0]["chosen"], tokenizer)
        before = encoded_before(train, tokenizer, data, cache, PairEncoder)
        return sampled(
            train, most, lambda some: encode_pairs(some, tokenizer, data, template),
            None if before is None else pairs_of(before, data),
        )  # fmt: skip

    def assumed(self, config: Config, base: Path, count: int) -> Encoded:
        return pairs_of(super().assumed(config, base, 2 * count), config.data)

    def splits(self, data: DataConfig) -> tuple[list[records.Record], list[records.Record]]:
        """The chosen answers, for the plain loss per token."""
        train, held_out = self._pairs(data)
        return [pair["chosen"] for pair in train], [pair["chosen"] for pair in held_out]

    def _pairs(self, data: DataConfig) -> tuple[list[records.Record], list[records.Record]]:
        load = partial(load_pairs, columns=data.columns, on_bad_record=data.on_bad_record)
        return records.load_splits(data.data, data.eval_data, data.eval_records, load, fewer=data.fewer_eval_records)

    def collate(self, data: Encoded, rows: Sequence[int], layout: Layout) -> Batch:
        assert isinstance(data, Pairs)
        order = [2 * row for row in rows] + [2 * row + 1 for row in rows]
        batch = collate(data.answers, order, pad_id=layout.pad_id, padding_mask=layout.padding_mask)
        return batch | {"preference": data.preference}

    def loss(self, forward: Callable[..., Any], batch: Batch, targets: int) -> Tensor:
        losses, _ = compare(forward, batch)
        return losses.sum() / targets

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        """eval_loss, the share of pairs in which the chosen answer is preferred, and its mean margin."""

        def measure(parts: Sequence[Sequence[int]]) -> tuple[Tensor]:
            losses, margins = compare(evaluation.forward, evaluation.batch(self, parts[0]))
            return (torch.stack([losses.sum(), (margins > 0).float().sum(), margins.sum()]).double(),)

        (sums,) = evaluation.total(evaluation.micro_batches, measure, size=1)
        loss, preferred, margin = (sums / len(evaluation.held_out)).tolist()
        return {"eval_loss": loss, "preferred": preferred, "margin": margin}


TASK: Task = Prefer()


def encode_pairs(
    pairs: Sequence[records.Record], tokenizer: Any, data: DataConfig, template: templates.Template
) -> Pairs:
    """What `PairEncoder` makes of these pairs, in memory."""
    return pairs_of(encoded(PairEncoder(pairs[0], tokenizer, data, template), pairs), data)


def pairs_of(answers: Encoded, data: DataConfig) -> Pairs:
    """The pairs of answers that `PairEncoder` made."""
    count = len(answers) // 2
    return Pairs(
        ids=answers.ids, loss=answers.loss, offsets=answers.offsets[::2].contiguous(),
        targets=torch.ones(count, dtype=torch.int64), report=answers.report, borders=answers.offsets,
        preference=Preference(data.preference_loss, data.preference_beta),
    )  # fmt: skip


def compare(forward: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses and margins (b,) of the pairs. A margin above 0 prefers the chosen answer.

    dpo: the margin is beta times (log probability of the answer - that under the reference), chosen minus rejected.
    orpo: the difference of the mean log probability of a token.
    """
    batch = dict(batch)
    loss, beta = batch.pop("preference")
    rows = (batch["labels"][:, 1:] != NO_LOSS).nonzero()[:, 0]
    size = len(batch["labels"])

    def log_probabilities() -> Tensor:
        zeros = torch.zeros(size, device=rows.device)
        return zeros.index_add(0, rows, -forward.token_losses(**batch, use_cache=False))

    if loss == "dpo":
        with torch.no_grad(), adapters_disabled(forward.model):
            reference = log_probabilities()
        chosen, rejected = (log_probabilities() - reference).chunk(2)
        margins = beta * (chosen - rejected)
        return -F.logsigmoid(margins), margins
    tokens = torch.bincount(rows, minlength=size)
    chosen, rejected = (log_probabilities() / tokens).chunk(2)
    odds = (chosen - _log_of_rest(chosen)) - (rejected - _log_of_rest(rejected))
    return -chosen - beta * F.logsigmoid(odds), chosen - rejected


def _log_of_rest(log_p: Tensor) -> Tensor:
    """log(1 - p), exact for small and for large p (Maechler 2012, log1mexp)."""
    log_p = log_p.clamp(max=-1e-7)  # a probability of 1 has infinite odds
    return torch.where(log_p > -0.6931, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Inside, the model is its base.

    PEFT's own `disable_adapter` also switches `requires_grad` off and on again, of all of an adapter's numbers.
    """
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def _several(record: records.Record) -> str:
    begin = record["messages"][0].get("content") or ""
    return (
        f"the pair that begins {begin!r:.50} has several answers, which the chat template rewrites as the conversation "
        "grows: keep one answer in chosen and in rejected"
    )
