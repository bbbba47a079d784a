"""Files that come with the project, both in a checkout and where it is installed."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """The recipes: the package loldu_recipes if the project is installed, the folder recipes/ in a checkout."""
    installed = PROJECT / "loldu_recipes"
    return installed if installed.is_dir() else PROJECT / "recipes"


def accelerate_file(name: str) -> str:
    """The path to give to `accelerate launch --config_file`, relative to the current folder if that is shorter."""
    path = str(recipes_folder() / "accelerate" / f"{name}.yaml")
    return min(os.path.relpath(path), path, key=len)
