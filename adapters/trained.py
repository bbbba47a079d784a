"""The family of methods that train the whole update of a weight: no factors of the weight, no factor cache.

A method is one file with two classes: a `TrainedConfig`, the PEFT config with its options, and an `Update`, the trained
numbers of one weight and their formula. It is registered in `adapters/__init__.py`. A method that also works between
steps has a `schedule` (schedule.py).

Letters: W (m, n) = out x in, x (..., n) the layer's input, W' = W + delta.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.shapes import features, matrix_shape
from adapters.tuner import FactorTuner, shared_weights


@dataclass
class TrainedConfig(PeftConfig, ABC):
    """Base class of the PEFT configs of these methods."""

    r: int = field(default=8, metadata={"help": "rank, clamped to a weight's smaller side"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "last parts of module names, a regular expression, or all-linear"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out, likewise"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "layer numbers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of layers"})
    init_weights: bool = field(
        default=True, metadata={"help": "start at the base model; False: random, so that tests see an effect"}
    )
    sizes: dict[str, int] | None = field(
        default=None, metadata={"help": "of a saved adapter: trained directions or entries by module, if they differ"}
    )

    method: ClassVar[str]  # name in lower case; PEFT's type is the same in capitals
    not_on_quantised: ClassVar[str] = ""  # why it cannot be trained on packed weights
    reads_weights: ClassVar[bool] = (
        False  # whether its start depends on whole weights, so that a process has to hold them
    )
    low_rank: ClassVar[bool] = True  # whether a LoRA adapter can equal it
    convolutions: ClassVar[bool] = False  # whether it adapts Conv2d as well

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = sorted(set(self.target_modules))
        if type(self.r) is not int or self.r < 1:  # True is an int too
            raise ValueError(f"{type(self).__name__}.r is a whole number of at least 1, got {self.r!r}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern names the list in which layers_to_transform counts: give both")

    @abstractmethod
    def update(self, name: str, base: nn.Module, W: Tensor | None) -> Update:
        """The update of the layer of this name. W (m, n): its weight, if the method reads weights and it has values.

        Without W, a method that reads weights makes its numbers in their sizes alone: those of a file follow.
        """

    def prepare(self, weights: Callable[[], list[Tensor]]) -> None:
        """Settle what depends on all weights that are adapted; called before each update, the first time with all."""


class Update(nn.Module, ABC):
    """The trained numbers of one weight, in float32, and what they add."""

    @abstractmethod
    def delta(self) -> Tensor:
        """W' - W (m, n)."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output (..., m) for its input x (..., n)."""

    def lora(self) -> tuple[Tensor, Tensor]:
        """The update as a product B A: A (r, n), B (m, r). Raises ValueError if its rank is not low."""
        raise ValueError(
            "this method's update is sparse and has no low rank, so no LoRA equals it: merge it into the base instead "
            "(loldu merge)"
        )

    def kept(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """By the name of a tensor, the part of it that a saved adapter has; those not named are saved whole."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Trained numbers stay float32 when a model is cast to a narrower dtype."""

        def apply(old: Tensor) -> Tensor:
            new = fn(old)
            return old.to(new.device) if new.element_size() < old.element_size() else new

        return super()._apply(apply, recurse)


def parameter(shape: tuple[int, ...], device: torch.device, std: float = 0.0) -> nn.Parameter:
    """A float32 parameter of zeros, or drawn from N(0, std^2) by torch's generator of the CPU, whatever the device."""
    if std == 0.0 or device.type == "meta":
        return nn.Parameter(torch.zeros(shape, device=device))
    return nn.Parameter((std * torch.randn(shape)).to(device))


class UpdateLayer(nn.Module, BaseTunerLayer):
    """A Linear, quantised Linear, Conv1D or Conv2d with updates of its weight."""

    embedding = False

    def __init__(self, base_layer: nn.Module, name: str, method: str):
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = (f"{method}_update",)  # PEFT knows a method's parameters by their prefix
        self.add_module(f"{method}_update", nn.ModuleDict())
        self.name = name  # in the model
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None
        self.shape = matrix_shape(self.base, name)
        self.in_features, self.out_features = features(self.base, self.shape)  # as PEFT's own layers have them
        self.quantization_backend = resolve_quantization_backend(self.base)

    @property
    def maps(self) -> dict[str, Update]:
        """The updates of this layer by the adapter's name."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def base(self) -> Any:
        """The base layer; its attributes depend on its type."""
        return self.get_base_layer()

    def add_update(self, adapter_name: str, config: TrainedConfig) -> None:
        """Give the layer a new adapter at its start."""
        weight = self.base.weight
        known = config.reads_weights and not weight.is_meta and not config.inference_mode
        self.maps[adapter_name] = config.update(self.name, self.base, self.matrix() if known else None)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def matrix(self) -> Tensor:
        """The unmerged W (m, n), dequantised if the base is quantised."""
        weight = self._unmerged if self._unmerged is not None else self.get_base_weight()
        return weight.T if isinstance(self.base, Conv1D) else weight.flatten(1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for adapter_name in self.active_adapters:
            if adapter_name in self.maps:
                y = y + self.maps[adapter_name](x).to(y.dtype)
        return y

    def lora(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The adapter as a low-rank pair A (r, n), B (m, r)."""
        A, B = self.maps[adapter_name].lora()
        return A.detach(), B.detach()

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's update of the base weight, in the base weight's layout."""
        delta = self.maps[adapter_name].delta()
        return delta.T if isinstance(self.base, Conv1D) else delta.view(self.base.weight.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight, of which a copy is kept."""
        if self.quantization_backend is not None:
            raise ValueError(
                f"{self.name} is quantised, and rounding would lose the update: load the base in full precision and "
                "merge there"
            )
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.maps]
        if not names:
            return
        unmerged = self.base.weight.data.clone() if self._unmerged is None else self._unmerged
        applied = [*self.merged_adapters, *names]
        merged = unmerged.to(torch.promote_types(unmerged.dtype, torch.float32))
        for name in applied:
            merged = merged + self.get_delta_weight(name).to(merged)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"{self.name}: merging {', '.join(names)} gives NaN or infinite weights; nothing was changed"
            )
        self.base.weight.data = merged.to(unmerged.dtype)
        self._unmerged, self.merged_adapters = unmerged, applied

    def unmerge(self) -> None:
        """Restore the unmerged weight, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base.weight.data = self._unmerged.to(self.base.weight)
        self._unmerged, self.merged_adapters = None, []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not isinstance(self.base, Conv1D)


class UpdateLinear(UpdateLayer):
    """The same for Linear and Conv1D: PEFT's all-linear recognises adapted layers by Linear in the class name."""


class UpdateTuner(BaseTuner):
    """Wraps each target in an `UpdateLayer`; the base model's own tensors are never changed."""

    tuner_layer_cls = UpdateLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _check_target_module_exists = staticmethod(FactorTuner._check_target_module_exists)

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        self._shared = shared_weights(model)

    def _weights(self, config: Any) -> list[Tensor]:
        """The weights that will be adapted; call it before the first of them is."""
        found = [
            module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)) and self._check_target_module_exists(config, name)
        ]
        return [weight.detach() for weight in found if not weight.is_meta]

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        if config.reads_weights and not config.inference_mode:
            config.prepare(lambda: self._weights(config))
        layer: Any = target
        if not isinstance(layer, UpdateLayer):
            kinds: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D, *([nn.Conv2d] if config.convolutions else []))
            if not isinstance(target, kinds):
                raise ValueError(
                    f"{current_key} is a {type(target).__name__}; {config.method} supports "
                    f"{', '.join(kind.__name__ for kind in kinds)}: leave it out (exclude_modules=['{target_name}'])"
                )
            matrix_shape(target, current_key)
            if id(target.weight) in self._shared:
                raise ValueError(
                    f"{current_key} shares its weight with another module (tied embeddings); an adapter would untie "
                    f"them: leave it out (exclude_modules=['{target_name}']) or load with tie_word_embeddings=False"
                )
            kind = UpdateLayer if isinstance(target, nn.Conv2d) else UpdateLinear
            layer = kind(target, current_key, config.method)
            layer.set_adapter([adapter_name] if isinstance(self.active_adapter, str) else self.active_adapter)
        layer.add_update(adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: list[str]
    ) -> dict[str, Any]:
        """What an adapter's file holds: the part of each tensor that the method keeps."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in model.named_modules():
            if isinstance(layer, UpdateLayer) and adapter_name in layer.maps:
                prefix = f"{name}.{layer.adapter_layer_names[0]}.{adapter_name}."
                for tensor, part in layer.maps[adapter_name].kept().items():
                    found[prefix + tensor] = part(found[prefix + tensor]).contiguous()
        return found

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to cast: trained numbers are float32 from the start."""
