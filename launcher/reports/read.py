"""A run folder as plain data: settings, curves, measurements, answers and trained numbers.

Reads files that a run wrote, even while it writes them: a line that is cut short is left out. Needs no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from launcher.files import open_regular, parse_json, read_json, read_or_empty, weights_digest
from launcher.owner import INTERRUPTED, present_state
from launcher.run_folder import foreign
from launcher.text import one_line

Line = dict[str, Any]
LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # the first number in a module's name is that of its layer
BLOCK = re.compile(r"(down|mid|up)_blocks?\b(.*?)\.transformer_blocks\.(\d+)\.")  # a UNet's; its layers are nested
PEFT_PREFIX = "base_model.model."
NO_REASON = "it left no reason, as when a process is killed or the machine ends"
KILLED = "its process has ended without leaving a word, as when it is killed; the same command resumes the run"
CORE, VALUES = ".core", ".values"
STARTS_AT_ZERO = ".lora_B.weight"  # of LoRA's two matrices; A starts from random values that are not stored


class Change(NamedTuple):
    """The trained numbers of one module, as changes since step 0."""

    module: str  # as in the base model
    layer: str  # the number of its layer; of a UNet its block: up 1.0. Empty if the name has no number
    part: str  # the module's name inside its layer
    change: np.ndarray  # (count,) float64


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    folder: Path
    state: str
    error: str = ""  # why it failed, on one line; empty if it did not, or wrote no reason
    config: dict[str, Any]  # its settings, nested
    resolved: dict[str, Any]  # what followed from them
    identity: dict[str, Any] = field(default_factory=dict)  # what a resume must have in common: digests, settings
    steps: list[Line]  # events with a loss
    evaluations: list[Line]  # events with an eval_loss, where that is a finite number
    diverged: bool = False  # the eval_loss of the last evaluation is NaN or infinite
    metrics: list[Line]  # measured: seconds, tokens_per_s, memory_gib, padding
    answers: list[Line]  # step, question, expected, answer
    changes: list[Change] = field(default_factory=list)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # of loldu eval: task -> model -> metric
    unit: str = ""  # what a change is relative to

    @property
    def counts(self) -> str:
        """What its samples consist of: tokens, patches, samples."""
        return str(self.resolved.get("counts", "tokens"))

    @property
    def name(self) -> str:
        return self.folder.resolve().name


class NotBegun(ValueError):
    """A run that reads its data, makes factors or loads its model, or failed there: it has no settings to show yet."""


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises ValueError if the folder is not a run folder, or its config.json is damaged, and
    NotBegun if the run has not written it yet."""
    file, state = folder / "config.json", read_state(folder)
    error_line = one_line(read_or_empty(folder / "error")) if state == "failed" else ""
    try:
        recorded = read_json(file)
        config, resolved = recorded["config"], recorded.get("resolved", {})
        if not (isinstance(config, dict) and isinstance(config["adapter"], dict) and isinstance(resolved, dict)):
            raise TypeError
    except FileNotFoundError as error:
        if not _begins(folder):
            raise ValueError(_no_run(folder, error)) from None
        if state == "failed":
            raise NotBegun(f"{folder} failed before it trained a step: {error_line or NO_REASON}") from None
        if state == INTERRUPTED:
            raise NotBegun(f"{folder} did not train a step: {KILLED}") from None
        quiet = f" ({state})" if state not in ("running", "unknown") else ""
        raise NotBegun(f"{folder} does not train yet{quiet}: a run reads its data and loads its model first") from None
    except OSError as error:
        raise ValueError(_no_run(folder, error)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} is damaged: it is not the config.json of a run") from None
    events = read_lines(folder / "events.jsonl")
    changes, unit = read_changes(folder)
    evaluated = [event for event in events if isinstance(event.get("eval_loss"), float)]
    return Run(
        folder=folder,
        state=state,
        error=error_line,
        config=config,
        resolved=resolved,
        identity=identity if isinstance(identity := recorded.get("identity"), dict) else {},
        steps=[event for event in events if _numbers(event, "step", "loss")],
        evaluations=[event for event in events if _numbers(event, "step", "eval_loss")],
        diverged=bool(evaluated) and not math.isfinite(evaluated[-1]["eval_loss"]),
        metrics=[line for line in read_lines(folder / "metrics.jsonl") if _numbers(line, "step")],
        answers=[line for line in read_lines(folder / "answers.jsonl") if _numbers(line, "step")],
        changes=changes,
        scores=read_scores(folder),
        unit=unit,
    )


def _begins(folder: Path) -> bool:
    """Whether a folder without config.json may be that of a run that has only begun."""
    try:
        return not foreign(folder)
    except OSError:
        return False


def _no_run(folder: Path, error: OSError) -> str:
    return f"{folder} is not a run folder (config.json: {error.strerror or error}): give runs/NAME"


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """What loldu eval has written: task -> base, adapter or model -> metric -> value, stderr, n. Damaged parts are left
    out. A task is named with the settings of its scores, and weights that the folder does not have now are `other`."""
    try:
        tasks = read_json(folder / "eval.json")["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found: dict[str, dict[str, Any]] = {}
    now = _weights_now(folder)
    for task, result in tasks.items() if isinstance(tasks, dict) else ():
        scores = result.get("scores") if isinstance(result, dict) else None
        for model, metrics in scores.items() if isinstance(scores, dict) else ():
            good = {
                metric: score
                for metric, score in (metrics.items() if isinstance(metrics, dict) else ())
                if isinstance(score, dict) and _numbers(score, "value")
            }
            found.setdefault(_with_settings(task, result), {})[_of_weights(model, result, now)] = good
    return found


def _weights_now(folder: Path) -> str | None:
    """The digest of what the run has trained, as loldu eval records it; None if it has none."""
    place = folder / "adapter"
    try:
        return weights_digest(place if place.is_dir() else folder / "model")
    except OSError:
        return None


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    recorded = result.get("measured")
    return recorded if isinstance(recorded, dict) else {}


def _of_weights(model: str, result: dict[str, Any], now: str | None) -> str:
    """The heading of a score's column: a base does not change with training; other weights are named as such."""
    if model == "base":
        return model
    weights = _measured(result).get("weights")
    return f"{model}, not recorded which" if weights is None else model if weights == now else f"other {model}"


def _with_settings(task: str, result: dict[str, Any]) -> str:
    """The task with the settings that its scores depend on; scores with others are never in one row."""
    known = _measured(result)
    said = [f"first {result['limit']}"] if result.get("limit") else []
    said += [str(known[name]) for name in ("dtype", "quantize") if known.get(name, "none") != "none"]
    named = {"base": "base", "prompt_template": "template", "max_tokens": "answer tokens"}
    said += [f"{word} {known[name]}" for name, word in named.items() if known.get(name) is not None]
    said += [f"records {str(known['records'])[:8]}"] if known.get("records") else []
    return f"{task} ({', '.join(said)})" if said else task


def read_lines(file: Path) -> list[Line]:
    """The objects of a JSONL file; lines that are damaged or not objects are left out."""
    try:
        with open_regular(file) as opened:
            text = opened.read().decode(errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_state(folder: Path) -> str:
    """stopped, finished, failed, or what is known of a run that has not ended by itself (`present_state`); unknown if
    the file is missing or holds something else."""
    if read_or_empty(folder / "state") not in ("running", "stopped", "finished", "failed"):
        return "unknown"
    return present_state(folder)


def read_changes(folder: Path) -> tuple[list[Change], str]:
    """How far each trained number has moved, by module, and what that is relative to.

    A core (r,) in the unit of its factorisation's values (r,), d of LU or s of SVD, is divided by the largest of these
    in its module. Other cores, and LoRA's B, which all start at zero, are divided by the largest of them in the
    adapter. Empty if nothing is saved yet, or the start of what is trained is not known.
    """
    adapter = folder / "adapter"
    try:
        config = read_json(adapter / "adapter_config.json")
        if not isinstance(config, dict) or not (adapter / "adapter_model.safetensors").is_file():
            return [], ""
        with safe_open(adapter / "adapter_model.safetensors", framework="np") as opened:
            names = set(opened.keys())
            trained = {
                name: np.asarray(opened.get_tensor(name), dtype=np.float64)
                for name in sorted(names)
                if name.endswith((CORE, STARTS_AT_ZERO))
            }
            values = {
                name: np.asarray(opened.get_tensor(name.removesuffix(CORE) + VALUES), dtype=np.float64)
                for name in trained
                if name.endswith(CORE) and name.removesuffix(CORE) + VALUES in names
            }
    except (OSError, ValueError, TypeError, SafetensorError):
        return [], ""
    divides = _is_relative(config) and all(
        name in values and values[name].shape == core.shape and np.any(values[name] != 0)
        for name, core in trained.items()
    )
    if not trained or config.get("init_weights", True) is False:
        return [], ""
    scale = float(config.get("scale", 1.0)) if divides else 1.0
    largest = max(float(np.abs(core).max(initial=0.0)) for core in trained.values()) or 1.0
    changes = []
    for name, core in trained.items():
        module = module_of(name)
        relative = core * (scale / np.abs(values[name]).max() if divides else 1 / largest)
        changes.append(Change(module, *layer_of(module), relative.ravel()))
    unit = (
        "relative to the module's largest frozen value"
        if divides
        else f"relative to the largest change ({largest:.3g})"
    )
    return changes, unit


def module_of(name: str) -> str:
    """The base model's module that a tensor of an adapter file belongs to."""
    module = name.removeprefix(PEFT_PREFIX)
    module = module.removesuffix(STARTS_AT_ZERO).removesuffix(CORE)
    return re.sub(r"\.[a-z]+_map$", "", module)


def layer_of(module: str) -> tuple[str, str]:
    """(layer, part): `3` and `self_attn.q_proj`; of a UNet `up 1.0.0` (block, attention, layer) and `attn2.to_q`."""
    if found := BLOCK.search(module):
        numbers = [word for word in (*found[2].split("."), found[3]) if word.isdigit()]
        return f"{found[1]} {'.'.join(numbers)}", module[found.end() :]
    found = LAYER.search(module)
    return (found[1], module[found.end() :]) if found else ("", module)


def layer_order(layer: str) -> tuple[Any, ...]:
    """A key that sorts layers as data flows through them: by number, a UNet's down, then mid, then up."""
    kind, _, numbers = layer.rpartition(" ")
    return ("", "down", "mid", "up").index(kind), *(int(number) for number in numbers.split(".") if number)


def differing_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ: (name, a value for each run)."""
    each = [flat(run.config) | flat(run.resolved) for run in runs]
    names = sorted({name for settings in each for name in settings})
    rows = [(name, [shown(settings.get(name)) for settings in each]) for name in names]
    own = {"run.output", "base_folder"}  # every run has its own
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name not in own]


def _is_relative(config: dict[str, Any]) -> bool:
    """Whether the core is in the unit of the stored values: LU without normalised directions, SVD with them."""
    through_svd = "svd" in config
    return bool(config.get("normalize_directions", False)) == through_svd


def _numbers(line: Line, *names: str) -> bool:
    return all(
        (isinstance(value := line.get(name), float) and math.isfinite(value))
        or (type(value) is int and abs(value) < 1 << 63)  # a whole number in JSON may have any length
        for name in names
    )


def same_records(evaluations: list[Line]) -> list[Line]:
    """The evaluations on the held-out records of the last one, which alone can be compared with it. Those of earlier
    versions do not tell their records, and count as such."""
    last = evaluations[-1].get("held_out") if evaluations else None
    return [line for line in evaluations if line.get("held_out", last) == last]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
