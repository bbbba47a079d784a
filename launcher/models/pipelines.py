"""Stable Diffusion pipelines in diffusers' folders: checked from their files, and loaded part by part.

A pipeline is a folder with model_index.json and one folder for each part: unet, which is trained; vae, text_encoder and
tokenizer, which stay as they are; scheduler. Where a run's base is such a folder, its tensors are those of the UNet.
diffusers is imported when a part is loaded, since it takes seconds and is an extra.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.checkpoint_files import INDEX, is_pipeline, list_tensors, local_folder
from launcher.files import read_json, user_path
from launcher.models.denoiser import Denoiser
from launcher.models.files import JSON_BYTES

SUPPORTED = "StableDiffusionPipeline"
PARTS = {  # class of each part, and the file that describes it
    "unet": ("UNet2DConditionModel", "config.json"),
    "vae": ("AutoencoderKL", "config.json"),
    "text_encoder": ("CLIPTextModel", "config.json"),
    "tokenizer": ("CLIPTokenizer", "tokenizer_config.json"),
    "scheduler": ("", "scheduler_config.json"),  # any
}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PREDICTIONS = ("epsilon", "v_prediction")


def check_installed() -> None:
    """Raises ValueError if the package diffusers is missing."""
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError(
            "this needs the package diffusers, which is not installed: pip install 'loldu-launcher[diffusion]', or pip "
            "install diffusers"
        )


def pipeline_folder(model: str, option: str = "") -> Path:
    """The local folder of a complete Stable Diffusion pipeline.

    option: the option that named it, for the message. Raises ValueError for what is missing, another kind of model or
    pipeline, and weights that exist only as pickles.
    """
    path = user_path(model)
    folder = path if path.is_dir() else local_folder(model)
    if folder is None:
        raise ValueError(
            f"{option}{model} is neither a folder here nor in the hub cache: give the folder of a Stable Diffusion "
            f"pipeline, or fetch it first (hf download {model})"
        )
    if not is_pipeline(folder):
        held = "a model of transformers" if (folder / "config.json").is_file() else "no model"
        raise ValueError(
            f"{option}{model} holds {held}, expected a Stable Diffusion pipeline (a folder with {INDEX}): give one "
            "that diffusers' save_pretrained wrote, such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    index = _read_json(folder / INDEX)
    if (kind := index.get("_class_name")) != SUPPORTED:
        raise ValueError(
            f"{option}{model} is a {kind}, which is not supported: give a {SUPPORTED} (Stable Diffusion 1.x or 2.x)"
        )
    for part, (wanted, file) in PARTS.items():
        if not (folder / part / file).is_file():
            raise ValueError(f"{option}{model} has no {part}/{file}: fetch the whole pipeline again")
        named = (index.get(part) or [None, None])[1]
        if wanted and str(named).removesuffix("Fast") != wanted:
            raise ValueError(
                f"{option}{model} has a {named} for its {part}, expected a {wanted}: this is not supported"
            )
    for part, name in WEIGHTS.items():
        _check_weights(folder / part, name)
    _check_scheduler(folder)
    return folder


def _check_weights(part: Path, name: str) -> None:
    if (part / f"{name}.safetensors").is_file() or (part / f"{name}.safetensors.index.json").is_file():
        return
    if variants := sorted(part.glob(f"{name}.*.safetensors")):
        raise ValueError(
            f"{part} has its weights only as the variant {variants[0].name}: rename that file to {name}.safetensors, "
            "or fetch the pipeline without a variant"
        )
    if pickled := sorted([*part.glob("*.bin"), *part.glob("*.ckpt"), *part.glob("*.pt")]):
        raise ValueError(
            f"{part} holds its weights only as a pickle ({pickled[0].name}), which can run code when it is read: fetch "
            f"the pipeline with {name}.safetensors, or convert it where you trust it (diffusers: load it, then "
            "save_pretrained)"
        )
    raise ValueError(f"{part} holds no {name}.safetensors: fetch the whole pipeline again")


def _check_scheduler(folder: Path) -> None:
    found = _read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if found not in PREDICTIONS:
        raise ValueError(
            f"{folder}/scheduler predicts {found!r}, which has no loss here: give a pipeline whose prediction_type is "
            f"{' or '.join(PREDICTIONS)}"
        )


def empty_base(folder: Path, *, dtype: str, attention: str | None, text_encoder: bool = False) -> Any:
    """What is trained of a pipeline, on the meta device: the UNet, or with text_encoder a `Denoiser`.

    Raises ValueError for an attention that diffusers does not choose by this name.
    """
    if attention not in (None, "sdpa"):
        raise ValueError(f"a UNet has torch's own attention (sdpa) alone, not {attention}")
    from accelerate import init_empty_weights

    settings = _read_json(folder / "unet" / "config.json")
    with init_empty_weights(include_buffers=False):
        try:
            unet: Any = _class("unet").from_config(settings)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{folder / 'unet' / 'config.json'} does not describe a valid UNet ({error})") from error
        if text_encoder:
            from transformers import CLIPTextConfig

            words = _class("text_encoder")(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
            unet = Denoiser(unet, words, folder)
    return unet.to(getattr(torch, dtype))


def load_base(folder: Path, *, dtype: str, device: torch.device, text_encoder: bool = False) -> Any:
    """What is trained of a pipeline, with its weights: the UNet, or with text_encoder a `Denoiser`."""
    unet = _load_unet(folder, dtype=dtype).to(device)
    if not text_encoder:
        return unet
    words = load_part(folder, "text_encoder", device, getattr(torch, dtype)).requires_grad_(True)
    return Denoiser(unet, words, folder)


def _load_unet(folder: Path, *, dtype: str) -> Any:
    """The UNet with its weights. Raises ValueError if a weight is missing or of another shape."""
    try:
        unet, found = _class("unet").from_pretrained(
            folder / "unet", torch_dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True,
            low_cpu_mem_usage=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / 'unet'} does not load: {str(error).strip().splitlines()[0]}") from None
    if missing := found["missing_keys"]:
        raise ValueError(f"{folder / 'unet'} lacks {', '.join(sorted(missing)[:3])}: fetch the pipeline again")
    return unet


def load_part(folder: Path, part: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen part (vae, text_encoder) in evaluation mode, or the tokenizer or scheduler."""
    if part == "tokenizer":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder / part, local_files_only=True)
    if part == "scheduler":
        return _diffusers().DDPMScheduler.from_pretrained(folder / part, local_files_only=True)
    try:
        made: nn.Module = _class(part).from_pretrained(folder / part, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / part} does not load: {str(error).strip().splitlines()[0]}") from None
    return made.to(device, dtype).eval().requires_grad_(False)


def load_pipeline(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The whole pipeline, which draws pictures, without its safety checker."""
    pipeline: Any = _diffusers().StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, safety_checker=None,
        feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    side: int,
    steps: int,
    guidance: float,
    negative: str | None = None,
) -> list[Any]:
    """PIL images in one pass, one for each prompt, from the noise of its seed."""
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        list(prompts), height=side, width=side, num_inference_steps=steps, guidance_scale=guidance, generator=noise,
        negative_prompt=None if negative is None else [negative] * len(prompts),
    ).images  # fmt: skip


def resolution_of(folder: Path) -> tuple[int, int]:
    """The side of the pictures that the pipeline was made for, in pixels, and how many of them make one of a latent."""
    levels = len(_read_json(folder / "vae" / "config.json").get("block_out_channels", [0] * 4))
    factor = 2 ** (levels - 1)
    return int(_read_json(folder / "unet" / "config.json").get("sample_size") or 64) * factor, factor


def digest_of_parts(folder: Path, parts: Sequence[str] = ("vae", "text_encoder")) -> str:
    """sha256 of some parts; by default the frozen ones that turn pictures and prompts into what the UNet sees."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update((folder / part / "config.json").read_bytes())
        for file in sorted({info.file for info in list_tensors(folder / part).values()}):
            with file.open("rb") as opened:
                sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()


def _diffusers() -> Any:
    """The package diffusers, which logs and shows bars only if something is wrong."""
    check_installed()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def _class(part: str) -> Any:
    if part == "text_encoder":
        from transformers import CLIPTextModel

        return CLIPTextModel
    return getattr(_diffusers(), PARTS[part][0])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = read_json(file, JSON_BYTES)
        if isinstance(found, dict):
            return found
        reason = "it is no object"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"{file} cannot be read ({reason}): fetch this file again")
