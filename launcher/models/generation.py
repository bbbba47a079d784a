"""Answers from a model, with token ids in and out: greedy for many prompts at once, or one that is streamed.

A model's cache and padding are used if they give the tokens of full forward passes, which is tested once per model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from launcher.methods import prompt_tokens
from launcher.models.files import check_ids, context_length
from launcher.text import first_line

log = logging.getLogger(__name__)
# Relative difference of logits from those of whole forward passes that rounding explains; a state that is lost, or
# padding that is read, moves them by 0.05 and more.
CLOSE, CLOSE_IN_16_BITS = 0.01, 0.1
PROBED = 12  # tokens of a prompt that is tried


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else sampled with temperature and top_p."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens is at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature is 0 (the likeliest token) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p lies in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer; complete: the model ended it by itself; interrupted: Ctrl-C did."""

    text: str
    ids: list[int]
    complete: bool
    interrupted: bool = False


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int = 64,
    stop_ids: Sequence[int] | None = None,
    *,
    batch_size: int = 64,
    answered: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """The greedy continuation of every prompt (token ids), in order, without the token that ended it.

    stop_ids: tokens that end an answer; by default those of `stop_tokens`. An answer also ends after max_tokens, or
    when the model's context is full. Prompts of similar length share a batch and are padded on the left; the other
    prompts of a batch change an answer only through the rounding of matrix products. The model's training mode is
    restored afterwards. answered is called after each batch with how many are.
    """
    if [] in map(list, prompts):
        raise ValueError(f"prompt {list(map(list, prompts)).index([])} has no token: there is nothing to answer")
    check_known(model, tokenizer, max(map(max, prompts), default=0))
    stop = list(stop_tokens(model, tokenizer) if stop_ids is None else stop_ids)
    device, context = _device(model), room(model)
    answers: list[list[int]] = [[] for _ in prompts]
    left = [min(max_tokens, context - len(prompt)) for prompt in prompts]
    plenty = sorted((i for i in range(len(prompts)) if left[i] == max_tokens), key=lambda i: -len(prompts[i]))
    batches = [plenty[start : start + batch_size] for start in range(0, len(plenty), batch_size)]
    batches += [[i] for i in range(len(prompts)) if 0 < left[i] < max_tokens]  # a longer neighbour would pass the end
    able = abilities(model, prompts)
    if not able.padding:
        batches = [part for batch in batches for part in _of_one_length(batch, prompts)]
    settings = _settings(Sampling(max_tokens=max_tokens), stop, use_cache=able.cache)
    done = 0
    for batch in batches:
        width = len(prompts[batch[0]])
        ids = torch.tensor(
            [[settings.pad_token_id] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=device
        )
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        settings.max_new_tokens = left[batch[0]]
        with _plainly(model):
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for i, row in zip(batch, made[:, width:].tolist(), strict=True):
            answers[i] = _cut(row, stop)
        done += len(batch)
        answered(done)
    return answers


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    write: Callable[[str], Any],
) -> Answer:
    """The answer to one prompt (token ids); write is called with each new piece of its text.

    Ctrl-C ends the answer early. Raises ValueError if the prompt fills the model's context.
    """
    context = room(model)
    if len(prompt) >= context:
        raise ValueError(
            f"the prompt with its template has {len(prompt)} tokens, but the model's context is {context} and must "
            "also hold the answer: shorten the prompt"
        )
    check_known(model, tokenizer, max(prompt, default=0))
    stop = stop_tokens(model, tokenizer)
    settings = _settings(sampling, stop, use_cache=abilities(model, [prompt]).cache)
    settings.max_new_tokens = min(sampling.max_tokens, context - len(prompt))
    pieces = _Pieces(tokenizer, stop, write)
    ids = torch.tensor([list(prompt)], device=_device(model))
    try:
        with _plainly(model):
            mask = torch.ones_like(ids)
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, streamer=pieces)
    except KeyboardInterrupt:
        pieces.end()
        return Answer(text=pieces.shown, ids=pieces.ids, complete=False, interrupted=True)
    return Answer(text=pieces.shown, ids=pieces.ids, complete=made[0, -1].item() in stop)


class Abilities(NamedTuple):
    """Which parts of generation give the same tokens as full forward passes."""

    cache: bool  # the keys and values (or the state) of earlier tokens
    padding: bool  # masked tokens before a shorter prompt


_known: WeakKeyDictionary[torch.nn.Module, Abilities] = WeakKeyDictionary()


def abilities(model: Any, prompts: Sequence[Sequence[int]]) -> Abilities:
    """Test the model's cache and padding, once per model, on tokens of the prompts; a warning names what does not work.

    All ranks call it if a forward pass is a collective. Raises ValueError if the model cannot generate at all.
    """
    if model not in _known:
        tokens = torch.tensor(sorted({token for prompt in prompts[:64] for token in prompt}))
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        padded, reason = _try(model, tokens, use_cache=True)
        cache = padded is not None
        if not cache:
            padded, other = _try(model, tokens, use_cache=False)
            if padded is None:
                raise ValueError(f"a {name} does not generate here: with a cache {reason}, without one {other}")
            log.warning("a %s generates without a cache, which is slow: with it %s", name, reason)
        if not padded:
            log.warning("a %s reads padding, so only prompts of equal length are answered together", name)
        _known[model] = Abilities(cache=cache, padding=bool(padded))
    return _known[model]


def _try(model: Any, tokens: torch.Tensor, *, use_cache: bool) -> tuple[bool | None, str]:
    """Whether generate gives a padded prompt the logits of whole forward passes.

    None and the reason if it does not even do so for the longer prompt beside it. Another attempt has other tokens:
    a router that is undecided between experts may send one elsewhere.
    """
    width = max(2, min(PROBED, context_length(model) - 3))
    pads, device, reason = (width + 1) // 3, _device(model), ""
    close = CLOSE if model.get_input_embeddings().weight.dtype.itemsize >= 4 else CLOSE_IN_16_BITS
    settings = _settings(Sampling(max_tokens=3), [], use_cache=use_cache)
    settings.return_dict_in_generate = settings.output_logits = True
    for attempt in range(3):
        drawn = torch.randint(len(tokens), (2, width), generator=torch.Generator().manual_seed(attempt))
        mask = torch.ones(2, width, dtype=torch.long, device=device)
        mask[1, :pads] = 0
        with _plainly(model):
            try:
                ids = tokens[drawn].to(device)
                made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            except Exception as error:  # code of a model, which may want another kind of cache
                return None, f"it fails ({type(error).__name__}: {first_line(error)})"
            apart = []
            for row, begin in enumerate((0, pads)):
                text = made.sequences[row, begin:-1][None]
                whole = _finite(model(input_ids=text, use_cache=False).logits[0, -3:])
                found = _finite(torch.stack([step[row] for step in made.logits]))
                apart.append(float((found - whole).norm() / whole.norm()))
        if apart[0] <= close:
            return apart[1] <= close, ""
        reason = f"its logits are {apart[0]:.2g} from those of whole forward passes"
    return None, reason


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Zero instead of what masks a token out."""
    return logits.float().where(logits.abs() < 1e4, 0)


def _of_one_length(batch: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    lengths = dict.fromkeys(len(prompts[i]) for i in batch)
    return [[i for i in batch if len(prompts[i]) == length] for length in lengths]


def room(model: Any) -> int:
    """Most tokens of a prompt and its answer, beside those of a trained prompt."""
    return context_length(model) - prompt_tokens(getattr(model, "active_peft_config", None))


def _device(model: Any) -> torch.device:
    """The device on which the model computes: that of its buffers, since offloaded parameters are in main memory."""
    return next(chain(model.buffers(), model.parameters())).device


def check_known(model: Any, tokenizer: Any, largest: int) -> None:
    """Raises ValueError for a token that the model has no embedding of, as of an adapter's own tokenizer."""
    if largest >= (rows := model.config.get_text_config().vocab_size):
        check_ids(tokenizer, largest, rows)


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's eos and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = [*(named if isinstance(named, (list, tuple)) else [named]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


class _Pieces(BaseStreamer):
    """Streams an answer's text. The whole answer is decoded each time, since transformers' TextStreamer decodes each
    line by itself and loses leading spaces. A character of several tokens is written once it is complete."""

    def __init__(self, tokenizer: Any, stop: Sequence[int], write: Callable[[str], Any]):
        self.tokenizer, self.stop, self.write = tokenizer, set(stop), write
        self.ids: list[int] = []
        self.shown = ""
        self.is_prompt = True  # generate passes the prompt first

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.stop]
        self._show(whole=False)

    def end(self) -> None:
        self._show(whole=True)

    def _show(self, whole: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if len(text) > len(self.shown) and (whole or not text.endswith("\ufffd")):
            new, self.shown = text[len(self.shown) :], text
            self.write(new)


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Evaluation mode, without gradients and without the sampling settings of the model's own generation_config."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, habits = model.training, inner.generation_config
    model.eval()
    inner.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            yield
    finally:
        inner.generation_config = habits
        model.train(training)


def _settings(sampling: Sampling, stop: Sequence[int], *, use_cache: bool) -> GenerationConfig:
    drawn = sampling.temperature > 0
    choice = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if drawn else {}
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=drawn,
        eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else 0,  # masked before a prompt, cut off after an answer: any token works
        use_cache=use_cache,
        **choice,
    )


def _cut(ids: list[int], stop: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))]
