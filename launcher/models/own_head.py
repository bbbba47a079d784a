"""A base with a classification head of its own: its rows keep the classes that they were trained for."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.checkpoint_files import local_folder
from launcher.files import read_json, user_path
from launcher.models.files import JSON_BYTES
from launcher.models.skeleton import in_head

log = logging.getLogger(__name__)
Names = tuple[str, ...]
UNNAMED = re.compile(r"LABEL_\d+")  # transformers' names for classes without any


def own_classes(model: str) -> Names:
    """The names of the classes in the config.json of a base (a folder or a hub name), in the order of its rows."""
    folder = user_path(model) if user_path(model).is_dir() else local_folder(model)
    try:
        names = read_json(folder / "config.json", JSON_BYTES)["id2label"] if folder else {}
        found = tuple(names[str(row)] for row in range(len(names)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # without names, or damaged, which others name
        return ()
    return found if all(isinstance(name, str) and not UNNAMED.fullmatch(name) for name in found) else ()


def in_rows_order(classes: Names, model: str) -> Names:
    """The classes of the data in the order of the base's head, if that has the same ones; else as they are."""
    own = own_classes(model)
    return own if len(own) == len(classes) and set(own) == set(classes) else classes


def check_own_head(base: Any, folder: Path, head: Mapping[str, Any]) -> None:
    """Raises ValueError if rows of the base's head would stand for classes of other names. base: a bare skeleton.

    Labels that are numbers name the rows themselves: a warning gives the classes that these were trained for.
    """
    names, own = tuple(head.get("id2label", {}).values()), own_classes(str(folder))
    kept = (
        name
        for name, value in base.named_parameters()
        if in_head(base, name) and name not in base.drawn_head and value.shape[0] == len(names)
    )
    if not names or names == own or next(kept, None) is None:
        return
    if names == tuple(map(str, range(len(names)))):
        if own:
            log.warning("the head of %s has rows for %s: the labels 0, 1, ... stand for these", folder, _some(own))
        return
    has = f"for the classes {_some(own)}" if own else f"of {len(names)} rows without names"
    raise ValueError(
        f"{folder} has a head {has}, and the labels are {_some(names)}, so its rows would change their meaning: give "
        "the labels the names of its classes, or their numbers from 0; for a new head, give a base without one: "
        f"transformers.AutoModel.from_pretrained({str(folder)!r}).save_pretrained(FOLDER), and copy the other files of "
        "the base there (not config.json and model.safetensors)"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
