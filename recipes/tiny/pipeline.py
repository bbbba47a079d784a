"""A random Stable Diffusion pipeline of 0.3M parameters and pictures for it, so that its recipe runs without a hub.

It has every part of a real one in the same files, but draws noise: it shows that training works, not what it is for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

SIDE = 32  # of a picture, in pixels; a latent has half of it
MADE = Path("runs") / "tiny-pipeline"
WORDS = 77  # tokens of a prompt


def tiny_pipeline(folder: Path = MADE) -> Path:
    """The folder with pipeline/, pictures/ (two) and held_out/ (one), made if it is not there."""
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError(
            "--tiny makes a pipeline with diffusers, which is not installed: pip install -e '.[diffusion]'"
        )
    partial = folder.with_name(f"{folder.name}-{os.getpid()}.tmp")
    save_pipeline(partial / "pipeline")
    save_pictures(partial / "pictures", (0.35, 0.6))
    save_pictures(partial / "held_out", (0.45,))
    try:
        partial.rename(folder)
    except OSError:  # another process of this run was first
        shutil.rmtree(partial)
    return folder


def save_pictures(folder: Path, places: tuple[float, ...]) -> None:
    """PNG files of a red disc at some places (shares of the width) on blue, all of the same size."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    for number, place in enumerate(places):
        picture = Image.new("RGB", (SIDE, SIDE), (40, 60, 160))
        at, radius = place * SIDE, SIDE / 4
        ImageDraw.Draw(picture).ellipse((at - radius, 16 - radius, at + radius, 16 + radius), fill=(220, 40, 30))
        picture.save(folder / f"{number}.png")


def save_pipeline(folder: Path, *, prediction: str = "epsilon", seed: int = 0, **unet: Any) -> None:
    """The pipeline, as diffusers' save_pretrained writes it. unet: settings of the UNet that replace these."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {
            "sample_size": SIDE // 2, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 32,
            "attention_head_dim": 2, "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **unet,
        }  # fmt: skip
        model = UNet2DConditionModel(**settings)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        words = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=WORDS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        encoder = CLIPTextModel(words)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    made = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=model, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with patch("accelerate.utils.other.is_deepspeed_available", lambda: False):  # else it is imported, and warns
        made.save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that reads letter by letter."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=WORDS)
