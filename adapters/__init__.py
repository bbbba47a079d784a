"""Adapters whose frozen factors come from the base weights and whose trained core is tiny, as PEFT methods.

To add a method, write one file as base.py describes, and add its config to `METHODS`.
"""

from collections.abc import Mapping

from peft import PeftConfig

from adapters.adalora import AdaLoRAConfig
from adapters.allora import ALLoRAConfig
from adapters.base import FactorConfig
from adapters.dsee import DSEEConfig
from adapters.factors import Factors
from adapters.flora import FLoRAConfig
from adapters.increlora import IncreLoRAConfig
from adapters.layer import BasePrecisionWarning, factors_from, rebuilding
from adapters.loldu import LoLDUConfig, LoLDUXSConfig
from adapters.lora_sb import LoRASBConfig, factors_from_gradients
from adapters.many import ManyAdapters
from adapters.sara import SaRAConfig
from adapters.svd import LoRAXSConfig, SVFitConfig, SVFTConfig
from adapters.trained import TrainedConfig, UpdateTuner
from adapters.tuner import register

PROJECT = "loldu-launcher"  # distinguishes this package from another one named adapters

METHODS: Mapping[str, type[PeftConfig]] = {
    config.method: config
    for config in (
        LoLDUConfig,
        LoLDUXSConfig,
        SVFitConfig,
        SVFTConfig,
        LoRAXSConfig,
        LoRASBConfig,
        ALLoRAConfig,
        AdaLoRAConfig,
        DSEEConfig,
        SaRAConfig,
        IncreLoRAConfig,
        FLoRAConfig,
    )
}
for _config in METHODS.values():  # the others are variants of PEFT's own methods
    if issubclass(_config, FactorConfig):
        register(_config)
    elif issubclass(_config, TrainedConfig):
        register(_config, UpdateTuner)

__all__ = [
    "METHODS",
    "BasePrecisionWarning",
    "FactorConfig",
    "Factors",
    "LoLDUConfig",
    "LoLDUXSConfig",
    "LoRASBConfig",
    "LoRAXSConfig",
    "ManyAdapters",
    "SVFTConfig",
    "SVFitConfig",
    "factors_from",
    "factors_from_gradients",
    "rebuilding",
]
