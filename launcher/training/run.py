"""From a config to a finished run folder: resolve, connect, read, factor, build, train, report."""

from __future__ import annotations

import copy
import gc
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from adapters.checkpoint_files import list_tensors
from adapters.schedule import for_steps, schedule_of
from launcher.availability import unavailable
from launcher.config import Config, as_dict, data_name
from launcher.data import batches
from launcher.data.crew import Crew
from launcher.data.encoded import Encoded
from launcher.data.microbatches import global_batches
from launcher.engines.engine import Engine, ModelSource, engine_class
from launcher.engines.registry import ENGINES
from launcher.exit_codes import DONE, FAILED, MISTAKE, STOPPED
from launcher.factorization.make import factors_of, fingerprint
from launcher.files import disk_errors
from launcher.models import joined, varlen
from launcher.models.build import FLASH, build
from launcher.models.files import check_ids, context_length
from launcher.models.head_loss import HeadLoss
from launcher.models.own_head import check_own_head
from launcher.models.skeleton import bare_skeleton
from launcher.models.suitable import leave_out
from launcher.processes import SLOW_S, Communicator, Ranks, Stopped, connect, print_error, same_everywhere
from launcher.tasks.base import Layout, Samples, on_device, padding_id
from launcher.tasks.joining import check_joined
from launcher.text import expected
from launcher.training import factoring
from launcher.training.ending import cause, post, tell, text_of
from launcher.training.factoring import Factoring
from launcher.training.folder import State, finished, prepare, save_final
from launcher.training.loop import Callbacks, Event, Training, train
from launcher.training.memory import check_run
from launcher.training.ownership import Ownership
from launcher.training.packing import (
    Way,
    candidates,
    check_causal,
    check_labels,
    check_packing,
    needs_padding_mask,
)
from launcher.training.report import Screen, open_trackers
from launcher.training.resolve import Resolved, check_context, resolve
from launcher.training.start import Start, begin, watch
from launcher.training.stop import StopRequest
from launcher.training.summary import conclude, introduce

log = logging.getLogger(__name__)


def run(
    config: Config,
    name: str,
    instead: Callable[[], Config] | None = None,
    *,
    on_step: Callable[[Training, Event], None] | None = None,
    on_evaluation: Callable[[Training, Event], None] | None = None,
) -> int:
    """One training run under whatever launcher started this process; returns its exit code.

    If the base or the data of config cannot be found, the config that `instead` returns is run in its place. on_step
    and on_evaluation are called as `Callbacks` describes. A single process that was stopped and saved returns 75 (run
    the same command again); under a launcher every rank returns 0 then, and the run folder's `state` says which.
    """
    try:
        ranks = Ranks.from_environment()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    quiet_libraries()
    given = {"on_step": on_step, "on_evaluation": on_evaluation}
    callbacks = Callbacks(**{event: function for event, function in given.items() if function is not None})
    screen = Screen(ranks.is_main)
    ownership = Ownership()
    state, comm = State(ranks, ownership), None
    with StopRequest(config.run.max_seconds) as stop:
        try:
            resolved = resolve(config, ranks)
            with stop.at_once():  # other ranks may never come
                comm = connect(ranks, cpu_offload=config.run.cpu_offload)
            stop.store = comm.store
            try:
                if instead is not None and (
                    reason := comm.from_main(
                        "the hub", lambda: unavailable(config.model.model, data_name(config.data.data))
                    )
                ):
                    screen.banner(
                        f"{reason}: running the embedded model and data instead, as --tiny does.\n"
                        "To run your own: --model DIR --data FILE"
                    )
                    resolved = resolve(instead(), ranks)
                status = _run(resolved, name, comm, stop, screen, state, callbacks)
                state.write(status)
            except Exception as error:
                if not isinstance(error, Stopped):
                    post(error, comm)
                raise
            finally:
                _disconnect(comm)
        except Stopped as reason:
            screen.say(f"stopped by {reason} before training began: nothing to save")
            status = "stopped"
            with suppress(ValueError):  # a full disk: the next start finds `running`, and resumes as well
                state.write(status)
        except Exception as error:
            return _failed(error, ranks, comm, state, stop)
        finally:
            ownership.release()
    return STOPPED if status == "stopped" and ranks.world_size == 1 else DONE


def _failed(error: Exception, ranks: Ranks, comm: Communicator | None, state: State, stop: StopRequest) -> int:
    """Print why the run ends and mark its folder; returns the exit code. Called by each rank that fails."""
    error = expected(error)
    state.failed()
    own, mistake, first, why = True, isinstance(error, (ValueError, OSError)), False, text_of(error)
    ended = lambda: stop.reason is not None  # noqa: E731
    if comm is not None and ranks.world_size > 1:
        own, first = tell(error, comm, ended)
        why = cause(error, comm)
        if first and not ranks.is_main:
            state.failed(in_place_of_main=True)
    elif mistake:
        print_error(error, ranks.is_main, shared=False, ended=ended)
    state.because(why, in_place_of_main=first)
    if own and not mistake:
        traceback.print_exc()
    return MISTAKE if own and mistake else FAILED


def _run(
    resolved: Resolved,
    name: str,
    comm: Communicator,
    stop: StopRequest,
    screen: Screen,
    state: State,
    callbacks: Callbacks,
) -> str:
    """The run, once the processes are connected; returns how it ended. Called by all ranks."""
    started = time.monotonic()

    # 1. The base's files and the data: read by every rank for itself, so nothing large travels.
    start = begin(resolved, name, comm, stop, screen)
    resolved, config, ranks = start.resolved, resolved.config, comm.ranks
    trusted = config.model.trust_remote_code
    task = resolved.task
    tokenizer = comm.each("tokenizer", lambda: task.tokenizer(start.base, trust_remote_code=trusted))
    crew = Crew(comm, screen.bar, stop.before_training)
    samples = task.read_together(config, tokenizer, resolved.cache, crew)
    if task.text:
        embedding, largest = start.bare.get_input_embeddings().weight.shape[0], int(samples.train.ids.max())
        comm.together("data", lambda: check_ids(tokenizer, largest, embedding, labels=task.labels))
    batches_of_run = global_batches(config, samples.train, ranks.world_size, flat=resolved.joins)
    comm.from_main("memory", lambda: check_run(resolved, start.base, start.bare, batches_of_run))
    steps = resolved.steps(len(batches_of_run.rows))
    comm.together("the factors", stop.before_training)

    # 2. What is trained; and whether this folder holds a part of the run already, or all of it.
    plan = _plan(start, samples.train, tokenizer, steps)
    output, resume = prepare(config, start.output, plan.identity, steps, comm, state.ownership)
    start, state.folder = replace(start, output=output), output
    if resume is not None and comm.from_main("state", lambda: finished(config, start.output, resume, steps)):
        screen.say(f"{start.output} is already finished at step {resume.step}: nothing to do")
        return "finished"
    comm.from_main("state", lambda: _mark_running(start, state))

    # 3. The factors of our own methods, by all ranks together, and the model.
    if plan.factoring.requests:
        plan = plan._replace(factoring=_factor(start, plan.factoring))
    check_base = comm.each("base model", lambda: watch(start.base))
    model = comm.each("model", lambda: _load(start, plan), SLOW_S)
    engine = comm.each("engine", lambda: _engine(start, model), SLOW_S)
    identity = comm.each("the factors", lambda: factoring.identify_factors(model, plan.identity, resume))
    if task.text:
        check_context(config, model.config, context_length(model))
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if task.text and not task.labels:
        ids = samples.train.distinct_ids().to(resolved.device)
        comm.each("attention", lambda: check_causal(base, engine.forward, ids))
    elif task.text:
        two = resolved.task.collate(samples.train, [0, len(samples.train) - 1], Layout(pad_id=tokenizer.pad_token_id))
        comm.each("texts", lambda: check_labels(base, engine.forward, on_device(two, resolved.device)))
    packed_as = _layout(start, engine, samples)
    if config.model.compile:
        from launcher.training.compiled import compile_layers  # torch's compiler takes a second to import

        comm.each("compile", lambda: compile_layers(base))
    batches_of_run = replace(batches_of_run, flat=Layout(**packed_as._asdict()).flat)
    introduce(start, identity, samples, engine, steps, batches_of_run.token_share())

    # 4. Train.
    trackers = open_trackers(config.run.trackers, start.output, as_dict(config)) if ranks.is_main else []
    training = Training(
        config=config, task=task, engine=engine, tokenizer=tokenizer,
        forward=HeadLoss(model, engine.forward) if task.text else engine.forward,
        samples=samples, batches=batches_of_run, steps=steps, packed_as=packed_as, device=resolved.device,
        output=start.output, identity=identity, comm=comm, stop=stop, screen=screen, trackers=trackers,
        callbacks=callbacks, ownership=state.ownership, check_base=check_base, schedule=schedule_of(model),
    )  # fmt: skip
    model.train()
    if resume is not None:
        screen.say(f"resuming from {resume.folder} at step {resume.step} of {steps}")
    status, last = train(training, resume)
    for tracker in trackers:
        tracker.finish()
    if training.schedule is not None:
        screen.say(training.schedule.summary())

    # 5. Report.
    if status == "stopped":
        again = "run the same command again" + ("" if config.run.output else f" with --output {start.output}")
        screen.say(f"stopped by {stop.reason or 'another rank'}; every step is saved. To resume, {again}")
    else:
        whole = engine.whole_state()
        comm.from_main("owner", state.ownership.check)

        def add_files(folder: Path) -> None:
            task.add_files(samples, tokenizer, folder)

        def save() -> str:
            total = sum(tensor.nbytes for tensor in whole.values())
            with screen.bar("saving", total, unit="bytes", brief=True) as show:
                return str(save_final(model, whole, start.output, config, add_files, show))

        saved = comm.from_main("adapter", save, SLOW_S)
        state.write("finished")  # before the report, which shows it
        begun = resume.step if resume is not None else 0
        conclude(training, Path(saved), begun, last, time.monotonic() - started)
    return status


def _mark_running(start: Start, state: State) -> None:
    state.write("running")
    with disk_errors("the control file", start.output, "give --output elsewhere"):
        start.stop.watch(start.output / "control")


class _Plan(NamedTuple):
    """What is trained, and of what it is made."""

    factoring: Factoring  # the adapter and what it is made of
    head: dict[str, Any] | None  # settings of a classification head
    identity: dict[str, Any]  # a run with another identity is another run


def _plan(start: Start, train_data: Encoded, tokenizer: Any, steps: int) -> _Plan:
    resolved, comm, base = start.resolved, start.comm, start.base
    config, how, cache = resolved.config, resolved.how, resolved.cache
    head = resolved.task.head(train_data, tokenizer)
    # a copy, since PEFT completes it in place
    adapter: Any = comm.each("schedule", lambda: for_steps(copy.deepcopy(resolved.adapter), steps))
    labels_model: Any = None
    if head is not None:
        plain = replace(config.model, quantize="none")
        labels_model = comm.each("head", lambda: bare_skeleton(plain, base, adapter, **how, head=head))
        comm.each("head", lambda: check_own_head(labels_model, base, head))
    known = start.bare if labels_model is None else labels_model
    if adapter is not None and hasattr(adapter, "exclude_modules"):
        more = comm.each("targets", lambda: leave_out(known, config.adapter, labels=head is not None))
        adapter.exclude_modules = [*config.adapter.exclude, *more] or None
    requested = factoring.request_factors(config, adapter, base, resolved.dtype, comm, known)
    identity = {
        "base": same_everywhere(
            comm,
            f"the base {base}",
            lambda: fingerprint(list_tensors(base), cache) if comm.ranks.local_rank == 0 else None,
        ),
        "adapter": as_dict(config.adapter),
        "dtype": resolved.dtype,
        "quantize": config.model.quantize,
        "data": same_everywhere(comm, f"what {data_name(config.data.data)} gives", train_data.digest),
        "packing": config.data.packing,
        "batch_size": config.optimizer.batch_size,
        "seed": config.optimizer.seed,
    }
    completed = factoring.complete(
        requested, resolved, train_data, identity, comm,
        load=lambda: build(config.model, base, None, factors=lambda name: None, device=resolved.device, **how),
        pad_id=padding_id(tokenizer), labels_model=labels_model,
        converted=any(info.conversion is not None for info in known.stored.values()),
    )  # fmt: skip
    return _Plan(completed, head, identity)


def _factor(start: Start, planned: Factoring) -> Factoring:
    """Make the factors that the cache lacks; returns the plan with their ranks in the adapter's config."""
    with start.screen.bar("factors", len(planned.requests)) as bar:

        def progress(done: int, total: int, weight: str) -> None:
            bar(done, weight)
            start.stop.before_training()

        made, factored = factoring.make_factors(planned, start.resolved, start.comm, progress)
    for line in factoring.summary(factored, start.resolved.cache):
        start.screen.say(line)
    return made


def _load(start: Start, plan: _Plan) -> Any:
    """The model with its adapter: whole, or this rank's part of it, as the engine has it."""
    resolved, cache = start.resolved, start.resolved.cache
    by_module, seals = {request.module: request for request in plan.factoring.requests}, plan.factoring.seals

    def factors(module: str, rows: slice = slice(None)) -> Any:
        return factors_of(by_module[module], cache, rows, seals.get(module)) if module in by_module else None

    start.stop.before_training()
    torch.manual_seed(resolved.config.optimizer.seed)
    with start.screen.bar("loading", 0) as bar:

        def progress(done: int, total: int) -> None:
            start.stop.before_training()
            bar(done, of=total)

        source = ModelSource(
            config=resolved.config, folder=start.base, adapter=plan.factoring.adapter,
            how={**resolved.how, "head": plan.head}, factors=factors, device=resolved.device,
            ranks=resolved.ranks, progress=progress,
        )  # fmt: skip
        return engine_class(resolved.sharding).load(source, ENGINES[resolved.sharding])


def _engine(start: Start, model: Any) -> Engine:
    resolved, config = start.resolved, start.resolved.config
    info, offload = ENGINES[resolved.sharding], config.run.cpu_offload
    return engine_class(info.name)(model, config.optimizer, resolved.ranks, info, cpu_offload=offload)


def _layout(start: Start, engine: Engine, samples: Samples) -> Way:
    """How the rows of a batch are laid out for this model. Called by all ranks."""
    resolved = start.resolved
    if resolved.task.labels or not resolved.task.text:
        return Way()
    if resolved.config.data.packing:
        return _packed_as(start, engine, samples)
    if resolved.task.flattens and resolved.attention in (FLASH, varlen.NAME):
        try:
            return _packed_as(start, engine, samples)
        except ValueError as error:
            log.warning("batches are padded, since this model does not keep flattened samples apart (%s)", error)
    base: Any = getattr(engine.model, "get_base_model", lambda: engine.model)()
    ids = samples.train.distinct_ids().to(resolved.device)
    config = resolved.config
    if resolved.joins:
        joined.register()
        apart = start.comm.each("padding", lambda: check_joined(base, engine.forward, ids, config.data.max_length))
        if not apart:
            return Way("joined")
        log.info("batches are padded, since %s", apart)
    masked = start.comm.each("padding", lambda: needs_padding_mask(base, engine.forward, ids))
    return Way(padding_mask=masked)


def _packed_as(start: Start, engine: Engine, samples: Samples) -> Way:
    """The layout in which this model keeps packed samples apart. Called by all ranks."""
    resolved, longest = start.resolved, start.resolved.config.data.max_length
    base: Any = getattr(engine.model, "get_base_model", lambda: engine.model)()

    def collate(tokens: Sequence[Tensor], way: Way | None) -> dict[str, Any]:
        lengths = torch.tensor([len(part) for part in tokens])
        ids, offsets = torch.cat(list(tokens)).int(), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        known = Encoded(ids, torch.ones(len(ids), dtype=torch.bool), offsets, lengths, samples.train.report)
        rows: Any = [list(range(len(tokens)))] if way else [0]
        batch = batches.collate(known, rows, pad_id=0, packing=way is not None, **(way or Way())._asdict())
        del batch["labels"]
        return on_device(batch, resolved.device)

    ways = candidates(base.config, resolved.attention, longest)
    ids = samples.train.distinct_ids()
    return start.comm.each("packing", lambda: check_packing(base, engine.forward, ways, collate, ids, longest))


def quiet_libraries() -> None:
    """No progress bars and notes of libraries between ours; warnings stay."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _disconnect(comm: Communicator) -> None:
    """Leave together: gloo sometimes aborts a process whose peers are still talking."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
