"""Find the adapters in the given folders. Nothing outside these folders is opened, also not through links."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.data.saved_template import CHAT_TEMPLATE, PROMPT_TEMPLATE
from launcher.models import same_tokenizer
from launcher.serving.errors import Refused
from launcher.text import one_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
READ = (CONFIG, WEIGHTS, PROMPT_TEMPLATE, CHAT_TEMPLATE, *same_tokenizer.READ)
MOST_NAME_CHARACTERS = 128
State = tuple[tuple[int, ...], ...]  # inode, size and time of change of each file that is read


@dataclass(frozen=True)
class Found:
    """An adapter's folder, and the state of its files."""

    name: str
    folder: Path
    state: State
    newest_ns: int  # when the last of its files changed


def scan(roots: Sequence[Path], known: Mapping[str, Found] | None = None) -> tuple[dict[str, Found], dict[str, str]]:
    """Adapters by name, and the reasons why others cannot be served, by name. Raises OSError for an unreadable root.

    known: adapters whose files are not looked at again, only whether their folders are there.
    """
    found: dict[str, Found] = {}
    problems: dict[str, str] = {}
    for root in roots:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        for name in names:
            try:
                seen = (known or {}).get(name)
                here = seen is not None and seen.folder in (root / name, root / name / "adapter")
                adapter = seen if here else look(root, name)
            except ValueError as error:
                problems.setdefault(name, str(error))
                continue
            if adapter is not None and name in found:
                problems[name] = f"{name} is in {found[name].folder} and in {adapter.folder}: the first is served"
            elif adapter is not None:
                found[name] = adapter
    return found, problems


def look(root: Path, name: str) -> Found | None:
    """The adapter `name` of a folder: root/name, or root/name/adapter as in a run; None if there is none.

    Raises ValueError for a name that cannot be a model's id and for files outside root.
    """
    for folder in (root / name, root / name / "adapter"):
        try:
            with os.scandir(folder) as entries:
                files = {entry.name: entry for entry in entries if entry.name in READ}
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{folder} cannot be read: {error.strerror}") from None
        if CONFIG not in files:
            continue
        check_name(name)
        links = [place for place in (root / name, folder) if place.is_symlink()]
        links += [folder / each for each, entry in files.items() if entry.is_symlink()]
        _check_links(root, links)
        state: list[tuple[int, ...]] = []
        newest = 0
        for each in READ:
            try:
                about = files[each].stat()
            except (KeyError, OSError):  # not copied yet, or without a template
                state.append((0,))
                continue
            if not stat.S_ISREG(about.st_mode):
                raise ValueError(f"{folder / each} is not a regular file: copy the adapter again")
            state.append((about.st_ino, about.st_size, about.st_mtime_ns))
            newest = max(newest, about.st_mtime_ns, about.st_ctime_ns)
        return Found(name, folder, tuple(state), newest)
    return None


def _check_links(root: Path, links: Sequence[Path]) -> None:
    """Raises ValueError for a link that leads out of root, or nowhere."""
    for link in links:
        try:
            inside = link.resolve(strict=True).is_relative_to(root.resolve())
        except OSError as error:
            raise ValueError(f"{link} is a link that leads nowhere: {error.strerror}") from None
        if not inside:
            raise ValueError(f"{link} is a link to outside {root}: copy the adapter there, or serve its own folder")


def look_up(roots: Sequence[Path], name: str) -> Found:
    """The adapter that a request names. Raises Refused (400 or 404)."""
    try:
        check_name(name)
        for root in roots:
            # the name is compared with the folder's own names, so it is never part of a path before it is known
            if name in os.listdir(root) and (found := look(root, name)) is not None:
                return found
    except (OSError, ValueError) as error:
        raise Refused(400, str(error), param="name") from None
    raise Refused(404, f"there is no adapter {name!r} in the folders of this server", code="adapter_not_found",
                  param="name")  # fmt: skip


def check_name(name: str) -> None:
    """Raises ValueError for a name that is not a plain folder name, or that a model's id cannot be."""
    plain = one_line(name).strip() == name and not set("/\t") & set(name)
    if not plain or name.startswith(".") or len(name) > MOST_NAME_CHARACTERS:
        raise ValueError(
            f"{name!r:.200} is no adapter's name: give the name of its folder, without a path, of at most "
            f"{MOST_NAME_CHARACTERS} characters"
        )
