"""The training loop, to be read aloud: batch, loss, one all-reduce, clip, step; evaluate, save, stop when asked.

Every rank computes the same plan from (seed, step). The loss is a sum over target tokens divided by the global batch's
number of them, so 1, 2 and 4 processes give the same curve.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config import Config, OptimizerConfig
from launcher.data.batches import batch_indices, collate, share, target_tokens
from launcher.data.encode import Encoded
from launcher.engines.engine import Engine
from launcher.engines.replicated import sum_over_ranks
from launcher.models.generation import answer
from launcher.processes import Communicator
from launcher.tasks import label
from launcher.tasks.label import Labelled
from launcher.training.checkpoint import Checkpoint, Saver, prune
from launcher.training.report import Events, Rate, Screen, memory_gib
from launcher.training.stop import StopRequest

ANSWERS = 64  # a rank writes so many at a time, and then hears whether to stop


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out prompt and the answer it should get."""

    prompt: str
    prompt_ids: list[int]
    expected: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs, loaded and checked."""

    config: Config
    engine: Engine
    tokenizer: Any
    train: Encoded
    rows: Sequence[Any]  # what batch_size counts: sample numbers, or lists of them when packing
    held_out: Encoded | None
    questions: list[Question]
    steps: int
    attention: str
    device: torch.device
    output: Path
    identity: dict[str, Any]
    comm: Communicator
    stop: StopRequest
    screen: Screen
    trackers: list[Any] = field(default_factory=list)
    clock: Clock = field(default_factory=lambda: Clock())


@dataclass
class Clock:
    """Seconds since this start: putting batches together, all steps, and what of these was waiting for a batch."""

    batches_s: float = 0.0
    steps_s: float = 0.0
    waited_s: float = 0.0


@dataclass
class Progress:
    """Where a run stands; with the cores and the optimizer this is all a checkpoint holds."""

    step: int = 0
    tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    worse: int = 0  # evaluations since the best one
    evaluated: int = -1  # the step of the last evaluation


def learning_rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of step 1 .. steps: linear warm-up, then cosine or linear to zero after the last step, or constant."""
    warmup = round(config.warmup_ratio * steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.learning_rate * shape


def train(job: Job, resume: Checkpoint | None) -> str:
    """Train to the end or until asked to stop; returns "finished" or "stopped". Called by all ranks."""
    config, ranks = job.config, job.comm.ranks
    progress = Progress(**resume.meta["progress"]) if resume else Progress()
    if resume:
        job.engine.restore(resume)
    seal = resume.meta["events"] if resume else None
    events = Events(job.output / "events.jsonl", progress.step, seal) if ranks.is_main else None
    saver = Saver(job.output / "checkpoints", job.comm, background=config.run.async_save)
    rate, saved, asked = Rate(), progress.step, False

    def tell(event: dict[str, Any]) -> None:
        if events is not None:
            events.write(event)
            for tracker in job.trackers:
                tracker.log({name: value for name, value in event.items() if name != "step"}, step=event["step"])

    def checkpoint() -> None:
        meta = {"identity": job.identity, "progress": dict(vars(progress)), "world_size": ranks.world_size}
        if events is None:
            saver.save(progress.step, job.engine.pieces(), meta)
            return
        meta["events"], best = events.seal(), progress.best_step
        keep = lambda: prune(saver.root, config.run.keep_last, best)  # noqa: E731
        saver.save(progress.step, job.engine.pieces(), meta, before=events.sync, after=keep)

    def evaluation() -> bool:
        result = evaluate(job)
        if result is None:
            return False
        progress.evaluated = progress.step
        if result["eval_loss"] < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = result["eval_loss"], progress.step, 0
        else:
            progress.worse += 1
        tell({"step": progress.step, **result})
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.items())
        job.screen.say(f"step {progress.step}: {shown}")
        return True

    def step() -> bool:
        number, started, batches_s = progress.step + 1, time.perf_counter(), job.clock.batches_s
        lr = learning_rate_at(number, job.steps, config.optimizer)
        loss, tokens, asked = gradients(job, number)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {number}: lower --learning-rate {config.optimizer.learning_rate}"
            )
        norm = job.engine.update(lr)
        job.clock.steps_s += time.perf_counter() - started
        job.clock.waited_s += job.clock.batches_s - batches_s
        progress.step, progress.tokens = number, progress.tokens + tokens
        tell({"step": number, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens})
        speed = rate.add(tokens)
        bar(number, f"loss {loss:.4f}  {speed:,.{0 if speed >= 10 else 1}f} tokens/s  {memory_gib():.1f} GiB")
        return asked

    with job.screen.bar("training", job.steps, progress.step) as bar:
        while True:  # at the start and after every step: evaluate, save, leave?
            if evaluation_due(job, progress) and not asked:
                asked = not evaluation()
            early = bool(config.run.patience) and progress.worse >= config.run.patience
            ended = progress.step == job.steps or early
            due = bool(config.run.save_every) and progress.step % config.run.save_every == 0
            if (ended or asked or due) and saved != progress.step:
                checkpoint()
                saved = progress.step
            if ended or asked:
                break
            asked = step()
    saver.wait()
    if early:
        job.screen.say(f"no better loss in {progress.worse} evaluations, the best was at step {progress.best_step}")
    if events is not None:
        events.close()
    return "finished" if ended and not evaluation_due(job, progress) else "stopped"


def evaluation_due(job: Job, progress: Progress) -> bool:
    """At the start, at the end, and every so many steps; not twice at a step, also after a resume."""
    if job.held_out is None or progress.evaluated == progress.step:
        return False
    every = job.config.run.eval_every
    return progress.step in (0, job.steps) or bool(every and progress.step % every == 0)


def gradients(job: Job, step: int) -> tuple[float, int, bool]:
    """Gradients of global batch `step`; returns its loss and tokens, and whether any rank was asked to stop."""
    optimizer, ranks = job.config.optimizer, job.comm.ranks
    rows = [job.rows[i] for i in batch_indices(optimizer.seed, step - 1, optimizer.batch_size, len(job.rows))]
    targets = target_tokens(job.train, rows)
    mine = share(rows, ranks.rank, ranks.world_size)
    size = optimizer.micro_batch_size or len(mine)
    total = torch.zeros((), device=job.device)
    for start in range(0, len(mine), size):
        torch.manual_seed(_seed(optimizer.seed, step, ranks.rank, start))  # dropout; so there is no state to save
        loss = loss_of(job, job.train, mine[start : start + size], targets, packing=job.config.data.packing)
        job.engine.backward(loss)
        total += loss.detach()
    asked = torch.tensor(float(job.stop.asked()), device=job.device)
    total, stops = job.engine.reduce([total, asked])
    return float(total), tokens_in(job.train, rows), bool(stops > 0)


def loss_of(job: Job, data: Encoded, rows: Sequence[Any], targets: int, *, packing: bool) -> Tensor:
    """Sum of the rows' token losses (labels: their own losses) divided by targets, a scalar on the device."""
    if isinstance(data, Labelled):
        return labelled_outputs(job, data, rows).loss * (len(rows) / targets)
    started = time.perf_counter()
    kind: Any = "flash" if job.attention == "flash_attention_2" else "sdpa"
    batch = collate(data, rows, pad_id=job.tokenizer.pad_token_id or 0, packing=packing, attention=kind)
    batch = {name: part.to(job.device) if isinstance(part, Tensor) else part for name, part in batch.items()}
    job.clock.batches_s += time.perf_counter() - started
    return job.engine.forward(**batch, num_items_in_batch=targets, use_cache=False).loss


def labelled_outputs(job: Job, data: Labelled, rows: Sequence[int]) -> Any:
    """The model's output on these rows: its mean loss, and logits (B, classes)."""
    started = time.perf_counter()
    batch = label.collate(data, rows, job.tokenizer.pad_token_id)
    batch = {name: part.to(job.device) for name, part in batch.items()}
    job.clock.batches_s += time.perf_counter() - started
    return job.engine.forward(**batch)


def evaluate(job: Job) -> dict[str, float] | None:
    """Held-out loss per target token, and exact_match where asked for; None where a rank was asked to stop meanwhile.

    Called by all ranks, which share the samples. Where a forward pass is a collective each rank makes the same passes:
    the last one over samples may be for show, and all write all answers.
    """
    assert job.held_out is not None
    ranks, model, lengths = job.comm.ranks, job.engine.model, job.held_out.lengths
    size = job.config.optimizer.micro_batch_size or 16
    samples = sorted(range(len(lengths)), key=lambda i: lengths[i])
    questions = (
        sorted(job.questions, key=lambda question: len(question.prompt_ids)) if job.config.data.exact_match else []
    )
    shares = 1 if job.engine.gathers else ranks.world_size
    sums = torch.zeros(label.MOMENTS, dtype=torch.float64, device=job.device)
    total, right = torch.zeros((), device=job.device), torch.zeros((), device=job.device)
    model.eval()
    try:
        for start in range(0, len(samples), size * ranks.world_size):
            if stop_agreed(job):
                return None
            part = samples[start : start + size * ranks.world_size][ranks.rank :: ranks.world_size]
            with torch.no_grad():
                if isinstance(job.held_out, Labelled) and part:
                    output = labelled_outputs(job, job.held_out, part)
                    loss = output.loss * len(part)
                    sums += label.moments(output.logits, job.held_out.labels[part].to(job.device))
                else:
                    loss = loss_of(job, job.held_out, part or samples[:1], 1, packing=False)
            total += loss if part else 0
        for start in range(0, len(questions), ANSWERS * shares):
            if stop_agreed(job):
                return None
            asked = questions[start : start + ANSWERS * shares][ranks.rank % shares :: shares]
            written = write_answers(job, asked)
            right += sum(text == question.expected.strip() for text, question in zip(written, asked, strict=True))
    finally:
        model.train()
    total, right = sum_over_ranks([], [total, right], ranks.world_size)
    result = {"eval_loss": float(total) / target_tokens(job.held_out, samples)}
    if questions:
        result["exact_match"] = float(right) * shares / ranks.world_size / len(questions)
    if isinstance(job.held_out, Labelled):
        if ranks.world_size > 1:
            dist.all_reduce(sums)  # in float64: float32 loses the spread of labels that are far from zero
        result |= label.metrics(sums, job.held_out.classes)
    return result


def stop_agreed(job: Job) -> bool:
    """Whether any rank was asked to stop. Called by all ranks."""
    asked = torch.tensor(float(job.stop.asked()), device=job.device)
    return bool(sum_over_ranks([], [asked], job.comm.ranks.world_size)[0] > 0)


def write_answers(job: Job, questions: Sequence[Question]) -> list[str]:
    """Greedy answers, stripped of surrounding blanks."""
    ids = answer(
        job.engine.model,
        job.tokenizer,
        [question.prompt_ids for question in questions],
        max_tokens=job.config.data.answer_tokens,
    )
    return [job.tokenizer.decode(part, skip_special_tokens=True).strip() for part in ids]


def tokens_in(data: Encoded, rows: Sequence[Any]) -> int:
    """Tokens of these rows, prompts included, padding not."""
    samples = [sample for row in rows for sample in (row if isinstance(row, list) else [row])]
    return int((data.offsets[torch.tensor(samples) + 1] - data.offsets[torch.tensor(samples)]).sum())


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
