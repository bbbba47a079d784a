"""LoRA-SB: frozen factors from the gradient of the weight, an r x r core that starts at the first step.

Paper: LoRA-SB, arXiv 2411.19557; the formulas are those of its authors' code. Letters: W (m, n) = out x in, r the rank,
L_i(W) the loss of sample i, where a few samples represent the data.

    G  = -sign(sum_i dL_i/dW)              the direction of full fine-tuning's first AdamW step (its size is the lr)
    G ~= U_r diag(s) V_r^T                 the leading singular vectors of G, signs as in svd.py
    W' = W + U_r R V_r^T                   R: r x r trained numbers, step * diag(s) at the start

So training starts with the best step of rank r that full fine-tuning would have made: by design not at the base model.
U_r and V_r do not follow from W: the layer reads its input through V_r (input_layer.py), and the adapter's file holds
both. Making them costs one backward pass over the samples (gradients.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor, nn

from adapters.base import DenseCore, FactorConfig, Factorization
from adapters.factors import Factors, signs
from adapters.gradients import BYTES_AT_ONCE, gradient_sums, groups_of
from adapters.shapes import matrix_shape
from adapters.svd import ALGORITHMS, check_algorithm, not_orthonormal, svd_cost, svd_factors, svd_residual


@dataclass(frozen=True)
class FirstStepSVD(Factorization):
    """The leading singular vectors of the first AdamW step; W is the weight's summed gradient."""

    svd: str = "auto"

    name = "lorasb"
    algorithm = ("svd-of-first-step", 1)
    from_gradients = True

    def factors(
        self,
        panel: Tensor,
        r: int | None,
        *,
        rows: Callable[[Tensor], Tensor],
        embedding: bool = False,
        saved: Factors | None = None,
    ) -> Factors:
        assert r is not None
        assert not embedding
        return first_step_factors(panel, r, method=self.svd)

    def cost(self, shape: tuple[int, int], r: int, *, embedding: bool = False) -> float:
        return svd_cost(shape, r, exact=self.svd == "exact")

    def residual(self, panel: Tensor, factors: Factors, *, embedding: bool = False) -> float:
        return svd_residual(panel.sign(), factors)

    def misfit(self, W: Tensor, factors: Factors, *, embedding: bool = False) -> str | None:
        """The gradient is gone, so only what holds for every gradient is checked (and who made them: make.py)."""
        g = signs(len(factors.values))
        if any(not_orthonormal(U.float(), g.to(U.device)) for U in (factors.write, factors.read.T)):
            return "its directions are not orthonormal"
        return None


@dataclass
class LoRASBConfig(DenseCore, FactorConfig):
    """LoRA-SB (arXiv 2411.19557): W' = W + scale U_r R V_r^T, R (r, r) trained from the first step's step * diag(s).

    U, s, V are the singular vectors and values of the sign of a few samples' summed gradient, not of W.
    """

    step: float | None = field(
        default=None,
        metadata={"help": "size of the first step; the launcher uses the learning rate, as the paper does"},
    )
    samples: int = field(
        default=64, metadata={"help": "samples whose gradient makes the factors (used by the launcher)"}
    )
    svd: str = field(default="auto", metadata={"help": f"algorithm of the SVD: {', '.join(ALGORITHMS)}"})

    method = "lorasb"
    through_write = False
    reads_input = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step is not None and not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"LoRASBConfig.step is a positive number, got {self.step}")
        if type(self.samples) is not int or self.samples < 1:
            raise ValueError(f"LoRASBConfig.samples is a whole number of at least 1, got {self.samples!r}")
        check_algorithm(self)

    def factorization(self) -> FirstStepSVD:
        return FirstStepSVD(svd=self.svd)

    @property
    def usual_learning_rate(self) -> float | None:
        return 1e-3

    def for_training(self, learning_rate: float) -> Self:
        """step is the learning rate unless it is given."""
        return self if self.step else dataclasses.replace(self, step=learning_rate)

    def start_core(self, values: Tensor) -> Tensor:
        """The first step itself: step * diag(s). Raises ValueError if step is not set."""
        if self.step is None:
            raise ValueError("LoRASBConfig.step is the size of the step that the factors belong to: give it a number")
        return (self.step * values).diag()


def first_step_factors(gradient: Tensor, r: int, *, method: str = "auto") -> Factors:
    """LoRA-SB's factors from a weight's summed gradient (m, n): write U_r (m, r), read V_r^T (r, n), values s (r,).

    They factor -sign(gradient), the direction of AdamW's first step; probe is left zero. Raises ValueError if the
    gradient is zero or not finite, or its sign has rank below r.
    """
    step = -gradient.sign().where(gradient.isfinite(), gradient)
    if not step.any():
        raise ValueError("its gradient is zero: no sample reaches it")
    factors = svd_factors(step, r, method=method)
    return factors._replace(read=factors.read[:, None] * (factors.write.T @ step.to(factors.write)))


def factors_from_gradients(
    model: nn.Module,
    names: Iterable[str],
    losses: Callable[[], Iterable[Tensor]],
    r: int,
    *,
    method: str = "auto",
    bytes_at_once: int = BYTES_AT_ONCE,
) -> Callable[[str, tuple[int, int]], Factors | None]:
    """A source for `factors_from`: factors of the named modules of this model, from the losses of a few samples.

    losses() computes the samples' losses with the model, one after the other; it is called once for each group of
    weights. method is the algorithm of the SVD.
    """
    layers = {name: model.get_submodule(name) for name in names}
    made: dict[str, Factors] = {}
    for group in groups_of({name: matrix_shape(layer, name) for name, layer in layers.items()}, bytes_at_once):
        with gradient_sums({name: layers[name] for name in group}) as sums:
            for loss in losses():
                loss.backward()
        for name in group:
            rank = min(r, *matrix_shape(layers[name], name))
            made[name] = first_step_factors(sums.pop(name), rank, method=method)
    return lambda name, shape: made.get(name)
