"""The engine of `loldu serve`: a base, its adapters, and requests that share forward passes.

One thread runs the model (batching.py). Others submit, cancel, and add or remove adapters; `emit` is called from the
engine's thread. A failure of that thread ends every request with its reason, and later ones are refused.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from adapters.many import Adapter, ManyAdapters
from launcher.inference.adapter_folder import adapter_config
from launcher.inference.load import load
from launcher.inference.sources import find
from launcher.models.files import context_length
from launcher.models.generation import stop_tokens
from launcher.models.same_tokenizer import BaseTokenizer
from launcher.serving.batching import Batches, Manager, Router, quiet_library
from launcher.serving.cache_size import SHARE, cache_size, free_bytes
from launcher.serving.choosing import Choice
from launcher.serving.requests import Finish, Request, Sampling, Token
from launcher.serving.suitable import PROMPTS, TOKENS, Made, check_attention, check_same, continuation, try_adapter
from launcher.serving.texts import Text

log = logging.getLogger(__name__)
PAGE = 32  # tokens
RUNNING = {"cpu": 64, "cuda": 256}  # requests in a batch; attention's cost grows with their number squared
BATCH_TOKENS = {"cpu": 256, "cuda": 2048}  # of a forward pass: a longer prompt is read in several
LONGEST = 2**20  # tokens of prompt and answer, for models without their own limit
END_S = 10.0  # for the thread to end


@dataclass
class Answer:
    """A request that is being answered."""

    request: Request
    adapter: Adapter | None
    emit: Callable[[Token], None]
    text: Text
    max_tokens: int
    seed: int
    made: int = 0
    choice: Choice | None = None
    ending: tuple[Finish, str | None] | None = None  # set by another thread; the engine's says it

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling


@dataclass
class BatchedEngine:
    """`launcher.serving.requests.Engine`. context_length: the model's, or less if memory limits the cache.

    cache_bytes: memory for the cache; None takes a share of what is free on the device.
    """

    model: Any
    tokenizer: Any
    base_id: str
    cache_bytes: int | None = None
    running: int | None = None
    batch_tokens: int | None = None
    many: ManyAdapters = field(init=False)

    def __post_init__(self) -> None:
        quiet_library()
        self.model.eval().requires_grad_(False)
        self.many = ManyAdapters(self.model)
        self._own = BaseTokenizer(self.tokenizer)
        device, config = self.model.device, self.model.config.get_text_config()
        check_attention(config)
        self._prompts = [[token % config.vocab_size for token in prompt] for prompt in PROMPTS]
        self._alone = [continuation(self.model, prompt) for prompt in self._prompts]  # before the attention is changed
        kind = device.type if device.type in RUNNING else "cuda"
        running = self.running or RUNNING[kind]
        batch_tokens = max(self.batch_tokens or BATCH_TOKENS[kind], running)
        budget = self.cache_bytes if self.cache_bytes is not None else int(SHARE[kind] * free_bytes(device))
        context = min(context_length(self.model), LONGEST)
        self.size = cache_size(
            config, self.model.dtype, context=context, running=running, batch_tokens=batch_tokens, page=PAGE,
            budget=budget,
        )  # fmt: skip
        self.context_length = min(context, self.size.tokens)
        if self.context_length < context:
            log.warning(
                "memory for the cache (%.3g GB) limits prompt and answer to %d tokens; the model allows %d",
                budget / 1e9, self.context_length, context,
            )  # fmt: skip
        self._stop_ids = stop_tokens(self.model, self.tokenizer)
        self._answers: dict[str, Answer] = {}
        self._lock = Lock()  # of _answers and _refusing
        self._trying = Lock()  # of the model, while the thread that runs it waits
        self._refusing: str | None = "the engine has not been started"
        self._made = 0
        self._manager = Manager(
            self.model, self.many, Batches(self._answers.get, self._orphan), Router(self._deliver), size=self.size,
            batch_tokens=batch_tokens, running=running, stop_ids=self._stop_ids, each_round=self._say_endings,
            ended=self._ended,
        )  # fmt: skip

    def start(self) -> None:
        """Start the thread. Raises ValueError if this model's answers in a packed batch are not those it gives alone:
        its code does not support continuous batching."""
        self._refusing = None
        self._manager.start()
        try:
            check_same(self.model.config.model_type, self._packed(), self._alone)
        except ValueError:
            self.stop(0)
            raise

    def stop(self, drain_s: float) -> None:
        """Refuse new requests, wait for those that run, cancel them after drain_s seconds, and end the thread."""
        with self._lock:
            self._refusing = self._refusing or "the engine is stopping"
        until = time.monotonic() + drain_s
        while self._answers and self._manager.is_running() and time.monotonic() < until:
            time.sleep(0.02)
        for answer in list(self._answers.values()):
            self._end(answer, "cancelled")
        until = time.monotonic() + END_S
        while self._answers and self._manager.is_running() and time.monotonic() < until:
            time.sleep(0.01)
        if self._manager.is_running():
            self._manager.stop(block=True, timeout=END_S, hard_stop=True)

    def models(self) -> list[str]:
        return [self.base_id, *list(self.many.adapters)]

    def add_adapter(self, name: str, folder: Path) -> None:
        if name == self.base_id:
            raise ValueError(f"{name} is the base's name: give the adapter's folder another one")
        if reason := self._own.difference(folder):
            raise ValueError(
                f"it has a tokenizer of its own ({reason}), and a server has the base's alone. Serve it by itself: "
                f"loldu merge {folder} --out MERGED, then loldu serve MERGED. If it was trained with the base's "
                "tokenizer, remove tokenizer* from its folder"
            )
        with suppress(OSError):  # what is missing, `adapter_config` says
            if self.many.add_known(name, folder) is not None:
                return
        adapter_config(Path(folder))  # its file is whole, finite, and no pickle
        added = self.many.add(name, folder)
        try:
            pause = self._manager.pause() if self._manager.is_running() else nullcontext()
            with self._trying, pause:
                try_adapter(self.model, self.many, added, self._prompts[0])
        except ValueError:
            self.many.remove(name)
            raise
        if added.lora is not None:
            log.info("adapter %s has maps of its own, as LoRA: it adds time to each batch that it is in", name)

    def remove_adapter(self, name: str) -> None:
        # Before its numbers become zero: a token of the base must not be delivered as its own.
        self._end_answers_of(name)
        self.many.remove(name)
        self._end_answers_of(name)  # those that came in between

    def submit(self, request: Request, emit: Callable[[Token], None]) -> None:
        adapter = None
        if request.model != self.base_id:
            try:
                adapter = self.many.adapters[request.model]
            except KeyError:
                raise KeyError(f"there is no model {request.model}") from None
        room = self.context_length - len(request.prompt)
        if room < 1 or not request.prompt:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens; with at least one of an answer, at most "
                f"{self.context_length} fit"
            )
        if request.sampling.max_tokens < 1:
            raise ValueError(f"max_tokens is at least 1, got {request.sampling.max_tokens}")
        vocabulary = self.model.config.get_text_config().vocab_size
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
            raise ValueError(f"the prompt has token ids outside of the vocabulary, 0 to {vocabulary - 1}")
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        text = Text(self.tokenizer, request.sampling.stop)
        answer = Answer(request, adapter, emit, text, min(request.sampling.max_tokens, room), seed)
        with self._lock:
            if self._refusing:
                raise RuntimeError(self._refusing)
            if request.id in self._answers:
                raise ValueError(f"there is a request {request.id} already")
            self._answers[request.id] = answer
        self._manager.add_request(
            list(request.prompt), request_id=request.id, max_new_tokens=answer.max_tokens, streaming=True
        )
        if adapter is not None and self.many.adapters.get(request.model) is not adapter:  # removed meanwhile
            self._end(answer, "error", f"adapter {request.model} was removed")

    def cancel(self, request_id: str) -> None:
        if (answer := self._answers.get(request_id)) is not None:
            self._end(answer, "cancelled")

    def stats(self) -> Mapping[str, float]:
        return {
            **self._manager.stats(),
            "tokens": self._made,
            "forward_passes": self._manager.forward_passes,
            "tokens_read": self._manager.tokens_seen,  # prompts and answers, as they went through the model
            "adapters": len(self.many),
            "adapter_bytes": sum(self.many.memory().values()),
            "cache_bytes": self.size.bytes,
        }

    def _end(self, answer: Answer, finish: Finish, error: str | None = None) -> None:
        """Ask the engine's thread to end an answer."""
        answer.ending = answer.ending or (finish, error)
        self._manager.cancel_request(answer.id)

    def _end_answers_of(self, name: str) -> None:
        for answer in list(self._answers.values()):
            if answer.adapter is not None and answer.adapter.name == name:
                self._end(answer, "error", f"adapter {name} was removed")

    def _say_endings(self) -> None:
        """In the engine's thread, between forward passes."""
        for answer in [each for each in list(self._answers.values()) if each.ending is not None]:
            assert answer.ending is not None
            self._finish(answer, *answer.ending)

    def _orphan(self, request_id: str) -> None:
        made = self._manager.batch_processor
        if made is not None:
            made.scheduler.set_request_cancellation(request_id)

    def _deliver(self, request_id: str, token: int | None, finished: bool, error: str | None) -> None:
        """In the engine's thread: one token of an answer, or why it failed."""
        answer = self._answers.get(request_id)
        if answer is None or answer.ending is not None:
            return
        if token is None or error is not None:
            self._finish(answer, "error", error or "the engine made no token")
            return
        choice = answer.choice or Choice(token)
        if not choice.ok:
            self._finish(answer, "error", f"the logits of {answer.request.model} are NaN or infinite")
            self._orphan(request_id)
            return
        answer.made += 1
        self._made += 1
        ends = token in self._stop_ids
        new = answer.text.end() if ends else answer.text.add(token, last=finished)
        finish: Finish | None = "stop" if ends or answer.text.stopped else "length" if finished else None
        if finish is not None:
            with self._lock:
                del self._answers[request_id]
            if not finished:
                self._orphan(request_id)
        self._emit(answer, Token(token, new, choice.logprob, choice.top, finish))

    def _finish(self, answer: Answer, finish: Finish, error: str | None = None) -> None:
        with self._lock:
            self._answers.pop(answer.id, None)
        self._emit(answer, Token(-1, answer.text.end(), finish=finish, error=error))

    def _emit(self, answer: Answer, token: Token) -> None:
        try:
            answer.emit(token)
        except Exception as error:  # a receiver that is gone must not stop the others' answers
            log.warning("request %s: its receiver failed (%s)", answer.id, error)
            if self._answers.pop(answer.id, None) is not None:
                self._orphan(answer.id)

    def _ended(self, error: BaseException | None) -> None:
        """The last thing in the engine's thread: no answer stays open."""
        with self._lock:
            if error is not None or not self._refusing:
                self._refusing = f"the engine has failed: {error}"
            left = list(self._answers.values())
        if error is not None:
            log.error("the engine has failed: %s", error)
            log.debug("where it failed", exc_info=error)
        for answer in left:
            self._finish(answer, *(answer.ending or ("error", self._refusing)))

    def _packed(self) -> list[Made]:
        """The continuations of the prompts that are tried at the start, in shared batches."""
        found: list[list[Token]] = [[] for _ in self._prompts]
        try:
            with self._manager.pause():  # so that they begin together
                for place, prompt in enumerate(self._prompts):
                    request = Request(f"check-{place}", self.base_id, tuple(prompt), Sampling(TOKENS, logprobs=0))
                    self.submit(request, found[place].append)
            while self._answers and self._manager.is_running():
                time.sleep(0.002)
        except RuntimeError as error:
            found[0].append(Token(-1, "", finish="error", error=self._refusing or str(error)))
        if wrong := next((token.error for tokens in found for token in tokens if token.error), None):
            raise ValueError(f"models of type {self.model.config.model_type} cannot be served: {wrong}")
        self._made = 0
        return [[(token.id, token.logprob or 0.0) for token in tokens] for tokens in found]


def load_engine(
    model: str,
    *,
    dtype: str = "auto",
    quantize: Any = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[BatchedEngine, Path]:
    """The engine for a base model (folder, or hub name in the local cache), and the base's folder; not started.

    settings are `BatchedEngine`'s. Raises ValueError for an adapter, and as `find` and `load` do.
    """
    source = find(model, trust_remote_code=trust_remote_code)
    if source.adapter is not None:
        raise ValueError(
            f"{model} is an adapter: give its base ({source.base_name}) as the model, and the folder in which the "
            "adapter's folder is as --adapters"
        )
    loaded, tokenizer = load(source, dtype=dtype, device=device, quantize=quantize)
    return BatchedEngine(loaded, tokenizer, base_id(source.base.resolve()), **settings), source.base


def base_id(folder: Path) -> str:
    """The model id of a base: its folder's name, or for a folder of the hub's cache (models--ORG--NAME) ORG/NAME."""
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name
