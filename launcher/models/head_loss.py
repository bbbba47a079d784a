"""The loss inside the output head: logits of the tokens that carry loss, a few hundred at a time, never of all.

A causal language model computes logits (B, N, V) of every position, in three copies, although only tokens with a label
need them: 55 % of Alpaca's, 5 % of the embedded demo's. Here the head itself computes the loss, while its weight is
whole on this process (FSDP2 gathers it only inside the root's forward pass, ZeRO-3 only inside the head's), and the
model returns that instead of logits.

torch 2.13 has `linear_cross_entropy` for this, which sums in the dtype of its inputs. In bfloat16 it gave 11.520 for a
loss of 11.493; the model's own head, which converts logits to float32, was off by 6e-5. In chunks it took twice the
processor time. So `summed_loss` converts each chunk of logits to float32, as transformers does.

Shapes: B rows, N tokens of the longest, T tokens that carry loss, H hidden size, V classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.methods import prompt_tokens

log = logging.getLogger(__name__)

NO_LOSS = -100  # the label of tokens that carry none, as torch and transformers have it
CHUNK = 256  # most tokens whose logits exist at once: 50 MB of 49,152 classes in float32
NUMBERS = 1 << 24  # most logits that exist at once: 67 MB in float32
PROBE = 8  # tokens of a row that the check of a model looks at


class _SummedLoss(torch.autograd.Function):
    """Chunks of logits, their loss and its gradients at once, so that no chunk outlives its turn."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *shape: float
    ) -> Tensor:
        scale, cap, divisor = shape
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wants[2] else None
        size = chunk_of(len(weight))
        for start in range(0, len(targets), size):
            part, wanted = hidden[start : start + size], targets[start : start + size]
            logits = _logits(part, weight, bias, scale, cap)
            total += F.cross_entropy(logits, wanted, reduction="sum")
            if not any(wants):
                continue
            d_logits = _d_logits(logits, wanted, cap)
            del logits
            d_logits = d_logits.mul_(scale / divisor).to(weight.dtype)  # divided before it is rounded, as autograd does
            if d_hidden is not None:
                d_hidden[start : start + size] = d_logits @ weight
            if d_weight is not None:
                d_weight += (d_logits.T @ part).float()
            if d_bias is not None:
                d_bias += d_logits.float().sum(0)
            del d_logits  # otherwise it is there while the next chunk is made
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = weight.dtype
        return total / divisor

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_total = outputs[0]
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        grads = [None if g is None else (g * d_total).to(ctx.dtype) for g in (d_hidden, d_weight, d_bias)]
        return (*grads, None, None, None, None)


class _TokenLosses(torch.autograd.Function):
    """The loss of each token under a frozen head: chunks of logits, and the gradient of each token's loss at once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *shape: float
    ) -> Tensor:
        scale, cap = shape
        losses, d_hidden = [], torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = chunk_of(len(weight))
        for start in range(0, len(targets), size):
            part, wanted = hidden[start : start + size], targets[start : start + size]
            logits = _logits(part, weight, bias, scale, cap)
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            if d_hidden is not None:
                d_hidden[start : start + size] = (_d_logits(logits, wanted, cap) * scale).to(weight.dtype) @ weight
        ctx.save_for_backward(d_hidden)
        return torch.cat(losses) if losses else torch.zeros(0, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return ((outputs[0][:, None] * d_hidden).to(d_hidden.dtype), None, None, None, None, None)


def chunk_of(classes: int) -> int:
    """Tokens whose logits exist at once."""
    return max(1, min(CHUNK, NUMBERS // classes))


def _scaled(logits: Tensor, scale: float) -> Tensor:
    """scale * logits; no copy if that is 1."""
    return logits if scale == 1 else logits * scale


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float) -> Tensor:
    """Logits (T, V) in float32, scaled and bent to +-cap as the model does."""
    logits = _scaled(F.linear(hidden, weight, bias), scale).float()
    return cap * torch.tanh(logits / cap) if cap else logits


def _d_logits(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """The gradient (T, V) of each token's loss by its logits before they were bent to +-cap."""
    grads = torch.softmax(logits, -1)
    grads[torch.arange(len(targets), device=targets.device), targets] -= 1
    if cap:
        grads *= 1 - (logits / cap).square()
    return grads


def summed_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    cap: float = 0.0,
    divisor: float = 1.0,
) -> Tensor:
    """Sum over tokens of the cross entropy of scale * (hidden (T, H) weight (V, H)^T + bias), divided by divisor.

    cap bends these logits to +-cap by tanh; 0: not. targets (T,) are classes. The result is float32; at most CHUNK x V
    logits exist at a time.
    """
    loss: Any = _SummedLoss.apply(hidden, weight, bias, targets, scale, cap, divisor)
    return loss


def loss_places(labels: Tensor) -> Tensor:
    """The places in the flat labels (B, N) of tokens whose next token carries loss."""
    return F.pad(labels[:, 1:] != NO_LOSS, (0, 1)).flatten().nonzero()[:, 0]


class LossOutput(NamedTuple):
    """What a forward pass returns whose head computed the loss."""

    loss: Tensor


class HeadLoss:
    """The forward pass of a causal language model, with the loss computed in its head if the batch has labels.

    Called with token labels it returns an output with a loss and no logits; called without, or with the labels of a
    classifier, it runs the model as it is. The first loss checks on a few tokens that the model's own loss is the same.
    If it is not, the model computes its own, logits of all positions included, and the log says why.
    """

    def __init__(self, model: Any, forward: Callable[..., Any] | None = None):
        """forward runs the model in its engine; by default the model itself."""
        self.run = forward or model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.settings = self.base.config.get_text_config()
        self.head: Any = self.base.get_output_embeddings()
        self.scale, self.cap = 1.0, float(getattr(self.settings, "final_logit_softcapping", None) or 0.0)
        self.prompt = prompt_tokens(getattr(model, "active_peft_config", None))
        self.usable: bool | None = None  # not known before the first loss
        self.logits_rows = 0  # tokens whose logits were computed, for those who count
        self.model = model
        self._labels: Tensor | None = None
        self._loss_at: Tensor | None = None
        self._divisor: float | None = 1.0  # None: the head returns the loss of each token
        self._seen: Tensor | None = None
        self._checking = False
        if self.head is not None:
            self._own_forward = self.head.forward
            self.head.forward = self._forward

    def __call__(self, *, num_items_in_batch: int | None = None, **batch: Any) -> Any:
        """Arguments as the model's. The loss is the sum over labels (B, N) divided by num_items_in_batch.

        Called by all ranks alike if the forward pass is a collective.
        """
        labels, self._loss_at = batch.get("labels"), batch.pop("loss_at", None)
        if num_items_in_batch is None or labels is None or labels.ndim != 2:
            return self.run(**batch)
        if self.usable is None:
            self.usable = self._check(batch)
        if not self.usable:
            return self.run(**batch, num_items_in_batch=num_items_in_batch)
        return LossOutput(self._through_head(batch, num_items_in_batch))

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch, in main memory, with the places of its tokens with loss: on a GPU their number would have to be
        copied to the host."""
        labels = batch.get("labels")
        if self.head is None or labels is None or labels.ndim != 2:
            return batch
        return batch | {"loss_at": loss_places(labels)}

    def token_losses(self, **batch: Any) -> Tensor:
        """The loss (T,) of each token with a label (B, N), row after row. Called as the model is, with labels."""
        self._loss_at = batch.pop("loss_at", None)
        if self.usable is None:
            self.usable = self._check(batch)
        if self.usable:
            return self._through_head(batch, None)
        labels = batch.pop("labels")
        chosen = labels[:, 1:] != NO_LOSS
        logits = self.run(**batch).logits[:, :-1][chosen].float()
        return F.cross_entropy(logits, labels[:, 1:][chosen], reduction="none")

    def _through_head(self, batch: Mapping[str, Any], divisor: float | None) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self._asking(batch["labels"], divisor):
            return self.run(**inputs).logits / self.scale

    @contextmanager
    def _asking(self, labels: Tensor, divisor: float | None) -> Iterator[None]:
        """While this lasts the head returns a loss, which the model must not bend as it bends logits."""
        self._labels, self._divisor = labels, divisor
        if self.cap:
            vars(self.settings)["final_logit_softcapping"] = None  # Gemma 3n's config would refuse it
        try:
            yield
        finally:
            self._labels = None
            if self.cap:
                vars(self.settings)["final_logit_softcapping"] = self.cap

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._labels is None:
            logits = self._own_forward(hidden, *args, **kwargs)
            self._seen = logits if self._checking else None
            self.logits_rows += hidden[..., 0].numel()
            return logits
        labels = self._labels
        if self.prompt and hidden.shape[1] == self.prompt + labels.shape[1]:
            hidden = hidden[:, self.prompt :]
        if hidden.shape[:2] != labels.shape:
            raise _Unlike(f"its head sees {tuple(hidden.shape[:2])} positions of {tuple(labels.shape)}")
        places = loss_places(labels) if self._loss_at is None else self._loss_at
        hidden, targets = hidden.flatten(0, 1).index_select(0, places), labels.flatten().index_select(0, places + 1)
        self.logits_rows += len(targets)
        divisor = self._divisor
        if type(self.head) is nn.Linear:
            weight, bias = self.head.weight, self.head.bias
            if divisor is not None:
                return summed_loss(hidden, weight, bias, targets, scale=self.scale, cap=self.cap, divisor=divisor)
            if not weight.requires_grad:
                losses: Any = _TokenLosses.apply(hidden, weight, bias, targets, self.scale, self.cap)
                return losses
        logits = (self._own_forward(hidden) * self.scale).float()  # an adapter on the head, or a quantised one
        if self.cap:
            logits = self.cap * torch.tanh(logits / self.cap)
        if divisor is None:
            return F.cross_entropy(logits, targets, reduction="none")
        return F.cross_entropy(logits, targets, reduction="sum") / divisor

    @torch.no_grad()
    def _check(self, batch: Mapping[str, Any]) -> bool:
        """Whether head and model agree on the loss of a few tokens; scale is found on the way."""
        training, places, self._loss_at = self.base.training, self._loss_at, None
        self.base.eval()  # dropout would make two passes differ
        try:
            if self.head is None:
                raise _Unlike("it names no output head")
            few = {"input_ids": batch["input_ids"][:1, :PROBE]}
            few["labels"] = few["input_ids"].clone()
            few["labels"][:, 0] = NO_LOSS  # which a trained prompt would predict
            self._checking = True
            own = self.run(**few, use_cache=False)
            seen, self._seen = self._seen, None
            if seen is None:
                raise _Unlike("its forward pass does not call its output head")
            self.scale = self._scale(seen, own.logits)
            found = float(self._through_head({**few, "use_cache": False}, few["labels"].shape[1] - 1))
            wanted = float(own.loss)
            # float32 logits differ in the last bits, bfloat16 ones by the rounding of a scaled or bent logit
            allowed = 1e-5 if seen.dtype == torch.float32 else 2e-3
            if not abs(found - wanted) <= allowed * max(1.0, abs(wanted)):
                raise _Unlike(f"its own loss is {wanted:.6f} where its head alone gives {found:.6f}")
        except (_Unlike, RuntimeError, TypeError, IndexError, AttributeError) as reason:
            log.warning(
                "the model computes its own loss, from logits of all positions, which takes more memory: %s",
                str(reason).partition("\n")[0],
            )
            return False
        finally:
            self._checking, self._seen, self._loss_at = False, None, places
            self.base.train(training)
        return True

    def _scale(self, seen: Tensor, logits: Tensor) -> float:
        """What the model multiplies its head's output by. Raises _Unlike if it does something else to it."""
        if seen.shape != logits.shape:
            raise _Unlike(f"its head gives {tuple(seen.shape)}, its logits are {tuple(logits.shape)}")
        before, after = seen.double(), logits.double()
        if self.cap:
            after = self.cap * torch.atanh((after / self.cap).clamp(-1 + 1e-7, 1 - 1e-7))
        scale = float((before * after).sum() / (before * before).sum())
        if not torch.allclose(before * scale, after, rtol=2e-2, atol=1e-3):
            raise _Unlike("it changes its head's output by more than a factor")
        return 1.0 if abs(scale - 1) < 1e-3 else scale


class _Unlike(Exception):
    """Why a model's loss is not that of its head."""
