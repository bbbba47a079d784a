"""What a sweep found: a row for each combination of values, means over seeds, and the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from launcher.files import read_or_empty
from launcher.reports.read import Run, read_run
from launcher.sweeps.grid import Variant, without

SEED = "seed"
HELD_OUT, TRAINING = "held-out loss", "training loss"


class Row(NamedTuple):
    """One combination of values, with all seeds."""

    values: dict[str, str]  # without the seed
    runs: list[Run]  # those that have finished
    planned: int  # how many runs are planned
    loss: float  # mean over the runs; NaN if none has finished, infinite if that of a run is not finite
    deviation: float  # of the loss over seeds; 0 for one run
    samples: set[str]  # digests of what the losses were measured on
    metrics: dict[str, float]  # other held-out metrics, means
    trained: int | None
    seconds: float  # mean time of the steps of a run


def rows(folder: Path, variants: Sequence[Variant]) -> tuple[list[Row], str]:
    """A row for each combination, lowest loss first if the losses are of the same samples, and which loss it is.

    The held-out loss is that of the last evaluation. If a finished run has none, rows have the mean training loss of
    the last tenth of the steps.
    """
    finished: dict[str, Run] = {}
    for variant in variants:
        if is_finished(folder / variant.name):
            finished[variant.name] = read_run(folder / variant.name)
    kind = HELD_OUT if all(run.evaluations or run.diverged for run in finished.values()) else TRAINING
    groups: dict[tuple[tuple[str, str], ...], list[Variant]] = {}
    for variant in variants:
        groups.setdefault(tuple(without(variant.values, SEED).items()), []).append(variant)
    found = []
    for values, members in groups.items():
        runs = [finished[variant.name] for variant in members if variant.name in finished]
        losses = [_loss(run, kind) for run in runs]
        last = [run.evaluations[-1] for run in runs if run.evaluations and not run.diverged]
        names = [name for name in (last[0] if last else {}) if name not in ("step", "eval_loss", "held_out")]
        found.append(
            Row(
                values=dict(values),
                runs=runs,
                planned=len(members),
                loss=mean(losses) if losses else math.nan,
                deviation=stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else 0.0,
                samples={digest for run in runs if (digest := _samples(run, kind))},
                metrics={name: mean(line[name] for line in last) for name in names if all(name in at for at in last)},
                trained=next((run.resolved.get("trained") for run in runs), None),
                seconds=mean(sum(line.get("seconds", 0.0) for line in run.metrics) for run in runs) if runs else 0.0,
            )
        )
    return (found if differ(found) else sorted(found, key=lambda row: (math.isnan(row.loss), row.loss))), kind


def differ(found: Sequence[Row]) -> bool:
    """Whether rows have losses of different samples (or other losses of them), so that none is the lowest.

    A seed may draw samples of its own: rows of the same seeds then have the same sets of samples.
    """
    of_all_seeds = max((row.samples for row in found), key=len, default=set())
    return any(not row.samples <= of_all_seeds for row in found)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run with its result."""
    done = read_or_empty(folder / "state") == "finished"
    return done and ((folder / "adapter").is_dir() or (folder / "model").is_dir())


def best(found: Sequence[Row]) -> Row | None:
    """The combination with the lowest loss of those with all of their runs; None if there is none."""
    if differ(found):
        return None
    return next((row for row in found if len(row.runs) == row.planned and math.isfinite(row.loss)), None)


def remarks(found: Sequence[Row]) -> list[str]:
    """What a reader should know before taking a row: losses of other samples, a value at an edge, a close rival."""
    if differ(found):
        return [
            "there is no best combination: a varied option changes what the loss is measured on (samples, tokens or "
            "the loss itself). To compare the runs, measure each with `loldu eval` on one file"
        ]
    chosen = best(found)
    if chosen is None:
        return []
    said = []
    for name, value in chosen.values.items():
        like = [row for row in found if without(row.values, name) == without(chosen.values, name)]
        compared = sum(bool(row.runs) for row in like) > 1
        numbers = as_numbers([row.values[name] for row in like])
        if numbers and compared and float(value) in (min(numbers), max(numbers)):
            edge, more = ("lowest", "lower") if float(value) == min(numbers) else ("highest", "higher")
            said.append(f"{name} {value} is the {edge} value tried: a {more} one may be better")
    for row in found:
        apart = row.loss - chosen.loss
        if row is not chosen and row.planned > 1 and apart < max(row.deviation, chosen.deviation):
            text = " ".join(f"{name}={value}" for name, value in row.values.items())
            said.append(f"{text} is within the deviation over seeds: {row.loss:.4f}")
    return said


def as_numbers(texts: Sequence[str]) -> list[float] | None:
    """The values as numbers; None if one is not a number."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def table(found: Sequence[Row], kind: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells."""
    metrics = list(dict.fromkeys(name for row in found for name in row.metrics))
    several = any(row.planned > 1 for row in found)
    options = list(found[0].values) if found else []
    headings = [*options, "trained", kind, *(name.replace("_", " ") for name in metrics), "seconds"]
    headings += ["runs"] if several else []
    cells = []
    for row in found:
        loss = "not finished" if math.isnan(row.loss) else "not finite" if math.isinf(row.loss) else f"{row.loss:.4f}"
        loss += f" ± {row.deviation:.4f}" if len(row.runs) > 1 and math.isfinite(row.loss) else ""
        line = [*row.values.values(), f"{row.trained:,}" if row.trained is not None else "", loss]
        line += [f"{row.metrics[name]:.4f}" if name in row.metrics else "" for name in metrics]
        line += [f"{row.seconds:.0f}" if row.runs else ""]
        cells.append(line + ([f"{len(row.runs)} of {row.planned}"] if several else []))
    return headings, cells


def as_json(found: Sequence[Row], kind: str) -> dict[str, Any]:
    """The rows as results.json has them."""
    chosen = best(found)
    return {
        "loss": kind,
        "best": None if chosen is None else chosen.values,
        "rows": [
            {
                "values": row.values,
                "loss": row.loss if math.isfinite(row.loss) else None,
                "deviation": row.deviation,
                **row.metrics,
                "trained": row.trained,
                "seconds": round(row.seconds, 3),
                "runs": [run.name for run in row.runs],
                "planned": row.planned,
            }
            for row in found
        ],
    }


def _samples(run: Run, kind: str) -> str | None:
    """The digest of what a run's loss was measured on; None if it has none (yet)."""
    if kind == HELD_OUT:
        return run.evaluations[-1].get("held_out") if run.evaluations else None
    return run.identity.get("data")


def _loss(run: Run, kind: str) -> float:
    if run.diverged:
        return math.inf
    if kind == HELD_OUT:
        return float(run.evaluations[-1]["eval_loss"])
    losses = [float(step["loss"]) for step in run.steps]
    return mean(losses[-max(1, len(losses) // 10) :]) if losses else math.nan
