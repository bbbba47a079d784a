"""Which linear layers of a model can carry an adapter or be quantised, found on its skeleton.

An adapter replaces a layer's forward pass, so it has no effect if the parent multiplies by the layer's weight itself
(Mamba's fused kernels, Gemma 3n's altup), and a parent cannot read a packed weight. Layers of a model's own classes
are suitable only if they compute the same as torch's.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.experts import is_fused
from launcher.config import AdapterConfig

log = logging.getLogger(__name__)

LINEAR = (nn.Linear, Conv1D)
# self.NAME.weight in a parent's code; the attribute after it shows whether its numbers matter.
READS = re.compile(r"\bself\.([A-Za-z_][\w.]*?)\.weight\b(?:\.(dtype|device|shape|size|ndim|numel)\b)?")


@lru_cache(maxsize=1024)
def raw_reads(parent: Any) -> dict[str, Literal["numbers", "dtype"]]:
    """The children (dotted names) whose weight the parent's own source reads, and what it reads of it."""
    found: dict[str, Literal["numbers", "dtype"]] = {}
    for cls in parent.__mro__:
        if cls.__module__.partition(".")[0] == "torch" or cls is object:
            break
        for name, method in vars(cls).items():
            function = getattr(method, "__wrapped__", method)
            if not inspect.isfunction(function) or "init" in name or name.startswith(("reset", "fuse")):
                continue
            try:
                source = inspect.getsource(function)
            except (OSError, TypeError):
                continue
            for child, what in READS.findall(source):
                if found.get(child) != "numbers":
                    found[child] = "dtype" if what else "numbers"
    return found


def read_by_parents(model: nn.Module) -> dict[str, tuple[str, Literal["numbers", "dtype"]]]:
    """Linear layers whose weight other code reads, by name: the class of that code, and what it reads."""
    found = {}
    for prefix, parent in model.named_modules():
        kind: Any = type(parent)
        for child, what in raw_reads(kind).items():
            try:
                layer = parent.get_submodule(child)
            except AttributeError:
                continue
            if isinstance(layer, LINEAR):
                found[f"{prefix}.{child}".removeprefix(".")] = type(parent).__name__, what
    return found


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes x W^T + b and nothing else, as torch's Linear and transformers' Conv1D do."""
    if type(layer) in LINEAR:
        return True
    if not isinstance(layer, nn.Linear):
        return False
    if type(layer) not in _plain:
        _plain[type(layer)] = _computes_a_product(layer)
    return _plain[type(layer)]


_plain: dict[type, bool] = {}


@torch.no_grad()
def _computes_a_product(layer: Any) -> bool:
    drawn = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=drawn) for shape in ((3, 5), (3,), (2, 4, 5)))
    small = copy.copy(layer)
    small._parameters = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    small.in_features, small.out_features = 5, 3
    try:
        made = small(x)
    except Exception:  # a model's code may need other shapes or arguments
        return False
    return isinstance(made, torch.Tensor) and torch.allclose(made, F.linear(x, weight, bias), atol=1e-5)


def unsuitable(model: Any, *, labels: bool = False) -> dict[str, str]:
    """Linear layers that cannot have an adapter, by name, and why. labels: the model has a classification head."""
    read = read_by_parents(model)
    owners = Counter(id(m._parameters["weight"]) for m in model.modules() if m._parameters.get("weight") is not None)
    text, prefix = language_part(model), f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LINEAR):
            continue
        if read.get(name, ("", ""))[1] == "numbers":
            found[name] = f"{read[name][0]} multiplies by its weight without calling it, so an adapter would not train"
        elif not is_plain(module):
            found[name] = f"a {type(module).__name__} computes more than a matrix product"
        elif (
            owners[id(module.weight)] > 1 and module is not model.get_output_embeddings()
        ):  # all-linear leaves that out
            found[name] = "it shares its weight with another layer, and an adapter would make them differ"
        elif labels and not name.startswith(prefix):
            found[name] = "the new head is trained whole"
        elif text and not name.startswith(text) and module is not model.get_output_embeddings():
            found[name] = "it is not part of the language model: text never reaches it"
    return found


def leave_out(model: Any, config: AdapterConfig, *, labels: bool = False) -> list[str]:
    """Names to add to `--exclude`: layers that the targets match but that cannot have an adapter.

    They are logged by reason. Raises ValueError for a target that matches no other layer.
    """
    found = unsuitable(model, labels=labels)
    if "all-linear" not in config.targets:
        modules = dict(model.named_modules())
        for word in config.targets:
            same = [name for name in modules if name == word or name.endswith(f".{word}")]
            if same and all(name in found for name in same):
                raise ValueError(f"--targets {word}: {same[0]} cannot carry an adapter: {found[same[0]]}")
        found = {name: why for name, why in found.items()
                 if any(name == word or name.endswith(f".{word}") for word in config.targets)}  # fmt: skip
    mine = [*config.exclude, *config.modules_to_save]
    found = {n: why for n, why in found.items() if not any(n == word or n.endswith(f".{word}") for word in mine)}
    for why in dict.fromkeys(found.values()):
        names = by_last_name((name for name, reason in found.items() if reason == why), model)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        if "trained whole" not in why:
            log.warning("no adapter on %s%s: %s", ", ".join(names[:4]), more, why)
    return by_last_name(found, model)


def reach(model: Any, bare: Any) -> str:
    """How many modules of each name have an adapter, and their share of the base's numbers.

    model: the PEFT model; bare: its base on the meta device.
    """
    tuner = model.base_model
    names = [*getattr(tuner, "targeted_module_names", ()), *getattr(tuner, "targeted_parameter_names", ())]
    sizes = {name: parameter.numel() for name, parameter in bare.named_parameters(remove_duplicate=False)}
    counts = Counter(re.search(r"[^.]*(\.\d+)?$", name.removesuffix(".weight"))[0] for name in names)  # type: ignore[index]
    reached = sum(sizes.get(name, sizes.get(f"{name}.weight", 0)) for name in names)
    total = sum(parameter.numel() for parameter in bare.parameters())
    text = f"adapters on {len(names)} weights ({', '.join(f'{name} {count}' for name, count in counts.items())})"
    text += f", {reached / total:.1%} of the base's numbers"
    apart = {name: size for name, size in sizes.items() if is_fused(bare, name) and name not in names}
    if apart:
        text += f"; the experts ({', '.join(sorted({name.rpartition('.')[2] for name in apart}))}, "
        text += f"{sum(apart.values()) / total:.1%}) stay as they are"
    return text


def unmatched(model: Any, targets: Iterable[str]) -> list[str]:
    """The targets (last parts of names) that match no adapted module of a PEFT model."""
    tuner = model.base_model
    if getattr(tuner, "targeted_parameter_names", None):  # PEFT renames experts
        return []
    names = getattr(tuner, "targeted_module_names", None)
    if not names:
        return []
    return [
        word for word in targets if word != "all-linear" and not any(n == word or n.endswith(f".{word}") for n in names)
    ]


def language_part(model: Any) -> str:
    """The prefix of the language model's modules in a multimodal model; empty for a pure language model."""
    if not {"vision_config", "audio_config"} & set(getattr(model.config, "sub_configs", ())):
        return ""
    inside = {id(module): name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    name = inside.get(id(decoder), "")
    return f"{name}." if name and decoder is not model.base_model else ""


def by_last_name(names: Iterable[str], model: nn.Module) -> list[str]:
    """The names as `--exclude` takes them: their last part, if every linear layer with that last part is included."""
    left, short = set(names), []
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    for last in sorted({name.rpartition(".")[2] for name in left}):
        same = {name for name in linear if name == last or name.endswith(f".{last}")}
        if same <= left:
            short.append(last)
            left -= same
    return [*short, *sorted(left)]
