"""Classes of images: how they are read and changed, whole runs, and mistakes in the files."""

import io
import json
import math
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from launching import Runs
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from adapters.layer import BasePrecisionWarning
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.data import pixels
from launcher.data.bad_records import BadRecord
from launcher.inference.sources import find
from launcher.models.image_processor import load_processor
from launcher.processes import Ranks
from launcher.tasks import label_images
from launcher.tasks.base import Layout
from launcher.training.resolve import resolve
from launcher.training.run import run

TASK = label_images.TASK
SHARED = Path(__file__).resolve().parents[3] / "shared"


def config(base, data, folder, **values):
    """Some steps on images."""
    return Config(
        model=ModelConfig(model=str(base)),
        data=DataConfig(
            data=data if isinstance(data, tuple) else str(data), image_column="image", **{"eval_records": 7, **values}
        ),
        adapter=AdapterConfig(rank=7, targets=("all-linear",), modules_to_save=("classifier",)),
        optimizer=OptimizerConfig(batch_size=6, max_steps=6, learning_rate=1e-2),
        run=RunConfig(output=str(folder / "run"), cache=str(folder / "cache"), save_every=2, report=False),
    )


def read(base, data, folder, **values):
    return TASK.read(config(base, data, folder, **values), load_processor(base), folder / "cache")


def file_of(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_evaluation_sees_what_the_models_processor_makes_of_the_whole_image(tiny_vit, image_folder, tmp_path):
    held_out = read(tiny_vit, image_folder, tmp_path).held_out
    processor = AutoImageProcessor.from_pretrained(tiny_vit, backend="pil")

    batch = TASK.collate(held_out, range(7), Layout())

    for row in range(7):
        with Image.open(held_out.images.name(int(held_out.places[row]))) as image:
            expected = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(batch["pixel_values"][row], expected)
        assert held_out.classes[batch["labels"][row]] in held_out.images.name(int(held_out.places[row]))


def test_a_training_image_changes_with_the_step_and_with_nothing_else(tiny_vit, image_folder, tmp_path):
    train = read(tiny_vit, image_folder, tmp_path).train

    def pixels_of(step, *rows):
        return TASK.collate(train, rows, Layout(step=step))["pixel_values"]

    whole = pixels_of(1, 3, 4)

    assert torch.equal(whole[0], pixels_of(1, 5, 3)[1])
    assert not torch.equal(whole[0], pixels_of(2, 3)[0])


def test_without_crop_and_flip_training_sees_the_images_of_an_evaluation(tiny_vit, image_folder, tmp_path):
    train = read(tiny_vit, image_folder, tmp_path, random_crop=1.0, random_flip=False).train

    batches = [TASK.collate(data, range(5), Layout())["pixel_values"] for data in (train, replace(train, augment=None))]

    assert torch.equal(*batches)


def test_a_flip_alone_mirrors_about_half_of_the_images(tiny_vit, image_folder, tmp_path):
    train = read(tiny_vit, image_folder, tmp_path, random_crop=1.0).train
    whole = TASK.collate(replace(train, augment=None), [0] * 40, Layout())["pixel_values"]

    changed = [TASK.collate(train, [0], Layout(step=step))["pixel_values"][0] for step in range(40)]

    mirrored = [torch.equal(one, other.flip(-1)) for one, other in zip(changed, whole, strict=True)]
    same = [torch.equal(one, other) for one, other in zip(changed, whole, strict=True)]
    assert sum(mirrored) + sum(same) == 40
    assert 8 <= sum(mirrored) <= 32


@pytest.mark.parametrize("size", [(40, 30), (300, 8)])
def test_a_crop_keeps_its_share_of_the_area_and_stays_inside(size):
    boxes = [pixels._crop(random.Random(seed), size, 0.25) for seed in range(200)]

    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= size[0]
        assert 0 <= upper < lower <= size[1]
    if size == (40, 30):
        shares = [(right - left) * (lower - upper) / 1200 for left, upper, right, lower in boxes]
        assert 0.2 < min(shares) < 0.35
        assert 0.9 < max(shares) <= 1
        assert len(set(boxes)) > 190


def test_an_image_is_upright_and_has_the_models_channels():
    """A grey one, one with a palette, and one that a camera stored lying."""
    lying = Image.new("RGB", (4, 2), (9, 9, 9))
    exif = lying.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    lying.save(file, "JPEG", exif=exif)

    assert pixels.decoded(file.getvalue(), "RGB").size == (2, 4)
    assert pixels.decoded(file_of(Image.new("L", (3, 3), 7)), "RGB").getpixel((0, 0)) == (7, 7, 7)
    assert pixels.decoded(file_of(Image.new("P", (3, 3))), "L").mode == "L"


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype("uint8"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello", "is no image"),
        (file_of(NOISE, "JPEG")[:2000], "is damaged or cut short"),
        (file_of(NOISE)[:2000], "is damaged or cut short"),
        (
            file_of(Image.new("1", (9000, 9000))),
            "9000 x 9000 pixels: the limit is 67,108,864; raise it with LOLDU_IMAGE",
        ),
        (file_of(Image.new("1", (20000, 10000))), "has too many pixels: the limit is 67,108,864"),
        (file_of(Image.new("I;16", (4, 4))), "more than 8 bits per channel"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
    ],
)
def test_a_bad_file_is_found_when_it_is_checked_and_when_it_is_decoded(data, message):
    for use in (pixels.check_image, lambda data: pixels.decoded(data, "RGB")):
        with pytest.raises(BadRecord, match=message):
            use(data)


@pytest.fixture
def with_bad(image_folder, tmp_path):
    """The folder with a file that is no image and a JPEG that was cut short."""
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "red" / "text.jpg").write_text("hello")
    (folder / "blue" / "cut.jpg").write_bytes(file_of(NOISE, "JPEG")[:2000])
    return folder


def test_bad_files_are_listed_before_anything_is_trained(tiny_vit, with_bad, tmp_path, capfd):
    assert run(config(tiny_vit, with_bad, tmp_path), "test") == 2

    said = capfd.readouterr().err
    assert "2 of 32 records cannot be used (1 x damaged, 1 x no image)" in said
    assert f"{with_bad}/blue/cut.jpg is damaged or cut short" in said
    assert f"{with_bad}/red/text.jpg is no image" in said
    assert not (tmp_path / "run").exists()


def test_skipped_bad_files_are_left_out_and_the_check_is_kept(tiny_vit, with_bad, image_folder, tmp_path, monkeypatch):
    found = read(tiny_vit, with_bad, tmp_path, on_bad_record="skip")
    monkeypatch.setattr(pixels, "check_image", lambda data: pytest.fail("checked twice"))

    again = read(tiny_vit, with_bad, tmp_path, on_bad_record="skip")

    assert len(found.train) + len(found.held_out) == 30
    assert "2 left out" in str(found.train.report)
    assert again.train.digest() == found.train.digest()


@pytest.mark.parametrize("kind", ["names", "numbers", "places"])
def test_rows_of_images_without_a_label_are_left_out_and_counted_if_asked(kind, tiny_vit, tmp_path, caplog):
    labels = [{"names": ("a", "b"), "numbers": (0.5, 2.5), "places": (0, 1)}[kind][i % 2] for i in range(12)]
    labels[3] = labels[8] = None
    labels[5] = {"names": None, "numbers": math.nan, "places": -1}[kind]
    images = [{"bytes": file_of(Image.new("RGB", (9, 9), (i, 0, 0))), "path": None} for i in range(12)]
    images[8]["bytes"] = b"damaged as well"
    datasets.Dataset.from_dict({"image": images, "label": labels}).to_parquet(tmp_path / "rows.parquet")

    with pytest.raises(ValueError, match=r"record \d"):
        read(tiny_vit, tmp_path / "rows.parquet", tmp_path, eval_records=2)
    found = read(tiny_vit, tmp_path / "rows.parquet", tmp_path, eval_records=2, on_bad_record="skip")

    places = torch.cat([found.train.places, found.held_out.places]).sort().values
    assert places.tolist() == [0, 1, 2, 4, 6, 7, 9, 10, 11]
    for data in (found.train, found.held_out):
        expected = [labels[place] if kind == "numbers" else place % 2 for place in data.places.tolist()]
        assert data.labels.tolist() == expected
    assert "3 left out" in str(found.train.report)
    assert "3 of 12 records cannot be used (2 x no label, 1 x no image)" in caplog.text


def test_a_file_that_is_damaged_after_the_check_is_named(tiny_vit, image_folder, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    train = read(tiny_vit, folder, tmp_path).train
    for file in folder.rglob("*.*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    with pytest.raises(ValueError, match=r"(cut short|no image).*it has changed since it was checked"):
        TASK.collate(train, range(20), Layout())


def test_the_digest_depends_on_the_files_the_split_and_the_processor(tiny_vit, image_folder, tmp_path):
    other = shutil.copytree(tiny_vit, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    digest = read(tiny_vit, image_folder, tmp_path).train.digest()

    assert read(tiny_vit, shutil.copytree(image_folder, tmp_path / "copy"), tmp_path).train.digest() == digest
    assert read(tiny_vit, image_folder, tmp_path, eval_records=8).train.digest() != digest
    assert read(other, image_folder, tmp_path).train.digest() != digest


def test_training_and_held_out_images_have_digests_of_their_own(tiny_vit, image_folder, tmp_path):
    """Other held-out images make no other run, and other training images no other held-out loss."""
    for name in ("train", "more", "held", "held2"):
        shutil.copytree(image_folder, tmp_path / name)
    shutil.copy(tmp_path / "more" / "red" / "0.jpg", tmp_path / "more" / "blue" / "new.jpg")
    (tmp_path / "held2" / "red" / "0.jpg").unlink()

    def digests(*train, held):
        found = read(tiny_vit, tuple(str(tmp_path / name) for name in train), tmp_path, eval_data=str(tmp_path / held))
        return found.train.digest(), found.held_out.digest()

    train, held = digests("train", held="held")

    assert digests("train", held="held2")[0] == train
    assert digests("train", held="held2")[1] != held
    assert digests("more", held="held")[0] != train
    assert digests("more", held="held")[1] == digests("train", "more", held="held")[1] == held
    (tmp_path / "two" / "train").parent.mkdir()
    shutil.copytree(image_folder, tmp_path / "two" / "train")
    shutil.copytree(tmp_path / "held2", tmp_path / "two" / "validation")  # a source with a held-out split in between
    both = read(tiny_vit, (str(tmp_path / "two"), str(tmp_path / "more")), tmp_path).train
    assert both.numbers.tolist() == list(range(61))
    assert both.places.tolist() == [*range(30), *range(59, 90)]


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_run_learns_and_its_adapter_and_head_score_the_same_in_plain_peft(tiny_vit, image_folder, tmp_path, capfd):
    asked = config(tiny_vit, image_folder, tmp_path)
    asked = replace(asked, optimizer=replace(asked.optimizer, max_steps=60), run=replace(asked.run, save_every=0))

    assert run(asked, "test") == 0

    first, last = events(tmp_path / "run")[0], events(tmp_path / "run")[-1]
    assert last["accuracy"] == 1.0
    assert last["eval_loss"] < first["eval_loss"] / 2
    held_out = read(tiny_vit, image_folder, tmp_path).held_out
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", BasePrecisionWarning)  # the new head is no part of the base
        base = AutoModelForImageClassification.from_pretrained(tiny_vit, num_labels=3)  # with another random head
        model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        loss = model(**TASK.collate(held_out, range(7), Layout())).loss
    assert float(loss) == pytest.approx(last["eval_loss"], abs=1e-5)
    assert "AutoModelForImageClassification" in capfd.readouterr().out
    assert json.loads((tmp_path / "run" / "adapter" / "classes.json").read_text()) == ["blue", "green", "red"]
    assert load_processor(tiny_vit).identity == read(tiny_vit, image_folder, tmp_path).held_out.processor.identity
    with pytest.raises(ValueError, match="classifies images, and this command is for models that write text"):
        find(str(tmp_path / "run"))


@pytest.fixture(scope="module")
def runs(tiny_vit, image_folder, tmp_path_factory):
    """Six steps over more than an epoch, on one process; without dropout, which each process draws for itself."""
    folder = tmp_path_factory.mktemp("label-images")
    base = shutil.copytree(tiny_vit, folder / "base")
    settings = json.loads((base / "config.json").read_text()) | {"hidden_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(settings))
    (folder / "none.json").write_text("[]")
    runs = Runs(folder, base, folder / "none.json")
    runs.base = config(base, image_folder, folder)
    runs.base = replace(runs.base, run=replace(runs.base.run, output=None))
    runs.alone("none")
    return runs


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs):
    runs.alone_from("resumed", "none", 2)

    assert runs.events("resumed") == runs.events("none")
    once, again = runs.adapter("none"), runs.adapter("resumed")
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("change", [{"random_crop": 0.5}, {"random_flip": False}])
def test_a_resume_with_other_changes_of_images_is_refused(change, runs, capfd):
    folder = shutil.copytree(runs.folder / "none", runs.folder / f"changed-{next(iter(change))}")
    asked = runs.config(folder.name)

    assert run(replace(asked, data=replace(asked.data, **change)), "test") == 2

    assert "would change the learning curve" in capfd.readouterr().err


SHARDED = [("none", "ddp"), ("none", "fsdp2"), ("none", "zero3"), ("nf4", "fsdp2")]


@pytest.fixture(scope="module")
def sharded(runs):
    def change(kind):
        return lambda config: replace(config, model=replace(config.model, quantize=kind))

    runs.alone("nf4", change=change("nf4"))
    runs.start(2, *(runs.entry(f"{kind}-{engine}", engine, change=change(kind)) for kind, engine in SHARDED))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "engine"), SHARDED)
def test_two_processes_train_to_the_curve_of_one(sharded, kind, engine):
    """On the same random parts of the same images; and the same adapter and head are saved."""
    name = f"{kind}-{engine}"

    torch.testing.assert_close(sharded.losses(name), sharded.losses(kind), atol=1e-5, rtol=0)
    ours, theirs = ([e for e in sharded.events(each) if "accuracy" in e][-1] for each in (name, kind))
    assert ours["accuracy"] == theirs["accuracy"]
    torch.testing.assert_close(sharded.adapter(name), sharded.adapter(kind), atol=1e-4, rtol=0)


def test_real_photographs_in_an_archive_train(tiny_vit, tmp_path, capfd):
    data = SHARED / "data" / "vision"
    if not data.is_dir():
        pytest.skip(f"needs the shared data folder beside the checkout: no {data}")
    asked = config(tiny_vit, data / "cifar10_test_100_per_class.zip", tmp_path, eval_records=50)

    assert run(asked, "test") == 0

    assert "950 images labelled with 10 classes, 16 x 16 pixels" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_columns": ("sentence",)}, "give one of them"),
        ({"packing": True}, "leave --packing"),
        ({"exact_match": True}, "leave --packing, --exact-match"),
    ],
)
def test_settings_of_texts_are_refused(values, message, tiny_vit, image_folder, tmp_path):
    asked = config(tiny_vit, image_folder, tmp_path)

    with pytest.raises(ValueError, match=message):
        resolve(replace(asked, data=replace(asked.data, **values)), Ranks())


def refused(asked, capfd):
    """The one line of a run that ends with a mistake."""
    assert run(asked, "test") == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_a_text_model_does_not_learn_images_and_an_image_model_no_texts(
    tiny_vit, tiny_roberta, image_folder, tmp_path, capfd
):
    images = config(tiny_roberta, image_folder, tmp_path)
    texts = config(tiny_vit, image_folder, tmp_path)
    texts = replace(texts, data=replace(texts.data, image_column=None, text_columns=("text",)))

    assert "is a roberta, which transformers has no image classifier for" in refused(images, capfd)
    assert "is a vit, an image model, which reads no text" in refused(texts, capfd)


def test_a_folder_of_images_for_a_text_model_names_the_option(tiny_roberta, image_folder, tmp_path, capfd):
    texts = config(tiny_roberta, image_folder, tmp_path)

    texts = replace(texts, data=replace(texts.data, image_column=None, text_columns=("text",), max_length=48))

    assert "holds images: give --image-column image and an image model" in refused(texts, capfd)


def test_one_class_and_classes_that_differ_between_splits_are_named(tiny_vit, image_folder, tmp_path, capfd):
    (tmp_path / "one").mkdir()
    shutil.copytree(image_folder / "red", tmp_path / "one" / "red")
    for split, names in (("train", ("red", "blue")), ("test", ("red", "green"))):
        for name in names:
            shutil.copytree(image_folder / name, tmp_path / "two" / split / name)

    assert "all training images have the class 'red'" in refused(config(tiny_vit, tmp_path / "one", tmp_path), capfd)
    said = refused(config(tiny_vit, tmp_path / "two", tmp_path), capfd)
    assert (
        "(test) have the class green, which no training image has; the training images have the classes blue, red"
        in said
    )


def test_a_processor_that_does_not_fit_the_model_is_named(tiny_vit, image_folder, tmp_path, capfd):
    other = shutil.copytree(tiny_vit, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"height": 20, "width": 20}}))

    assert "makes images of 20 x 20" in refused(config(other, image_folder, tmp_path), capfd)

    (other / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json" in refused(config(other, image_folder, tmp_path), capfd)


def test_missing_pillow_is_named(tiny_vit, image_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pixels, "find_spec", lambda name: None)

    assert "pip install 'loldu-launcher[images]'" in refused(config(tiny_vit, image_folder, tmp_path), capfd)


def test_the_rows_of_an_image_models_head_keep_their_classes(tiny_vit, image_folder, tmp_path):
    names = dict(enumerate(("red", "blue", "green")))
    torch.manual_seed(0)
    headed = shutil.copytree(tiny_vit, tmp_path / "headed")
    AutoModelForImageClassification.from_pretrained(tiny_vit, id2label=names).save_pretrained(headed)

    train, other = (read(base, image_folder, tmp_path).train for base in (headed, tiny_vit))

    assert train.classes == ("red", "blue", "green")
    assert other.classes == ("blue", "green", "red")
    assert train.places.tolist() == other.places.tolist()
    wanted = [train.classes.index(other.classes[label]) for label in other.labels.tolist()]
    assert train.labels.tolist() == wanted
