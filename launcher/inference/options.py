"""Options that several commands share. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["none", "int8", "nf4", "fp4"]
Quantize = Literal["auto", Kind]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which model, and how it is loaded."""

    adapter: str | None = None
    """Adapter or run folder to load on top of the model."""
    base: str | None = None
    """Base model to use instead of the one that the adapter or run names."""
    dtype: str = "auto"
    """auto (the run's, or the one of the model's files), float32, bfloat16 or float16."""
    quantize: Quantize = "auto"
    """Precision of the base weights: auto (as in training), none, int8, nf4 or fp4."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder. Only for models that you trust."""


@dataclass(frozen=True, kw_only=True)
class Answering(Loading):
    """How the model chooses its words."""

    prompt_template: str | None = None
    """auto, short, alpaca, chat, none (the bare prompt), or a FILE with {instruction} and {input}. Default: the run's
    template; without a run, the model's chat template, or alpaca if it has none."""
    max_tokens: int = 512
    """Maximum number of tokens in an answer."""
    temperature: float = 0.0
    """0 always takes the most likely token; higher values sample more evenly."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this value."""
    seed: int = 0
    """Random seed for sampling."""


@dataclass(frozen=True, kw_only=True)
class Classifying(Loading):
    """Where the records have what, and how many are computed at once."""

    columns: tuple[str, ...] = ()
    """With --data: the column with the text (two for pairs of texts), or with the image. Default: the run's."""
    label_column: str | None = None
    """With --data: the column with the label, which may be absent. Default: the run's, or label."""
    batch_size: int = 16
    """Texts or images in one forward pass."""
    max_length: int = 0
    """Tokens at which a text is cut; 0 is the run's number, or the model's context but at most 512."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Pictures of a pipeline of Stable Diffusion."""

    prompts: tuple[str, ...] = ()
    """For a run that learned from pictures, or a pipeline: the words to draw, a text each. --seed belongs to the first
    picture of each text."""
    count: int = 1
    """With --prompts: pictures of each text."""
    steps: int = 50
    """With --prompts: denoising steps of a picture."""
    guidance: float = 7.5
    """With --prompts: how strongly a picture follows its words (classifier-free guidance); 1 turns that off."""
    negative_prompt: str | None = None
    """With --prompts: what the pictures should not show."""
    resolution: int = 0
    """With --prompts: side of the pictures in pixels; 0 is the one that the pipeline was made for."""
    out: str | None = None
    """With --prompts: folder of the PNG files. Default: pictures/ in the run's folder, else in the current one."""
