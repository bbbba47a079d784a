"""Answers from a model, token ids in and out: greedy for many prompts at once, or one that is streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from launcher.models.files import context_length


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the top_p most likely ones."""

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
    """One answer; complete where the model ended it by itself, interrupted where Ctrl-C did."""

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
) -> list[list[int]]:
    """The greedy continuation of every prompt (token ids), in their order, without the token that ended it.

    stop_ids: tokens that end an answer; by default those of `stop_tokens`. An answer also ends after max_tokens, and
    where the model's context is full. Prompts are padded on the left, with others of similar length; what stands
    beside a prompt changes its answer by no more than the rounding of a matrix product. The model may be in training
    mode, and is again afterwards.
    """
    if [] in map(list, prompts):
        raise ValueError(f"prompt {list(map(list, prompts)).index([])} has no token: there is nothing to answer")
    stop = list(stop_tokens(model, tokenizer) if stop_ids is None else stop_ids)
    device, context = _device(model), context_length(model)
    answers: list[list[int]] = [[] for _ in prompts]
    room = [min(max_tokens, context - len(prompt)) for prompt in prompts]
    plenty = sorted((i for i in range(len(prompts)) if room[i] == max_tokens), key=lambda i: -len(prompts[i]))
    batches = [plenty[start : start + batch_size] for start in range(0, len(plenty), batch_size)]
    batches += [[i] for i in range(len(prompts)) if 0 < room[i] < max_tokens]  # a longer neighbour would pass the end
    settings = _settings(Sampling(max_tokens=max_tokens), stop)
    for batch in batches:
        width = len(prompts[batch[0]])
        ids = torch.tensor(
            [[settings.pad_token_id] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=device
        )
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        settings.max_new_tokens = room[batch[0]]
        with _plainly(model):
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for i, row in zip(batch, made[:, width:].tolist(), strict=True):
            answers[i] = _cut(row, stop)
    return answers


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    write: Callable[[str], Any],
) -> Answer:
    """The answer to one prompt (token ids); its text goes to write piece by piece as it comes.

    Ctrl-C ends the answer with what there is. Raises ValueError where the prompt fills the model's context.
    """
    context = context_length(model)
    if len(prompt) >= context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens with its template, the model's context is {context} and an answer "
            "needs room too: shorten it"
        )
    stop = stop_tokens(model, tokenizer)
    settings = _settings(sampling, stop)
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


def _device(model: Any) -> torch.device:
    """Where the model computes; its buffers are there, while offloaded parameters wait in main memory."""
    return next(chain(model.buffers(), model.parameters())).device


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's eos and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = [*(named if isinstance(named, (list, tuple)) else [named]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


class _Pieces(BaseStreamer):
    """Text as it grows. The whole answer is decoded each time: transformers' TextStreamer starts afresh on each line
    and loses the blanks a line begins with. Half a character waits for its other tokens."""

    def __init__(self, tokenizer: Any, stop: Sequence[int], write: Callable[[str], Any]):
        self.tokenizer, self.stop, self.write = tokenizer, set(stop), write
        self.ids: list[int] = []
        self.shown = ""
        self.is_prompt = True  # generate hands over the prompt first

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
    """Evaluation mode, no gradients, and none of the sampling habits in the model's own generation_config."""
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


def _settings(sampling: Sampling, stop: Sequence[int]) -> GenerationConfig:
    drawn = sampling.temperature > 0
    choice = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if drawn else {}
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=drawn,
        eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else 0,  # masked before a prompt, cut after an answer: any token will do
        use_cache=True,
        **choice,
    )


def _cut(ids: list[int], stop: Sequence[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))]
