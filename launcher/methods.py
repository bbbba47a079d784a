"""`--method`: the PEFT config of what is trained, ours or PEFT's own, and the methods that cannot be trained here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import type_validator
from peft import PeftConfig, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from adapters import METHODS, FactorConfig, TrainedConfig
from launcher.config import AdapterConfig, nearest

# Names for options of one of PEFT's methods.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
    "olora": ("lora", {"init_lora_weights": "olora"}),
}
TRAINED_PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
PROMPTS = f"among methods that train a prompt, give {', '.join(TRAINED_PROMPTS)}"
DATA_START = "its initialisation needs a pass over data that PEFT leaves to a script of your own"
# Not supported, by method, by LoRA's init_lora_weights or by an option, and why.
REFUSED: Mapping[str, str] = {
    "adaption_prompt": PROMPTS,
    "poly": "it needs a task number with each sample",
    "xlora": "it mixes LoRA adapters that are trained already",
    "eva": DATA_START,
    "corda": DATA_START,
    "lora_ga": DATA_START,
    "loftq": "it changes the quantised base, and a loaded adapter would meet an unchanged one",
    "use_asa": "it masks subspaces on a schedule that checkpoints do not hold: leave this option of adamss out",
    "pissa_niter": "it changes the base by a random decomposition, a different one at each loading: give pissa",
}
# Methods that are not for linear layers, and what to give them.
OWN_TARGETS: Mapping[str, str] = {
    "ln_tuning": "norm layers: --targets input_layernorm post_attention_layernorm norm",
    "trainable_tokens": "rows of the embedding: --targets embed_tokens --options token_indices=[5,6]",
    "shadow": "decoder layers: --options target_modules='.*layers[.][0-9]+$'",
}
NOT_A_RANK = ("oft",)  # methods whose r is something else, here the number of blocks


def refusals() -> dict[str, str]:
    """Why a method of PEFT, a value of init_lora_weights or an option is not supported; docs/methods.md lists all."""
    kinds = {str(kind.value).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    prompts = {kind for kind, cls in kinds.items() if issubclass(cls, PromptLearningConfig)}
    return dict.fromkeys(prompts - {*TRAINED_PROMPTS}, PROMPTS) | dict(REFUSED)


def peft_config(config: AdapterConfig, task_type: str | None = "CAUSAL_LM") -> PeftConfig | None:
    """The PEFT config of the adapter, ours or PEFT's own; None for full fine-tuning. task_type as PEFT names it.

    Raises ValueError for an unknown method (all names, the nearest first), one that is not supported (the reason), an
    unknown option, or an option of the wrong type.
    """
    if config.method == "full":
        return None
    kinds: dict[str, Any] = {str(kind.value).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kinds |= METHODS  # some are variants of PEFT's own methods, which PEFT does not know by name
    name, values = VARIANTS.get(config.method, (config.method, {}))
    if name not in kinds and name.replace("_", "") in kinds:  # ours are written without underscores
        name = name.replace("_", "")
    refused = refusals()
    if name in refused:
        raise ValueError(f"--method {config.method} cannot be trained here: {refused[name]}")
    if name not in kinds:
        known = {*kinds, *VARIANTS, "full"} - refused.keys()
        names = sorted(known, key=lambda known: (-SequenceMatcher(None, name, known).ratio(), known))
        raise ValueError(f"unknown --method {config.method}; there are, the nearest first: {', '.join(names)}")
    if name in OWN_TARGETS and config.targets == AdapterConfig().targets and not config.options:
        raise ValueError(f"--method {config.method} is not for linear layers but for {OWN_TARGETS[name]}")
    cls = kinds[name]
    hints = {field.name: get_type_hints(cls)[field.name] for field in dataclasses.fields(cls) if field.init}
    common: dict[str, Any] = {
        "r": None if name in NOT_A_RANK else config.rank,
        "num_virtual_tokens": config.rank,
        "target_modules": config.targets[0] if config.targets == ("all-linear",) else list(config.targets),
        "exclude_modules": list(config.exclude),
        "modules_to_save": list(config.modules_to_save),
        "task_type": task_type,
    }
    values = {field: value for field, value in common.items() if value and field in hints} | values
    for option in config.options:
        field, _, text = option.partition("=")
        if field not in hints:
            raise ValueError(f"unknown option {field} of method {config.method}; {nearest(field, set(hints))}")
        # PEFT's own list of starts is not complete
        hint = bool | str if field == "init_lora_weights" else hints[field]
        values[field] = _typed(field, text, hint, config.method)
    start = str(values.get("init_lora_weights"))
    if why := REFUSED.get("pissa_niter" if start.startswith("pissa_niter") else start):
        raise ValueError(f"init_lora_weights={start} cannot be trained here: {why}")
    if values.get("use_asa"):
        raise ValueError(f"use_asa=true cannot be trained here: {REFUSED['use_asa']}")
    try:
        return cls(**values)
    except (TypeError, ImportError) as error:
        raise ValueError(f"--method {config.method}: {error}") from None


def exports_lora(adapter: PeftConfig) -> bool:
    """Whether `loldu export-lora` writes this adapter as LoRA: those of this project, unless their update is sparse."""
    return isinstance(adapter, FactorConfig) or (isinstance(adapter, TrainedConfig) and adapter.low_rank)


def prompt_tokens(adapter: PeftConfig | None) -> int:
    """How many trained tokens a method puts before each sample; 0 for methods that change weights."""
    return adapter.num_virtual_tokens if isinstance(adapter, PromptLearningConfig) else 0


def unusual_learning_rate(method: str, adapter: PeftConfig | None, learning_rate: float) -> str | None:
    """A warning if the learning rate is more than ten times off the one at which this core trained best."""
    usual = adapter.usual_learning_rate if isinstance(adapter, FactorConfig) else None
    if usual is None or 0.099 < learning_rate / usual < 10.1:
        return None
    return f"--learning-rate {learning_rate:g} is far from {usual:g}, at which {method} trained best on small models"


def _typed(field: str, text: str, hint: Any, method: str) -> Any:
    """The value of an option written in JSON, or as it stands; ValueError if it is not of the field's type."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    for attempt in (value, float(value)) if type(value) is int else (value,):
        try:
            type_validator(field, attempt, hint)
            return attempt
        except TypeError as error:
            reason = error
    raise ValueError(f"option {field}={text} of method {method}: {reason}")
