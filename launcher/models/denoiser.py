"""A UNet together with its text encoder, as one module, where both are trained (--train-text-encoder).

The text encoder has to run in the module's own forward pass: an engine that shards it gathers its weights there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PARTS = ("unet", "text_encoder")  # folders of the pipeline; the first one's adapter is the run's
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # linear layers of a text encoder


class Denoiser(nn.Module):
    """Predicts the noise of latents from token ids of prompts."""

    def __init__(self, unet: Any, text_encoder: Any, folder: Path):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.part_folders = {part: folder / part for part in PARTS}  # of their checkpoints: `model_tensors`
        self.config = unet.config
        self._no_split_modules = [*unet._no_split_modules, *(text_encoder._no_split_modules or ())]

    def forward(self, sample: Tensor, timestep: Tensor, ids: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """sample (b, c, h, w), timestep (b,), ids (b, n) -> the prediction (b, c, h, w)."""
        words = self.text_encoder(ids)[0]
        return self.unet(sample, timestep, words, return_dict=return_dict)

    def enable_gradient_checkpointing(self) -> None:
        """Of both parts."""
        self.unet.enable_gradient_checkpointing()
        self.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_adapter(model: Any, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the adapter as PEFT does: that of a `Denoiser` as one for the UNet, and one for the text encoder in the
    folder text_encoder, so that each loads on its part of a pipeline."""
    model.save_pretrained(str(folder), state_dict=dict(state))
    if not isinstance(getattr(model, "get_base_model", lambda: model)(), Denoiser):
        return
    weights, described = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(described.read_text(encoding="utf-8"))
    for part in reversed(PARTS):
        place = folder if part == PARTS[0] else folder / part
        place.mkdir(exist_ok=True)
        start = f"base_model.model.{part}."
        own = {
            f"base_model.model.{name.removeprefix(start)}": t for name, t in tensors.items() if name.startswith(start)
        }
        save_file(own, place / weights.name, metadata={"format": "pt"})
        settings = {key: _of_part(value, f"{part}.") for key, value in config.items()}
        if part != PARTS[0]:  # the fingerprint is that of the UNet
            settings = {key: value for key, value in settings.items() if key != "base_fingerprint"}
        (place / described.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _of_part(value: Any, prefix: str) -> Any:
    """A setting of an adapter by modules (ranks), for the modules of one part."""
    if not isinstance(value, dict) or not any(key.startswith(f"{part}.") for key in value for part in PARTS):
        return value
    return {key.removeprefix(prefix): each for key, each in value.items() if key.startswith(prefix)}
