"""The family's PEFT configs, one per method: what decides its factors, and the shape of its core."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
class FactorConfig(PeftConfig, ABC):
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
    through_write: ClassVar[bool]  # whether it reads through its write map (svd.py), or pivot rows (factors.py)
    reads_input: ClassVar[bool] = False  # reads the layer's input, not its output: its factors are not W's (lora_sb.py)
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

    def core_shape(self, r: int) -> tuple[int, ...]:
        """Of the trained numbers; here the diagonal of an r x r matrix."""
        return (r,)

    def multiply(self, h: Tensor, core: Tensor) -> Tensor:
        """The r x r matrix that core stands for, times h (..., r)."""
        return h * core

    def core_matrix(self, core: Tensor, r: int) -> Tensor:
        """That matrix, or its diagonal (r,) where there is no more."""
        return core

    @abstractmethod
    def factors(self, W: Tensor, r: int | None, *, embedding: bool = False, saved: Factors | None = None) -> Factors:
        """Factors of W (m, n), probe left empty; saved: the pivots and values that an adapter was saved with."""

    @abstractmethod
    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        """How far factors rebuilt from this W are from those with the saved pivots and values."""

    @abstractmethod
    def factor_options(self) -> dict[str, Any]:
        """What decides the factors beside rank and weight, as JSON: for those who make them elsewhere."""


def _check_svd(config: Any) -> None:
    if config.svd not in svd.METHODS:
        raise ValueError(f"{type(config).__name__}.svd is one of {', '.join(svd.METHODS)}, got {config.svd!r}")


class DenseCore:
    """An r x r core, for a config that inherits from this first.

    For an embedding the formula of the SVD methods is that of W^T; LoLDU's has R transposed. A diagonal is the same.
    """

    def core_shape(self, r: int) -> tuple[int, ...]:
        return (r, r)

    def multiply(self, h: Tensor, core: Tensor) -> Tensor:
        return F.linear(h, core)


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
    through_write = False
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
        return {"method": "loldu", "normalize": self.normalize_directions}


@dataclass
class LoLDUXSConfig(DenseCore, LoLDUConfig):
    """LoRA-XS's core between LoLDU's directions: W' = W + scale P L_r R U_r, R (r, r) trained from zero."""

    method = "lolduxs"


@dataclass
class SVDConfig(FactorConfig):
    """What the methods on singular vectors share."""

    energy: float | None = field(
        default=None,
        metadata={"help": "choose each weight's rank, r aside: the least that holds this share of its squared norm"},
    )
    normalize_directions: bool = field(
        default=True, metadata={"help": "u v^T has norm one; without, LoRA-XS takes the paper's u s v^T"}
    )
    svd: str = field(default="auto", metadata={"help": f"how the factors are made: {', '.join(svd.METHODS)}"})
    ranks: dict[str, int] | None = field(default=None, metadata={"help": "the ranks that energy chose, by module"})

    through_write = True
    # Measured as above (71 weights): the error is the predicted one to a factor of 2. bf16 stays below 0.13 (and the
    # update's true error below 0.07), NF4 passes 0.19 on all weights from rank 8 up, another base is at 1.4. int8 is
    # accepted on two weights of three, with a true error of up to 0.2.
    rebuilt_bound = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(
                f"{type(self).__name__}.energy is a share between 0 and 1, got {self.energy}; give r for all of it"
            )
        if not self.normalize_directions and self.method != "loraxs":
            raise ValueError("normalize_directions=false is not to be had: singular vectors have norm one")
        _check_svd(self)

    def rank_of(self, module: str, shape: tuple[int, int]) -> int | None:
        return super().rank_of(module, shape) if self.energy is None else (self.ranks or {}).get(module)

    def note_rank(self, module: str, r: int) -> None:
        if self.energy is not None:
            self.ranks = {**(self.ranks or {}), module: r}

    def factors(self, W: Tensor, r: int | None, *, embedding: bool = False, saved: Factors | None = None) -> Factors:
        return svd.svd_factors(
            W.T if embedding else W,
            r,
            energy=self.energy or 1.0,
            method=self.svd,
            pivots=saved.pivots if saved else None,
            divide=self.normalize_directions,
        )

    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        return svd.rebuilt_error(W, saved.values)

    def factor_options(self) -> dict[str, Any]:
        how = "svfit" if self.normalize_directions else "loraxs"
        return {"method": how, "energy": self.energy, "svd": self.svd}


@dataclass
class SVFitConfig(SVDConfig):
    """SVFit (arXiv 2409.05926): W' = W + scale U_r diag(delta) V_r^T, delta (r,) trained from zero.

    delta is the paper's s' - s: its unit is that of the singular values, and every direction has norm one.
    """

    method = "svfit"


@dataclass
class SVFTConfig(SVDConfig):
    """SVFT, banded (arXiv 2405.19597): W' = W + scale U_r M V_r^T, M's diagonals -b .. b trained from zero.

    The core holds them one after the other, r (2 b + 1) - b (b + 1) numbers. The paper has r = k.
    """

    off_diagonals: int = field(default=2, metadata={"help": "b: diagonals on either side of the main one"})

    method = "svft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.off_diagonals) is not int or self.off_diagonals < 0:
            raise ValueError(f"SVFTConfig.off_diagonals is a whole number of at least 0, got {self.off_diagonals!r}")

    def _bands(self, r: int) -> list[tuple[int, int]]:
        """(place above the main diagonal, numbers) of each diagonal that an r x r matrix has."""
        b = min(self.off_diagonals, r - 1)
        return [(above, r - abs(above)) for above in range(-b, b + 1)]

    def core_shape(self, r: int) -> tuple[int, ...]:
        return (sum(count for _, count in self._bands(r)),)

    def multiply(self, h: Tensor, core: Tensor) -> Tensor:
        r, total = h.shape[-1], torch.zeros_like(h)
        bands = self._bands(r)
        for (above, count), band in zip(bands, core.split([count for _, count in bands]), strict=True):
            row, column = max(0, -above), max(0, above)
            total[..., row : row + count] += h[..., column : column + count] * band
        return total

    def core_matrix(self, core: Tensor, r: int) -> Tensor:
        return self.multiply(torch.eye(r).to(core), core).T


@dataclass
class LoRAXSConfig(DenseCore, SVDConfig):
    """LoRA-XS (arXiv 2405.17604): W' = W + scale U_r R diag(s_r) V_r^T, R (r, r) trained from zero.

    The paper draws R from N(0, 1e-10); zero is the same start to rounding, and keeps the function exactly.
    """

    normalize_directions: bool = field(default=False, metadata={"help": "leave diag(s_r) out"})

    method = "loraxs"


@dataclass
class LoRASBConfig(DenseCore, FactorConfig):
    """LoRA-SB (arXiv 2411.19557): W' = W + scale U_r R V_r^T, R (r, r) trained from the first step's step * diag(s).

    U, s, V are of the sign of the summed gradient of a few samples, not of W: see lora_sb.py.
    """

    step: float | None = field(
        default=None,
        metadata={"help": "size of the first step; the launcher takes the learning rate, as the paper does"},
    )
    samples: int = field(default=64, metadata={"help": "samples whose gradient makes the factors (the launcher's)"})
    svd: str = field(default="auto", metadata={"help": f"how the factors are made: {', '.join(svd.METHODS)}"})

    method = "lorasb"
    through_write = False
    reads_input = True
    rebuilt_bound = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"LoRASBConfig.step is a positive number, got {self.step}")
        if type(self.samples) is not int or self.samples < 1:
            raise ValueError(f"LoRASBConfig.samples is a whole number of at least 1, got {self.samples!r}")
        _check_svd(self)

    def factors(self, W: Tensor, r: int | None, *, embedding: bool = False, saved: Factors | None = None) -> Factors:
        """Of the summed gradient W (m, n), not of the weight."""
        assert r is not None
        assert not embedding
        return svd.first_step_factors(W, r, method=self.svd)

    def rebuilt_error(self, W: Tensor, saved: Factors) -> float:
        return math.inf  # no weight tells its gradient

    def factor_options(self) -> dict[str, Any]:
        return {"method": "lorasb", "svd": self.svd}


FAMILY = (LoLDUConfig, LoLDUXSConfig, SVFitConfig, SVFTConfig, LoRAXSConfig, LoRASBConfig)
for _config in FAMILY:
    _new_peft_type(_config.method.upper())
