"""What a training pass keeps in memory: the model's own forward and backward pass, run on tensors without memory.

All parameters are on the meta device, so a pass takes no memory and hardly any time, whatever the model's size. Every
tensor that an operation makes counts until it is freed, as it would with real numbers. So there is no formula for an
architecture, a method or checkpointing: their code runs. Token ids, masks and labels are real: code looks at them.

What is not seen: buffers inside one operation, and memory that a GPU's allocator keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from launcher.main_memory import OWN_MAPPING

MAPPED = 32 << 20  # glibc maps larger tensors by themselves: no hole stays beside them. With `map_large_blocks`: 1 MiB
FEW_LAYERS = 2  # of a stack of equal layers, this many are run, and one fewer: the rest follows
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class Traced(NamedTuple):
    """Bytes beside the parameters, and operations, of one micro-batch."""

    peak: float  # most that is alive in a pass beside the gradients, which exist before it
    operations: float  # multiplications and additions of both passes
    mapped_peak: float  # the peak of an engine that maps large blocks, which leaves fewer holes
    mapped_layers: float  # of that, the most until the backward pass has left the first layer
    mapped_after: float  # and after that


def trace(model: nn.Module, run: Callable[[], Tensor], layers: nn.ModuleList | None, holes: float = 0.0) -> Traced:
    """Trace a pass. run() makes the loss of one micro-batch; all of the model's parameters are on meta.

    layers is a stack of equal layers in the model: a few of them are run and the others follow in proportion. None: all
    layers are run. holes: what the heap loses beside each tensor on it, as a share of the tensor.
    """
    if layers is None or len(layers) <= FEW_LAYERS + 1:
        return _whole(_trace(model, run, holes))
    fewer, few = (_with_layers(model, run, layers, count, holes) for count in (FEW_LAYERS - 1, FEW_LAYERS))
    more = len(layers) - FEW_LAYERS
    return _whole(_Phases(*(b + more * (b - a) for a, b in zip(fewer, few, strict=True))))


class _Phases(NamedTuple):
    """A pass in two parts, since each grows in proportion to the layers, and the larger of them does not."""

    peak: float  # until the backward pass has left the first layer
    after: float  # in the rest, where an embedding may be trained
    operations: float
    mapped_peak: float
    mapped_after: float


def _whole(phases: _Phases) -> Traced:
    most = max(phases.peak, phases.after), phases.operations, max(phases.mapped_peak, phases.mapped_after)
    return Traced(*most, phases.mapped_peak, phases.mapped_after)


def equal_layers(model: nn.Module, layers: list[nn.Module]) -> nn.ModuleList | None:
    """The list that holds these layers, if it holds nothing else and they are alike; None otherwise."""
    alike = {tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()) for layer in layers}
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == layers]
    return lists[0] if len(alike) == 1 and len(lists) == 1 else None


def _with_layers(
    model: nn.Module, run: Callable[[], Tensor], layers: nn.ModuleList, count: int, holes: float
) -> _Phases:
    rest = list(layers)[count:]
    del layers[count:]
    try:
        return _trace(model, run, holes, layers[0])
    finally:
        layers.extend(rest)


def _trace(model: nn.Module, run: Callable[[], Tensor], holes: float, first: nn.Module | None = None) -> _Phases:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    live = _Live([*model.parameters(), *model.buffers(), *gradients], holes)
    hook = first.register_forward_pre_hook(live.mark_input, with_kwargs=True) if first is not None else None
    try:
        with _attention(), live:
            run().backward()
    finally:
        model.zero_grad(set_to_none=True)
        if hook is not None:
            hook.remove()
    (peak, mapped_peak), (after, mapped_after) = live.before or live.peak, live.peak
    return _Phases(peak, after, live.operations, mapped_peak, mapped_after)


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, with the holes beside those below MAPPED, and beside those below
    OWN_MAPPING. Operations on tensors of which any is on meta run there."""

    def __init__(self, known: list[Tensor], holes: float):
        super().__init__()
        self.holes = holes
        self.now = self.peak = 0.0, 0.0
        self.before: tuple[float, float] | None = None  # peak of the first phase, once that is over
        self.operations = 0.0
        self._known = known  # not counted
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = [each.is_meta for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(on_meta):
            if func is aten._local_scalar_dense.default:
                return 1.0  # the value of a tensor without values, such as a norm that is logged
            if func in INDEXING:
                args = (args[0], _as_numbers(args[1]), *args[2:])
            if not all(on_meta):
                args, kwargs = tree_map(_to_meta, (args, kwargs))
        elif func is aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            kwargs = {**kwargs, "device": args[0].device}  # a model moves its mask to its parameters: it stays real
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.operations += count(*args, **kwargs, out_val=out)
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return out

    def mark_input(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin the second phase when a gradient reaches the input of this layer."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self._second_phase)

    def _second_phase(self, gradient: Tensor) -> None:
        if self.before is None:
            self.before, self.peak = self.peak, self.now

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, float(storage.nbytes())
        if key in self._seen:
            return
        self._seen.add(key)
        takes = tuple(size * (1 + self.holes * (size < least)) for least in (MAPPED, OWN_MAPPING))
        self.now = self.now[0] + takes[0], self.now[1] + takes[1]
        self.peak = max(self.peak[0], self.now[0]), max(self.peak[1], self.now[1])
        weakref.finalize(storage, self._free, key, takes)

    def _free(self, key: int, takes: tuple[float, ...]) -> None:
        self._seen.discard(key)
        self.now = self.now[0] - takes[0], self.now[1] - takes[1]


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _as_numbers(indices: Any) -> list[Any]:
    """The indices with real masks as the numbers of their entries, so that shapes are known on meta."""
    found: list[Any] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool and not index.is_meta
        found += index.nonzero().unbind(1) if masks else [index]
    return found


@contextmanager
def _attention() -> Iterator[None]:
    """Scaled dot product attention as the fused kernels compute it, which keep no scores; on meta torch would.

    A mode would do for the forward pass, but not where checkpoints compute again in the backward pass.
    """
    functional: Any = torch.nn.functional
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch converts it to numbers to add, in every layer
        hidden = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        attn_mask = hidden.masked_fill_(attn_mask.logical_not(), float("-inf"))
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    found: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return found
