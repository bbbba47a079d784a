"""`loldu export-lora`: write an adapter as an ordinary LoRA adapter, and check it by loading it with stock PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from adapters.base import FactorConfig
from adapters.lora_export import export_lora as write_lora
from launcher.exit_codes import Failed
from launcher.inference.checks import probe_logits, quantised_gap
from launcher.inference.merge import new_folder
from launcher.inference.sources import adapter_config, find, load_model


def export_lora(
    adapter: str,
    *,
    out: str,
    base: str | None = None,
    tolerance: float = 1e-4,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter as a LoRA adapter; `loldu export-lora` (commands.py) describes the arguments.

    Returns the folder. Raises Failed if stock PEFT computes other logits from it; nothing is left in out then.
    """
    if not tolerance > 0:
        raise ValueError(f"--tolerance must be above 0, got {tolerance}")
    source = replace(find(adapter, base=base, trust_remote_code=trust_remote_code), dtype="float32")
    if source.adapter is None:
        raise ValueError(f"{adapter} holds a whole model and no adapter: there is nothing to export")
    config = adapter_config(source.adapter)
    if not isinstance(config, FactorConfig):
        raise ValueError(f"{adapter} is a {config.peft_type.value} adapter: PEFT loads it already, nothing to export")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with new_folder(Path(out), "--out") as partial:
        model = load_model(source, device=device)
        model.peft_config["default"].base_model_name_or_path = source.base_name
        wanted = probe_logits(model)
        write_lora(model, partial)
        del model
        exported = load_model(replace(source, adapter=partial), device=device)
        gap = float((probe_logits(exported) - wanted).abs().max())
        if not gap <= tolerance:
            raise Failed(
                f"the LoRA adapter was deleted again: its logits differ by {gap:.2g} from those of {adapter}, whose "
                f"largest is {float(wanted.abs().max()):.3g}; if that is rounding, raise --tolerance {tolerance:g}"
            )
        largest = f"largest difference between logits {gap:.2g}, allowed {tolerance:g}"
        other = quantised_gap(source, wanted, device)
        console.print(f"checked: stock PEFT reads it back on {source.base_name}, {largest}{other}")
    console.print(f"LoRA adapter of rank {exported.peft_config['default'].r} in {out}")
    return Path(out)
