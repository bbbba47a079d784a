"""What is learned from the samples: one file for each kind of training, registered here by its name."""

from __future__ import annotations

import importlib

from launcher.config import Config
from launcher.tasks.base import Task

# Files of this folder, each with its `TASK`. They are asked in this order: the first that wants a config trains it.
REGISTERED = [
    "label",
    "instruct",
]


def task_of(config: Config) -> Task:
    """The task that a config asks for."""
    tasks = (importlib.import_module(f"launcher.tasks.{name}").TASK for name in REGISTERED)
    return next(task for task in tasks if task.wants(config))
