"""Tasks of lm-evaluation-harness, run on a loaded model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from launcher.evaluation.scores import Score
from launcher.files import read_text, user_path

INSTALL = "pip install 'loldu-launcher[eval]'"


def check(name: str) -> None:
    """Raises ValueError if the package is missing, naming what to install."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"--tasks {name} is no file here; as a task of lm-evaluation-harness it needs that package: {INSTALL}"
        )


def check_trust(task: str, trusted: bool) -> None:
    """Raises ValueError for a YAML file unless the user trusts it.

    lm-evaluation-harness runs the functions that a task's file names, and renders its templates without a sandbox.
    """
    if Path(task).suffix in (".yaml", ".yml") and not trusted:
        raise ValueError(
            f"--tasks {task}: lm-evaluation-harness runs code that such a file names or holds in its templates: give "
            "--trust-remote-code if you trust the file and its folder"
        )


def task_name(task: str) -> tuple[str, str | None]:
    """The task's name, and the folder of its YAML file if it is one. Raises ValueError for a file without a name."""
    if Path(task).suffix not in (".yaml", ".yml"):
        return task, None
    try:
        settings = yaml.load(read_text(user_path(task)), Loader=_Lenient)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--tasks {task} cannot be read ({str(error).splitlines()[0]}): give a file in YAML") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("task"), str):
        raise ValueError(f"--tasks {task} describes no task of lm-evaluation-harness: it has no `task: NAME`")
    return settings["task"], str(user_path(task).resolve().parent)


class _Lenient(yaml.SafeLoader):
    """Reads a task's file without running what it names (!function)."""


_Lenient.add_multi_constructor("!", lambda loader, suffix, node: None)


def evaluate(task: str, model: Any, tokenizer: Any, *, limit: int, batch_size: int = 8) -> dict[str, Score]:
    """The metrics of a task, with the filter after a slash if it has one. Raises ValueError for an unknown task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    name, folder = task_name(task)
    manager = TaskManager(include_path=folder)
    if not manager.match_tasks([name]):
        raise ValueError(
            f"--tasks {name} is neither a file here nor a task of lm-evaluation-harness (lm-eval ls tasks)"
        )
    found: Any = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=[name], limit=limit or None,
        task_manager=manager, log_samples=False,
    )  # fmt: skip
    scores: dict[str, Score] = {}
    for own, metrics in found["results"].items():
        count = found.get("n-samples", {}).get(own, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not kind:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric}/{kind}"
            shown = shown if own == name else f"{own}: {shown}"
            scores[shown] = {
                "value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else float("nan"),
                "n": count or 0,
            }  # fmt: skip
    return scores
