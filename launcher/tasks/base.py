"""What a task decides: which samples are read, how a batch of them becomes a loss, how a model is evaluated.

A task holds no state: one object serves every run. The training loop and the commands call it and know no task's name.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from peft import PeftConfig
from torch import Tensor

from launcher.config import Config, DataConfig
from launcher.data.batches import FLAT, PackedAs, collate, target_tokens
from launcher.data.crew import Crew
from launcher.data.encoded import DataReport, Encoded
from launcher.data.forms import Record
from launcher.data.joined import join
from launcher.data.saved_template import save_template
from launcher.data.templates import Template
from launcher.methods import exports_lora, peft_config, prompt_tokens
from launcher.models.files import base_folder, copy_tokenizer, has_tokenizer, load_tokenizer
from launcher.models.image_processor import is_image_model, model_type

if TYPE_CHECKING:
    from launcher.tasks.evaluation import Evaluation

Batch = dict[str, Any]  # arguments of the model's forward


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out prompt and the expected answer."""

    prompt: str
    prompt_ids: list[int]
    expected: str


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a task reads."""

    train: Encoded
    held_out: Encoded | None = None
    questions: Sequence[Question] = ()  # for tasks whose model writes text
    template: Template | None = None  # of prompts, if there is one


class Sampled(NamedTuple):
    """Some training samples."""

    samples: Encoded
    of: int  # how many there are, perhaps estimated
    how: str  # where these come from


def sampled(
    rows: Sequence[Record], most: int, encode: Callable[[Sequence[Record]], Encoded], before: Encoded | None = None
) -> Sampled:
    """The samples of all rows if they were tokenised before, else those of the first `most` rows."""
    if before is not None:
        return Sampled(before, len(before), "all records, tokenised before")
    first = rows[:most]
    some = encode(first)
    how = f"the first {len(first):,} of {len(rows):,} records, tokenised now"
    return Sampled(some, round(len(rows) * len(some) / len(first)), how)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows are laid out in a batch."""

    pad_id: int = 0
    packing: bool = False  # a row is a list of samples, which do not attend to each other
    attention: PackedAs = "sdpa"
    windows: Mapping[str, int | None] | None = None  # of packed rows, by type of layer
    padding_mask: bool = True  # rows that are not packed have one
    step: int = 0  # the optimizer step, for what a task draws at random in each; 0 outside training

    @property
    def flat(self) -> bool:
        """Whether a batch is one row of all its samples, without padding."""
        return self.attention in (*FLAT, "joined")


class Table(NamedTuple):
    """A table for the screen."""

    title: str
    header: list[str]
    rows: list[list[str]]


class Task(Protocol):
    """One kind of training. The methods with a body are defaults."""

    peft_type: str | None = "CAUSAL_LM"  # PEFT's task_type of the adapter
    text: bool = True  # samples are tokens of a language model
    counts: str = "tokens"  # what the lengths of samples are
    labels: bool = False  # the model has a classification head instead of its head for words
    flattens: bool = False  # a batch may be one row of all its samples, as with packing
    packages: tuple[str, ...] = ()  # whose versions a run records, beside those that every run has
    unplanned: str | None = None  # runs that `loldu plan` cannot predict, in words

    def wants(self, config: Config) -> bool:
        """Whether a config that names no task (--task auto) asks for this one."""
        return False

    def variant(self, config: Config) -> Task:
        """The task for this config's kind of data."""
        return self

    def check(self, config: Config, adapter: PeftConfig | None) -> None:
        """Raises ValueError for settings that the task does not support. Touches no file and no device."""
        return None

    def base_folder(self, model: str) -> Path:
        """The local folder of the base model, its files checked from their headers."""
        folder = base_folder(model, "--model ")
        self.check_folder(folder)
        return folder

    def check_folder(self, folder: Path) -> None:
        """Raises ValueError if the model that a folder's config.json describes cannot learn the task."""
        if is_image_model(model_type(folder)):
            raise ValueError(
                f"{folder} is a {model_type(folder)}, an image model, which reads no text: for classes of images give "
                "--image-column image, otherwise a language model"
            )

    def has_tokenizer(self, base: Path) -> bool:
        """Whether a base's folder has the files of what `tokenizer` loads."""
        return has_tokenizer(base)

    def tokenizer(self, base: Path, *, trust_remote_code: bool = False) -> Any:
        """The tokenizer of a base's folder, or the image processor of a model for images."""
        return load_tokenizer(base, trust_remote_code=trust_remote_code)

    def assumed(self, config: Config, base: Path, count: int) -> Encoded:
        """Samples for a plan without data: each of the maximum length, half of it with loss."""
        length = config.data.max_length
        loss = (torch.arange(length) >= length // 2).repeat(count)
        targets = torch.full((count,), length - length // 2)
        report = DataReport(count, count, 0, 0, count * length, int(targets.sum()), length)
        ids = torch.zeros(count * length, dtype=torch.int32)
        return Encoded(ids, loss, torch.arange(count + 1) * length, targets, report)

    def read(self, config: Config, tokenizer: Any, cache: Path) -> Samples:
        """Read, check and tokenise the data. cache is a folder for tokenised data.

        Raises ValueError naming the record for a mistake in the data.
        """
        ...

    def read_together(self, config: Config, tokenizer: Any, cache: Path, crew: Crew) -> Samples:
        """The same, called by all processes of a run. By default one process of each machine calls `read` first, so
        that the others find its tokens in the cache."""
        return crew.in_turn("data", lambda: self.read(config, tokenizer, cache))

    def sample(self, config: Config, tokenizer: Any, cache: Path, most: int) -> Sampled:
        """Some training samples, to predict what a run takes: all that are cached, or those of `most` records."""
        train = self.read(config, tokenizer, cache).train
        return Sampled(train, len(train), "all records")

    def head(self, train: Encoded, tokenizer: Any) -> dict[str, Any] | None:
        """Settings of the classification head in the model's config; None for a model that predicts tokens."""
        return None

    def collate(self, data: Encoded, rows: Sequence[Any], layout: Layout) -> Batch:
        """One batch of these rows, on the CPU.

        Called in a thread while the device computes the batch before: random numbers come from its own generator,
        seeded from the rows, never from torch's global one.
        """
        ...

    def loss(self, forward: Callable[..., Any], batch: Batch, targets: int) -> Tensor:
        """Sum of the losses of the batch's targets, divided by `targets`: a scalar.

        Targets are what `Encoded.targets` counts. The training loop passes those of the global batch, so the losses of
        micro-batches and ranks add up to the mean loss per target.
        """
        ...

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        """eval_loss (mean per target) on the held-out samples, and further metrics by name, shares in [0, 1].

        Called by all ranks; see `Evaluation.total`.
        """
        ...

    def show(self, evaluation: Evaluation) -> Table | None:
        """What to show when training has ended, such as answers before and after. Called by all ranks."""
        return None

    def answers(self, evaluation: Evaluation) -> list[tuple[Question, str]]:
        """What the model writes now to the questions that the run shows. Called by all ranks."""
        return []

    def add_files(self, samples: Samples, tokenizer: Any, folder: Path) -> None:
        """Write what else belongs beside the adapter or model in a folder: the prompt template, and the tokenizer.

        An adapter has a tokenizer, which takes megabytes, only if the base's own would give other prompts.
        """
        template = samples.template
        other = template is not None and (template.jinja or "") != tokenizer.chat_template
        if other or (folder / "config.json").is_file():
            copy_tokenizer(Path(tokenizer.name_or_path), folder)
        if template is not None:
            save_template(template, tokenizer, folder)

    def next_steps(self, config: Config, output: Path, saved: Path) -> list[str]:
        """Lines that say what can be done with the result. output is the run folder, saved the adapter or model."""
        return []


class NextToken(Task, Protocol):
    """Predict each token that carries loss from those before it: collate, loss and evaluation of such tasks."""

    flattens: bool = True

    def splits(self, data: DataConfig) -> tuple[list[Record], list[Record]]:
        """Training and held-out records, checked. Raises ValueError naming the record for a mistake in the data."""
        ...

    def encode(
        self, rows: Sequence[Record], tokenizer: Any, data: DataConfig, template: Template | None = None
    ) -> Encoded:
        """Records as samples of the plain loss per token. template replaces the one that data names."""
        ...

    def collate(self, data: Encoded, rows: Sequence[Any], layout: Layout) -> Batch:
        if layout.attention == "joined":
            return join(data, rows)
        if layout.flat and not layout.packing:
            rows, layout = [[row] for row in rows], replace(layout, packing=True)
        return collate(
            data, rows, pad_id=layout.pad_id, packing=layout.packing, attention=layout.attention,
            windows=layout.windows, padding_mask=layout.padding_mask,
        )  # fmt: skip

    def loss(self, forward: Callable[..., Any], batch: Batch, targets: int) -> Tensor:
        return forward(**batch, num_items_in_batch=targets, use_cache=False).loss

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        held_out = evaluation.held_out

        def loss(parts: Sequence[Sequence[int]]) -> tuple[Tensor]:
            return (self.loss(evaluation.forward, evaluation.batch(self, parts[0]), 1),)

        (total,) = evaluation.total(evaluation.micro_batches, loss, size=1)
        return {"eval_loss": float(total) / target_tokens(held_out, range(len(held_out)))}

    def next_steps(self, config: Config, output: Path, saved: Path) -> list[str]:
        chat, merged, lora = map(shlex.quote, map(str, (output, output / "merged", output / "lora")))
        trained = peft_config(config.adapter)
        if trained is None or prompt_tokens(trained):
            return [f"Chat with the model: loldu chat {chat}"]
        adapter = shlex.quote(str(saved))
        steps = ["Next steps:", f"  loldu chat {chat}", f"  loldu merge {adapter} --out {merged}"]
        if exports_lora(trained):
            steps.append(f"  loldu export-lora {adapter} --out {lora}")
        return steps


def padding_id(tokenizer: Any) -> int:
    """The token that fills a row; 0 without one, and for images."""
    return getattr(tokenizer, "pad_token_id", None) or 0


def by_length(data: Encoded) -> list[int]:
    """The samples, shortest first: batches of similar lengths need little padding."""
    return sorted(range(len(data)), key=data.lengths.__getitem__)


def on_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch with its tensors moved, also those of a dictionary in it; other values stay as they are.

    Tensors in pinned memory are copied while the host continues.
    """

    def moved(part: Any) -> Any:
        return (
            part.to(device, non_blocking=True)
            if isinstance(part, Tensor)
            else on_device(part, device)
            if isinstance(part, dict)
            else part
        )

    return {name: moved(part) for name, part in batch.items()}
