"""transformers' continuous batching, with the adapter of each token and a choice of each request's next token.

The library schedules requests, packs their tokens into one row and keeps their keys and values in pages. Ours:

- The layout of the packed row is known where logits processors get their arguments. `Batches` takes their place: it
  notes which request each token belongs to, and `ManyAdapters.packed` applies each one's adapter in that forward pass.
- The library's processors have temperature and top_p for each request, but neither seed, greedy beside sampled
  requests, nor the log-probabilities of other tokens: `Batches` chooses the tokens itself, and marks its choice.
- Prefix sharing is off: it finds keys and values by the tokens of a prompt, and they differ from adapter to adapter.
- Attention masks the other requests of the row, but 0 * NaN is NaN: an adapter whose activations overflow would spoil
  the answers of all others. So keys and values are made finite before they are written.

CUDA graphs and batches prepared ahead of time are off: both would replay another batch's layout.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import RequestStatus

from adapters.many import Adapter, ManyAdapters
from launcher.serving.cache_size import CacheSize
from launcher.serving.choosing import Choice, choose, number
from launcher.serving.requests import Sampling

LARGEST = 1e6  # of keys and values: no model comes near it, and products of such numbers stay finite


class Running(Protocol):
    """What batching knows of a request."""

    id: str
    adapter: Adapter | None
    sampling: Sampling
    seed: int
    made: int  # tokens so far
    choice: Choice | None


class Batches:
    """Takes the place of the manager's logits processors: notes a batch's layout, and chooses its tokens."""

    tensors_required = 0
    do_processing = True

    def __init__(self, find: Callable[[str], Any], orphan: Callable[[str], None]):
        self.find, self.orphan = find, orphan
        self.layout: list[tuple[Adapter | None, int]] = []  # adapter and tokens of each request, in their order
        self._new: list[Running | None] = []  # the requests that get a token

    def fill_defaults(self, storage: Tensor) -> None:
        """There are no arguments in tensors."""

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """There are none either."""

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        found = [(each, self.find(each.state.request_id)) for each in requests_in_batch]
        for each, request in found:
            if request is None:  # ended, and the manager does not know yet
                self.orphan(each.state.request_id)
        self.layout = [(None if request is None else request.adapter, each.query_length) for each, request in found]
        self._new = [request for each, request in found if each.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, args: Tensor) -> Tensor:
        """scores (requests, vocabulary) with the chosen tokens the largest, for the argmax that follows."""
        rows = [(row, request) for row, request in enumerate(self._new) if request is not None]
        if rows:
            chosen = choose(
                scores[: len(self._new)] if len(rows) == len(self._new) else scores[[row for row, _ in rows]],
                [request.sampling for _, request in rows],
                [number(request.seed, request.made) for _, request in rows],
            )
            for (_, request), choice in zip(rows, chosen, strict=True):
                request.choice = choice
            at = torch.tensor([[row, choice.id] for (row, _), choice in zip(rows, chosen, strict=True)]).T
            scores[at[0].to(scores.device), at[1].to(scores.device)] = torch.inf
        return scores


class Router(OutputRouter):
    """Hands each new token to `deliver_token`, in the manager's thread."""

    def __init__(self, deliver_token: Callable[[str, int | None, bool, str | None], None]):
        super().__init__()
        self.deliver_token = deliver_token

    def deliver(self, output: Any) -> None:
        token = output.generated_tokens[-1] if output.error is None else None
        self.deliver_token(output.request_id, token, output.status == RequestStatus.FINISHED, output.error)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)


class Manager(ContinuousBatchingManager):
    """The library's manager with our layout, choice and delivery."""

    def __init__(
        self,
        model: Any,
        many: ManyAdapters,
        batches: Batches,
        router: Router,
        *,
        size: CacheSize,
        batch_tokens: int,
        running: int,
        stop_ids: Sequence[int],
        each_round: Callable[[], None],
        ended: Callable[[BaseException | None], None],
    ):
        super().__init__(
            model,
            GenerationConfig(do_sample=False, eos_token_id=list(stop_ids) or -1, max_new_tokens=1),
            ContinuousBatchingConfig(
                page_size=size.page, num_blocks=size.blocks, max_batch_tokens=batch_tokens,
                max_requests_per_batch=running, allow_block_sharing=False, use_cuda_graph=False,
                use_async_batching=False, max_blocks_per_request=0, max_memory_percent=1.0,
            ),
        )  # fmt: skip
        self.many, self.each_round, self.ended = many, each_round, ended
        self.logit_processor = self.batches = batches  # type: ignore[assignment]
        self.output_router = router
        self.forward_passes = self.tokens_seen = 0
        self._update: Callable[..., Any]
        self._finite_update = self._write_finite  # one object, to be recognised

    def start(self) -> None:
        """In a daemon thread, so that a program that fails can end."""
        self.background_thread_status.clear()
        thread: Any = threading.Thread(target=self._run_generation_loop, name="engine", daemon=True)
        self._generation_thread = thread
        thread.start()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        self.each_round()
        return super()._generation_loop_body(batch_processor, bootstrapping)

    def _generation_step(self) -> None:
        """One forward pass for all requests of the batch."""
        with self.many.packed(self.batches.layout):
            super()._generation_step()
        self.forward_passes += 1
        self.tokens_seen += sum(count for _, count in self.batches.layout)

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self.ended(self.background_thread_status.fatal_error)

    def _create_batch_processor(self) -> Any:
        made: Any = super()._create_batch_processor()
        if made.cache.update is not self._finite_update:
            self._update, made.cache.update = made.cache.update, self._finite_update
        return made

    def _write_finite(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        return self._update(finite(key_states), finite(value_states), layer_idx, kwargs)

    def stats(self) -> dict[str, float]:
        """Requests and cache blocks now; zero while nothing has started."""
        made, waiting = self.batch_processor, self.input_queue.qsize()
        if made is None:
            return {"waiting": waiting, "running": 0, "cache_blocks_used": 0, "cache_blocks_free": 0}
        free = round(made.cache.compute_free_capacity() * made.cache.num_blocks)
        return {
            "waiting": waiting + len(made.scheduler.waiting_requests),
            "running": len(made.scheduler.active_requests),
            "cache_blocks_used": made.cache.num_blocks - free,
            "cache_blocks_free": free,
        }


def finite(states: Tensor) -> Tensor:
    """Keys or values without NaN and infinite numbers."""
    return torch.nan_to_num(states, 0.0, 0.0, 0.0).clamp_(-LARGEST, LARGEST)


def quiet_library() -> None:
    """The library logs its settings at each start, and an error that ends the thread, which the engine reports."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
