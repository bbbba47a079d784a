"""Which task trains a config."""

from __future__ import annotations

import importlib

from launcher.config import Config
from launcher.tasks import registry
from launcher.tasks.base import Task


def task_of(config: Config) -> Task:
    """The task that a config names, with auto the first one that wants the config; in the variant for its data."""
    named = config.data.task
    names = registry.REGISTERED if named == "auto" else (named,)
    tasks = (importlib.import_module(f"launcher.tasks.{name}").TASK for name in names)
    return next(task for task in tasks if named != "auto" or task.wants(config)).variant(config)
