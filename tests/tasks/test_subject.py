"""Pictures: the loss is diffusers', the start is the base, and every sharding and resume gives one curve."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from launching import start_several
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file

from adapters import METHODS
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig, as_dict
from launcher.inference.export import export_lora
from launcher.inference.generate import generate
from launcher.inference.options import Answering, Drawing
from launcher.models import pipelines
from launcher.models.denoiser import Denoiser
from launcher.processes import Ranks
from launcher.tasks import subject
from launcher.tasks.base import Layout
from launcher.training.resolve import resolve
from launcher.training.run import run
from recipes.tiny.pipeline import SIDE, save_pictures, save_pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a random pipeline, one that predicts velocities, two pictures and one held out."""
    folder = tmp_path_factory.mktemp("pipelines")
    save_pipeline(folder / "epsilon")
    save_pipeline(folder / "v_prediction", prediction="v_prediction")
    save_pictures(folder / "pictures", (0.35, 0.6))
    save_pictures(folder / "held_out", (0.45,))
    save_pictures(folder / "classes", (0.5, 0.55, 0.6))
    return folder


@pytest.fixture
def config(made, tmp_path):
    return Config(
        model=ModelConfig(model=str(made / "epsilon"), dtype="float32"),
        data=DataConfig(
            data=str(made / "pictures"), instance_prompt="a photo of sks disc", eval_data=str(made / "held_out")
        ),
        adapter=AdapterConfig(rank=15, targets=TARGETS, options=("normalize_directions=true",)),
        optimizer=OptimizerConfig(learning_rate=3e-2, batch_size=4, max_steps=6, schedule="constant"),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )


def changed(config, **parts):
    return replace(config, **{part: replace(getattr(config, part), **values) for part, values in parts.items()})


def read(config, tmp_path):
    tokenizer = subject.TASK.tokenizer(subject.TASK.base_folder(config.model.model))
    return subject.TASK.read(config, tokenizer, tmp_path / "cache").train


def with_prior(config, made, weight=0.5):
    classes = {"class_prompt": "a photo of a disc", "class_data": str(made / "classes"), "prior_weight": weight}
    return changed(config, data=classes)


def with_text_encoder(config):
    targets = (*TARGETS, "q_proj", "v_proj")
    return changed(config, model={"train_text_encoder": True}, adapter={"targets": targets})


def events(config, name="loss"):
    lines = map(json.loads, Path(config.run.output, "events.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_diffusers_scheduler(prediction, config, made, tmp_path):
    config = with_prior(changed(config, model={"model": str(made / prediction)}), made)
    unet = UNet2DConditionModel.from_pretrained(made / prediction / "unet")
    scheduler = DDPMScheduler.from_pretrained(made / prediction / "scheduler")
    data = read(config, tmp_path)
    batch = subject.TASK.collate(data, [0, 1, 2], Layout(step=5))

    loss = subject.TASK.loss(unet, batch, 3)

    x0, noise, timestep = batch["x0"], batch["noise"], batch["timestep"]
    noisy = scheduler.add_noise(x0, noise, timestep)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, timestep)
    found = unet(noisy, timestep, batch["words"]).sample
    own, prior = (found - wanted).square().chunk(2)
    torch.testing.assert_close(loss, own.mean() + 0.5 * prior.mean())


def test_latents_and_words_are_those_of_the_pipeline(config, made, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(made / "epsilon")
    data = read(config, tmp_path)

    picture = pipe.image_processor.preprocess(Image.open(made / "pictures" / "1.png"))
    with torch.no_grad():
        latents = pipe.vae.encode(picture).latent_dist
        words, _ = pipe.encode_prompt("a photo of sks disc", CPU, 1, False)
        item = subject.TASK.collate(data, [1], Layout(step=3))
        drawn = (item["x0"] / pipe.vae.config.scaling_factor - latents.mean) / latents.std

    torch.testing.assert_close(data.subject.moments[1, 0], latents.parameters[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(item["words"], words)
    torch.testing.assert_close(drawn, item["drawn"], atol=1e-3, rtol=1e-3)


def test_noise_follows_from_seed_step_and_sample_alone(config, made, tmp_path):
    config = changed(with_prior(config, made), data={"crop": "random", "flip": True, "resolution": SIDE // 2})
    data = read(config, tmp_path)
    batch = lambda rows, step: subject.TASK.collate(data, rows, Layout(step=step))  # noqa: E731

    whole, alone = batch([0, 1, 2, 3], 7), batch([2], 7)
    for name in ("x0", "drawn", "noise", "timestep"):
        assert torch.equal(whole[name][[2, 6]], alone[name])
    assert not torch.equal(whole["noise"][0], whole["noise"][2])  # one picture, two samples
    assert not torch.equal(alone["noise"], batch([2], 8)["noise"])
    other = read(changed(config, optimizer={"seed": 7}), tmp_path)
    assert not torch.equal(alone["noise"], subject.TASK.collate(other, [2], Layout(step=7))["noise"])


def test_random_cuts_are_squares_of_the_picture_and_go_through_the_vae(config, tmp_path):
    wide = Image.radial_gradient("L").resize((3 * SIDE, SIDE)).convert("RGB")
    (tmp_path / "wide").mkdir()
    wide.save(tmp_path / "wide" / "a.png")
    config = changed(config, data={"crop": "random", "data": str(tmp_path / "wide"), "eval_data": None})
    data = read(config, tmp_path)

    batch = subject.TASK.collate(data, range(4), Layout(step=1))
    loss = subject.TASK.loss(UNet2DConditionModel.from_pretrained(f"{config.model.model}/unet"), batch, 4)

    [pixels] = data.subject.pixels
    squares = [pixels[:, :, left : left + SIDE].float() / 127.5 - 1 for left in range(2 * SIDE + 1)]
    places = [next(at for at, square in enumerate(squares) if torch.equal(square, found)) for found in batch["x0"]]
    assert len(set(places)) > 1
    assert batch["latents"](batch["x0"], batch["drawn"]).shape == batch["noise"].shape
    assert torch.isfinite(loss)


def test_micro_batches_add_up_to_the_batch(config, made, tmp_path):
    data = read(with_prior(config, made), tmp_path)
    unet = UNet2DConditionModel.from_pretrained(made / "epsilon" / "unet")
    loss = lambda rows: subject.TASK.loss(unet, subject.TASK.collate(data, rows, Layout(step=1)), 4)  # noqa: E731

    torch.testing.assert_close(loss([0]) + loss([1, 2]) + loss([3]), loss(range(4)))


def test_a_run_learns_two_pictures_and_its_adapter_loads_in_diffusers(config, made, tmp_path):
    config = changed(config, optimizer={"max_steps": 40})

    assert run(config, "test") == 0

    first, last = events(config, "eval_loss")
    losses = events(config)
    assert last < first - 0.05
    assert sum(losses[-10:]) < sum(losses[:10])
    pipe = StableDiffusionPipeline.from_pretrained(made / "epsilon")
    batch = subject.TASK.collate(read(config, tmp_path), range(4), Layout(step=0))
    with torch.no_grad():
        before = subject.TASK.loss(pipe.unet, batch, 4)
        pipe.unet = PeftModel.from_pretrained(pipe.unet, f"{config.run.output}/adapter")
        after = subject.TASK.loss(pipe.unet, batch, 4)
    assert after < before - 0.05
    recorded = json.loads(Path(config.run.output, "config.json").read_text())["versions"]
    assert recorded["diffusers"] == diffusers.__version__


@pytest.mark.parametrize("method", ["loldu", "lora"])
def test_the_first_prediction_is_the_base_models_bit_for_bit(method, config, made, tmp_path, monkeypatch):
    config = changed(config, adapter={"method": method, "options": ()}, optimizer={"max_steps": 1})
    seen = []
    loss = subject.TASK.loss

    def watched(forward, batch, targets):
        def keep(*args, **kwargs):
            (found,) = forward(*args, **kwargs)
            seen.append((args, found.detach().clone()))
            return (found,)

        return loss(keep, batch, targets)

    monkeypatch.setattr(subject.TASK, "loss", watched)
    assert run(config, "test") == 0

    unet = UNet2DConditionModel.from_pretrained(made / "epsilon" / "unet")
    (args, found), *_, (last_args, last) = seen
    with torch.no_grad():
        assert torch.equal(found, unet(*args).sample)
        assert not torch.equal(last, unet(*last_args).sample)  # after the step


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(config, made, tmp_path):
    config = changed(with_prior(config, made), data={"crop": "random", "flip": True})
    uninterrupted = changed(config, run={"output": str(tmp_path / "all")})

    def stop_at_three(training, event):
        if event["step"] == 3:
            training.stop.request("the test")

    assert run(config, "test", on_step=stop_at_three) == 75
    assert run(config, "test") == 0
    assert run(uninterrupted, "test") == 0

    assert events(config) == events(uninterrupted)
    one, other = (load_file(f"{c.run.output}/adapter/adapter_model.safetensors") for c in (config, uninterrupted))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_another_vae_prompt_or_picture_is_another_run(config, made, tmp_path):
    save_pipeline(tmp_path / "other", seed=1)
    shutil.copytree(made / "epsilon", tmp_path / "mixed")
    shutil.copytree(tmp_path / "other" / "vae", tmp_path / "mixed" / "vae", dirs_exist_ok=True)
    digest = read(config, tmp_path).digest()

    assert read(config, tmp_path).digest() == digest
    for part, values in (
        ("model", {"model": str(tmp_path / "mixed")}),
        ("data", {"instance_prompt": "a photo of sks ball"}),
        ("data", {"data": str(made / "classes")}),
        ("data", {"flip": True}),
    ):
        assert read(changed(config, **{part: values}), tmp_path).digest() != digest


def test_class_pictures_are_made_once_by_the_base(config, tmp_path, monkeypatch):
    config = changed(config, data={"class_prompt": "a photo of a disc", "class_pictures": 2, "prior_weight": 1.0},
                     optimizer={"max_steps": 1})  # fmt: skip
    monkeypatch.setattr("launcher.tasks.class_pictures.STEPS", 2)

    assert run(config, "test") == 0
    files = sorted((tmp_path / "cache" / "class_pictures").rglob("*.png"))
    first = [file.read_bytes() for file in files]
    files[1].unlink()
    more = changed(config, data={"class_pictures": 3}, run={"output": str(tmp_path / "more")})
    assert run(more, "test") == 0

    files = sorted((tmp_path / "cache" / "class_pictures").rglob("*.png"))
    assert [Image.open(file).size for file in files] == [(SIDE, SIDE)] * 3
    assert [file.read_bytes() for file in files[:2]] == first
    assert files[2].read_bytes() not in first


@pytest.mark.slow
def test_generate_draws_pictures_that_differ_from_the_bases(config, made, tmp_path, capsys):
    assert run(config, "test") == 0
    capsys.readouterr()
    drawing = Drawing(prompts=("a photo of sks disc", "a/b"), count=2, steps=3)

    generate(config.run.output, Answering(seed=4), drawing=drawing)
    files = capsys.readouterr().out.split()
    generate(config.run.output, Answering(seed=5), drawing=replace(drawing, prompts=drawing.prompts[:1], count=1))
    [again] = capsys.readouterr().out.split()
    generate(str(made / "epsilon"), Answering(seed=4), drawing=replace(drawing, out=str(tmp_path / "base")), json=True)
    base = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    names = ["a-photo-of-sks-disc-4.png", "a-photo-of-sks-disc-5.png", "a-b-4.png", "a-b-5.png"]
    assert files == [f"{config.run.output}/pictures/{name}" for name in names]
    assert again.endswith("/a-photo-of-sks-disc-5-2.png")  # nothing is overwritten
    assert Image.open(again).tobytes() == Image.open(files[1]).tobytes()
    assert [line["seed"] for line in base] == [4, 5, 4, 5]
    for file, line in zip(files, base, strict=True):
        assert Image.open(file).size == (SIDE, SIDE)
        assert Image.open(file).tobytes() != Image.open(line["file"]).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "dora", "loha", "vera", "oft", "ia3"])
def test_every_method_of_the_family_and_of_peft_trains(method, config):
    options = {"vera": ("projection_prng_key=1",), "ia3": ("feedforward_modules=[]",)}.get(method, ())
    rank = 16 if method == "oft" else 4
    config = changed(config, adapter={"method": method, "rank": rank, "options": options}, optimizer={"max_steps": 4})
    if method == "loha":
        config = changed(config, adapter={"targets": ("to_q", "conv1")})

    assert run(config, "test") == 0
    assert events(config, "eval_loss")[-1] != events(config, "eval_loss")[0]


@pytest.mark.slow
def test_every_engine_gives_the_curve_of_one_process(config, made, tmp_path):
    unet = with_prior(config, made)
    both = changed(with_text_encoder(config), run={"output": str(tmp_path / "both")})
    engines = [(unet, name) for name in ("ddp", "fsdp2", "zero2", "zero3")] + [(both, "fsdp2")]
    outputs = [
        (one, changed(one, run={"output": str(tmp_path / f"{number}"), "sharding": name}))
        for number, (one, name) in enumerate(engines)
    ]

    assert [run(one, "test") for one in (unet, both)] == [0, 0]
    start_several(tmp_path, 2, [{"config": as_dict(sharded)} for _, sharded in outputs])

    for one, sharded in outputs:
        assert events(sharded) == pytest.approx(events(one), abs=2e-5)
        assert events(sharded, "eval_loss") == pytest.approx(events(one, "eval_loss"), abs=2e-5)
        folders = [Path(each.run.output) / "adapter" for each in (one, sharded)]
        files = [sorted(file.relative_to(folder) for file in folder.rglob("*.safetensors")) for folder in folders]
        assert files[0] == files[1]
        assert len(files[0]) == (2 if one is both else 1)
        for file in files[0]:
            wanted, found = (load_file(folder / file) for folder in folders)
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)


def remove(part):
    return lambda folder: shutil.rmtree(folder / part)


def rename_class(kind):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))

    return change


def pickle_unet(folder):
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")


def cut_unet(folder):
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    del weights["conv_in.weight"]
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")


def predict_samples(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "holds no model, expected a Stable Diffusion pipeline"),
        (rename_class("StableDiffusionXLPipeline"), "is a StableDiffusionXLPipeline, which is not supported"),
        (remove("vae"), "has no vae/config.json"),
        (pickle_unet, r"only as a pickle \(diffusion_pytorch_model.bin\)"),
        (cut_unet, "conv_in.weight"),
        (predict_samples, "predicts 'sample'"),
    ],
)
def test_other_and_damaged_pipelines_are_refused_by_name(damage, message, config, made, tmp_path, capfd):
    shutil.copytree(made / "epsilon", tmp_path / "damaged")
    damage(tmp_path / "damaged")

    assert run(changed(config, model={"model": str(tmp_path / "damaged")}), "test") == 2

    assert_one_line(capfd, message)


def assert_one_line(capfd, message):
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert message.replace("\\", "") in lines[0]


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("data", {"instance_prompt": "", "task": "subject"}, "give --instance-prompt"),
        ("data", {"prior_weight": 1.0}, "give --class-prompt"),
        ("data", {"class_prompt": "a disc"}, "give --prior-weight 1"),
        ("data", {"class_data": "classes"}, "--class-data needs"),
        ("data", {"packing": True}, "leave --packing out"),
        ("adapter", {"method": "full"}, "--method full"),
        ("adapter", {"method": "prompt_tuning", "options": ()}, "trains a prompt"),
        ("adapter", {"modules_to_save": ("conv_in",)}, "leave --modules-to-save out"),
        ("model", {"compile": True}, "--compile is not supported"),
        ("model", {"train_text_encoder": True}, "add some of q_proj k_proj"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_file_is_read(part, values, message, config):
    with pytest.raises(ValueError, match=message):
        resolve(changed(config, **{part: values}), Ranks())


def test_a_missing_package_is_named(config, monkeypatch):
    monkeypatch.setattr(pipelines.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ValueError, match=r"pip install 'loldu-launcher\[diffusion\]'"):
        subject.TASK.check(config, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "empty"}, "holds no pictures"),
        ({"data": "text"}, "0.png is no image that can be read"),
        ({"data": "cut"}, "0.png is damaged or cut short"),
        ({"data": "wide"}, "0.png has more than 8 bits per channel"),
        ({"data": "script"}, "0.png is no image that can be read"),
        ({"data": "missing"}, "neither a folder of pictures here nor a data set"),
        ({"resolution": 33}, "--resolution 33 must be a multiple of 2"),
        ({"eval_data": None, "eval_records": 2}, "leaves none to train on"),
        ({"instance_prompt": "x" * 100}, "--instance-prompt takes 102 tokens, and this pipeline reads 77"),
    ],
)
def test_bad_pictures_and_prompts_are_refused_by_name(values, message, config, made, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "text", "cut", "wide", "script"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.full((64, 64), 40_000, dtype=np.uint16)).save(tmp_path / "wide" / "0.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "script" / "0.png", format="EPS")  # for which Pillow starts Ghostscript
    (tmp_path / "text" / "0.png").write_text("no picture")
    (tmp_path / "cut" / "0.png").write_bytes((made / "pictures" / "0.png").read_bytes()[:80])

    assert run(changed(config, data=values), "test") == 2

    assert_one_line(capfd, message)


def test_a_layer_that_does_not_exist_is_refused_with_the_names_there_are(config, capfd):
    assert run(changed(config, adapter={"targets": ("q_proj",)}), "test") == 2

    assert_one_line(capfd, "--targets q_proj matches no module of this UNet2DConditionModel model")


def test_commands_for_text_refuse_pictures_by_name(config, made, tmp_path):
    resolved = resolve(changed(config, data={"instance_prompt": "", "task": "instruct"}), Ranks())

    with pytest.raises(ValueError, match="is a diffusers pipeline, which makes pictures"):
        resolved.task.base_folder(config.model.model)
    with pytest.raises(ValueError, match="this model draws pictures: give --prompts"):
        generate(str(made / "epsilon"))


@pytest.mark.slow
def test_a_trained_text_encoder_starts_as_the_base_and_loads_in_diffusers(config, made, tmp_path, capsys):
    frozen = changed(config, run={"output": str(tmp_path / "frozen")})
    config = with_text_encoder(config)

    assert run(config, "test") == 0
    assert run(frozen, "test") == 0

    assert events(config)[0] == events(frozen)[0]  # the base's, whether its text encoder is trained or not
    assert events(config)[-1] != events(frozen)[-1]
    pipe = StableDiffusionPipeline.from_pretrained(made / "epsilon")
    folder = f"{config.run.output}/adapter"
    pipe.unet = PeftModel.from_pretrained(pipe.unet, folder)
    pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, f"{folder}/text_encoder")
    held_out = changed(config, data={"data": config.data.eval_data, "eval_data": None})
    batch = subject.TASK.collate(read(held_out, tmp_path), range(8), Layout(step=0))
    with torch.no_grad():
        loss = subject.TASK.loss(Denoiser(pipe.unet, pipe.text_encoder, made), batch, 8)
    assert float(loss) == pytest.approx(events(config, "eval_loss")[-1], abs=1e-6)
    assert sorted(path.name for path in Path(folder, "text_encoder").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    capsys.readouterr()
    generate(config.run.output, drawing=Drawing(prompts=("a photo of sks disc",), steps=2))
    assert Path(capsys.readouterr().out.strip()).is_file()


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number(config, tmp_path):
    config = with_text_encoder(changed(config, optimizer={"max_steps": 2}))
    checkpointed = changed(config, model={"gradient_checkpointing": True}, run={"output": str(tmp_path / "other")})

    assert run(config, "test") == 0
    assert run(checkpointed, "test") == 0

    assert events(checkpointed) == pytest.approx(events(config), abs=1e-6)


def test_a_layer_that_the_method_does_not_support_is_refused_by_name(config, capfd):
    assert run(changed(config, adapter={"method": "vera", "options": (), "targets": ("conv1", "to_q")}), "test") == 2

    assert_one_line(capfd, "--method vera does not support a layer that --targets names: Target module Conv2d")


def test_an_adapter_made_in_float32_loads_on_a_bfloat16_pipeline(config, capsys):
    assert run(with_text_encoder(config), "test") == 0
    capsys.readouterr()

    generate(config.run.output, Answering(dtype="bfloat16"), drawing=Drawing(prompts=("a disc",), steps=2))

    assert Path(capsys.readouterr().out.strip()).is_file()


@pytest.mark.slow
def test_an_exported_lora_loads_with_load_lora_weights(config, made, tmp_path, capsys):
    config = with_text_encoder(config)
    assert run(config, "test") == 0

    export_lora(config.run.output, out=str(tmp_path / "lora"))

    plain, adapted = (StableDiffusionPipeline.from_pretrained(made / "epsilon", safety_checker=None) for _ in range(2))
    plain.load_lora_weights(str(tmp_path / "lora"))
    adapted.unet = PeftModel.from_pretrained(adapted.unet, f"{config.run.output}/adapter")
    adapted.text_encoder = PeftModel.from_pretrained(adapted.text_encoder, f"{config.run.output}/adapter/text_encoder")
    words, steps = torch.arange(16).view(2, 8), torch.tensor([3, 700])
    latents = torch.randn(2, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (
            pipe.unet(latents, steps, pipe.text_encoder(words)[0], return_dict=False)[0] for pipe in (plain, adapted)
        )
        base = UNet2DConditionModel.from_pretrained(made / "epsilon" / "unet")
        untrained = base(latents, steps, adapted.text_encoder(words)[0], return_dict=False)[0]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert (one - untrained).abs().max() > 1e-3
    with pytest.raises(ValueError, match="leave it out"):
        export_lora(config.run.output, out=str(tmp_path / "more"), rank=2)
