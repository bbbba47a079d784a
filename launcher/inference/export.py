"""`loldu export-lora`: write an adapter as an ordinary LoRA adapter, and check it by loading it with stock PEFT.

--rank lowers its rank afterwards, since servers limit it; what that costs is measured and printed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from adapters.base import FactorConfig
from adapters.lora_export import FILE, lower_rank
from adapters.lora_export import export_lora as write_lora
from adapters.trained import TrainedConfig
from launcher.data.saved_template import CHAT_TEMPLATE, PROMPT_TEMPLATE, drop_older
from launcher.exit_codes import Failed
from launcher.files import user_path
from launcher.inference.adapter_folder import adapter_config
from launcher.inference.checks import probe_logits, quantised_gap
from launcher.inference.load import choose_device, load_model
from launcher.inference.pictures import export_lora as export_pictures
from launcher.inference.pictures import find_drawn
from launcher.inference.sources import Source, find
from launcher.inference.write_model import new_folder
from launcher.models.files import copy_tokenizer
from launcher.progress import Bars
from launcher.text import printable

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of its --max-lora-rank (vLLM 0.11 to 0.27)
EXACT = 1e-6  # relative error of an update that was lowered without loss, in float32


def export_lora(
    adapter: str,
    *,
    out: str,
    base: str | None = None,
    rank: int | None = None,
    tolerance: float = 1e-4,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter as a LoRA adapter; `loldu export-lora` (commands.py) describes the arguments.

    Returns the folder. Raises Failed if stock PEFT computes other logits from it; nothing is left in out then.
    """
    if not tolerance > 0:
        raise ValueError(f"--tolerance must be above 0, got {tolerance}")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank is at least 1, got {rank}")
    if (drawn := find_drawn(adapter, base)) is not None:
        if rank is not None:
            raise ValueError(f"--rank {rank} is for language models: leave it out")
        return export_pictures(drawn, out, tolerance=tolerance, device=device)
    source = replace(find(adapter, base=base, trust_remote_code=trust_remote_code), dtype="float32")
    if source.adapter is None:
        raise ValueError(f"{adapter} holds a whole model and no adapter: there is nothing to export")
    config = adapter_config(source.adapter)
    if not isinstance(config, (FactorConfig, TrainedConfig)):
        raise ValueError(f"{adapter} is a {config.peft_type.value} adapter: PEFT loads it already, nothing to export")
    if isinstance(config, TrainedConfig) and not config.low_rank:
        raise ValueError(
            f"{adapter} is a {config.method.upper()} adapter: its update is sparse and has no low rank, so no LoRA "
            f"equals it: merge it into the base instead (loldu merge {adapter} --out MERGED)"
        )
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with new_folder(user_path(out), "--out") as partial:
        model = load_model(source, device=device)
        model.peft_config["default"].base_model_name_or_path = source.base_name
        wanted = probe_logits(model)
        with Bars(console).bar("exporting", brief=True) as show:
            write_lora(model, partial, progress=lambda done, total: show(done, of=total))
        del model
        exported = load_model(replace(source, adapter=partial), device=device)
        found = probe_logits(exported)
        gap = float((found - wanted).abs().max())
        if not gap <= tolerance:
            raise Failed(
                f"the LoRA adapter was deleted again: its logits differ by {gap:.2g} from those of {adapter}, whose "
                f"largest is {float(wanted.abs().max()):.3g}; if that is rounding, raise --tolerance {tolerance:g}"
            )
        largest = f"largest difference between logits {gap:.2g}, allowed {tolerance:g}"
        other = quantised_gap(source, wanted, device)
        console.print(f"checked: stock PEFT reads it back on {printable(source.base_name)}, {largest}{other}")
        if rank is not None:
            del exported
            _lower(partial, rank, replace(source, adapter=partial), wanted, device, tolerance, console)
        written = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
        convolutions = _has_convolutions(partial)
        if source.tokenizer == source.adapter:
            copy_tokenizer(source.adapter, partial)
        for name in (PROMPT_TEMPLATE, CHAT_TEMPLATE):
            if (source.adapter / name).is_file():
                shutil.copyfile(source.adapter / name, partial / name)
        drop_older(partial)
    console.print(f"LoRA adapter of rank {written['r']} in {printable(str(out))}")
    for line in _servers(written, convolutions):
        console.print(line)
    return user_path(out)


def _lower(
    partial: Path, rank: int, source: Source, wanted: Tensor, device: str, tolerance: float, console: Console
) -> None:
    """Lower the rank of the LoRA adapter in `partial`, print each layer's error and what it does to the logits.

    Raises Failed if the updates are the same and the logits are not.
    """

    def show(layer: str, before: int, error: float) -> None:
        if before > rank:
            console.print(f"  {printable(layer)}: rank {before} to {rank}, relative error {error:.2g}")

    if json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))["r"] <= rank:
        console.print(f"no layer has a rank above {rank}: the adapter stays as it is")
        return
    errors = lower_rank(partial, rank, torch.device(choose_device(device)), show)
    worst = max(errors, key=errors.__getitem__)
    lowered = load_model(source, device=device)
    gap = float((probe_logits(lowered) - wanted).abs().max())
    with lowered.disable_adapter():
        effect = float((probe_logits(lowered) - wanted).abs().max())
    if not gap <= (tolerance if errors[worst] <= EXACT else math.inf):
        raise Failed(
            f"the LoRA adapter was deleted again: at rank {rank} its updates are the same, but its logits differ by "
            f"{gap:.2g}, allowed {tolerance:g}"
        )
    console.print(
        f"lowered to rank {rank}: largest relative error {errors[worst]:.2g} ({worst}); the logits differ by up to "
        f"{gap:.2g}, where the adapter moves them by up to {effect:.2g}"
    )


def _has_convolutions(folder: Path) -> bool:
    with safe_open(folder / FILE, framework="pt") as file:
        return any(len(file.get_slice(key).get_shape()) == 4 for key in file.keys())  # noqa: SIM118 (no mapping)


def _servers(config: dict[str, Any], convolutions: bool) -> Iterator[str]:
    """What to know before the adapter goes to a LoRA server, a line each."""
    r, merged = config["r"], "give them the merged model (loldu merge)"
    if config.get("modules_to_save"):
        yield (
            f"warning: the adapter has {', '.join(config['modules_to_save'])} whole (modules_to_save), and LoRA "
            f"servers such as vLLM refuse that: {merged}"
        )
    if convolutions:
        yield f"warning: the adapter has convolutions, and LoRA servers such as vLLM adapt linear layers only: {merged}"
    if r > VLLM_RANKS[-1]:
        yield (
            f"warning: vLLM refuses a rank above {VLLM_RANKS[-1]}: give --rank {VLLM_RANKS[-1]} or less (the error is "
            f"measured), or {merged.replace('them', 'it')}"
        )
    else:
        yield f"vLLM serves it with --enable-lora --max-lora-rank {next(size for size in VLLM_RANKS if size >= r)}"
