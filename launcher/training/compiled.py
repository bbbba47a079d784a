"""`--compile`: each decoder layer through torch.compile, with a line in the log if it runs uncompiled after all.

Layers of one class share one compiled program, so a model of 80 layers compiles as long as one of 2. Only the layer's
own forward is compiled: the hooks that gather a sharded layer and the recomputation of --gradient-checkpointing stay
outside. Evaluation and generation run the plain layers, whose caches would be compiled again and again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from launcher.engines.fsdp2 import decoder_layers
from launcher.text import one_line

log = logging.getLogger(__name__)
PROGRAMS = 32  # of one class of layers: with and without mask, one row and several, blocks of a triangle or none


class Compiled:
    """The compiled decoder layers of one model."""

    def __init__(self, layers: list[nn.Module]):
        self.failed: str | None = None  # why all layers run uncompiled
        self._told = False
        torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
        counters.clear()
        for layer in layers:
            vars(layer)["forward"] = self._through(layer, layer.forward)

    def _through(self, layer: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(plain, dynamic=True)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.failed or not layer.training:
                return plain(*args, **kwargs)
            try:
                found = compiled(*args, **kwargs)
            except Exception as error:
                if not of_the_compiler(error):
                    raise
                self.failed = reason_of(error)
                log.warning("--compile: the layers run uncompiled, since torch cannot compile them: %s", self.failed)
                return plain(*args, **kwargs)
            if not self._told:
                self._told = True
                tell_breaks()
            return found

        return forward


def compile_layers(base: nn.Module) -> Compiled:
    """Compile the decoder layers in place. Raises ValueError for a model that does not name their class."""
    return Compiled(decoder_layers(base))


def tell_breaks() -> None:
    """Log where Python runs between compiled parts of a layer."""
    if breaks := counters["graph_break"]:
        [(reason, _)] = breaks.most_common(1)
        text = one_line(str(reason).partition("\n")[0], 200)
        log.warning(
            "--compile: a decoder layer is compiled in parts (%d breaks, such as: %s)", sum(breaks.values()), text
        )


def of_the_compiler(error: BaseException | None) -> bool:
    """Whether torch's compiler raised this error or its cause."""
    while error is not None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch")):
            return True
        error = error.__cause__
    return False


def reason_of(error: BaseException) -> str:
    """The first line of the innermost error."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    return one_line(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", 200)
