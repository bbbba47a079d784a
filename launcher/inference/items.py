"""What `loldu predict` classifies: texts and images of the command line or of a source of records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from launcher.data import pixels, records
from launcher.data.bad_records import BadRecord
from launcher.data.image_files import Columns, Images, choose_split, held_out_split, splits_of
from launcher.files import open_regular, user_path
from launcher.inference.options import Classifying
from launcher.inference.sources import Source
from launcher.tasks.labels import Labels
from launcher.text import printable


@dataclass(frozen=True, kw_only=True)
class Item:
    """One text or image to classify. `content` reads it, so that images are not all in memory."""

    name: str
    content: Callable[[], Any]  # texts, or a decoded image
    label: Any = None  # as the record has it; None if it has none


def read_items(
    source: Source,
    how: Classifying,
    *,
    pictures: bool,
    text: Sequence[str],
    images: Sequence[str],
    data: str | None,
    say: Callable[[str], None],
) -> list[Item]:
    """The items that the options name. Raises ValueError if the model reads other ones.

    say is called with which split of the images is read, if there are several.
    """
    run = source.data or {}
    columns = how.columns or tuple(run.get("text_columns") or ())
    label = how.label_column or run.get("label_column") or "label"
    if text or images:
        if bool(images) != pictures:
            reads, option = ("images", "--images FILE ...") if pictures else ("texts", "--text TEXT")
            raise ValueError(f"{source.base_name} classifies {reads}: give {option}")
        if text and len(text) != max(len(columns), 1) and (columns or len(text) > 2):
            raise ValueError(f"--text takes {max(len(columns), 1)} for this model, got {len(text)}")
        return [Item(name=" | ".join(text), content=lambda: list(text))] if text else list(map(_image, images))
    assert data is not None
    if len(how.columns) > (1 if pictures else 2):
        raise ValueError(f"--columns {' '.join(how.columns)}: give one column, or two with pairs of texts")
    if pictures:
        column = how.columns[0] if how.columns else run.get("image_column") or "image"
        return _listed(data, Columns(column, label), say)
    if not columns:
        raise ValueError(f"{source.base_name} is in no run folder that names them: give --columns COLUMN")
    return _rows(data, columns, label)


def _image(file: str) -> Item:
    def content() -> Any:
        try:
            with open_regular(user_path(file)) as opened:
                return opened.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"--images {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None

    return Item(name=file, content=content)


def _listed(data: str, columns: Columns, say: Callable[[str], None]) -> list[Item]:
    """The images of the held-out split of a source, or of its only one."""
    found = splits_of(data, "--data", columns)
    split = held_out_split(found) or choose_split(found, "--data")
    listing = found[split]
    if len(found) > 1:
        others = ", ".join(each.split for each in found if each != split)
        say(f"images of the split {split.split} (not of {others})")
    read = Images([(split, listing)], columns)

    def content(place: int) -> bytes:
        try:
            return pixels.read_image(read, place, bytes)
        except BadRecord as error:
            raise ValueError(str(error)) from None

    names = [listing.classes[label] if listing.classes else float(label) for label in listing.labels.tolist()]
    return [
        Item(name=read.name(place), content=partial(content, place), label=names[place])
        for place in range(len(listing))
    ]


def _rows(data: str, columns: Sequence[str], label: str) -> list[Item]:
    items = []
    for index, row in enumerate(records.load_rows(data, "--data")):
        where = f"record {index} of {data}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is a {type(row).__name__}, expected an object with {', '.join(columns)}")
        texts = [records.text_of(row, column, where) for column in columns]
        items.append(Item(name=" | ".join(texts), content=lambda texts=texts: texts, label=row.get(label)))  # type: ignore[misc]
    if not items:
        raise ValueError(f"--data {data} holds no records")
    return items


def check_labels(items: Sequence[Item], classes: Labels, *, pictures: bool) -> None:
    """Raises ValueError naming the first label that the model cannot give: no class of its own, or no number."""
    for item in items:
        if item.label is None or (str(item.label) in classes if classes else _is_number(item.label)):
            continue
        knows = f"the model knows: {', '.join(classes)}" if classes else "the model predicts numbers"
        without = (
            "To predict without labels, give --images FILE ..."
            if pictures
            else "Give another --label-column (one that does not exist: without labels)"
        )
        raise ValueError(f"{printable(item.name):.80} has the label {item.label!r:.80}, {printable(knows)}. {without}")


def _is_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError, OverflowError):
        return False
