"""The PEFT tuner that all methods share, and the function that registers a method with PEFT."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftType, TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    register_peft_method,
)
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.base import FactorConfig
from adapters.factor_map import FactorMap
from adapters.factors import base_fingerprint, probe_digest
from adapters.input_layer import InputLinear, InputMap
from adapters.layer import BasePrecisionWarning, FactorLayer, FactorLinear
from adapters.shapes import matrix_shape

log = logging.getLogger(__name__)


class FactorTuner(BaseTuner):
    """Wraps each target in a `FactorLayer`; the base model's own tensors are never changed."""

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
        self._ranks: Counter[int] = Counter()
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
        chosen = ", ".join(f"{r} on {count} weights" for r, count in sorted(self._ranks.items()) if r != config.r)
        if config.factorization().chooses_rank:
            log.info("ranks chosen from the weights: %s", chosen)
        elif chosen and not config.inference_mode:  # a saved adapter has the ranks that it had
            log.warning("rank %d is reduced to the smaller dimension of some weights: %s", config.r, chosen)
        self._check_fingerprint(model, config)

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        self._shared = shared_weights(model)

    def _create_and_replace(  # type: ignore[override]
        self,
        config: FactorConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer = target
        if not isinstance(layer, FactorLayer):
            matrix_shape(target, current_key)
            if id(target.weight) in self._shared:
                raise ValueError(
                    f"{current_key} shares its weight with another module (tied embeddings); an adapter would untie "
                    f"them: leave it out (exclude_modules=['{target_name}']) or load with tie_word_embeddings=False"
                )
            kind = FactorLinear if isinstance(target, (nn.Linear, Conv1D)) else FactorLayer
            if config.reads_input:
                if kind is FactorLayer:
                    raise ValueError(
                        f"{current_key} is a {type(target).__name__}; {config.method} supports Linear and Conv1D: "
                        f"leave it out (exclude_modules=['{target_name}'])"
                    )
                kind = InputLinear
            layer = kind(target, current_key, config.method)
            layer.set_adapter([adapter_name] if isinstance(self.active_adapter, str) else self.active_adapter)
        loaded_from = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        r = layer.update_layer(adapter_name, config, (loaded_from, config.base_model_name_or_path))
        config.note_rank(current_key, r)
        self._ranks[r] += 1
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        """Restore the model after an injection that failed at a later layer."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, FactorLayer) and adapter_name in layer.maps:
                layer.delete_adapter(adapter_name)
                if not layer.maps:
                    model.set_submodule(name, layer.get_base_layer())

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """all-linear also matches the copies of a module that another adapter trains whole; these are not targets."""
        if {"modules_to_save", "original_module"} & set(key.split(".")):
            return False
        return BaseTuner._check_target_module_exists(peft_config, key)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: list[str]
    ) -> dict[str, Any]:
        """What an adapter's file holds, even under torch's FSDP1.

        There the state dict has the frozen maps as well, which are dropped here. And if layers are wrapped one by
        one, PEFT finds none of them, because it looks for the wrappers' names in the keys.
        """
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        derived = InputMap.derived if config.reads_input else FactorMap.derived
        ours = {key: value for key, value in state_dict.items() if f".{config.method}_map.{adapter_name}." in key}
        return {
            key: value for key, value in {**found, **ours}.items()
            if key not in ours or key.rpartition(".")[2] not in derived
        }  # fmt: skip

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Hand adapter_names, one name per sample, to the layers for one call, as PEFT's own LoRA does."""
        if adapter_names is None:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, (FactorLayer, AuxiliaryTrainingWrapper))]
        known = {"__base__", *(name for layer in layers if isinstance(layer, FactorLayer) for name in layer.maps)}
        if unknown := sorted(set(adapter_names) - known):
            raise ValueError(
                f"adapter_names names {', '.join(unknown)}, which this model does not have: load it, or name one of "
                f"{', '.join(sorted(known))}"
            )
        if merged := sorted({name for layer in layers for name in getattr(layer, "merged_adapters", ())}):
            raise ValueError(f"{', '.join(merged)} is merged: call unmerge_adapter before passing adapter_names")
        if self.training:
            raise ValueError("adapter_names works in evaluation mode only: call model.eval() first")
        encodes = self.model.get_encoder() if getattr(self.model.config, "is_encoder_decoder", False) else None
        once = set(encodes.modules()) if encodes is not None else set()  # an encoder sees each sample once
        repeated = [name for name in adapter_names for _ in range(kwargs.get("num_beams") or 1)]
        hooks = [
            layer.register_forward_pre_hook(
                partial(_with_names, names=adapter_names if layer in once else repeated), with_kwargs=True
            )
            for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to cast: cores are float32 from the start, and frozen maps keep the base's dtype."""

    def _check_fingerprint(self, model: nn.Module, config: FactorConfig) -> None:
        classifies = config.task_type in (
            TaskType.SEQ_CLS,
            TaskType.TOKEN_CLS,
            None,  # images
        )  # the base's checkpoint has no such head
        heads = [f"{name}." for name in config.modules_to_save or ()] if classifies else []
        ours = (self.prefix, "modules_to_save.", *heads)
        bases = [p for name, p in model.named_parameters() if p.ndim >= 2 and not any(part in name for part in ours)]
        if any(p.is_meta or not p.dtype.is_floating_point for p in bases) or getattr(model, "is_quantized", False):
            return  # no values yet, or packed ones: each adapted weight is checked separately
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


def _with_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: Sequence[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": names}


def shared_weights(model: Any) -> set[int]:
    """The ids of weights that two modules share (a tied head): an adapter on one would not change the other."""
    own = (m._parameters.get("weight") for m in model.modules())  # m.weight would count PEFT's wrappers too
    owners = Counter(id(weight) for weight in own if weight is not None)
    shared = {weight for weight, count in owners.items() if count > 1}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        shared |= {id(end.weight) for end in ends if hasattr(end, "weight")}
    return shared


def adaptable_modules(model: nn.Module) -> list[str]:
    """Last parts of the names of all modules that can be adapted, for error messages."""
    kinds = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}
    return sorted(names - {"base_layer"})


def register(config: Any, tuner: type[BaseTuner] = FactorTuner) -> None:
    """Make a method known to PEFT under its name: `PeftType`, the config and a tuner class of its own."""
    name = config.method.upper()
    member = str.__new__(PeftType, name)  # a closed enum, and PEFT offers no other way in for a method from outside
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    own = type(f"{config.__name__.removesuffix('Config')}Tuner", (tuner,), {"prefix": f"{config.method}_"})
    register_peft_method(name=config.method, config_cls=config, model_cls=own)
