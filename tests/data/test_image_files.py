"""Which images a folder, an archive or a dataset has, and with which classes; and mistakes in them."""

import io
import shutil
import zipfile

import datasets
import pytest
from PIL import Image

from launcher.data.image_files import Columns, Images, choose_split, held_out_split, load_listing, splits_of

COLUMNS = Columns("image", "label")


def bytes_of(value, size=(8, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def fill(root, *names):
    """Image files with these names; returns the folder."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes_of(number))
    return root


def zipped(root):
    """The folder as an archive beside it, in a folder of its own, as file managers pack it."""
    file = root.parent / f"{root.name}.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, f"{root.name}/{path.relative_to(root)}")
        archive.writestr("__MACOSX/a/._0.png", b"no image")
    return file


def contents(source, option="--data"):
    """(class, bytes) of each image of the split that an option means."""
    found = splits_of(str(source), option, COLUMNS)
    split = choose_split(found, option)
    images = Images([(split, found[split])], COLUMNS)
    return [(found[split].classes[found[split].labels[i]], images.read(i)) for i in range(images.count)]


@pytest.mark.parametrize("pack", [lambda root: root, zipped])
def test_subfolders_are_classes(pack, tmp_path):
    root = fill(tmp_path / "data", "b/1.PNG", "a/2.jpg", "a/10.webp", "a/.hidden.png")

    assert contents(pack(root)) == [("a", bytes_of(2)), ("a", bytes_of(1)), ("b", bytes_of(0))]


@pytest.mark.parametrize("pack", [lambda root: root, zipped])
def test_folders_above_the_classes_are_splits(pack, tmp_path):
    root = fill(tmp_path / "data", "train/a/1.png", "train/b/1.png", "test/a/1.png", "val/b/1.png")
    found = splits_of(str(pack(root)), "--data", COLUMNS)

    held_out = held_out_split(found)

    assert sorted(split.split for split in found) == ["test", "train", "val"]
    assert held_out is not None
    assert held_out.split == "val", "the test split is for the end"
    assert contents(pack(root)) == [("a", bytes_of(0)), ("b", bytes_of(1))]
    assert contents(pack(root), "--eval-data") == [("b", bytes_of(3))]


def test_a_listing_is_the_same_from_a_folder_anywhere_and_from_what_was_saved(tmp_path):
    one = fill(tmp_path / "one", "a/1.png", "b/1.png")
    shutil.copytree(one, tmp_path / "other" / "place")
    listings = [
        next(iter(splits_of(str(root), "--data", COLUMNS).values())) for root in (one, tmp_path / "other/place")
    ]

    listings[0].save(tmp_path / "saved")
    again = load_listing(tmp_path / "saved")

    assert listings[0].digest() == listings[1].digest() == again.digest()
    assert [again.name(i) for i in range(len(again))] == ["a/1.png", "b/1.png"]
    (one / "b" / "1.png").write_bytes(bytes_of(9, (50, 50)))
    assert next(iter(splits_of(str(one), "--data", COLUMNS).values())).digest() != again.digest()


def rows(labels, features=None):
    images = [{"bytes": bytes_of(i), "path": None} for i in range(len(labels))]
    features = datasets.Features({"picture": datasets.Image(), "kind": features}) if features else None
    return datasets.Dataset.from_dict({"picture": images, "kind": labels}, features=features)


def test_rows_of_a_parquet_file_and_of_a_saved_dataset(tmp_path):
    """With the names of a ClassLabel, in its order, and with names as text, sorted."""
    columns = Columns("picture", "kind")
    rows([1, 0, 1], datasets.ClassLabel(names=["zebra", "ape"])).to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict(train=rows(["b", "a", "b"]), test=rows(["a", "b"])).save_to_disk(tmp_path / "saved")

    parquet = splits_of(str(tmp_path / "rows.parquet"), "--data", columns)
    saved = splits_of(str(tmp_path / "saved"), "--data", columns)

    [(split, listing)] = parquet.items()
    assert (listing.classes, listing.labels.tolist()) == (("zebra", "ape"), [1, 0, 1])
    assert listing.sizes.tolist() == [len(bytes_of(i)) for i in range(3)]
    images = Images([(split, listing)], columns)
    assert [images.read(i) for i in range(3)] == [bytes_of(i) for i in range(3)]
    assert images.name(2) == f"record 2 of {tmp_path / 'rows.parquet'}"
    train, test = choose_split(saved, "--data"), choose_split(saved, "--eval-data")
    assert (train.split, test.split) == ("train", "test")
    assert (saved[train].classes, saved[train].labels.tolist()) == (("a", "b"), [1, 0, 1])


def test_a_metadata_file_names_the_classes_of_a_folder(tmp_path):
    root = fill(tmp_path / "data", "pictures/1.png", "pictures/2.png", "pictures/3.png")
    lines = ["file_name,kind", "pictures/1.png,b", "pictures/2.png,a", "pictures/3.png,b"]
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    columns = Columns("image", "kind")

    [(split, listing)] = splits_of(str(root), "--data", columns).items()

    assert [listing.classes[label] for label in listing.labels] == ["b", "a", "b"]
    assert [Images([(split, listing)], columns).read(i) for i in range(3)] == [bytes_of(i) for i in range(3)]
    (root / "pictures" / "2.png").write_bytes(bytes_of(9, (50, 50)))
    [changed] = splits_of(str(root), "--data", columns).values()
    assert changed.digest() != listing.digest()


def test_several_sources_are_read_one_after_the_other(tmp_path):
    found = [splits_of(str(fill(tmp_path / name, "a/1.png", "b/1.png")), "--data", COLUMNS) for name in "xy"]

    images = Images([pair for each in found for pair in each.items()], COLUMNS)

    assert [images.read(i) for i in range(4)] == [bytes_of(0), bytes_of(1)] * 2
    assert images.name(3) == f"{tmp_path}/y/b/1.png"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt", "a/readme.md"], r"holds no images \(.jpg.*expected FOLDER/CLASS/IMAGE"),
        (["1.png", "2.png"], "1.png is not in a folder of its class"),
        (["a/1.png", "b/deep/1.png"], "b/deep/1.png is not in a folder of its class"),
        (["train/a/1.png", "train/b/1.png", "c/1.png"], "train/a/1.png is not in a folder|c/1.png is not in"),
    ],
)
def test_a_folder_without_classes_is_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        splits_of(str(fill(tmp_path / "data", *names)), "--data", COLUMNS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None], "record 2: 'kind' is a class or a number, got None"),
        ([None, 1, 0], "record 0: 'kind' is a class or a number, got None"),
        ([[1], [0]], r"record 0: 'kind' is a class or a number, got \[1\]"),
        ([0, -1, 1], "record 1, has the label -1: it is unlabelled"),
        ([0, 1, 70000], "numbers up to 70000: classes are numbered from 0"),
    ],
)
def test_a_mistake_in_the_labels_of_rows_is_named(labels, message, tmp_path):
    rows(labels).to_parquet(tmp_path / "rows.parquet")

    with pytest.raises(ValueError, match=message):
        splits_of(str(tmp_path / "rows.parquet"), "--data", Columns("picture", "kind"))


def test_other_mistakes_are_named(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK no archive")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    rows([0, 1]).to_parquet(tmp_path / "rows.parquet")

    for source, message in {
        "broken.zip": "is not a .zip archive that can be read",
        "broken.parquet": "broken.parquet cannot be read",
        "rows.parquet": r"no column 'image' and no column 'label' \(its columns: picture, kind\): give --image-column",
        "absent.zip": "there is no such file",
    }.items():
        with pytest.raises(ValueError, match=message):
            splits_of(str(tmp_path / source), "--data", COLUMNS)


def test_a_link_to_a_folder_above_ends(tmp_path):
    root = fill(tmp_path / "data", "a/1.png", "b/1.png")
    (root / "b" / "up").symlink_to(root)

    assert len(contents(root)) == 2
