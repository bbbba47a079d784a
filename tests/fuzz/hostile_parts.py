"""What the hostile cases are made of: a case, the words of a command, and changes of files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = {"instruction": "Say yes.", "input": "", "output": "yes"}
ASK = ("--prompt", "hello", "--max-tokens", "2")  # options of generate
DEEP = "[" * 100_000 + "]" * 100_000
WRONG: dict[str, Any] = {
    "null": None, "minus one": -1, "zero": 0, "huge": 10**9, "beyond 64 bits": 1 << 70, "a float": 1.5, "1e308": 1e308,
    "a string": "x", "empty string": "", "a list": [1], "an empty list": [], "an object": {"a": 1}, "true": True,
    "a path": "../../../etc/passwd", "markup": "[/b][red]", "an escape sequence": "\x1b[2J\x1b]0;owned\x07",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One input. accepts: exit codes that are right; an input that is odd but valid may also run."""

    kind: str
    name: str
    write: Callable[[Path], list[str]]  # writes into a folder; returns the words of the command
    accepts: tuple[int, ...] = (2,)


@dataclass(frozen=True)
class Materials:
    """What the cases are made from: a small model, a finished run of it, and its cache."""

    model: Path
    run: Path


def train_words(folder: Path, materials: Materials, **changed: str | None) -> list[str]:
    """One step on a few records; changed replaces options (data="x" for --data x; None leaves one out)."""
    data = folder / "good.json"
    if not data.exists():
        data.write_text(json.dumps([RECORD] * 4))
    options: dict[str, str | None] = {
        "model": str(materials.model), "data": str(data), "output": str(folder / "run"), "rank": "4",
        "cache": str(folder / "cache"), "batch-size": "2", "max-steps": "1", "eval-records": "0",
    }  # fmt: skip
    options |= {name.replace("_", "-"): value for name, value in changed.items()}
    return ["train", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def model_folder(folder: Path, materials: Materials) -> Path:
    """A copy of the model whose files may be changed; the weights are linked."""
    model = folder / "model"
    model.mkdir()
    for file in materials.model.iterdir():
        if file.suffix == ".safetensors":
            (model / file.name).symlink_to(file)
        elif file.is_file():
            shutil.copy(file, model / file.name)
            (model / file.name).chmod(0o644)
    return model


def change_json(file: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**known, key: value}))

    return change


def change_text(file: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))


def change_bytes(file: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(data)

    return change


def make_special(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return change


def tensor_header(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text
