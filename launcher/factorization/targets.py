"""Which weights a run factors: the modules that PEFT would match, found on a model without weights."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.base import Factorization
from adapters.checkpoint_files import TensorInfo, list_tensors
from adapters.checkpoint_names import model_tensors
from adapters.experts import FORMER_NAMES, is_fused
from launcher.factorization.make import FactorRequest
from launcher.text import needs_code

FULL_PRECISION = ("F64", "F32", "F16", "BF16")


def skeleton(model_folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder on the meta device: shapes and names, no weights. Raises ValueError naming the folder."""
    if not (model_folder / "config.json").is_file():
        raise ValueError(f"{model_folder} has no config.json: give the folder of a Hugging Face model")
    try:
        config = transformers.AutoConfig.from_pretrained(model_folder, trust_remote_code=trust_remote_code)
    except (OSError, KeyError, ValueError) as error:
        reason = needs_code(error) or f"config.json describes no known model: {str(error).strip().splitlines()[0]}"
        raise ValueError(f"{model_folder}: {reason}") from error
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if type(config) in transformers.AutoModelForCausalLM._model_mapping or named is None:
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return named(config)


def targets_of(
    model_folder: Path,
    targets: Sequence[str],
    exclude: Sequence[str],
    rank: int,
    method: Factorization,
    *,
    dtype: str = "float32",
    modules_to_save: Sequence[str] = (),
    model: nn.Module | None = None,
    trust_remote_code: bool = False,
) -> list[FactorRequest]:
    """One request per module that PEFT would adapt, in the model's order, from config.json and tensor headers alone.

    model is the skeleton, if it has been built already. If the method chooses each weight's rank, `rank` is
    ignored. Stricter than PEFT in one respect: a name in targets or exclude that matches no module is an error.

    Raises ValueError listing the names there are, or naming a module that has no factors and why.
    """
    if model is None:
        model = skeleton(model_folder, trust_remote_code)
    tensors = model_tensors(model, list_tensors(model_folder))
    modules = dict(model.named_modules())
    names = matched(model, targets, exclude, modules_to_save)
    same: dict[int, list[str]] = {}  # the checkpoint stores tied weights under one of their names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    requests = []
    for name in names:
        module = modules[name]
        transposed, embedding = isinstance(module, Conv1D), isinstance(module, nn.Embedding)
        twins = [f"{name}.weight", *same[id(module.weight)]]
        info = next((tensors[twin] for twin in twins if twin in tensors), None)
        info = _checked(name, module, info, model_folder)
        request = FactorRequest(name, info, rank, method, transposed, embedding, dtype)
        most = min(request.shape)
        requests.append(replace(request, rank=most if method.chooses_rank else min(rank, most)))
    return requests


def matched(
    model: nn.Module, targets: Sequence[str], exclude: Sequence[str], modules_to_save: Sequence[str] = ()
) -> list[str]:
    """The names of the modules that PEFT would adapt: equal to a target, ending in .target, or all-linear ones.

    Raises ValueError listing the names there are if one matches nothing.
    """
    modules = dict(model.named_modules())
    every = [name for name, module in modules.items() if _is_factorable(module)]
    _refuse_experts(model, targets)
    for option, asked in (("--targets", targets), ("--exclude", exclude)):
        if unmatched := [word for word in asked if word != "all-linear" and not _names_one(word, modules)]:
            raise ValueError(_no_module(option, unmatched, sorted({n.rpartition(".")[2] for n in every}), model))
    config: PeftConfig = LoraConfig(
        target_modules="all-linear" if "all-linear" in targets else list(targets),
        exclude_modules=list(exclude) or None,
        modules_to_save=list(modules_to_save) or None,
    )
    config = _maybe_include_all_linear_layers(config, model)
    names = [name for name in modules if name and check_target_module_exists(config, name)]
    if not names:
        raise ValueError(
            f"--targets {' '.join(targets)} with --exclude {' '.join([*exclude, *modules_to_save])} leaves no module"
        )
    for name in names:
        if not _is_factorable(modules[name]):
            inside = sorted({n.rpartition(".")[2] for n in every if n.startswith(f"{name}.")})
            raise ValueError(
                f"{name} is a {type(modules[name]).__name__}, which has no factors; give linear layers"
                + (f" in it: {', '.join(inside)}" if inside else ", or leave it out with --exclude")
            )
    return names


def _refuse_experts(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises ValueError for a target that names fused experts, by the name they have here or in older checkpoints."""
    fused = [name for name, _ in model.named_parameters() if is_fused(model, name)]
    if not fused:
        return
    names = {word for name in fused for word in (name, name.rpartition(".")[0])}
    modules = dict(model.named_modules())
    for word in targets:
        if not _names_one(word, names) and (word not in FORMER_NAMES or _names_one(word, modules)):
            continue
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        within = dict.fromkeys(re.sub(r"^.*?layers\.\d+\.", "", name) for name in fused)
        raise ValueError(
            f"--targets {word} names experts, which a {kind} model holds in 3-dimensional parameters "
            f"({', '.join(within)}); this method factors matrices and leaves experts as they are: leave {word} out, or "
            "train experts with PEFT's LoRA: --method lora --options "
            f"'target_parameters={json.dumps(list(within), separators=(',', ':'))}'"
        )


def _names_one(word: str, modules: Iterable[str]) -> bool:
    return any(name == word or name.endswith(f".{word}") for name in modules)


def _no_module(option: str, unmatched: Sequence[str], has: Sequence[str], model: nn.Module) -> str:
    """The error for names that match nothing, with what this architecture has instead."""
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    near = difflib.get_close_matches(unmatched[0], has, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    match = "matches" if len(unmatched) == 1 else "match"
    remedy = f"; give some of these, or {option} all-linear" if option == "--targets" else ""
    return (
        f"{option} {' '.join(unmatched)} {match} no module of this {kind} model; {hint}it has: {', '.join(has)}{remedy}"
    )


def _is_factorable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or (
        isinstance(module, nn.Conv2d) and module.groups == 1
    )


def _checked(name: str, module: nn.Module, info: TensorInfo | None, folder: Path) -> TensorInfo:
    if info is None:
        raise ValueError(
            f"{folder} has no tensor for {name}.weight: it is stored under another name or fused with others; leave "
            f"the layer out with --exclude {name}"
        )
    if info.dtype not in FULL_PRECISION:
        raise ValueError(
            f"{name} is stored as {info.dtype} in {info.file}; factors come from {', '.join(FULL_PRECISION)}: give the "
            "full-precision checkpoint (--quantize makes it small while loading)"
        )
    shape = tuple(module.get_parameter("weight").shape)
    if shape != info.shape:
        raise ValueError(
            f"{name} is {shape} by {folder / 'config.json'} but {info.shape} in {info.file}: the "
            "two belong to different models"
        )
    return info
