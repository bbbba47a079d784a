"""`--optimizer`: torch's AdamW, and others of well-kept libraries. Plain data, so the command line can list them.

The state of each is kept in checkpoints as the library has it: optimizer/PARAMETER/NAME for every tensor.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class OptimizerInfo:
    """What is known about an optimizer without importing it."""

    where: str  # "module:Class"
    settings: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    fields: Mapping[str, str] = field(default_factory=lambda: NOTHING)  # its arguments, and the settings they take
    state: str = "state1"  # a tensor that each parameter's state has after a step
    sharded: bool = False  # works on a parameter's rows, and under DeepSpeed
    dense_only: bool = False  # for whole weight matrices: --method full

    @property
    def package(self) -> str:
        return self.where.partition(".")[0]


OPTIMIZERS: dict[str, OptimizerInfo] = {
    "adamw": OptimizerInfo(
        where="torch.optim:AdamW",  # 8 bytes of state per trained number
        settings={"fused": True},
        state="exp_avg",
        sharded=True,
    ),
    "adamw8bit": OptimizerInfo(where="bitsandbytes.optim:AdamW8bit"),  # 2 bytes (arXiv 2110.02861)
    "lion": OptimizerInfo(where="bitsandbytes.optim:Lion"),  # 4 bytes (arXiv 2302.06675)
    "lion8bit": OptimizerInfo(where="bitsandbytes.optim:Lion8bit"),  # 1 byte
    "gradnormlorp": OptimizerInfo(
        where="launcher.gradnormlorp:GradNormLoRP",  # AdamW of gradients in a subspace (arXiv 2412.19616)
        fields={"rank": "projection_rank", "every": "projection_every"},
        state="step",
        dense_only=True,
    ),
}


def check_optimizer(name: str, *, dense: bool) -> None:
    """Raises ValueError if the optimizer's package is missing, or it needs whole weights and the run trains none."""
    info = OPTIMIZERS[name]
    if importlib.util.find_spec(info.package) is None:
        raise ValueError(f"--optimizer {name} needs {info.package}: pip install {info.package}")
    if info.dense_only and not dense:
        raise ValueError(
            f"--optimizer {name} projects the gradients of whole weight matrices, and an adapter is small already: "
            "give --method full, or --optimizer adamw"
        )


def make(config: Any, parameters: Iterable[Any]) -> Any:
    """The torch optimizer of an OptimizerConfig."""
    info = OPTIMIZERS[config.optimizer]
    module, _, cls = info.where.partition(":")
    named = {argument: getattr(config, field) for argument, field in info.fields.items()}
    return getattr(importlib.import_module(module), cls)(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        **info.settings,
        **named,
    )
