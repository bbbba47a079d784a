"""Hostile files in run folders and in the cache."""

# ruff: noqa: E501 (tables of inputs)

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_parts import ASK, DEEP, WRONG, Case, Materials, change_text, make_special, tensor_header, train_words


def run_cases(materials: Materials) -> Iterator[Case]:
    """A run folder with false contents, read by resuming, by status, by generate and by report; its checkpoint index
    resealed."""

    def case(name: str, change: Callable[[Path], Any], command: str = "resume", accepts=(0, 2)) -> Case:
        def write(folder: Path) -> list[str]:
            shutil.copytree(materials.run, folder / "run", symlinks=True)
            change(folder / "run")
            if command == "resume":
                return train_words(folder, materials, max_steps="3")
            if command == "generate":
                return ["generate", str(folder / "run"), *ASK]
            return [*command.split(), str(folder / "run")]

        return Case("run", f"{command}: {name}", write, accepts)

    (point,) = (materials.run / "checkpoints").glob("step-*")
    index = json.loads((point / "index.json").read_text())

    def resealed(changed: Any) -> Callable[[Path], None]:
        def change(run: Path) -> None:
            import hashlib

            here = run / "checkpoints" / point.name
            text = changed if isinstance(changed, str) else json.dumps(changed)
            (here / "index.json").write_text(text)
            (here / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())

        return change

    for path in _paths(index):
        for name in ("null", "minus one", "huge", "a string", "a list", "an object", "a path"):
            changed = copy.deepcopy(index)
            _set(changed, path, WRONG[name])
            yield case(f"index {'.'.join(map(str, path))}: {name}", resealed(changed))
        changed = copy.deepcopy(index)
        _delete(changed, path)
        yield case(f"index without {'.'.join(map(str, path))}", resealed(changed))
    for name, text in {"nested deeply": DEEP, "a list": "[]", "a number": "3", "nothing": "", "cut": "{"}.items():
        yield case(f"index: {name}", resealed(text))
        for file in ("config.json", "events.jsonl", "state"):
            for command in ("resume", "status", "generate", "report", "logs"):
                accepts = (0, 2)
                yield case(f"{file}: {name}", change_text(file, text), command, accepts)
    for file in ("config.json", "events.jsonl", "state", "control"):
        for name, make in {"a FIFO": os.mkfifo, "a folder": lambda path: path.mkdir(), "a link to a device":
                           lambda path: path.symlink_to("/dev/zero"), "a broken link": lambda path: path.symlink_to("/nowhere/x")}.items():  # fmt: skip
            for command in ("resume", "status", "generate", "report"):
                yield case(f"{file}: {name}", make_special(file, make), command)
    events = [
        '{"step": "x", "loss": "y"}',
        '{"step": 1e308, "loss": 1}',
        "[]",
        "3",
        '{"loss": [1]}',
        '{"loss": 1' + "0" * 400 + "}",
    ]
    for line in events:
        for command in ("resume", "status", "report"):
            yield case(f"an event {line[:30]}", change_text("events.jsonl", f"{line}\n"), command)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields, and of the first element of each list."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        found += _paths(child, (*path, key))
    return found[:60]


def _set(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def _delete(value: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        value = value[key]
    del value[path[-1]]


def cache_cases(materials: Materials) -> Iterator[Case]:
    """--cache: folders that are something else, and cached files with false contents."""
    for command in ("cache ls", "cache verify", "cache prune --max-gb 0"):
        for name in ("model", "run", "file", "fifo", "link", "root"):

            def write(folder: Path, command: str = command, name: str = name) -> list[str]:
                place = folder / "place"
                if name == "model":
                    shutil.copytree(materials.model, place)
                elif name == "run":
                    shutil.copytree(materials.run, place)
                elif name == "file":
                    place.write_text("x")
                elif name == "fifo":
                    os.mkfifo(place)
                elif name == "link":
                    place.symlink_to(place)
                else:
                    place = Path("/")
                return [*command.split(), "--cache", str(place)]

            yield Case("cache", f"{command} on a {name}", write, (2,))
        for name, data in {"noise": b"x" * 100, "nothing": b"", "a deep header": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
                           "no tensors": tensor_header({}), "markup": tensor_header({"__metadata__": {"about": "[/b]", "seal": "x"}})}.items():  # fmt: skip

            def file(folder: Path, command: str = command, data: bytes = data) -> list[str]:
                (folder / "cache" / "factors").mkdir(parents=True)
                (folder / "cache" / "factors" / f"{'a' * 64}.safetensors").write_bytes(data)
                (folder / "cache" / "index").mkdir()
                (folder / "cache" / "index" / f"{'b' * 64}.json").write_bytes(data)
                return [*command.split(), "--cache", str(folder / "cache")]

            yield Case("cache", f"{command} with a file of {name}", file, (0, 1))
