"""Experts that are modules in a list, as in code of the hub: a process calls those that its tokens reach.

The others get no gradients in this process. Engines that exchange gradients in the order of their arrival then add up
those of different experts.
"""

from __future__ import annotations

from torch import nn

from launcher.engines.registry import give_first


def expert_lists(model: nn.Module, *, trained: bool) -> list[str]:
    """The names of such lists; trained: of those that hold trained parameters."""
    lists = ((name, module) for name, module in model.named_modules() if "expert" in name.rpartition(".")[2])
    return [
        name
        for name, module in lists
        if isinstance(module, (nn.ModuleList, nn.ModuleDict))
        and len(module) > 1
        and any(parameter.requires_grad or not trained for parameter in module.parameters())
    ]


def refuse(lists: list[str], why: str) -> None:
    """Raises ValueError if there are any, with why and an engine that trains them."""
    if lists:
        raise ValueError(
            f"the experts of {lists[0]} are separate modules, of which each process calls those that its tokens reach: "
            f"{why}. Give {give_first(lambda info: not (info.averages or info.one_process_only))}"
        )
