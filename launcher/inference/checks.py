"""Compare what `merge` and `export-lora` wrote with the trained adapter, before it gets its final name.

They compare logits over fixed random tokens; if rounding is intended, the loss on held-out records. The models are
loaded one after the other, each as its user will load it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.exit_codes import Failed
from launcher.inference.heldout import mean_loss
from launcher.inference.load import load_model, load_quantised
from launcher.inference.options import Kind
from launcher.inference.sources import Source
from launcher.models.files import context_length
from launcher.models.quantize import check_quantize

# Allowed distance of the merged model's logits (`distance`). Measured on two small Llamas with random cores that move
# the logits by 0.1 to 1.5: 3e-7 to 3e-4 in float32, 5e-4 to 0.01 in float16, 0.003 to 0.07 in bfloat16.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def probe_logits(model: Any) -> Tensor:
    """Logits (4, tokens, vocabulary) in float32 on the CPU over fixed random tokens."""
    length = min(32, context_length(model))
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (4, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # no cache: some types fail to make one, and nothing follows
        return model(tokens.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()


def distance(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, relative to the norm of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


def compare(source: Source, folder: Path, dtype: torch.dtype, device: str) -> str:
    """Compare the logits of base and adapter with those of the merged folder, each in the dtype of its files.

    Returns what was found. Raises Failed if they differ by more than the rounding of the weights explains.
    """
    model = load_model(source, device=device)
    wanted, own = probe_logits(model), model.dtype
    with model.disable_adapter():
        effect = distance(wanted, probe_logits(model))
    del model
    merged = plain(source, folder)
    gap = distance(probe_logits(load_model(merged, device=device)), wanted)
    coarse = max((dtype, own), key=lambda kind: torch.finfo(kind).eps)
    name = str(coarse).removeprefix("torch.")
    allowed = TOLERANCE[coarse]
    if torch.finfo(coarse).bits >= 32:
        allowed = min(allowed, max(1e-5, effect / 10))  # stricter, so that a small update that was lost is noticed
    elif not gap <= allowed:  # some models differ as much from themselves when they run in this dtype
        runs = [probe_logits(load_model(source, dtype=kind, device=device)) for kind in (name, "float32")]
        allowed = max(allowed, 3 * distance(*runs))
    found = f"{gap:.2g} (relative; allowed {allowed:.2g} in {name}; the adapter moves them by {effect:.2g})"
    if not gap <= allowed:
        raise Failed(f"the merged model was deleted again: its logits differ from base and adapter by {found}")
    hint = (
        f"; rounding to {name} hides much of the adapter's effect: --dtype float32 keeps it"
        if gap > effect / 2 > 0
        else ""
    )
    return f"checked: logits differ from base and adapter by {found}{hint}{quantised_gap(source, wanted, device)}"


def plain(source: Source, folder: Path) -> Source:
    """The merged model in folder, which needs the same code as the source."""
    return Source(base=folder, base_name=str(folder), tokenizer=folder, trust_remote_code=source.trust_remote_code)


def loss_change(
    source: Source, folder: Path, dtype: torch.dtype, kind: Kind, held: tuple[Any, Any], device: str
) -> str:
    """Held-out losses of base and adapter, in full precision and quantised, and of the merged folder.

    Raises Failed if the last one is not finite.
    """
    name = str(dtype).removeprefix("torch.")
    merged = plain(source, folder)
    full = mean_loss(load_model(source, dtype=name, device=device), *held)
    beside = mean_loss(load_quantised(source, kind, dtype=name, device=device), *held)
    after = mean_loss(load_model(merged, device=device), *held)
    if not math.isfinite(after):
        raise Failed(f"the merged model was deleted again: its loss is {after}, that of base and adapter {beside:.4f}")
    return (
        f"loss on {len(held[0])} held-out records: {after:.4f} merged into {kind}; of base and adapter "
        f"{beside:.4f} in {kind} (change {after - beside:+.4f}) and {full:.4f} in {name} ({after - full:+.4f})"
    )


def quantised_gap(source: Source, wanted: Tensor, device: str) -> str:
    """How far these logits are from those on the quantised base of the training; empty for other runs."""
    if source.quantize == "none" or source.adapter is None:
        return ""
    try:
        check_quantize(source.quantize)
    except ValueError as missing:
        return f"; not compared with the base of the training: {missing}"
    quantised = load_quantised(source, source.quantize, dtype="float32", device=device)
    gap = distance(probe_logits(quantised), wanted)
    return f"; with the {source.quantize} base of the training, the logits differ from these by {gap:.2g} (relative)"
