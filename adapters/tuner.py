"""LoLDU as a PEFT method: its config, its tuner, and their registration, which happens at import."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.factors import base_fingerprint, probe_digest
from adapters.layer import BasePrecisionWarning, FactorLayer, FactorLinear, matrix_shape

log = logging.getLogger(__name__)

# The paper's starting values of z that keep the function. With the difference z - z0 as the core they are all one and
# the same start, zero (they differ in weight decay alone, which pulls ours towards the base).
KEEPS_FUNCTION = ("lu", "uniform", "normal", "constant")
# Its others leave the residual as it is and replace d: the network is destroyed at step 0 (output error 0.98 to 21.6).
BREAKS_FUNCTION = ("s_uniform", "s_normal", "ones", "zeros")


def _new_peft_type(name: str) -> PeftType:
    """PeftType is a closed enum, and PEFT has no other door for a method from outside."""
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


LOLDU = _new_peft_type("LOLDU")


@dataclass
class LoLDUConfig(PeftConfig):
    """LoLDU (arXiv 2410.13618): W' = W + scale P L_r diag(delta) U_r, delta (r,) trained from zero."""

    r: int = field(default=64, metadata={"help": "trained numbers per weight, clamped to its smaller side"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "last parts of module names, a regular expression, or all-linear"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out, likewise"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})
    scale: float = field(default=1.0, metadata={"help": "the paper's sigma; every setting there has 1"})
    init_delta: str = field(
        default="lu",
        metadata={"help": f"the paper's start of z, one that keeps the function: {', '.join(KEEPS_FUNCTION)}"},
    )
    normalize_directions: bool = field(
        default=False, metadata={"help": "divide each direction by its norm, so that one learning rate suits all"}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer numbers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    base_fingerprint: str | None = field(default=None, metadata={"help": "of the base the adapter was made for"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOLDU
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = sorted(set(self.target_modules))
        if type(self.r) is not int or self.r < 1:  # True is an int too
            raise ValueError(f"LoLDUConfig.r is a whole number of at least 1, got {self.r!r}")
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"LoLDUConfig.scale is a finite number other than 0, got {self.scale}")
        if self.init_delta not in KEEPS_FUNCTION:
            why = "replaces the pretrained function at step 0" if self.init_delta in BREAKS_FUNCTION else "is unknown"
            raise ValueError(f"init_delta={self.init_delta!r} {why}; choose one of {', '.join(KEEPS_FUNCTION)}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where to count layers_to_transform, which is missing")


class LoLDUTuner(BaseTuner):
    """Puts a `FactorLayer` around each target; the base model's own tensors are never written."""

    prefix = "loldu_"
    tuner_layer_cls = FactorLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        layers = [layer for layer in model.modules() if isinstance(layer, FactorLayer)]
        if merged := {name for layer in layers for name in layer.merged_adapters}:
            raise ValueError(
                f"{', '.join(sorted(merged))} is merged: unmerge before adding {adapter_name}, whose factors come from "
                "the unmerged weights"
            )
        self._clamped: Counter[int] = Counter()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError:
            raise NoMatchingPeftModuleError(
                f"no module matches target_modules={config.target_modules!r} (exclude_modules="
                f"{config.exclude_modules!r}); this model has: {', '.join(adaptable_modules(model))}"
            ) from None
        except ValueError:
            self._take_back(model, adapter_name)
            raise
        if self._clamped:
            shown = ", ".join(f"{r} on {count} weights" for r, count in sorted(self._clamped.items()))
            log.warning("rank %d is larger than some weights' smaller side and is clamped there: %s", config.r, shown)
        self._check_fingerprint(model, config)

    def _prepare_model(self, peft_config: PeftConfig, model: Any) -> None:
        """Note which weights belong to two modules (a tied head): an adapter on one would not reach the other."""
        own = (m._parameters.get("weight") for m in model.modules())  # m.weight would count PEFT's wrappers too
        owners = Counter(id(weight) for weight in own if weight is not None)
        self._shared = {weight for weight, count in owners.items() if count > 1}
        if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            ends = (model.get_input_embeddings(), model.get_output_embeddings())
            self._shared |= {id(end.weight) for end in ends if hasattr(end, "weight")}

    def _create_and_replace(  # type: ignore[override]
        self, config: LoLDUConfig, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        layer = target
        if not isinstance(layer, FactorLayer):
            matrix_shape(target, current_key)
            if id(target.weight) in self._shared:
                raise ValueError(
                    f"{current_key} shares its weight with another module (tied embeddings), an adapter would untie "
                    f"them: leave it out (exclude_modules=['{target_name}']) or load with tie_word_embeddings=False"
                )
            kind = FactorLinear if isinstance(target, (nn.Linear, Conv1D)) else FactorLayer
            layer = kind(target, current_key)
            layer.set_adapter([adapter_name] if isinstance(self.active_adapter, str) else self.active_adapter)
        loaded_from = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        r = layer.update_layer(adapter_name, config, (loaded_from, config.base_model_name_or_path))
        if r < config.r:
            self._clamped[r] += 1
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        """Leave the model as it was before an injection that failed at a later layer."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, FactorLayer) and adapter_name in layer.maps:
                layer.delete_adapter(adapter_name)
                if not layer.maps:
                    model.set_submodule(name, layer.get_base_layer())

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """all-linear also names the copies of a module that another adapter trains whole: they are no targets."""
        if {"modules_to_save", "original_module"} & set(key.split(".")):
            return False
        return BaseTuner._check_target_module_exists(peft_config, key)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """PEFT drops adapter_names (one per sample, LoRA's alone) silently where a method has no such hook."""
        if adapter_names is not None:
            raise ValueError("LoLDU has no adapter_names per sample: set_adapter, and run each adapter's samples apart")
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cores are float32 from the start, and the frozen maps stay in the base's dtype."""

    def _check_fingerprint(self, model: nn.Module, config: LoLDUConfig) -> None:
        ours = (self.prefix, "modules_to_save.")
        bases = [p for name, p in model.named_parameters() if p.ndim >= 2 and not any(part in name for part in ours)]
        if any(p.is_meta or not p.dtype.is_floating_point for p in bases) or getattr(model, "is_quantized", False):
            return  # nothing to probe yet, or packed: each adapted weight is checked by itself
        found = base_fingerprint(probe_digest(p.flatten(1), p.flatten(1).shape) for p in bases)
        if config.base_fingerprint is None:
            config.base_fingerprint = found
        elif config.base_fingerprint != found:
            warnings.warn(
                f"this base has fingerprint {found[:12]}, the adapter was made on {config.base_fingerprint[:12]}: "
                "another precision or another model; each adapted weight is checked as it loads",
                BasePrecisionWarning,
                stacklevel=2,
            )


def adaptable_modules(model: nn.Module) -> list[str]:
    """Last parts of the names of all modules the family can adapt, for error messages."""
    kinds = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}
    return sorted(names - {"base_layer"})


register_peft_method(name="loldu", config_cls=LoLDUConfig, model_cls=LoLDUTuner)
