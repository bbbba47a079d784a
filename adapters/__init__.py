"""Adapters whose frozen factors come from the base weights and whose trained core is tiny, as PEFT methods."""

import adapters.tuner  # noqa: F401 (registers them)
from adapters.config import LoLDUConfig, LoLDUXSConfig, LoRASBConfig, LoRAXSConfig, SVFitConfig, SVFTConfig
from adapters.factors import Factors
from adapters.layer import BasePrecisionWarning, factors_from
from adapters.lora_sb import factors_from_gradients

PROJECT = "loldu-launcher"  # tells this package from another one named adapters

__all__ = [
    "BasePrecisionWarning",
    "Factors",
    "LoLDUConfig",
    "LoLDUXSConfig",
    "LoRASBConfig",
    "LoRAXSConfig",
    "SVFTConfig",
    "SVFitConfig",
    "factors_from",
    "factors_from_gradients",
]
