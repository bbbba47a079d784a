"""The tensors of an adapter file by module, and the refusal of those that do not belong to an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Parts = dict[str, dict[str, Tensor]]  # module -> part of its adapter -> tensor
PREFIX = "base_model.model."  # PEFT's, before the name of the module


def by_module(tensors: Mapping[str, Tensor], between: str) -> tuple[Parts, dict[str, Tensor]]:
    """The tensors named PREFIX module between part, and all others."""
    found: Parts = {}
    rest = {}
    for name, tensor in tensors.items():
        module, is_ours, part = name.partition(between)
        if is_ours and module.startswith(PREFIX):
            found.setdefault(module[len(PREFIX) :], {})[part] = tensor
        else:
            rest[name] = tensor
    return found, rest


def refuse_unknown(model: nn.Module, adapter: str, rest: Mapping[str, Tensor]) -> None:
    """Raises ValueError for tensors other than copies of the base's own, which PEFT saves for adapted embeddings."""
    if foreign := [name for name, tensor in rest.items() if not _copies_base(model, name, tensor)]:
        raise ValueError(
            f"adapter {adapter} holds tensors that are not part of the adapter ({len(foreign)}: "
            f"{', '.join(foreign[:3])}): get it from a source you trust, or remove them"
        )


def module_of(model: nn.Module, adapter: str, module: str) -> Any:
    """The model's module of this name. Raises ValueError if there is none."""
    try:
        return model.get_submodule(module)
    except AttributeError:
        raise ValueError(
            f"adapter {adapter} adapts {module}, which this base does not have: load it on the base it was trained on"
        ) from None


def _copies_base(model: nn.Module, name: str, tensor: Tensor) -> bool:
    try:
        held = model.get_parameter(name.removeprefix(PREFIX).replace(".base_layer.", "."))
    except AttributeError:
        return False
    return held.shape == tensor.shape and torch.equal(held.cpu(), tensor.to(held.dtype))
