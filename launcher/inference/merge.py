"""`loldu merge`: write base and adapter as a plain Hugging Face model, with one weight in memory at a time.

The base is never loaded as a whole. A skeleton of it with the adapter is on the meta device. For each adapted weight,
the weight is read, the update is computed from factors rebuilt from the saved pivots (checked as on any load), and the
sum is written to its place in a safetensors file, whose header is known in advance. Adapters of PEFT's other methods
are merged by PEFT, in memory.

With --quantize, the update is added to the full-precision weight and the sum is rounded once to 8 or 4 bits. On an nf4
run of babyllama (held-out loss 2.637) this gives 2.672; adding to the nf4 weight and rounding again gives 2.688
(float32: 2.618).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import nn

from adapters.base import FactorConfig
from launcher.data.saved_template import CHAT_TEMPLATE, PROMPT_TEMPLATE, drop_older
from launcher.files import user_path
from launcher.inference.adapter_folder import adapter_config
from launcher.inference.checks import compare, loss_change, plain
from launcher.inference.heldout import held_out
from launcher.inference.load import DTYPES, choose_device, load_model
from launcher.inference.merge_plan import Plan, plan_merge
from launcher.inference.options import Kind
from launcher.inference.sources import Source, find
from launcher.inference.write_model import new_folder, write_checkpoint
from launcher.models.files import TOKENIZER_PATTERNS
from launcher.models.quantize import check_quantize
from launcher.progress import Bars, growth
from launcher.text import first_line, printable

BESIDE_WEIGHTS = (
    "generation_config.json", "chat_template*", PROMPT_TEMPLATE, "*processor_config.json", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip


def merge(
    adapter: str,
    *,
    out: str,
    base: str | None = None,
    dtype: str = "auto",
    quantize: Kind = "none",
    data: str | None = None,
    shard_gb: float = 5.0,
    check: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write base and adapter as one plain Hugging Face model; `loldu merge` (commands.py) describes the arguments.

    Returns the folder. Raises ValueError before anything is written if the request cannot work, and Failed if the
    merged model does not compute what base and adapter compute; nothing is left in out then.
    """
    check_quantize(quantize)
    if quantize != "none" and not check:
        raise ValueError("--quantize always measures the accuracy that it costs: leave --no-check out")
    if quantize == "none" and data is not None:
        raise ValueError(f"--data {data} is only used by --quantize, which measures a loss on it: give both")
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype {dtype} is unknown: give auto, {', '.join(DTYPES)}")
    if not shard_gb > 0:
        raise ValueError(f"--shard-gb must be above 0, got {shard_gb}")
    device = choose_device(device)  # checked before an hour of writing
    source = replace(find(adapter, base=base, trust_remote_code=trust_remote_code), dtype=None)
    if source.adapter is None:
        raise ValueError(f"{adapter} holds a whole model and no adapter: there is nothing to merge")
    config = adapter_config(source.adapter)
    held = held_out(source, data) if quantize != "none" else None
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with new_folder(user_path(out), "--out") as partial:
        whole = source
        if not isinstance(config, FactorConfig):
            console.print(f"PEFT merges {config.peft_type.value} adapters with the whole model in memory")
            place = partial if held is None else partial / "whole"
            written = _merge_in_memory(source, place, dtype, shard_gb, console)
            whole = plain(source, place)
        if isinstance(config, FactorConfig) or held is not None:
            plan = plan_merge(whole, DTYPES.get(dtype), quantize)
            write_checkpoint(plan.entries, partial, shard_gb, console)
            _write_config(whole.base, partial, plan)
            written = plan.dtype
        if whole is not source and held is not None:
            shutil.rmtree(whole.base)
        _copy_beside(source, partial)
        if held is not None:
            console.print(loss_change(source, partial, written, quantize, held, device))
        elif check:
            console.print(compare(source, partial, written, device))
    console.print(f"merged model in {printable(str(out))}")
    return user_path(out)


def _copy_beside(source: Source, folder: Path) -> None:
    """Copy all but weights and config: the adapter's before the base's, and the tokenizer's from one folder alone.

    A special_tokens_map.json of the base would change the tokens that an adapter's own tokenizer_config.json names.
    """
    template = source.saved_template  # of an adapter, it may be in its tokenizer_config.json
    if template is not None and template.jinja is not None:
        (folder / CHAT_TEMPLATE).write_text(template.jinja, encoding="utf-8")
    code = ["*.py"] if source.trust_remote_code else []
    for origin in dict.fromkeys((source.adapter or source.base, source.tokenizer, source.base)):
        for pattern in (*BESIDE_WEIGHTS, *(TOKENIZER_PATTERNS if origin == source.tokenizer else ()), *code):
            for file in origin.glob(pattern):
                if file.is_file() and not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)
    drop_older(folder)


def _write_config(base: Path, folder: Path, plan: Plan) -> None:
    """Write the base's config.json with the new dtype, and without weight tying if the embeddings now differ."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or {"dtype", "torch_dtype"} & part.keys():
            part.pop("torch_dtype", None)
            part["dtype"] = str(plan.dtype).removeprefix("torch.")
        if plan.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if plan.quantization:
        config["quantization_config"] = plan.quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merge_in_memory(source: Source, folder: Path, dtype: str, shard_gb: float, console: Console) -> torch.dtype:
    model = load_model(source, dtype=dtype, device="cpu")
    method = next(iter(model.peft_config.values())).peft_type.value
    _untie(model.get_base_model())
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError) as error:  # PEFT raises any of these
        raise ValueError(
            f"PEFT cannot merge {method} adapters into weights ({first_line(error)}): use it as an adapter"
        ) from error
    ends = (merged.get_input_embeddings(), merged.get_output_embeddings())
    if all(ends) and ends[0].weight is not ends[1].weight:
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    total = sum(tensor.nbytes for tensor in merged.state_dict().values())
    with Bars(console).bar("saving", total, unit="bytes") as show, growth(show, folder, total):
        merged.save_pretrained(folder, max_shard_size=int(shard_gb * 1e9))
    return merged.dtype


def _untie(base: Any) -> None:
    """Give the head a weight of its own if one of the tied embeddings has an adapter: PEFT adds the update in place."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if None in ends or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    first, head = (getattr(end, "base_layer", end) for end in ends)
    if first.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
