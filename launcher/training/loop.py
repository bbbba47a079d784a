"""The training loop: evaluate, save, train a step. A step: batches, losses, one all-reduce, clip, update.

Every rank computes the same plan from (seed, step). The loss is a sum over targets divided by the number of targets in
the global batch, so 1, 2 and 4 processes give the same curve.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adapters.schedule import Schedule
from launcher.config import Config, OptimizerConfig
from launcher.data.microbatches import GlobalBatch, GlobalBatches
from launcher.engines.engine import Engine, NonFinite
from launcher.engines.replicated import sum_over_ranks
from launcher.files import disk_errors
from launcher.processes import SLOW_S, Communicator, agreed
from launcher.tasks.base import Batch, Layout, Question, Samples, Task, on_device, padding_id
from launcher.tasks.evaluation import Evaluation, Interrupted
from launcher.training.ahead import Ahead, pinned
from launcher.training.checkpoint import Checkpoint, Piece, Saver, prune
from launcher.training.checkpoint_index import TrainingState
from launcher.training.ownership import Ownership
from launcher.training.packing import Way
from launcher.training.report import Events, Log, Screen, Throughput, memory_gib
from launcher.training.stop import StopRequest

Event = dict[str, Any]  # a line of events.jsonl
SCHEDULE = "schedule/"  # before the names of the schedule's tensors in a checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Functions that a caller of `run` adds. Each is called on every rank; an exception in it ends the run as failed.

    on_step(training, event) follows each update, before a checkpoint of that step is written. event is the step's line
    in events.jsonl: step, loss, lr, grad_norm, tokens. on_evaluation(training, event) follows each evaluation, with
    step, eval_loss, the task's metrics, and held_out, the digest of the held-out samples.
    `training.stop.request(reason)` ends the run, saved, after the next step.
    """

    on_step: Callable[[Training, Event], None] = lambda training, event: None
    on_evaluation: Callable[[Training, Event], None] = lambda training, event: None


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything the loop needs, loaded and checked."""

    config: Config
    task: Task
    engine: Engine
    forward: Callable[..., Any]  # the engine's forward pass, with the loss in the model's head
    tokenizer: Any
    samples: Samples
    batches: GlobalBatches
    steps: int
    packed_as: Way  # the layout of packed rows
    device: torch.device
    output: Path
    identity: dict[str, Any]
    comm: Communicator
    stop: StopRequest
    screen: Screen
    trackers: list[Any] = field(default_factory=list)
    callbacks: Callbacks = field(default_factory=Callbacks)
    schedule: Schedule | None = None  # what the method does between steps
    ownership: Ownership = field(default_factory=Ownership)
    check_base: Callable[[], None] = lambda: None  # raises ValueError if the base's files have changed
    clock: Clock = field(default_factory=lambda: Clock())
    ahead: Ahead = field(default_factory=Ahead)


@dataclass
class Clock:
    """Seconds since this start: waiting for batches, all steps, and the part of the steps spent waiting."""

    batches_s: float = 0.0
    steps_s: float = 0.0
    waited_s: float = 0.0


def learning_rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step 1 .. steps: linear warm-up, then constant, or cosine or linear decay to zero."""
    warmup = round(config.warmup_ratio * steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.learning_rate * shape


def train(training: Training, resume: Checkpoint | None) -> tuple[str, int]:
    """Train to the end or until asked to stop; returns "finished" or "stopped", and the last step. Called by all
    ranks."""
    loop = _Loop(training, resume)
    return loop.run(), loop.state.step


class _Loop:
    """The state of a run between two steps, and the work done there."""

    def __init__(self, training: Training, resume: Checkpoint | None):
        self.training, self.config = training, training.config
        self.state = TrainingState(**resume.meta["progress"]) if resume else TrainingState()
        if resume:
            training.comm.together("restoring", lambda: restore(training, resume), SLOW_S)
        self.compare_held_out()
        seal = resume.meta["events"] if resume else None
        file, is_main = training.output / "events.jsonl", training.comm.ranks.is_main
        with disk_errors("events", training.output, "give --output elsewhere"):
            self.events = Events(file, self.state.step, seal) if is_main else None
            names = ("metrics", "answers") if is_main else ()
            self.logs = {name: Log(file.with_name(f"{name}.jsonl"), self.state.step) for name in names}
        self.saver = Saver(training.output / "checkpoints", training.comm, background=self.config.run.async_save)
        self.saved = self.state.step
        self.throughput = Throughput()
        self.bar: Callable[[int, str], None] = lambda step, note: None
        if (schedule := training.schedule) is not None:
            training.engine.after_step(lambda: schedule.after_update(self.state.step + 1))

    def run(self) -> str:
        training, state, options = self.training, self.state, self.config.run
        asked = False
        with training.screen.bar("training", training.steps, state.step) as self.bar:
            while True:  # at the start and after every step: evaluate, save, stop?
                if evaluation_due(training, state) and not asked:
                    asked = not self.evaluate()
                early = bool(options.patience) and state.worse >= options.patience
                ended = state.step >= training.steps or early
                best = bool(options.keep_last) and state.best_step == state.step  # which is to be kept
                due = bool(options.save_every) and (state.step % options.save_every == 0 or best)
                if (ended or asked or due) and self.saved != state.step:
                    self.save()
                if ended or asked:
                    break
                asked = self.step()
        self.saver.finish(training.screen)
        training.ahead.close()
        if early:
            training.screen.say(
                f"stopped early: no lower loss in {state.worse} evaluations, the lowest was at step {state.best_step}"
            )
        if self.events is not None:
            self.events.close()
        for log in self.logs.values():
            log.close()
        return "finished" if ended and not evaluation_due(training, state) else "stopped"

    def step(self) -> bool:
        """Train one step; returns whether any rank was asked to stop."""
        training, state, clock = self.training, self.state, self.training.clock
        number, started, batches_s = state.step + 1, time.perf_counter(), clock.batches_s
        learning_rate = learning_rate_at(number, training.steps, self.config.optimizer)
        total, stops, batch = gradients(training, number)
        if training.schedule is not None:
            training.schedule.before_update()  # on every rank alike, to gradients that are summed already
        try:
            norm, loss, asked = training.engine.update(learning_rate, [total, stops])
        except NonFinite as error:
            raise agreed(ValueError(self.diverged(number, error.numbers[0], error))) from None
        seconds = time.perf_counter() - started
        clock.steps_s += seconds
        clock.waited_s += clock.batches_s - batches_s
        state.step, state.tokens = number, state.tokens + batch.tokens
        event = {"step": number, "loss": loss, "lr": learning_rate, "grad_norm": norm, "tokens": batch.tokens}
        self.log(event)
        speed = self.throughput.add(batch.tokens)
        self.note("metrics", {
            "step": number, "seconds": round(seconds, 6), "tokens_per_s": round(batch.tokens / seconds, 3),
            "memory_gib": round(memory_gib(), 4), "padding": round(1 - batch.token_share, 4),
        })  # fmt: skip
        per_s = f"{speed:,.{0 if speed >= 10 else 1}f} {training.task.counts}/s"
        self.bar(number, f"loss {loss:.4f}, {per_s}, {memory_gib():.1f} GiB")
        training.callbacks.on_step(training, event)
        return asked > 0

    def diverged(self, number: int, loss: float, error: NonFinite) -> str:
        """The message about a step that was not taken. Called by all ranks."""
        numbers = suspects(self.training, number)
        samples = ", ".join(map(str, numbers[:8])) + f" and {len(numbers) - 8} more" * (len(numbers) > 8)
        kept = len(self.training.samples.train)
        where = f"samples {samples} (from 0, of the {kept} kept)" if numbers else "no sample alone is to blame"
        return (
            f"the loss is {loss:.4g} at step {number} and {error}; {where}. Nothing was updated, and what is saved is "
            f"sound: lower --learning-rate {self.config.optimizer.learning_rate}, or take such samples out"
        )

    def compare_held_out(self) -> None:
        """Forget the best loss if it is that of other samples."""
        state, held_out = self.state, self.training.samples.held_out
        if held_out is None:
            return
        digest = held_out.digest()
        if state.held_out not in ("", digest):
            if self.training.comm.ranks.is_main:
                log.warning(
                    "the held-out samples are not those that this run was evaluated on until step %d: losses before "
                    "and after it cannot be compared, and the best loss and --patience start anew",
                    state.step,
                )
            state.best_loss, state.best_step, state.worse, state.evaluated = math.inf, 0, 0, -1
        state.held_out = digest

    def evaluate(self) -> bool:
        """Evaluate on the held-out samples; returns False if a rank was asked to stop meanwhile."""
        training, state = self.training, self.state
        result = evaluate(training)
        if result is None:
            return False
        state.evaluated = state.step
        if result["eval_loss"] < state.best_loss:
            state.best_loss, state.best_step, state.worse = result["eval_loss"], state.step, 0
        else:
            state.worse += 1
        event = {"step": state.step, **result, "held_out": state.held_out}  # which records: losses on others differ
        self.log(event)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.items())
        training.screen.say(f"step {state.step}: {shown}")
        training.callbacks.on_evaluation(training, event)
        for question, text in written_answers(training):
            answer = {"question": question.prompt, "expected": question.expected, "answer": text}
            self.note("answers", {"step": state.step, **answer})
        return True

    def note(self, name: str, line: Event) -> None:
        """Add a line to metrics.jsonl or answers.jsonl; on rank 0."""
        if name in self.logs:
            with disk_errors(name, self.training.output, "run the same command with more space"):
                self.logs[name].write(line)

    def log(self, event: Event) -> None:
        if self.events is not None:
            self.training.ownership.check()
            with disk_errors("events", self.training.output, "run the same command with more space"):
                self.events.write(event)
            for tracker in self.training.trackers:
                numbers = {name: value for name, value in event.items() if name not in ("step", "held_out")}
                tracker.log(numbers, step=event["step"])

    def save(self) -> None:
        training, state, saver = self.training, self.state, self.saver
        pieces, keep_last, best = pieces_of(training), self.config.run.keep_last, state.best_step
        world_size = training.comm.ranks.world_size
        meta = {"identity": training.identity, "progress": dict(vars(state)), "world_size": world_size}
        with saver.bar(training.screen, state.step, pieces):
            if self.events is None:
                saver.save(state.step, pieces, meta)
            else:
                training.ownership.check()
                meta["events"] = self.events.seal()
                prune_old = lambda: prune(saver.root, keep_last, best)  # noqa: E731
                saver.save(state.step, pieces, meta, before=self.before_sealing, after=prune_old)
        self.saved = state.step

    def before_sealing(self) -> None:
        """Check and sync what must be on the disk before a checkpoint is complete; on rank 0."""
        self.training.check_base()
        if self.events is not None:
            self.events.sync()


def pieces_of(training: Training) -> dict[str, Piece]:
    """What this rank writes into a checkpoint: its rows of the engine's state; rank 0 also that of the schedule."""
    pieces = training.engine.pieces()
    if training.schedule is not None and training.comm.ranks.is_main:
        pieces |= {f"{SCHEDULE}{name}": Piece.whole(tensor) for name, tensor in training.schedule.state().items()}
    return pieces


def restore(training: Training, found: Checkpoint) -> None:
    """Put a checkpoint's state back into the engine and the schedule."""
    training.engine.restore(found)
    if training.schedule is not None:
        names = [name for name in found.tensors if name.startswith(SCHEDULE)]
        state = {name.removeprefix(SCHEDULE): found.read(name, found.tensors[name].shape) for name in names}
        training.schedule.restore(found.step, state)


def evaluation_due(training: Training, state: TrainingState) -> bool:
    """At the start, at the end, and every so many steps; never twice at one step, even after a resume.

    A resume with other held-out samples is a start too.
    """
    if training.samples.held_out is None or state.evaluated == state.step:
        return False
    every = training.config.run.eval_every
    return state.evaluated < 0 or state.step == training.steps or bool(every and state.step % every == 0)


def gradients(training: Training, step: int) -> tuple[Tensor, Tensor, GlobalBatch]:
    """Gradients of global batch `step`; returns its loss and how many ranks were asked to stop, both on the device, and
    the batch."""
    seed, rank, batch = training.config.optimizer.seed, training.comm.ranks.rank, training.batches.at(step)
    total = torch.zeros((), device=training.device)
    parts = batch.of_rank(rank)
    for number, rows in enumerate(parts):
        begin_next(training, step, parts[number + 1 :])
        torch.manual_seed(_seed(seed, step, rank, number))  # dropout; so there is no state to save
        loss = batch_loss(training, rows, batch.targets, step)
        training.engine.backward(loss)
        total += loss.detach()
    asked = torch.full((), float(training.stop.asked()), device=training.device)  # torch.tensor would wait for a copy
    total, stops = training.engine.reduce([total, asked])
    return total, stops, batch


def collated(training: Training, rows: Sequence[Any], step: int = 0) -> Batch:
    """These training rows as one batch of this step in main memory, ready to be copied."""
    pad_id, packing = padding_id(training.tokenizer), training.config.data.packing
    layout = Layout(pad_id=pad_id, packing=packing, step=step, **training.packed_as._asdict())
    batch = training.task.collate(training.samples.train, rows, layout)
    prepare = getattr(training.forward, "prepare", None)  # of HeadLoss
    return pinned(prepare(batch) if prepare else batch)


def begin_next(training: Training, step: int, parts: Sequence[Sequence[Any]]) -> None:
    """Have the next micro-batch collated: the first of parts, the rest of this step, or that of the next step."""
    rank = training.comm.ranks.rank
    if parts:
        training.ahead.begin(lambda: parts[0], partial(collated, training, step=step), step)
    elif step < training.steps:
        make = partial(collated, training, step=step + 1)
        training.ahead.begin(lambda: training.batches.at(step + 1).of_rank(rank)[0], make, step + 1)


def suspects(training: Training, step: int) -> list[int]:
    """The samples of global batch `step` whose gradients alone are NaN or infinite, in order. Called by all ranks.

    Each rank takes its samples one by one. Several ranks take a pass together, so all samples of that pass are named.
    """
    ranks, batch, found = training.comm.ranks, training.batches.at(step), []
    for start in range(0, len(batch.rows), ranks.world_size):
        together = batch.rows[start : start + ranks.world_size]
        training.engine.backward(batch_loss(training, [together[ranks.rank]], batch.targets, step))
        if training.engine.nonfinite():
            found += [sample for row in together for sample in (row if isinstance(row, list) else [row])]
    return sorted(found)


def batch_loss(training: Training, rows: Sequence[Any], targets: int, step: int = 0) -> Tensor:
    """The task's loss of these training rows as one batch of this step, divided by targets; a scalar on the device."""
    started = time.perf_counter()
    batch = on_device(training.ahead.take(rows, partial(collated, training, step=step), step), training.device)
    training.clock.batches_s += time.perf_counter() - started
    return training.task.loss(training.forward, batch, targets)


def evaluate(training: Training) -> dict[str, float] | None:
    """The task's metrics on the held-out samples; None if a rank was asked to stop. Called by all ranks."""
    model = training.engine.model
    model.eval()
    try:
        return training.task.evaluate(evaluation_of(training))
    except Interrupted:
        return None
    finally:
        model.train()


def written_answers(training: Training) -> list[tuple[Question, str]]:
    """The model's answers to the questions that the run shows. Called by all ranks."""
    model = training.engine.model
    model.eval()
    try:
        return training.task.answers(evaluation_of(training))
    finally:
        model.train()


def evaluation_of(training: Training) -> Evaluation:
    """The model as it is now and the held-out samples, for the task's evaluation on all ranks.

    A batch is laid out as in training, but never packed by `--packing`.
    """
    ranks, engine = training.comm.ranks, training.engine

    def add_up(tensor: Tensor) -> Tensor:
        if ranks.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    return Evaluation(
        config=training.config,
        samples=training.samples,
        model=engine.model,
        forward=training.forward,
        layout=Layout(**training.packed_as._asdict()),
        tokenizer=training.tokenizer,
        device=training.device,
        rank=ranks.rank,
        world_size=ranks.world_size,
        gathers=engine.gathers,
        add_up=add_up,
        interrupted=lambda: stop_agreed(training),
        bar=training.screen.bar,
    )


def stop_agreed(training: Training) -> bool:
    """Whether any rank was asked to stop. Called by all ranks."""
    if training.comm.ranks.world_size == 1:
        return training.stop.asked()  # the device need not be waited for
    asked = torch.tensor(float(training.stop.asked()), device=training.device)
    return bool(sum_over_ranks([], [asked], training.comm.ranks.world_size)[0] > 0)


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
