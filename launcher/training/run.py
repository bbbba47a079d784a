"""From a config to a finished run folder: check, connect, read, factor, build, train, tell. The one place that acts."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from transformers import AutoConfig

from adapters.checkpoint_files import list_tensors
from adapters.config import FactorConfig, LoRASBConfig
from launcher.availability import unavailable
from launcher.config import Config, as_dict
from launcher.data import batches, encode, records, templates
from launcher.data.tokenised import encode_once
from launcher.engines.choose import check_sharding
from launcher.engines.engine import Engine, ModelSource, engine_class
from launcher.engines.registry import ENGINES
from launcher.exit_codes import DONE, FAILED, MISTAKE, STOPPED
from launcher.factorization import cache
from launcher.factorization.make import FactorRequest, factors_of, fingerprint
from launcher.factorization.share import factorize
from launcher.factorization.targets import targets_of
from launcher.models.build import build, choose_attention, choose_dtype, settle_base
from launcher.models.files import base_folder, context_length, load_tokenizer
from launcher.models.quantize import base_size, check_base, size
from launcher.models.skeleton import bare_skeleton, stored_base
from launcher.processes import Communicator, Ranks, Stopped, connect, same_everywhere, say_mistake
from launcher.tasks import label
from launcher.tasks.label import Labelled
from launcher.training import checkpoint
from launcher.training.first_gradients import FirstStep, check_frozen
from launcher.training.folder import State, finished, prepare, save_final
from launcher.training.loop import Job, Question, train, write_answers
from launcher.training.memory import check_memory
from launcher.training.methods import odd_rate, peft_config
from launcher.training.report import Screen, open_trackers, read_events
from launcher.training.resolve import check, check_context
from launcher.training.stop import StopRequest

log = logging.getLogger(__name__)

TOKENISE_S = 6 * 3600.0
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "deepspeed", "bitsandbytes")


def run(config: Config, name: str, instead: Callable[[], Config] | None = None) -> int:
    """One training run under whatever started this process; returns its exit code.

    Where instead is given, and the config's base or data cannot be had, what it returns is run in the config's place. A
    single process that was stopped and saved returns 75 (run me again); under a launcher every rank returns 0 then,
    and the run folder's `state` tells.
    """
    try:
        ranks = Ranks.from_environment()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    quiet_libraries()
    screen = Screen(ranks.is_main)
    state, connected = State(ranks, None), ranks.world_size == 1
    with StopRequest(config.run.max_seconds) as stop:
        try:
            check(config, ranks)
            comm = connect(ranks, cpu_offload=config.run.cpu_offload)
            stop.store, connected = comm.store, True
            try:
                if instead is not None and (
                    reason := comm.from_main("the hub", lambda: unavailable(config.model.model, config.data.data))
                ):
                    screen.banner(
                        f"{reason}: running the embedded model and instructions instead, as --tiny does.\n"
                        "To run your own: --model DIR --data FILE"
                    )
                    config = instead()
                    check(config, ranks)
                status = _run(config, name, comm, stop, screen, state)
            finally:
                _disconnect(comm)
        except Stopped as reason:
            screen.say(f"stopped by {reason} before training began: nothing to save")
            status = "stopped"
        except (ValueError, OSError) as error:
            state.write("failed")
            # Once connected, a mistake of one rank is a ValueError on all.
            shared = connected and isinstance(error, ValueError)
            say_mistake(error, ranks.is_main, shared=shared, ended=lambda: stop.reason is not None)
            return MISTAKE
        except Exception:
            state.write("failed")
            traceback.print_exc()
            return FAILED
    state.write(status)
    return STOPPED if status == "stopped" and ranks.world_size == 1 else DONE


def _run(config: Config, name: str, comm: Communicator, stop: StopRequest, screen: Screen, state: State) -> str:
    """The run, once the processes have met; how it ended. Called by all ranks."""
    ranks, started = comm.ranks, time.monotonic()

    # 1. The base's files and the data: read by every rank for itself, so nothing large travels.
    start = _settle(config, name, comm, stop, screen)
    trusted = config.model.trust_remote_code
    tokenizer = comm.each("tokenizer", lambda: load_tokenizer(start.base, trust_remote_code=trusted))
    samples = _read_in_turn(start, tokenizer)
    rows = _rows(config, samples.train)
    steps = config.optimizer.max_steps or math.ceil(config.optimizer.epochs * len(rows) / config.optimizer.batch_size)
    comm.together("the factors", stop.before_training)

    # 2. What is trained; and whether that has begun, or ended, in this folder already.
    plan = _plan(start, samples.train, tokenizer)
    resume = prepare(config, start.output, plan.identity, comm)
    state.folder = start.output
    if resume is not None and comm.from_main("state", lambda: finished(config, start.output, resume, steps)):
        screen.say(f"{start.output} is already finished at step {resume.step}: nothing to do")
        return "finished"
    state.write("running")
    if ranks.is_main:
        stop.watch(start.output / "control")

    # 3. The factors of our own methods, by all ranks together, and the model.
    if plan.requests:
        _factor(start, plan)
    model = comm.each("model", lambda: _load(start, plan))
    engine = comm.each("engine", lambda: _engine(start, model))
    comm.together("the factors", lambda: check_frozen(model, plan.identity, resume))
    check_context(config, model.config, context_length(model))
    _introduce(start, plan, samples, engine, steps)

    # 4. Train.
    trackers = open_trackers(config.run.trackers, start.output, as_dict(config)) if ranks.is_main else []
    job = Job(
        config=config, engine=engine, tokenizer=tokenizer, train=samples.train, rows=rows, held_out=samples.held_out,
        questions=samples.questions, steps=steps, attention=start.attention, device=start.device, output=start.output,
        identity=plan.identity, comm=comm, stop=stop, screen=screen, trackers=trackers,
    )  # fmt: skip
    model.train()
    if resume is not None:
        screen.say(f"going on from {resume.folder} at step {resume.step} of {steps}")
    status = train(job, resume)
    for tracker in trackers:
        tracker.finish()

    # 5. Tell.
    if status == "stopped":
        again = "the same command" + ("" if config.run.output else f" with --output {start.output}")
        screen.say(f"stopped by {stop.reason or 'another rank'}; every step is saved. To go on, type {again}")
    else:
        whole = engine.whole_state()
        saved = comm.from_main("adapter", lambda: str(save_final(model, whole, start.output, config)))
        _tell(job, Path(saved), time.monotonic() - started)
    return status


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What is settled before anything large is read."""

    config: Config
    comm: Communicator
    stop: StopRequest
    screen: Screen
    device: torch.device
    dtype: str
    attention: str
    attention_reason: str
    sharding: str
    output: Path
    base: Path  # the base model's folder
    bare: Any  # the model on the meta device, without adapter
    cache: Path  # folder of factors and of tokenised data

    @property
    def how(self) -> dict[str, Any]:
        """How the base computes."""
        return {"dtype": self.dtype, "attention": self.attention}


class _Samples(NamedTuple):
    train: encode.Encoded
    held_out: encode.Encoded | None
    questions: list[Question]
    template: str | None  # labels are asked for without one


class _Plan(NamedTuple):
    """What is trained, and of what it is made."""

    adapter: Any  # a PEFT config; None for full fine-tuning
    head: dict[str, Any] | None  # of a model that labels
    requests: list[FactorRequest]  # none for methods that are not ours
    identity: dict[str, Any]  # what makes this run another one, where it changes
    first_step: FirstStep | None  # LoRA-SB's gradients


def _settle(config: Config, name: str, comm: Communicator, stop: StopRequest, screen: Screen) -> _Start:
    ranks, on_gpu = comm.ranks, torch.cuda.is_available()
    dtype = choose_dtype(config.model.dtype)
    attention, reason = choose_attention(config.model.attention, on_gpu=on_gpu, dtype=dtype)
    named = config.run.output or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    output = Path(comm.from_main("run folder", lambda: named))
    base = Path(comm.together("base model", lambda: str(base_folder(config.model.model, "--model ")))[0])
    comm.together("base model", lambda: check_base(base, config.model.quantize))
    labels = bool(config.data.text_columns)
    bare, attention, reason = comm.each(
        "base model",
        lambda: settle_base(config.model, base, dtype=dtype, attention=attention, reason=reason, labels=labels),
    )
    trusted = config.model.trust_remote_code
    comm.together(
        "base model", lambda: check_context(config, AutoConfig.from_pretrained(base, trust_remote_code=trusted))
    )
    sharding = check_sharding(config.run.sharding, ranks, config.run.shard_size)
    comm.together("base model", lambda: check_memory(config, base, dtype, sharding, ranks))
    return _Start(
        config=config,
        comm=comm,
        stop=stop,
        screen=screen,
        device=torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu"),
        dtype=dtype,
        attention=attention,
        attention_reason=reason,
        bare=bare,
        sharding=sharding,
        output=output,
        base=base,
        cache=Path(config.run.cache) if config.run.cache else cache.default_folder(),
    )


def _read_in_turn(start: _Start, tokenizer: Any) -> _Samples:
    """One process of each machine tokenises, unless it is done already; the others then find it in the cache."""
    comm = start.comm
    found: list[_Samples] = []

    def read(mine: bool) -> None:
        if mine:
            found.append(_read_data(start.config, tokenizer, start.cache))

    comm.together("data", lambda: read(comm.ranks.local_rank == 0), timeout_s=TOKENISE_S)
    comm.together("data", lambda: read(comm.ranks.local_rank != 0), timeout_s=TOKENISE_S)
    return found[0]


def _plan(start: _Start, train_data: encode.Encoded, tokenizer: Any) -> _Plan:
    config, comm, base = start.config, start.comm, start.base
    classes = train_data.classes if isinstance(train_data, Labelled) else None
    head = None if classes is None else label.head_settings(classes, tokenizer.pad_token_id)
    adapter: Any = peft_config(config.adapter, "CAUSAL_LM" if classes is None else "SEQ_CLS")
    ours = isinstance(adapter, FactorConfig)
    labels_model: Any = None
    if head is not None:
        plain = replace(config.model, quantize="none")
        labels_model = comm.each("head", lambda: bare_skeleton(plain, base, adapter, **start.how, head=head))
    requests: list[FactorRequest] = []
    if ours:
        requests = comm.each(
            "targets",
            lambda: targets_of(
                base,
                config.adapter.targets,
                config.adapter.exclude,
                config.adapter.rank,
                dtype=start.dtype,
                modules_to_save=config.adapter.modules_to_save,
                model=start.bare if labels_model is None else labels_model,
                **adapter.factor_options(),
            ),
        )
    identity = {
        "base": same_everywhere(
            comm,
            f"the base {base}",
            lambda: fingerprint(list_tensors(base), start.cache) if comm.ranks.local_rank == 0 else None,
        ),
        "adapter": as_dict(config.adapter),
        "dtype": start.dtype,
        "quantize": config.model.quantize,
        "data": same_everywhere(comm, f"what {config.data.data} gives", train_data.digest),
        "packing": config.data.packing,
        "batch_size": config.optimizer.batch_size,
        "seed": config.optimizer.seed,
    }
    if ours and head is None:
        adapter.base_fingerprint = identity["base"]
    elif ours:  # a head for words is no part of this base, and neither is a new one for labels
        of_base = stored_base(labels_model)
        adapter.base_fingerprint = comm.from_main("fingerprint", lambda: fingerprint(of_base, start.cache))
    first_step = None
    if isinstance(adapter, LoRASBConfig):
        adapter.step = adapter.step or config.optimizer.learning_rate
        first_step = FirstStep(
            config, adapter, train_data, identity, pad_id=tokenizer.pad_token_id or 0,
            load=lambda: build(config.model, base, None, factors=lambda name: None, device=start.device, **start.how),
        )  # fmt: skip
        requests = [replace(request, gradients=first_step.digest) for request in requests]
    return _Plan(adapter, head, requests, identity, first_step)


def _factor(start: _Start, plan: _Plan) -> None:
    """Have the factors in the cache, and their ranks in the adapter's config."""
    config, screen = start.config, start.screen
    with screen.bar("factors", len(plan.requests)) as bar:

        def progress(done: int, total: int, weight: str) -> None:
            bar(done, weight)
            start.stop.before_training()

        factored = factorize(
            plan.requests,
            start.cache,
            start.comm,
            progress,
            verify_base=config.run.verify_base,
            per_node=config.run.cache_per_node,
            gradient_of=plan.first_step,
        )
    if plan.first_step is not None:
        plan.first_step.free()
    for module, entry in factored.items():
        plan.adapter.note_rank(module, entry.rank)
    made = sum(entry.made for entry in factored.values())
    screen.say(f"factors of {len(factored)} weights: {made} made, {len(factored) - made} from {start.cache}")
    if len(ranks_made := sorted({entry.rank for entry in factored.values()})) > 1:
        screen.say(f"their ranks: {ranks_made[0]} to {ranks_made[-1]}")


def _load(start: _Start, plan: _Plan) -> Any:
    """The model with its adapter: whole, or this rank's part of it, as the engine has it."""
    by_module = {request.module: request for request in plan.requests}

    def factors(module: str, rows: slice = slice(None)) -> Any:
        return factors_of(by_module[module], start.cache, rows) if module in by_module else None

    start.stop.before_training()
    torch.manual_seed(start.config.optimizer.seed)
    with start.screen.bar("loading", 0) as bar:

        def progress(done: int, total: int) -> None:
            start.stop.before_training()
            bar(done, of=total)

        source = ModelSource(
            config=start.config, folder=start.base, adapter=plan.adapter, how={**start.how, "head": plan.head},
            factors=factors, device=start.device, ranks=start.comm.ranks, progress=progress,
        )  # fmt: skip
        return engine_class(start.sharding).load(source, ENGINES[start.sharding])


def _engine(start: _Start, model: Any) -> Engine:
    config, info = start.config, ENGINES[start.sharding]
    return engine_class(start.sharding)(
        model, config.optimizer, start.comm.ranks, info, cpu_offload=config.run.cpu_offload
    )


def _introduce(start: _Start, plan: _Plan, samples: _Samples, engine: Engine, steps: int) -> None:
    """Write config.json, complete, and say what is about to run."""
    config, ranks, say = start.config, start.comm.ranks, start.screen.say
    trained, total = sum(size(parameter) for parameter in engine.parameters.values()), base_size(engine.model)
    if ranks.is_main:
        resolved = {
            "prompt_template": samples.template, "dtype": start.dtype, "attention": start.attention,
            "attention_reason": start.attention_reason, "steps": steps, "world_size": ranks.world_size,
            "sharding": start.sharding, "base_folder": str(start.base.resolve()), "trained": trained,
            "device": torch.cuda.get_device_name(start.device) if start.device.type == "cuda" else "cpu",
        }  # fmt: skip
        whole = {"config": as_dict(config), "resolved": resolved, "identity": plan.identity, "versions": versions()}
        checkpoint.write_atomically(start.output / "config.json", json.dumps(whole, indent=2) + "\n")
    precision = start.dtype if config.model.quantize == "none" else f"{config.model.quantize} computed in {start.dtype}"
    say(f"{config.model.model}: {total:,} parameters, {trained:,} trained ({config.adapter.method}, {precision})")
    say(f"{config.data.data}: {samples.train.report}")
    processes = f"{ranks.world_size} x {start.device.type}"
    attention = f"{start.attention} ({start.attention_reason})"
    say(f"{steps} steps of {config.optimizer.batch_size} on {processes}, attention {attention}")
    if ranks.is_main and (odd := odd_rate(config.adapter, config.optimizer.learning_rate)):
        log.warning(odd)


def _read_data(config: Config, tokenizer: Any, cache_folder: Path) -> _Samples:
    if config.data.text_columns:
        rows, held_rows, classes = label.load_splits(config.data)
        encode = lambda some: label.encode(some, classes, tokenizer, config.data)  # noqa: E731
        held = encode(held_rows) if held_rows else None
        return _Samples(encode(rows), held, [], None)
    train_records, held_records = records.load_splits(config.data.data, config.data.eval_data, config.data.eval_records)
    train_data = encode_once(train_records, tokenizer, config.data, cache_folder)
    held_out = encode_once(held_records, tokenizer, config.data, cache_folder) if held_records else None
    questions = []
    conversations = "messages" in train_records[0]
    template = templates.load_template(config.data.prompt_template, tokenizer, conversations=conversations)
    if config.data.exact_match or config.run.show_samples:
        for record in held_records:
            prompt = record.get("instruction") or record["messages"][-2]["content"]
            shown = f"{prompt}\n{record['input']}" if record.get("input") else prompt
            ids = templates.prompt_ids(record, template, tokenizer)
            questions.append(Question(prompt=shown, prompt_ids=ids, expected=records.answer(record)))
    return _Samples(train_data, held_out, questions, template.name)


def _rows(config: Config, encoded: encode.Encoded) -> Sequence[Any]:
    if not config.data.packing:
        return range(len(encoded))
    order = batches.epoch_order(config.optimizer.seed, 0, len(encoded)).tolist()
    return batches.pack(encoded.lengths, order, config.data.max_length)


def _tell(job: Job, saved: Path, seconds: float) -> None:
    evaluations = [event for event in read_events(job.output / "events.jsonl") if "eval_loss" in event]
    rows = []
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        rows = [["held-out loss", f"{first['eval_loss']:.4f}", f"{last['eval_loss']:.4f}"]]
        for name in [
            name for name in last if name in first and name not in ("step", "eval_loss")
        ]:  # a resume may ask for more
            rows.append([name.replace("_", " "), f"{first[name]:.1%}", f"{last[name]:.1%}"])
        job.screen.table("Held out", ["", "before", "after"], rows)
    shown = job.questions[: job.config.run.show_samples]
    if shown:
        model: Any = job.engine.model
        model.eval()
        after, before = write_answers(job, shown), [""] * len(shown)
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                before = write_answers(job, shown)
        cells = [[q.prompt, q.expected, b, a] for q, b, a in zip(shown, before, after, strict=True)]
        job.screen.table("Answers", ["question", "expected", "before", "after"], cells)
    waited = job.clock.waited_s / max(job.clock.steps_s, 1e-9)
    job.screen.say(
        f"{job.steps} steps, {seconds:.0f} s in all ({waited:.1%} of the steps waiting for data); saved in {saved}"
    )
    if job.config.data.text_columns:
        adapted = "" if job.config.adapter.method == "full" else " and peft's PeftModel.from_pretrained"
        job.screen.say(f"It loads with AutoModelForSequenceClassification{adapted}.")
    elif job.config.adapter.method != "full":
        job.screen.say("Next, type one of:")
        job.screen.say(f"  loldu chat {job.output}")
        job.screen.say(f"  loldu merge {saved} --out {job.output / 'merged'}")
        job.screen.say(f"  loldu export-lora {saved} --out {job.output / 'lora'}")


def versions() -> dict[str, str]:
    """Of Python and the packages a run depends on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def quiet_libraries() -> None:
    """No progress bars and notes of libraries between ours; warnings stay."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _disconnect(comm: Communicator) -> None:
    """Leave together: gloo sometimes aborts a process whose peers are still talking."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
