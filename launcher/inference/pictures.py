"""`loldu generate RUN --prompts ...`: pictures of a Stable Diffusion pipeline with a trained adapter, as PNG files."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from adapters.base import FactorConfig
from adapters.checkpoint_files import is_pipeline, local_folder
from adapters.lora_export import as_lora
from launcher.data.pictures import save_picture
from launcher.exit_codes import Failed
from launcher.files import read_json, user_path
from launcher.inference.adapter_folder import attach
from launcher.inference.load import DTYPES, choose_device
from launcher.inference.options import Drawing
from launcher.inference.write_model import new_folder
from launcher.models import pipelines
from launcher.models.build import choose_dtype
from launcher.models.files import JSON_BYTES, recorded_run
from launcher.text import json_line

LORA = "pytorch_lora_weights.safetensors"  # diffusers' name
SLUG = 48  # most characters of a prompt in a file's name


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What draws, and where its pictures go by default."""

    pipeline: Path
    adapter: Path | None
    out: Path
    dtype: str


def find_drawn(model: str, base: str | None = None) -> Drawn | None:
    """The pipeline of a run, an adapter folder or a pipeline itself; None if the base is no pipeline.

    Raises ValueError for a run without an adapter, and a pipeline that is not here.
    """
    place = user_path(model)
    adapter, run = _adapter(place), recorded_run(place)
    if adapter is not None:
        run = run or (recorded_run(place.parent) if place.name == "adapter" else None)
    names = [base] if base else _bases(adapter, run) if adapter is not None or run is not None else [model]
    folder = next((found for name in names if (found := _pipeline(name))), None)
    if folder is None:
        if run is not None and run["config"].get("data", {}).get("instance_prompt"):
            raise ValueError(f"the pipeline of {model}, {' or '.join(names)}, is not here: give --base PIPELINE")
        return None
    if run is not None and adapter is None:
        raise ValueError(f"run {model} has not saved an adapter yet: start it again to finish training")
    if base is not None and adapter is None:
        raise ValueError(f"--base {base} needs an adapter, and {model} is not one: leave --base out")
    trained = (run or {}).get("resolved", {}).get("dtype", "auto")
    out = (adapter.parent if adapter is not None and run is not None else Path()) / "pictures"
    return Drawn(pipeline=pipelines.pipeline_folder(str(folder)), adapter=adapter, out=out, dtype=trained)


def draw(found: Drawn, drawing: Drawing, *, seed: int, dtype: str, device: str, as_json: bool) -> list[Path]:
    """Draw every prompt `count` times, picture i of a prompt from the noise of seed + i; returns the files.

    A file's name has its prompt and seed; a number follows if that name is taken.
    """
    if drawing.count < 1 or drawing.steps < 1 or drawing.guidance < 0 or drawing.resolution < 0:
        raise ValueError("--count and --steps are at least 1, --guidance and --resolution at least 0")
    if empty := [prompt for prompt in drawing.prompts if not prompt.strip()]:
        raise ValueError(f"--prompts has an empty text ({empty[0]!r}): give words")
    own, factor = pipelines.resolution_of(found.pipeline)
    side = drawing.resolution or own
    if side % max(8, factor):
        raise ValueError(f"--resolution {side} must be a multiple of {max(8, factor)}, such as {own}")
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype {dtype} is unknown: give auto, {', '.join(DTYPES)}")
    place = choose_device(device)
    kind = choose_dtype(found.dtype if dtype == "auto" else dtype, narrow=None if place != "cpu" else False)
    pipeline = pipelines.load_pipeline(found.pipeline, dtype=DTYPES[kind], device=torch.device(place))
    if found.adapter is not None:
        pipeline.unet = attach(pipeline.unet, found.adapter).eval()
        if (words := found.adapter / "text_encoder").is_dir():
            pipeline.text_encoder = attach(pipeline.text_encoder, words).eval()
    out = user_path(drawing.out) if drawing.out else found.out
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    files = []
    for prompt in drawing.prompts:
        for number in range(drawing.count):
            [picture] = pipelines.draw(
                pipeline, [prompt], seeds=[seed + number], side=side, steps=drawing.steps, guidance=drawing.guidance,
                negative=drawing.negative_prompt,
            )  # fmt: skip
            file = _free(out / f"{_slug(prompt)}-{seed + number}.png")
            save_picture(picture, file)
            files.append(file)
            print(
                json_line({"prompt": prompt, "seed": seed + number, "file": str(file)}) if as_json else file, flush=True
            )
    what = f"adapter {found.adapter}" if found.adapter is not None else "no adapter"
    counts = {"picture": len(files), "step": drawing.steps}
    pictures, taken = (f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    console.print(f"{pictures} of {side} x {side} pixels, {taken}, {what}")
    return files


def export_lora(found: Drawn, out: str, *, tolerance: float, device: str) -> Path:
    """Write the run's adapter as diffusers' `load_lora_weights` reads it, in one file; returns the folder.

    Raises Failed, and leaves nothing in out, if a pipeline that loaded it predicts another noise than the adapter.
    """
    if found.adapter is None:
        raise ValueError(f"{found.pipeline} is a pipeline and no adapter: there is nothing to export")
    folders = {"unet": found.adapter, "text_encoder": found.adapter / "text_encoder"}
    place = torch.device(choose_device(device))
    pipeline = pipelines.load_pipeline(found.pipeline, dtype=torch.float32, device=place)
    tensors: dict[str, Tensor] = {}
    with new_folder(user_path(out), "--out") as partial:
        for part in [part for part, folder in folders.items() if folder.is_dir()]:
            model = attach(getattr(pipeline, part), folders[part])
            config: Any = model.peft_config["default"]
            if not isinstance(config, FactorConfig):
                raise ValueError(
                    f"{found.adapter} is a {config.peft_type.value} adapter: load it with PeftModel.from_pretrained("
                    "pipe.unet, ...), nothing to export"
                )
            for name, value in as_lora(model)[1].items():
                tensors[f"{part}.{name.removeprefix('base_model.model.')}"] = value
            setattr(pipeline, part, model.eval())
        wanted = _prediction(pipeline)
        save_file(tensors, partial / LORA, metadata={"format": "pt"})
        del pipeline, model
        plain = pipelines.load_pipeline(found.pipeline, dtype=torch.float32, device=place)
        plain.load_lora_weights(str(partial), weight_name=LORA)
        gap = float((_prediction(plain) - wanted).abs().max())
        if not gap <= tolerance:
            raise Failed(
                f"the LoRA was deleted again: the noise that diffusers predicts with it differs by {gap:.2g}, allowed "
                f"{tolerance:g}: if that is rounding, raise --tolerance"
            )
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print(f"checked: diffusers reads it back, largest difference of the predicted noise {gap:.2g}")
    console.print(f"LoRA for pipe.load_lora_weights in {user_path(out) / LORA}")
    return user_path(out)


@torch.no_grad()
def _prediction(pipeline: Any) -> Tensor:
    """The noise that the pipeline predicts for fixed latents and words, on the CPU."""
    drawn = torch.Generator().manual_seed(0)
    side = pipeline.unet.config.sample_size
    latents = torch.randn(2, pipeline.unet.config.in_channels, side, side, generator=drawn).to(pipeline.device)
    ids = torch.randint(pipeline.text_encoder.config.vocab_size, (2, 8), generator=drawn).to(pipeline.device)
    steps = torch.tensor([100, 500], device=pipeline.device)
    return pipeline.unet(latents, steps, pipeline.text_encoder(ids)[0], return_dict=False)[0].float().cpu()


def _adapter(place: Path) -> Path | None:
    return next((each for each in (place, place / "adapter") if (each / "adapter_config.json").is_file()), None)


def _bases(adapter: Path | None, run: dict[str, Any] | None) -> list[str]:
    """The names that the run and the adapter have for their base."""
    names: list[Any] = []
    if run is not None:
        names += [run["config"]["model"]["model"], run.get("resolved", {}).get("base_folder")]
    if adapter is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):  # loading the adapter reports what is wrong
            names.append(read_json(adapter / "adapter_config.json", JSON_BYTES)["base_model_name_or_path"])
    return [name for name in dict.fromkeys(names) if isinstance(name, str) and name]


def _pipeline(name: str) -> Path | None:
    path = user_path(name)
    folder = local_folder(str(path)) or local_folder(name)
    return folder if folder is not None and is_pipeline(folder) else None


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:SLUG] or "picture"


def _free(file: Path) -> Path:
    number, free = 1, file
    while free.exists():
        number += 1
        free = file.with_name(f"{file.stem}-{number}.png")
    return free
