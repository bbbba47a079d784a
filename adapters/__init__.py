"""Adapters whose frozen factors come from the base weights and whose trained core is tiny, as PEFT methods."""

from adapters.factors import Factors
from adapters.layer import BasePrecisionWarning, factors_from
from adapters.tuner import LoLDUConfig

PROJECT = "loldu-launcher"  # tells this package from another one named adapters

__all__ = ["BasePrecisionWarning", "Factors", "LoLDUConfig", "factors_from"]
