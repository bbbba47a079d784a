"""ALLoRA: LoRA with a row-wise scaled gradient. Saved as a plain LoRA, which stock PEFT loads.

Method: arXiv 2410.09692; the formula is taken from an implementation of its section 4.2, not from the paper itself.
LoRA without dropout and without alpha / r: y = W x + B A x. The gradient g that reaches A and B from row i of the
output is

    g_i / sqrt(|(B A)_i| + 1 / eta^2)

so rows that have hardly changed yet learn fastest, at eta times the plain gradient. The gradient of the layer's input
is not scaled. The row norms follow from A A^T (r x r): B A is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

STARTS = (True, False, "gaussian", "orthogonal")  # initialisations of A and B that do not use the base's weights
# LoRA's options that may be changed: which layers, and what else is trained. The others would change the formula.
OPTIONS = {own.name for own in fields(PeftConfig)} | {
    *("r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "bias", "runtime_config"),
}


@dataclass
class ALLoRAConfig(LoraConfig):
    """LoRA trained with ALLoRA's gradient scaling. Once trained it is a plain LoRA, and saved as one."""

    # Marked as a LoRA variant, so that PEFT refuses it on layers of a plain LoRA that a model has already.
    eta: float = field(
        default=1.0, metadata={"help": "factor of the gradient where B A is still zero", "is_lora_variant": True}
    )
    method: ClassVar[str] = "allora"  # PEFT knows it as LoRA
    lora_alpha: int | None = field(default=None, metadata={"help": "r, a scaling of one"})  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eta) and self.eta > 0):
            raise ValueError(f"ALLoRAConfig.eta is a positive number, got {self.eta}")
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        plain = LoraConfig(lora_alpha=self.r)
        for name in sorted({own.name for own in fields(LoraConfig)} - OPTIONS):
            value, known = getattr(self, name), STARTS if name == "init_lora_weights" else (getattr(plain, name),)
            if value not in known:
                expected = " or ".join(map(str, known))
                raise ValueError(f"ALLoRA does not support {name}={value}, only {expected}: leave it out, or use lora")
        super().__post_init__()
        # PEFT takes the first entry that matches; without nn.Module, other layers would get its plain LoRA layer.
        self._register_custom_module({nn.Linear: ALLoRALinear, nn.Module: _refuse})  # type: ignore[dict-item]

    def to_dict(self) -> dict[str, Any]:
        """Leaves out eta, which other readers of a LoRA do not know."""
        return {name: value for name, value in super().to_dict().items() if name != "eta"}


class ALLoRALinear(Linear):
    """PEFT's LoRA layer with the scaled gradient."""

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant:
        return Scaled(config.eta)


def _refuse(target: nn.Module, adapter_name: str, *, target_name: str, **kwargs: Any) -> NoReturn:
    raise ValueError(
        f"{target_name} is a {type(target).__name__}, ALLoRA supports nn.Linear only: leave it out (exclude_modules), "
        "name other target_modules, or use lora"
    )


class Scaled(LoraVariant):
    """The forward pass and merging of an ALLoRA adapter in PEFT's layer."""

    def __init__(self, eta: float):
        self.eta = eta

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        pass

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        with torch.no_grad():
            norms = ((B @ (A @ A.T)) * B).sum(1).clamp(min=0).sqrt()
            factors = (norms + self.eta**-2).rsqrt()
        return result + ScaledProduct.apply(x, A, B, factors) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Any) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class ScaledProduct(torch.autograd.Function):
    """B A x for x (..., n), A (r, n), B (m, r); factors (m,) scale the gradient's rows for A and B, not for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, factors: Tensor) -> Tensor:
        h = F.linear(x, A)
        ctx.save_for_backward(x, h, A, B, factors)
        return F.linear(h, B)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, h, A, B, factors = ctx.saved_tensors
        g, h = g.to(A.dtype), h.to(A.dtype)  # under autocast the forward pass ran in a narrower one
        scaled = (g * factors).flatten(0, -2)
        dx = ((g @ B) @ A).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, (scaled @ B).T @ x.flatten(0, -2).to(A.dtype), scaled.T @ h.flatten(0, -2), None
