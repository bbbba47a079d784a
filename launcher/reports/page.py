"""One self-contained HTML page about one run, or about several side by side. Pure: runs in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from launcher.owner import INTERRUPTED
from launcher.reports.figures import MAP_COLUMNS, change_map, curves, mark, png, svg
from launcher.reports.read import KILLED, NO_REASON, Run, differing_settings, flat, same_records, shown
from launcher.text import printable

MOVERS = 10
ANSWERS_SHOWN = 20


class Report(NamedTuple):
    """The page, and its pictures as PNG files by name."""

    html: str
    pictures: dict[str, bytes]


NOTHING: Mapping[str, Any] = {}


def report(runs: Sequence[Run], *, refresh_s: int = 0, first: Mapping[str, Figure] = NOTHING) -> Report:
    """The page about these runs; with refresh_s the browser loads it again after so many seconds, and no picture is
    made as a file.

    first: further figures by title, each with a heading of its own before the curves.
    """
    drawn = curves(runs)
    maps: list[dict[str, Any]] = []
    pictures: dict[str, bytes] = {}
    if not refresh_s:
        pictures = {file_name(title): png(figure) for title, figure in {**first, **drawn}.items()}
    for run in runs:
        if run.changes:
            figure = change_map(run.changes)
            if not refresh_s:
                name = "trained numbers" if len(runs) == 1 else f"trained numbers {run.name}"
                pictures[file_name(name)] = png(figure)
            maps.append(
                {
                    "name": run.name,
                    "count": f"{sum(len(change.change) for change in run.changes):,}",
                    "modules": len(run.changes),
                    "others": others(run),
                    "unit": run.unit,
                    "binned": any(len(change.change) > MAP_COLUMNS for change in run.changes),
                    "picture": Markup(svg(figure)),
                    "movers": largest_movers(run),
                }
            )
    html = _template().render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        refresh_s=refresh_s,
        runs=[{"name": run.name, "mark": mark(number), "row": overview(run)} for number, run in enumerate(runs)],
        columns=COLUMNS,
        endings=[(run.name, run.state, why) for run in runs if (why := ending(run))],
        summary=summary(runs[0]) if len(runs) == 1 else "",
        unmapped=[run.name for run in runs if run.state == "finished" and not run.changes],
        first=[(title, Markup(svg(figure))) for title, figure in first.items()],
        held_out_notes=held_out_notes(runs),
        curves=[(title, Markup(svg(figure))) for title, figure in drawn.items()],
        maps=maps,
        scores=score_table(runs),
        answers=answers_over_time(runs[0]) if len(runs) == 1 else None,
        differences=differing_settings(list(runs)) if len(runs) > 1 else [],
        settings=[(name, shown(value)) for name, value in flat(runs[0].config).items()] if len(runs) == 1 else [],
    )
    return Report(html, pictures)


def waiting(text: str, refresh_s: int) -> str:
    """A page with this sentence alone, which the browser loads again after so many seconds."""
    return _template("waiting.html.jinja").render(text=text, refresh_s=refresh_s)


def ending(run: Run) -> str:
    """Why a run ended before its end; empty if it did not, or was stopped."""
    return {"failed": run.error or NO_REASON, INTERRUPTED: KILLED}.get(run.state, "")


def others(run: Run) -> str:
    """How many trained numbers the map does not have: a new head, --modules-to-save, LoRA's A. Empty if it has all."""
    trained = run.resolved.get("trained")
    more = trained - sum(len(change.change) for change in run.changes) if type(trained) is int else 0
    return f"{more:,}" if more > 0 else ""


def score_table(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What loldu eval found: a row for each metric of each task, a column for each run's base and adapter."""
    columns = list(
        dict.fromkeys((run.name, model) for run in runs for models in run.scores.values() for model in models)
    )
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for run in runs:
        for task, models in run.scores.items():
            for model, metrics in models.items():
                for metric, score in metrics.items():
                    error, value = score.get("stderr"), score["value"]
                    text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
                    text += f" ± {error:.4f}" if isinstance(error, float) else ""
                    rows.setdefault((task, metric), {})[run.name, model] = text
    if not rows:
        return None
    names = [model if len(runs) == 1 else f"{run}: {model}" for run, model in columns]
    stale = any(model.startswith("other ") or model.endswith("not recorded which") for _, model in columns)
    return {
        "names": names,
        "stale": stale,
        "rows": [(*key, *(cells.get(c, "") for c in columns)) for key, cells in rows.items()],
    }


COLUMNS = ("state", "method", "trained", "step", "loss", "held-out loss")


def overview(run: Run) -> list[str]:
    """A run's cells under COLUMNS, for a table of several runs."""
    trained, last = run.resolved.get("trained"), run.steps[-1] if run.steps else None
    alike = same_records(run.evaluations)
    losses = [f"{line['eval_loss']:.4f}" for line in (alike[0], alike[-1])] if alike else []
    return [
        run.state, str(run.config["adapter"].get("method", "?")), f"{trained:,}" if isinstance(trained, int) else "",
        f"{last['step']} of {run.resolved.get('steps', '?')}" if last else "", f"{last['loss']:.4f}" if last else "",
        " → ".join([*losses[: len(alike)], *(["not finite"] if run.diverged else [])]),
    ]  # fmt: skip


def summary(run: Run) -> str:
    """One line: state, method, model, data, steps and the last losses."""
    config, resolved = run.config, run.resolved
    method, model = config["adapter"].get("method", "?"), config.get("model", {}).get("model", "?")
    said = [run.state, f"{method} on {model}", f"data {config.get('data', {}).get('data', '?')}"]
    if isinstance(resolved.get("trained"), int):
        said.append(f"{resolved['trained']:,} trained numbers")
    if run.steps:
        said.append(f"step {run.steps[-1]['step']} of {resolved.get('steps', '?')}, loss {run.steps[-1]['loss']:.4f}")
    if run.evaluations:
        first, last = same_records(run.evaluations)[0], run.evaluations[-1]
        losses = [f"{each['eval_loss']:.4f} at step {each['step']}" for each in (first, last)]
        said.append(f"held-out loss {', '.join(dict.fromkeys(losses))}{', then not finite' if run.diverged else ''}")
    return "; ".join(said)


def held_out_notes(runs: Sequence[Run]) -> list[str]:
    """Which held-out values cannot be compared, since they are of different records."""
    changed = [run.name for run in runs if len(same_records(run.evaluations)) < len(run.evaluations)]
    told = [
        f"{name}: the held-out records changed during the run. Curves break there; losses side by side are of the same "
        "records."
        for name in changed
    ]
    last = {line["held_out"] for run in runs for line in run.evaluations[-1:] if isinstance(line.get("held_out"), str)}
    if len(last) > 1:
        told.append("These runs were evaluated on different held-out records: these values cannot be compared.")
    return told


def largest_movers(run: Run) -> list[tuple[str, int, float]]:
    """(module, place of the number in it, change) of the numbers that moved most."""
    owners = np.concatenate([np.full(len(change.change), i) for i, change in enumerate(run.changes)])
    places = np.concatenate([np.arange(len(change.change)) for change in run.changes])
    values = np.concatenate([change.change for change in run.changes])
    order = np.argsort(-np.abs(values), kind="stable")[:MOVERS]
    return [(run.changes[int(owners[i])].module, int(places[i]), float(values[i])) for i in order]


def answers_over_time(run: Run) -> dict[str, Any] | None:
    """A row for each question: its text, the expected answer, and the answer at each recorded step."""
    if not run.answers:
        return None
    steps = sorted({line["step"] for line in run.answers})
    questions = list(dict.fromkeys((str(a.get("question", "")), str(a.get("expected", ""))) for a in run.answers))
    said = {
        (str(line.get("question", "")), str(line.get("expected", "")), line["step"]): str(line.get("answer", ""))
        for line in run.answers
    }
    rows = [
        [question, expected, *(said.get((question, expected, step), "") for step in steps)]
        for question, expected in questions[:ANSWERS_SHOWN]
    ]
    return {"steps": steps, "rows": rows}


def file_name(title: str) -> str:
    """A picture's file name from its title."""
    kept = "".join(letter if letter.isalnum() else "_" for letter in title.partition("(")[0].strip().lower())
    return f"{kept}.png"


@cache
def _template(name: str = "page.html.jinja") -> jinja2.Template:
    loader = jinja2.PackageLoader("launcher.reports", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown)
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """Text of files with control characters escaped, since a report is also read with cat. Markup of our own stays."""
    return printable(value) if type(value) is str else value
