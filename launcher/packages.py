"""The packages that a run depends on, and their versions on this machine. Standard library alone."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "tokenizers", "numpy", "deepspeed",
    "bitsandbytes", "flash-attn",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and of each package; "missing" if one is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found
