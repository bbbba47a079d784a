"""What must be equal on all nodes of a run: interpreter, packages, code. Uses only the standard library."""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path
from typing import Any

from launcher.packages import versions

PROJECT = Path(__file__).resolve().parents[2]


def environment(recipe: str = "") -> dict[str, Any]:
    """Interpreter, package versions and hashes of the code on this machine."""
    sources = sorted(path for part in ("adapters", "launcher") for path in (PROJECT / part).rglob("*.py"))
    return {
        **versions(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "this project's code": _digest([PROJECT / "loldu.py", *sources]),
        **({"recipe": _digest([Path(recipe)])} if recipe else {}),
    }


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """The differences, each as `torch 2.13.0 instead of 2.12.1`, with the value of `here` first."""
    return [
        f"{name} {here.get(name, 'unknown')} instead of {there.get(name, 'unknown')}"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0".encode())
        whole.update(file.read_bytes() if file.is_file() else b"\0missing")
    return whole.hexdigest()[:12]
