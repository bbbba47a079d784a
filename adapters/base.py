"""What a method declares: how it factors a weight, and the core that it trains between the factors.

A method is one file with two classes: a `Factorization`, which turns a weight (or its gradient) into frozen factors,
and a `FactorConfig`, the PEFT config with the method's options and the shape of its core. Methods that differ in their
cores alone share a factorization. The file is registered in `adapters/__init__.py`.

Letters: W (m, n) = out x in, k = min(m, n), r <= k the rank, y0 = W x the base layer's output.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftType
from torch import Tensor

from adapters.factors import Factors

RANDOM_CORE = 0.1  # standard deviation of a random core
# Values of LoRA's init_lora_weights with which PEFT subtracts the starting product from the base's own weights
IN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Factorization(ABC):
    """How a weight W (m, n) is factored; a frozen dataclass whose fields are the settings that change the factors.

    `panel` below stands for the part of W that the factors are computed from, on the device where that happens.
    """

    name: ClassVar[str]
    algorithm: ClassVar[tuple[str, int]]  # part of the cache key: raise the number whenever the factors change
    from_gradients: ClassVar[bool] = False  # W is the weight's gradient, summed over a few samples, not the weight
    rebuilt_bound: ClassVar[float] = 0.0  # largest `rebuilt_error` that is accepted

    def recipe(self) -> dict[str, Any]:
        """What decides the factors besides rank and weight, as JSON; part of the cache key."""
        settings = {own.name: getattr(self, own.name) for own in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"method": self.name, "algorithm": list(self.algorithm), **settings}

    @property
    def chooses_rank(self) -> bool:
        """Whether the rank follows from each weight rather than from the config's r."""
        return False

    def needs_whole_weight(self, *, embedding: bool = False) -> bool:
        """Whether the factors depend on more of W than its first r columns."""
        return True

    def panel(self, W: Tensor, r: int | None) -> Tensor:
        """The part of W (m, n) that the factors are computed from."""
        return W

    @abstractmethod
    def factors(
        self,
        panel: Tensor,
        r: int | None,
        *,
        rows: Callable[[Tensor], Tensor],
        embedding: bool = False,
        saved: Factors | None = None,
    ) -> Factors:
        """The factors of W at rank r (None if the factorization chooses it); `probe` is left zero.

        rows(indices) returns those rows of W. embedding: the layer's output is a row of W instead of W x. saved:
        pivots and values of a saved adapter, whose core belongs to exactly these directions.

        Raises ValueError if this weight has no such factors; the caller adds the weight's name and a remedy.
        """

    @abstractmethod
    def cost(self, shape: tuple[int, int], r: int, *, embedding: bool = False) -> float:
        """Multiplications that the factors of one weight take: weights are shared out among processes by it."""

    @abstractmethod
    def residual(self, panel: Tensor, factors: Factors, *, embedding: bool = False) -> float:
        """Relative error of the factors against W, before `write` is rounded."""

    def misfit(self, W: Tensor, factors: Factors, *, embedding: bool = False) -> str | None:
        """Why these, read from a file, cannot be the factors of W (m, n); None if no check fails.

        Cheap, because every start calls it for every weight: a few random vectors, a sample of rows. W may be a map of
        a file, of which only what is used is read. By default nothing is compared.
        """
        return None

    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        """Estimated relative error of factors rebuilt from this W against those with the saved pivots and values.

        Used if an adapter is loaded on its base in another precision, without the checkpoint at hand.
        """
        return math.inf


@dataclass
class FactorConfig(PeftConfig, ABC):
    """Base class of the methods' PEFT configs."""

    r: int = field(default=64, metadata={"help": "rank of the trained core, clamped to a weight's smaller side"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "last parts of module names, a regular expression, or all-linear"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out, likewise"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})
    scale: float = field(default=1.0, metadata={"help": "factor of the whole update"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer numbers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    base_fingerprint: str | None = field(default=None, metadata={"help": "of the base the adapter was made for"})
    init_weights: bool = field(
        default=True, metadata={"help": "start the core as the method does; False: random, so that tests see an effect"}
    )

    method: ClassVar[str]  # name in lower case; PEFT's type is the same in capitals
    # How the layer reads the r numbers h that the core multiplies:
    through_write: ClassVar[bool] = True  # read * (write^T y0), read (r,); if False read @ y0[pivots], read (r, r)
    reads_input: ClassVar[bool] = False  # read @ x, read (r, n), saved with the adapter (input_layer.py)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = sorted(set(self.target_modules))
        if type(self.r) is not int or self.r < 1:  # True is an int too
            raise ValueError(f"{type(self).__name__}.r is a whole number of at least 1, got {self.r!r}")
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"{type(self).__name__}.scale is a finite number other than 0, got {self.scale}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list in which layers_to_transform counts: give both")

    @abstractmethod
    def factorization(self) -> Factorization:
        """How this config's weights are factored."""

    @property
    def factors_from_gradients(self) -> bool:
        """Whether a few samples have to pass through the base before the factors can be made.

        Such a config has a field `samples`: how many.
        """
        return self.factorization().from_gradients

    @property
    def usual_learning_rate(self) -> float | None:
        """The learning rate at which this core trained best on small models (benchmarks/README.md), if measured."""
        return None

    def for_training(self, learning_rate: float) -> Self:
        """The config completed by what it takes from the run's learning rate; this one if it takes nothing."""
        return self

    def rank_of(self, module: str, shape: tuple[int, int]) -> int | None:
        """The rank of a weight (m, n); None if its factors decide."""
        return min(self.r, *shape)

    def note_rank(self, module: str, r: int) -> None:
        """Record a rank that the factors decided, so that it is saved with the config."""

    def with_ranks(self, ranks: Mapping[str, int]) -> Self:
        """A copy that records these ranks by module."""
        noted = copy.copy(self)
        for module, r in ranks.items():
            noted.note_rank(module, r)
        return noted

    def core_shape(self, r: int) -> tuple[int, ...]:
        """Shape of the trained core; by default the diagonal of an r x r matrix."""
        return (r,)

    def random_core(self, r: int, name: str) -> Tensor:
        """The core if init_weights is False: drawn from torch's seed and the module's name.

        So it is the same on every rank and under every sharding.
        """
        generator = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        return RANDOM_CORE * torch.randn(self.core_shape(r), generator=generator)

    def start_core(self, values: Tensor) -> Tensor:
        """The core before training, from the factors' values (r,). Zero: training starts at the base model."""
        return torch.zeros(self.core_shape(len(values)))

    def multiply(self, h: Tensor, core: Tensor) -> Tensor:
        """The r x r matrix that the core stands for, times h (..., r).

        In a batch of many adapters, core has leading dimensions that broadcast with those of h: a core for each row.
        """
        return h * core

    def core_matrix(self, core: Tensor, r: int) -> Tensor:
        """That matrix (r, r), or only its diagonal (r,) if it is diagonal."""
        return core


class DenseCore:
    """A core that is the whole r x r matrix; inherit from this before the `FactorConfig`.

    On an embedding the SVD methods apply their formula to W^T and LoLDU transposes the core. Diagonal cores are the
    same either way.
    """

    def core_shape(self, r: int) -> tuple[int, ...]:
        return (r, r)

    def multiply(self, h: Tensor, core: Tensor) -> Tensor:
        return F.linear(h, core) if core.ndim == 2 else h @ core.mT  # (..., tokens, r) @ (..., r, r)


def start_in_base(config: Any) -> str | None:
    """The init_lora_weights of a LoRA that changes the weights of its base: with the adapter disabled, the model is not
    the base. None for other adapters."""
    start = str(getattr(config, "init_lora_weights", None))
    return start if start.startswith(IN_BASE) else None
