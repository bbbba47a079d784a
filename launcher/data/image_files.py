"""The images of a source and their classes, listed without decoding an image.

A source is a folder with one subfolder for each class (as `datasets`' imagefolder reads it), a .zip of such a folder,
or rows with an image and a label: parquet files, a folder that `datasets` saved, a hub dataset. Above the classes, a
folder or archive may have train/ and validation/ or test/. A folder with a metadata file is read by `datasets`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from launcher.data.files import HELD_OUT, TRAINING
from launcher.data.files import IMAGES as SUFFIXES
from launcher.data.limits import LimitExceeded, limits
from launcher.files import open_regular, user_path

log = logging.getLogger(__name__)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
EXPECTED = "expected FOLDER/CLASS/IMAGE, or FOLDER/train/CLASS/IMAGE and FOLDER/validation/CLASS/IMAGE"
ARRAYS = ("labels", "sizes", "checks", "names", "ends")


class Columns(NamedTuple):
    """Where rows have the image and its label."""

    image: str
    label: str


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of one split of a source, in order; n of them."""

    classes: tuple[str, ...]  # empty: labels are numbers
    labels: np.ndarray  # (n,) int64 places in classes, or float32
    sizes: np.ndarray  # (n,) int64, bytes of each image's file
    checks: np.ndarray  # (n,) int64, CRC-32 in an archive, else 0
    names: np.ndarray  # uint8, relative names end to end; of rows, the last part of a path beside them
    ends: np.ndarray  # (n,) int64, where each name ends

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unlabelled(self) -> np.ndarray:
        """Places of the images without a label that can be used."""
        return np.flatnonzero(self.labels < 0 if self.classes else np.isnan(self.labels))

    def name(self, place: int) -> str:
        """The path in the folder or archive; of rows, the file's name if they have files beside them."""
        start = int(self.ends[place - 1]) if place else 0
        return bytes(self.names[start : int(self.ends[place])]).decode("utf-8", "surrogateescape")

    def digest(self) -> str:
        """sha256 of names, sizes, labels and (in an archive) checksums; equal for equal files on every machine."""
        sha = hashlib.sha256(json.dumps(self.classes).encode())
        for name in ARRAYS:
            array = np.ascontiguousarray(getattr(self, name))
            sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return sha.hexdigest()

    def save(self, folder: Path) -> None:
        """Write to a new folder, for `load_listing`."""
        folder.mkdir()
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        (folder / "classes.json").write_text(json.dumps(self.classes))


def load_listing(folder: Path) -> Listing:
    """What `Listing.save` wrote, mapped into memory."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
    return Listing(classes=tuple(json.loads((folder / "classes.json").read_text())), **arrays)


class Split(NamedTuple):
    """One split of a source: enough to list and to open it. split is empty if the source has no splits."""

    source: str
    kind: str  # folder, zip or rows
    split: str = ""


def splits_of(source: str, option: str, columns: Columns, *, skip: bool = False) -> dict[Split, Listing]:
    """The splits of a source, listed. Raises ValueError for a source without images, or without their classes.

    skip: rows whose label cannot be used are listed as `Listing.unlabelled`, and are no error.
    """
    kind = _kind(source, option)
    if kind == "rows":
        return {
            Split(source, kind, name): _list_rows(rows, columns, f"{option} {source}", skip=skip)
            for name, rows in _rows(source, option).items()
        }
    path = user_path(source)
    entries = list(_zip_entries(path, option) if kind == "zip" else _folder_entries(path, option))
    return {Split(source, kind, name): listing for name, listing in _arranged(entries, f"{option} {source}").items()}


def choose_split(found: dict[Split, Listing], option: str) -> Split:
    """The split that an option means: of --data the training split, of --eval-data a held-out one.

    Raises ValueError if there are several splits and none is named so.
    """
    wanted = HELD_OUT if option == "--eval-data" else TRAINING
    chosen = held_out_split(found) if option == "--eval-data" else _named(found, TRAINING)
    if chosen is None and len(found) == 1:
        chosen = next(iter(found))
    if chosen is None:
        source, names = next(iter(found)).source, ", ".join(split.split for split in found)
        raise ValueError(f"{option} {source} has the splits {names}: expected one named {' or '.join(wanted)}")
    return chosen


def held_out_split(found: dict[Split, Listing]) -> Split | None:
    """The split to evaluate on, if a source has one: validation before test."""
    return _named(found, HELD_OUT)


def _named(found: dict[Split, Listing], names: Sequence[str]) -> Split | None:
    by_name = {split.split.lower(): split for split in found}
    return next((by_name[name] for name in names if name in by_name), None)


class Images:
    """The images of several splits, one after the other. `read` may be called by several threads."""

    def __init__(self, splits: Sequence[tuple[Split, Listing]], columns: Columns):
        self.starts: list[int] = []
        self.count = 0
        self._opened: list[tuple[Split, Listing, Callable[[int], bytes]]] = []
        for split, listing in splits:
            self.starts.append(self.count)
            self.count += len(listing)
            self._opened.append((split, listing, _reader(split, listing, columns)))

    def _find(self, place: int) -> tuple[Split, Listing, Callable[[int], bytes], int]:
        number = bisect.bisect_right(self.starts, place) - 1
        while not len(self._opened[number][1]):
            number -= 1
        return *self._opened[number], place - self.starts[number]

    def name(self, place: int) -> str:
        """The image, for messages."""
        split, listing, _, at = self._find(place)
        if split.kind == "rows":
            return f"record {at} of {split.source}" + (f" ({split.split})" if split.split else "")
        return (
            f"{split.source}/{listing.name(at)}" if split.kind == "folder" else f"{listing.name(at)} in {split.source}"
        )

    def read(self, place: int) -> bytes:
        """The bytes of an image's file. Raises OSError or ValueError if it cannot be read."""
        _, _, read, at = self._find(place)
        return read(at)


def _kind(source: str, option: str) -> str:
    path = user_path(source)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return "rows"
        tops = [path, *(child for child in sorted(path.iterdir()) if child.is_dir())]
        if any((top / name).is_file() for top in tops for name in METADATA):
            return "rows"
        return "rows" if _parquet_files(path) else "folder"
    if path.suffix.lower() in (".zip", ".parquet"):
        if not path.is_file():
            raise ValueError(f"{option} {path}: there is no such file")
        return "rows" if path.suffix.lower() == ".parquet" else "zip"
    if path.exists() or source.startswith((".", "~", os.sep)):
        there = "is no folder, .zip or .parquet file" if path.exists() else "does not exist"
        raise ValueError(f"{option} {source} {there}: give a folder of images ({EXPECTED}), a .zip of it, or a dataset")
    return "rows"


def _parquet_files(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*.parquet")) if not _hidden(file.relative_to(path).parts)]


def _hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


class _Entry(NamedTuple):
    name: str  # relative, with /
    size: int
    check: int


def _folder_entries(root: Path, option: str) -> Iterator[_Entry]:
    """All files, by name. Links are followed once: a link to a folder above would never end."""
    seen = set()

    def walk(folder: Path, prefix: str) -> Iterator[_Entry]:
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                return
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as found:
                inside = sorted(found, key=lambda entry: entry.name)
            for entry in inside:
                if _hidden([entry.name]):
                    continue
                if entry.is_dir():
                    yield from walk(Path(entry.path), f"{prefix}{entry.name}/")
                else:
                    yield _Entry(f"{prefix}{entry.name}", entry.stat().st_size if entry.is_file() else 0, 0)
        except OSError as error:
            raise ValueError(f"{option} {folder} cannot be read: {error.strerror}") from error

    return walk(root, "")


def _zip_entries(path: Path, option: str) -> Iterator[_Entry]:
    """All files in an archive, by name. Raises ValueError for a damaged or encrypted one."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = sorted(archive.infolist(), key=lambda info: info.filename)
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{option} {path} is not a .zip archive that can be read: {error}") from error
    for info in inside:
        if info.is_dir() or _hidden(PurePosixPath(info.filename).parts):
            continue
        if info.flag_bits & 1:
            raise ValueError(f"{option} {path} is encrypted: unpack it, and give the folder")
        yield _Entry(info.filename, info.file_size, info.CRC)


def _arranged(entries: Sequence[_Entry], where: str) -> dict[str, Listing]:
    """A listing for each split (a single one named "" without splits)."""
    images = [(PurePosixPath(entry.name).parts, entry) for entry in entries if entry.name.lower().endswith(SUFFIXES)]
    others = [entry.name for entry in entries if not entry.name.lower().endswith(SUFFIXES)]
    if not images:
        raise ValueError(f"{where} holds no images ({', '.join(SUFFIXES)}); {EXPECTED}")
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        log.warning("%s: %d files whose ending is not that of an image are left out: %s", where, len(others), shown)
    at = 0  # folders that all images are in
    while len({parts[at] for parts, _ in images}) == 1 and all(len(parts) > at + 2 for parts, _ in images):
        at += 1
    tops = {parts[at].lower() for parts, _ in images}
    deep = all(len(parts) == at + 3 for parts, _ in images)
    splits = deep and tops <= {*TRAINING, *HELD_OUT}
    found: dict[str, list[tuple[str, _Entry]]] = {}
    for parts, entry in images:
        if len(parts) != at + (3 if splits else 2):
            raise ValueError(f"{where}: {entry.name} is not in a folder of its class: {EXPECTED}")
        found.setdefault(parts[at] if splits else "", []).append((parts[-2], entry))
    return {split: _listed(some) for split, some in found.items()}


def _listed(images: Sequence[tuple[str, _Entry]]) -> Listing:
    classes = tuple(sorted({name for name, _ in images}))
    number = {name: place for place, name in enumerate(classes)}
    names = [entry.name.encode("utf-8", "surrogateescape") for _, entry in images]
    return Listing(
        classes=classes,
        labels=np.array([number[name] for name, _ in images], dtype=np.int64),
        sizes=np.array([entry.size for _, entry in images], dtype=np.int64),
        checks=np.array([entry.check for _, entry in images], dtype=np.int64),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
    )


def _rows(source: str, option: str) -> dict[str, Any]:
    """The splits of a source of rows, by name, as `datasets.Dataset`: mapped from the cache of `datasets`."""
    import datasets

    path = user_path(source)
    datasets.disable_progress_bars()
    try:
        if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
            found: Any = datasets.load_from_disk(str(path))
        elif path.is_dir() and (files := _parquet_files(path)):
            found = datasets.load_dataset("parquet", data_files=_by_split(files, path))
        elif path.is_dir():
            found = datasets.load_dataset("imagefolder", data_dir=str(path))
        elif path.is_file():
            found = datasets.load_dataset("parquet", data_files=[str(path)], split="train")
        else:
            name, configuration, split = _hub_name(source, option)
            found = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # the hub, its client, the network and damaged files have no common error class
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        kind = "cannot be read" if path.exists() else "is neither here nor a hub dataset that can be read"
        raise ValueError(f"{option} {source} {kind} ({reason:.300})") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"": found}


def _hub_name(source: str, option: str) -> tuple[str, str | None, str | None]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}", source):
        raise ValueError(f"{option} {source!r} is neither a folder nor the name of a hub dataset")
    name, configuration, split = [*source.split(":"), None, None][:3]
    assert name is not None
    return name, configuration, split


def _by_split(files: Sequence[Path], root: Path) -> dict[str, list[str]]:
    """The files by the split in their names; all of them train if one names none."""
    found: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(root)).lower())
        split = next((word for word in words if word in (*TRAINING, *HELD_OUT)), "")
        found.setdefault(split, []).append(str(file))
    return {"train": [str(file) for file in files]} if "" in found else found


def _list_rows(rows: Any, columns: Columns, where: str, *, skip: bool) -> Listing:
    import pyarrow.compute as compute

    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        flags = {"image": "--image-column", "label": "--label-column"}
        asked = " and ".join(f"{flags[part]} NAME" for part in flags if getattr(columns, part) in missing)
        raise ValueError(
            f"{where} has no column {' and no column '.join(map(repr, missing))} (its columns: "
            f"{', '.join(rows.column_names)}): give {asked}"
        )
    if not len(rows):
        raise ValueError(f"{where} holds no rows")
    images = _undecoded(rows, columns.image, where)
    table = images.data.table if images._indices is None else images.flatten_indices().data.table
    column = table[columns.image].combine_chunks() if table[columns.image].num_chunks == 1 else table[columns.image]
    inside = compute.fill_null(compute.binary_length(compute.struct_field(column, "bytes")), 0)
    sizes, names = np.array(inside, dtype=np.int64), [b""] * len(rows)
    for place, path in enumerate(compute.struct_field(column, "path").to_pylist()):
        if not sizes[place] and path:  # a file beside the rows
            names[place] = os.path.basename(path).encode("utf-8", "surrogateescape")
            sizes[place] = os.path.getsize(path) if os.path.isfile(path) else 0
    classes, labels = _row_labels(rows, columns.label, where, skip=skip)
    return Listing(
        classes=classes,
        labels=labels,
        sizes=sizes,
        checks=np.zeros(len(rows), dtype=np.int64),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
    )


def _undecoded(rows: Any, column: str, where: str) -> Any:
    """The rows with {bytes, path} in the column of images."""
    import datasets

    try:
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's errors have no common class
        raise ValueError(f"{where}: the column {column!r} holds no images, but {rows.features[column]}") from error


def _row_labels(rows: Any, column: str, where: str, *, skip: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes and the label of each row: places in them, or numbers to predict.

    With skip, -1 or NaN stands for a label that cannot be used, of which the first is an error otherwise.
    """
    names = getattr(rows.features[column], "names", None)
    values = rows.with_format(None).select_columns([column])[:][column]

    def usable(wrong: Callable[[Any], bool], message: str) -> None:
        """Leave wrong values out, as None."""
        for place, value in enumerate(values):
            if value is not None and wrong(value):
                if not skip:
                    raise ValueError(f"{where}, record {place}{message.format(value=repr(value)[:40])}")
                values[place] = None

    odd = f": {column!r} is a class or a number, got "
    if not skip and None in values:
        raise ValueError(f"{where}, record {values.index(None)}{odd}None")
    usable(lambda value: not isinstance(value, (int, float, str)) or value in (np.inf, -np.inf), odd + "{value}")
    usable(lambda value: value != value, odd + "{value}")
    found = [value for value in values if value is not None]
    kinds = {type(value) for value in found}
    if kinds and kinds <= {int, float} and float in kinds:
        return (), np.array([np.nan if value is None else value for value in values], dtype=np.float32)
    if len(kinds) > 1:
        raise ValueError(f"{where}: {column!r} mixes names and numbers: give one kind of label")
    if kinds == {int}:
        unlabelled = " has the label {value}: it is unlabelled, as test splits are; give another split"
        usable(lambda value: value < 0, "," + unlabelled)
        found = [value for value in values if value is not None]
    if not found:
        raise ValueError(f"{where}: no row has a label in {column!r} that can be used")
    known: list[Any] = sorted(set(found))
    if names is not None:
        known = list(range(len(names)))
    elif kinds == {int}:
        if known[-1] >= 10 * len(known) + 100:
            raise ValueError(f"{where}: {column!r} has numbers up to {known[-1]}: classes are numbered from 0")
        known = list(range(known[-1] + 1))
    number = {name: place for place, name in enumerate(known)} | {None: -1}
    return tuple(names or map(str, known)), np.array([number[value] for value in values], dtype=np.int64)


def bytes_of(file: Path) -> bytes:
    """The content of a regular file. Raises OSError for another kind, and LimitExceeded."""
    most = limits().image_bytes
    with open_regular(file) as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        raise LimitExceeded(f"its file has more than {most:,} bytes: {limits().raised('image_bytes')}")
    return data


def _reader(split: Split, listing: Listing, columns: Columns) -> Callable[[int], bytes]:
    """A function that reads the file of an image by its place."""
    path, most = user_path(split.source), limits().image_bytes

    def check(place: int) -> None:
        if listing.sizes[place] > most:
            size = f"{int(listing.sizes[place]):,} bytes"
            raise LimitExceeded(f"its file has {size}: {limits().raised('image_bytes')}")

    if split.kind == "folder":

        def read_file(place: int) -> bytes:
            check(place)
            return bytes_of(path / listing.name(place))

        return read_file
    if split.kind == "zip":
        archive = zipfile.ZipFile(path)

        def read_entry(place: int) -> bytes:
            check(place)
            return archive.read(listing.name(place))

        return read_entry
    rows = _undecoded(_rows(split.source, "--data")[split.split], columns.image, split.source)

    def read_row(place: int) -> bytes:
        check(place)
        found = rows[place][columns.image]
        if not found or (found["bytes"] is None and not found["path"]):
            raise ValueError("there is no image")
        return found["bytes"] if found["bytes"] is not None else bytes_of(Path(found["path"]))

    return read_row
