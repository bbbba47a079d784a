"""Subject-driven pictures: a Stable Diffusion UNet learns a subject from a few pictures. Selected by --instance-prompt.

DreamBooth (arXiv 2208.12242): the loss is the mean squared error of the predicted noise (or velocity, arXiv
2202.00512, as the pipeline's scheduler has it). With a prior weight, each picture of the subject is trained together
with one of its class, so that the model does not forget the class; the base itself makes these before training.

The frozen parts of the pipeline run once, before training: the text encoder on the prompts and the VAE on the pictures,
whose mean and deviation are kept in memory. With --crop random the VAE runs in each step instead. Noise, timestep, crop
and the sample of the VAE's distribution are drawn from seed, step and sample number, so every number of processes and
every resume sees the same.

Shapes: b items of a micro-batch, (c, h, w) a latent, n tokens of a prompt, e the width of their embeddings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from launcher.config import Config, DataConfig
from launcher.data.crew import Crew
from launcher.data.encoded import DataReport, Encoded
from launcher.data.pictures import crop, find_pictures, read_picture
from launcher.models import pipelines
from launcher.models.build import choose_dtype
from launcher.models.denoiser import TEXT_TARGETS
from launcher.tasks.base import Batch, Layout, Samples, Task
from launcher.tasks.class_pictures import class_pictures
from launcher.tasks.evaluation import Evaluation

DRAWS = 8  # noises of each held-out picture in an evaluation


@dataclass(frozen=True)
class Shown:
    """Pictures of one prompt, as the frozen parts of the pipeline see them."""

    prompt: str
    words: Tensor  # embeddings (n, e); token ids (n,) where the text encoder is trained too
    pixels: list[Tensor]  # uint8 (3, H, W)
    moments: Tensor | None = None  # (pictures, 1 or 2 if flipped, 2 c, h, w): means and logarithms of variances


@dataclass(frozen=True)
class How:
    """How pictures become noisy latents."""

    side: int  # of a picture, in pixels
    crop: str  # center or random
    flip: bool
    prediction: str  # epsilon or v_prediction
    prior_weight: float
    seed: int
    shift: float  # of latents: (latent - shift) * scaling
    scaling: float
    parts: str  # digest of VAE and text encoder


@dataclass(frozen=True)
class PictureReport(DataReport):
    """Counts of pictures."""

    pictures: str = ""

    def __str__(self) -> str:
        return self.pictures


@dataclass(frozen=True, eq=False)
class Pictures(Encoded):
    """Samples as in `Encoded`, each one target of one position: a picture of the subject, and one of its class.

    Sample i is picture i modulo their number, so a sample number above them is the same picture with other noise.
    """

    subject: Shown
    prior: Shown | None
    how: How
    alphas: Tensor  # (timesteps,) cumulative products of the noise schedule
    latent: tuple[int, ...]  # (c, h, w)
    vae: Any  # for --crop random; else None
    dtype: torch.dtype  # of the UNet

    def digest(self) -> str:
        sha = hashlib.sha256(json.dumps([*vars(self.how).items()]).encode())
        for shown in filter(None, (self.subject, self.prior)):
            sha.update(shown.prompt.encode())
            for pixels in shown.pixels:
                sha.update(json.dumps(pixels.shape).encode() + pixels.numpy().tobytes())
        return sha.hexdigest()


class Subject(Task):
    """Noise prediction on pictures of a subject."""

    peft_type = None
    text = False
    counts = "samples"
    packages = ("diffusers",)
    unplanned = "runs of image pipelines"

    def wants(self, config: Config) -> bool:
        return bool(config.data.instance_prompt)

    def check(self, config: Config, adapter: PeftConfig | None) -> None:
        data, model = config.data, config.model
        pipelines.check_installed()
        if not data.instance_prompt:
            raise ValueError(
                "--task subject needs the words that name the subject: give --instance-prompt 'a photo of sks dog'"
            )
        if bool(data.class_prompt) != bool(data.prior_weight):
            given, lacks = (
                ("class", "prior-weight 1") if data.class_prompt else ("prior", "class-prompt 'a photo of a dog'")
            )
            raise ValueError(
                f"--{'class-prompt' if given == 'class' else 'prior-weight'} needs both words and weight of the class: "
                f"give --{lacks} as well"
            )
        if data.class_data and not data.class_prompt:
            raise ValueError("--class-data needs the words for its pictures: give --class-prompt and --prior-weight 1")
        if not isinstance(data.data, str):
            raise ValueError("--task subject reads one folder of pictures: give one --data")
        unused = {"packing": data.packing, "exact-match": data.exact_match, "show-samples": config.run.show_samples}
        for option, value in unused.items():
            if value:
                raise ValueError(f"--task subject has pictures, no answers: leave --{option} out")
        if adapter is None:
            raise ValueError(
                "--task subject trains an adapter of the UNet, and --method full has none: give another method"
            )
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"--method {config.adapter.method} trains a prompt of a language model, which a UNet does not have: "
                "give a method that changes weights, such as lora"
            )
        for option, value in {"quantize": model.quantize != "none", "compile": model.compile}.items():
            if value:
                raise ValueError(f"--{option} is not supported by --task subject: leave it out")
        names = {target.rpartition(".")[2] for target in config.adapter.targets}
        if model.train_text_encoder and not names & {"all-linear", *TEXT_TARGETS}:
            raise ValueError(
                "--train-text-encoder adapts those of its layers that --targets names, and there are none: add some of "
                f"{' '.join(TEXT_TARGETS)} to --targets"
            )
        if config.adapter.modules_to_save:
            raise ValueError("--task subject saves an adapter alone: leave --modules-to-save out")

    def base_folder(self, model: str) -> Path:
        return pipelines.pipeline_folder(model, "--model ")

    def tokenizer(self, base: Path, *, trust_remote_code: bool = False) -> Any:
        return pipelines.load_part(base, "tokenizer", torch.device("cpu"))

    def read(self, config: Config, tokenizer: Any, cache: Path) -> Samples:
        data, folder = config.data, self.base_folder(config.model.model)
        side = _side(data, folder)
        subject, tested, others = (
            [read_picture(file, side) for file in files] for files in _files(config, folder, cache)
        )
        dtype = getattr(torch, choose_dtype(config.model.dtype))
        embed = _Words(folder, tokenizer, None if config.model.train_text_encoder else dtype)
        words = embed(data.instance_prompt, "--instance-prompt")
        prior: Shown | None = None
        if data.prior_weight:
            prior = Shown(data.class_prompt, embed(data.class_prompt, "--class-prompt"), others)
        del embed
        factor = pipelines.resolution_of(folder)[1]
        vae, schedule = (
            pipelines.load_part(folder, "vae", _device()),
            pipelines.load_part(folder, "scheduler", _device()),
        )
        how = How(
            side=side, crop=data.crop, flip=data.flip, prediction=schedule.config.prediction_type,
            prior_weight=data.prior_weight, seed=config.optimizer.seed,
            shift=float(getattr(vae.config, "shift_factor", None) or 0.0), scaling=float(vae.config.scaling_factor),
            parts=pipelines.digest_of_parts(folder),
        )  # fmt: skip

        def made(own: Shown, beside: Shown | None, how: How) -> Pictures:
            shown = [each and _encoded(each, how, vae) for each in (own, beside)]
            pictures = max(len(own.pixels), len(beside.pixels) if beside else 0)
            count = math.lcm(pictures, config.optimizer.batch_size)  # so that no batch holds a sample twice
            assert shown[0] is not None
            return Pictures(
                ids=torch.zeros(count, dtype=torch.int32),
                loss=torch.ones(count, dtype=torch.bool),
                offsets=torch.arange(count + 1),
                targets=torch.ones(count, dtype=torch.int64),
                report=PictureReport(count, count, 0, 0, count, count, 1, pictures=_told(own, beside, how)),
                subject=shown[0], prior=shown[1], how=how, alphas=schedule.alphas_cumprod.float().cpu(),
                latent=(vae.config.latent_channels, side // factor, side // factor),
                vae=vae if how.crop == "random" else None, dtype=dtype,
            )  # fmt: skip

        without_prior = replace(
            how, prior_weight=0.0
        )  # held-out losses are the same ones for every weight of the prior
        held_out = made(Shown(data.instance_prompt, words, tested), None, without_prior) if tested else None
        return Samples(train=made(Shown(data.instance_prompt, words, subject), prior, how), held_out=held_out)

    def read_together(self, config: Config, tokenizer: Any, cache: Path, crew: Crew) -> Samples:
        """Pictures of the class are made by the first process of each machine, once the others were read."""
        data, folder = config.data, self.base_folder(config.model.model)

        def look() -> None:
            side = _side(data, folder)
            for files in _files(replace(config, data=replace(data, prior_weight=0.0, class_prompt="")), folder, cache):
                for file in files:
                    read_picture(file, side)

        def make() -> None:
            _files(config, folder, cache, bar=crew.bar, check=crew.check)

        crew.comm.together("data", look)
        crew.led("class pictures", make)
        return crew.comm.each("data", lambda: self.read(config, tokenizer, cache))

    def collate(self, data: Encoded, rows: Sequence[int], layout: Layout) -> Batch:
        assert isinstance(data, Pictures)
        items = [_item(data, data.subject, 1.0, row, layout.step, "subject") for row in rows]
        if data.prior is not None:
            items += [_item(data, data.prior, data.how.prior_weight, row, layout.step, "class") for row in rows]
        batch: Batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        latents = None if data.vae is None else _Latents(data)
        return {**batch, "prediction": data.how.prediction, "dtype": data.dtype, "latents": latents}

    def loss(self, forward: Callable[..., Any], batch: Batch, targets: int) -> Tensor:
        x0 = batch["x0"] if batch["latents"] is None else batch["latents"](batch["x0"], batch["drawn"])
        signal, level = (batch[name].view(-1, 1, 1, 1) for name in ("signal", "level"))
        noise, words = batch["noise"], batch["words"]
        noisy = signal * x0 + level * noise
        wanted = noise if batch["prediction"] == "epsilon" else signal * noise - level * x0
        found = forward(noisy.to(batch["dtype"]), batch["timestep"], words, return_dict=False)[0]
        errors = (found.float() - wanted).square().mean((1, 2, 3))
        return (errors * batch["weight"]).sum() / targets

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        """eval_loss over the held-out pictures, each with several noises, the same in every evaluation."""
        held_out = evaluation.held_out
        assert isinstance(held_out, Pictures)
        samples = list(range(DRAWS * len(held_out.subject.pixels)))

        def measure(rows: Sequence[int]) -> tuple[Tensor]:
            return (self.loss(evaluation.forward, evaluation.batch(self, rows), 1),)

        (total,) = evaluation.total(samples, measure, size=evaluation.batch_size)
        return {"eval_loss": float(total) / len(samples)}

    def add_files(self, samples: Samples, tokenizer: Any, folder: Path) -> None:
        """Nothing: a pipeline has its own tokenizer."""

    def next_steps(self, config: Config, output: Path, saved: Path) -> list[str]:
        return [f"Draw pictures: loldu generate {output} --prompts {json.dumps(config.data.instance_prompt)}"]


TASK: Task = Subject()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _side(data: DataConfig, folder: Path) -> int:
    """The side of a picture in pixels. Raises ValueError if the UNet cannot halve its latent as often as it does."""
    own, factor = pipelines.resolution_of(folder)
    side = data.resolution or own
    if side % factor:
        raise ValueError(f"--resolution {side} must be a multiple of {factor} for this pipeline, such as {own}")
    return side


def _files(config: Config, folder: Path, cache: Path, **shown: Any) -> tuple[list[Path], list[Path], list[Path]]:
    """The pictures of the subject, those held out, and those of its class, which are made if need be."""
    data = config.data
    assert isinstance(data.data, str)
    files = find_pictures(data.data, "--data")
    held = find_pictures(data.eval_data, "--eval-data") if data.eval_data else []
    if not held and data.eval_records:
        if data.eval_records >= len(files):
            raise ValueError(
                f"--eval-records {data.eval_records} of {len(files)} pictures leaves none to train on: give fewer, or "
                "--eval-data FOLDER"
            )
        files, held = files[: -data.eval_records], files[-data.eval_records :]
    if data.class_data:
        return files, held, find_pictures(data.class_data, "--class-data")
    if not data.prior_weight:
        return files, held, []
    made = class_pictures(
        folder, data, _side(data, folder), cache, seed=config.optimizer.seed, device=_device(),
        dtype=choose_dtype(config.model.dtype), **shown,
    )  # fmt: skip
    return files, held, made


def _told(subject: Shown, prior: Shown | None, how: How) -> str:
    told = f"{len(subject.pixels)} pictures of {how.side} x {how.side} pixels ({subject.prompt!r})"
    if prior is not None:
        told += f", {len(prior.pixels)} of the class ({prior.prompt!r}, weight {how.prior_weight:g})"
    return told + ("; latents are computed once" if how.crop == "center" else "; latents are computed in each step")


class _Words:
    """Turns prompts into what the model sees: their embeddings in dtype, or with None their token ids."""

    def __init__(self, folder: Path, tokenizer: Any, dtype: torch.dtype | None):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.encoder = None if dtype is None else pipelines.load_part(folder, "text_encoder", _device())

    @torch.no_grad()
    def __call__(self, prompt: str, option: str) -> Tensor:
        """(n, e) or (n,) on the CPU. Raises ValueError for a prompt longer than the text encoder's context."""
        room = self.tokenizer.model_max_length
        if (needed := len(self.tokenizer(prompt, verbose=False)["input_ids"])) > room:
            raise ValueError(f"{option} takes {needed} tokens, and this pipeline reads {room}: shorten it")
        found = self.tokenizer(prompt, padding="max_length", max_length=room, return_tensors="pt")
        if self.encoder is None:
            return found["input_ids"][0]
        used = getattr(self.encoder.config, "use_attention_mask", False)
        mask = found["attention_mask"].to(_device()) if used else None
        return self.encoder(found["input_ids"].to(_device()), attention_mask=mask)[0][0].to("cpu", self.dtype)


@torch.no_grad()
def _encoded(shown: Shown, how: How, vae: Any) -> Shown:
    """With the moments of its pictures, if they are cut in the middle."""
    if how.crop == "random":
        return shown
    device, moments = next(vae.parameters()).device, []
    for pixels in shown.pixels:
        square = _scaled(crop(pixels, how.side))
        views = torch.stack([square, square.flip(-1)] if how.flip else [square])
        moments.append(torch.stack([_moments(vae, view.to(device)) for view in views]).cpu())
    return replace(shown, moments=torch.stack(moments))


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _moments(vae: Any, square: Tensor) -> Tensor:
    """Means and logarithms of variances (2 c, h, w) of a picture (3, H, W) in [-1, 1]."""
    return vae.encode(square[None]).latent_dist.parameters[0].float()


def _item(data: Pictures, shown: Shown, weight: float, row: int, step: int, kind: str) -> dict[str, Tensor]:
    """One picture with its noise, drawn from seed, step and sample number. x0 is its latent, or with --crop random its
    pixels."""
    how = data.how
    seed = hashlib.sha256(repr((how.seed, step, row, kind)).encode()).digest()[:7]
    drawn = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    number = row % len(shown.pixels)
    flipped = how.flip and bool(torch.randint(2, (), generator=drawn))
    timestep = torch.randint(len(data.alphas), (), generator=drawn)
    noise, deviation = (torch.randn(data.latent, generator=drawn) for _ in range(2))
    if shown.moments is None:
        square = crop(shown.pixels[number], how.side, lambda room: int(torch.randint(room + 1, (), generator=drawn)))
        x0 = _scaled(square.flip(-1) if flipped else square)
    else:
        x0 = _sampled(shown.moments[number, int(flipped)], deviation, how)
    alpha = data.alphas[timestep]
    return {
        "x0": x0, "drawn": deviation, "noise": noise, "timestep": timestep, "words": shown.words,
        "signal": alpha.sqrt(), "level": (1 - alpha).sqrt(), "weight": torch.tensor(weight),
    }  # fmt: skip


def _sampled(moments: Tensor, drawn: Tensor, how: How) -> Tensor:
    """A latent from the VAE's distribution, scaled as the UNet sees it. drawn: standard normal, of its shape."""
    mean, log_variance = moments.chunk(2, -3)
    latent = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * drawn
    return (latent - how.shift) * how.scaling


@dataclass(frozen=True)
class _Latents:
    """The VAE, run in a step on randomly cut pictures."""

    data: Pictures

    @torch.no_grad()
    def __call__(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        moments = torch.stack([_moments(self.data.vae, picture) for picture in pixels])
        return _sampled(moments, drawn, self.data.how)
