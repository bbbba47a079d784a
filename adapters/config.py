"""The family's PEFT configs, one per method: what decides its factors, and the shape of its core."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from torch import Tensor

from adapters import factors as lu
from adapters import svd
from adapters.factors import Factors

# The paper's starting values of z that keep the function. With the difference z - z0 as the core they are all one and
# the same start, zero (they differ in weight decay alone, which pulls ours towards the base).
KEEPS_FUNCTION = ("lu", "uniform", "normal", "constant")
# Its others leave the residual as it is and replace d: the network is destroyed at step 0 (output error 0.98 to 21.6).
BREAKS_FUNCTION = ("s_uniform", "s_normal", "ones", "zeros")


def _new_peft_type(name: str) -> None:
    """PeftType is a closed enum, and PEFT has no other door for a method from outside."""
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)


@dataclass
class FactorConfig(PeftConfig):
    """What all methods of the family share; each adds the options of its own factors."""

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

    method: ClassVar[str]  # its name in lower case; PEFT's type is the same in capitals
    saved: ClassVar[tuple[str, ...]]  # of its Factors, beside the core
    # Largest `rebuilt_error` of factors made from a rounded weight, no checkpoint at hand.
    rebuilt_bound: ClassVar[float]

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
            raise ValueError("layers_pattern says where to count layers_to_transform, which is missing")

    def rank_of(self, module: str, shape: tuple[int, int]) -> int | None:
        """The rank of a weight (m, n); None where its factors decide."""
        return min(self.r, *shape)

    def note_rank(self, module: str, r: int) -> None:
        """Take note of a rank that the factors decided, to be saved."""

    def factors(self, W: Tensor, r: int | None, *, embedding: bool = False, saved: Factors | None = None) -> Factors:
        """Factors of W (m, n), probe left empty; saved: the pivots and values that an adapter was saved with."""
        raise NotImplementedError

    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        """How far factors rebuilt from this W are from those with the saved pivots and values."""
        raise NotImplementedError

    def factor_options(self) -> dict[str, Any]:
        """What decides the factors beside rank and weight, as JSON: for those who make them elsewhere."""
        return {"method": self.method}


@dataclass
class LoLDUConfig(FactorConfig):
    """LoLDU (arXiv 2410.13618): W' = W + scale P L_r diag(delta) U_r, delta (r,) trained from zero."""

    init_delta: str = field(
        default="lu",
        metadata={"help": f"the paper's start of z, one that keeps the function: {', '.join(KEEPS_FUNCTION)}"},
    )
    normalize_directions: bool = field(
        default=False, metadata={"help": "divide each direction by its norm, so that one learning rate suits all"}
    )

    method = "loldu"
    saved = ("pivots", "values", "probe")
    # Measured on two small Llamas and Gaussian weights at ranks 1, 8, 64 and full: bf16 stays below 0.05, int8 below
    # 0.1 on 96 % of the weights, NF4 passes it on nearly all from rank 8 up and another base on all. A bound of 0.25
    # cost an NF4 base 70 % of what a trained rank 8 had gained, one of 1 all of it at rank 64, and full rank was left
    # worse than no adapter (loss 5.1, 3.6, true factors 3.2).
    rebuilt_bound = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_delta not in KEEPS_FUNCTION:
            why = "replaces the pretrained function at step 0" if self.init_delta in BREAKS_FUNCTION else "is unknown"
            raise ValueError(f"init_delta={self.init_delta!r} {why}; choose one of {', '.join(KEEPS_FUNCTION)}")

    def factors(self, W: Tensor, r: int | None, *, embedding: bool = False, saved: Factors | None = None) -> Factors:
        assert r is not None
        return lu.loldu_factors(
            W[:, :r],
            lambda rows: W[rows.long()],
            pivots=saved.pivots if saved else None,
            normalize=self.normalize_directions,
            embedding=embedding,
        )

    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        return lu.rebuilt_error(W[:, : len(saved.pivots)], saved.pivots, saved.values)

    def factor_options(self) -> dict[str, Any]:
        return {"method": self.method, "normalize": self.normalize_directions}


@dataclass
class SVFitConfig(FactorConfig):
    """SVFit (arXiv 2409.05926): W' = W + scale U_r diag(delta) V_r^T, delta (r,) trained from zero.

    delta is the paper's s' - s: its unit is that of the singular values, and every direction has norm one.
    """

    energy: float | None = field(
        default=None,
        metadata={"help": "choose each weight's rank, r aside: the least that holds this share of its squared norm"},
    )
    normalize_directions: bool = field(default=True, metadata={"help": "they have norm one by themselves: always true"})
    svd: str = field(default="auto", metadata={"help": f"how the factors are made: {', '.join(svd.METHODS)}"})
    ranks: dict[str, int] | None = field(default=None, metadata={"help": "the ranks that energy chose, by module"})

    method = "svfit"
    saved = ("values", "probe")
    # Measured as above (71 weights): the error is the predicted one to a factor of 2. bf16 stays below 0.13 (and the
    # update's true error below 0.07), NF4 passes 0.19 on all weights from rank 8 up, another base is at 1.4. int8 is
    # accepted on two weights of three, with a true error of up to 0.2.
    rebuilt_bound = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(f"SVFitConfig.energy is a share between 0 and 1, got {self.energy}; give r for all of it")
        if not self.normalize_directions:
            raise ValueError("normalize_directions=false is not to be had: SVFit's directions have norm one")
        if self.svd not in svd.METHODS:
            raise ValueError(f"SVFitConfig.svd is one of {', '.join(svd.METHODS)}, got {self.svd!r}")

    def rank_of(self, module: str, shape: tuple[int, int]) -> int | None:
        return super().rank_of(module, shape) if self.energy is None else (self.ranks or {}).get(module)

    def note_rank(self, module: str, r: int) -> None:
        if self.energy is not None:
            self.ranks = {**(self.ranks or {}), module: r}

    def factors(self, W: Tensor, r: int | None, *, embedding: bool = False, saved: Factors | None = None) -> Factors:
        return svd.svd_factors(W.T if embedding else W, r, energy=self.energy or 1.0, method=self.svd)

    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        return svd.rebuilt_error(W, saved.values)

    def factor_options(self) -> dict[str, Any]:
        return {"method": self.method, "energy": self.energy, "svd": self.svd}


FAMILY = (LoLDUConfig, SVFitConfig)
for _config in FAMILY:
    _new_peft_type(_config.method.upper())
