"""The packages that a run depends on, and their versions on this machine. Standard library alone."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "tokenizers", "numpy", "deepspeed",
    "bitsandbytes", "flash-attn",
)  # fmt: skip

CACHED = {  # functions that remember whether bitsandbytes is installed
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "transformers.utils.import_utils": ("is_bitsandbytes_available",),
}


def versions(*more: str) -> dict[str, str]:
    """Of Python, of each package and of `more` packages; "missing" if one is not installed."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """While this lasts, bitsandbytes counts as not installed, unless it is imported already: PEFT imports it wherever
    it is found, a quarter of the start-up of a run that does not need it. Afterwards it can be imported again, for the
    next run of the same process."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        for module, names in CACHED.items():
            for name in names if module in sys.modules else ():
                getattr(sys.modules[module], name).cache_clear()
