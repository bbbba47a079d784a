"""The picture of a sweep: the loss against a numeric option, a line for each choice of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from launcher.reports.figures import DASHES, INK, STYLE
from launcher.sweeps.grid import shown, without
from launcher.sweeps.results import SEED, Row, as_numbers

MOST_BARS = 40
MARKERS = "os^Dv<>P"  # with the dashes: colours are those of single runs in the report


def picture(found: Sequence[Row], vary: Mapping[str, Sequence[str]], kind: str) -> Figure | None:
    """Losses of the finished rows, with the deviation over seeds; None if no row has finished.

    Against the numeric option with most values, on a logarithmic axis if all are positive; bars without such an option.
    """
    rows = [row for row in found if math.isfinite(row.loss)]
    if not rows:
        return None
    numeric = {name: texts for name, texts in vary.items() if name != SEED and len(texts) > 1 and as_numbers(texts)}
    if not numeric:
        return _bars(rows[:MOST_BARS], kind)
    axis = max(numeric, key=lambda name: len(numeric[name]))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(shown(without(row.values, axis)), []).append(row)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for number, (label, members) in enumerate(sorted(lines.items())):
            members = sorted(members, key=lambda row: float(row.values[axis]))
            axes.errorbar(
                [float(row.values[axis]) for row in members], [row.loss for row in members],
                yerr=[row.deviation for row in members], label=label or kind, color=INK,
                linestyle=list(DASHES.values())[number % len(DASHES)], marker=MARKERS[number % len(MARKERS)],
                markersize=5, linewidth=1.4, capsize=2,
            )  # fmt: skip
        if min(float(row.values[axis]) for row in rows) > 0:
            axes.set_xscale("log")
        ticks = sorted({float(row.values[axis]): row.values[axis] for row in rows}.items())
        axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(axis)
        axes.set_ylabel(kind)
        axes.grid(alpha=0.15, color=INK)
        if len(lines) > 1:
            axes.legend(fontsize=10, loc="lower left", bbox_to_anchor=(0, 1), ncols=1 + (len(lines) > 4))
    return figure


def _bars(rows: Sequence[Row], kind: str) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 1 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        axes.errorbar(
            [row.loss for row in rows], places, xerr=[row.deviation for row in rows], color=INK, marker="o",
            linestyle="none", capsize=2,
        )  # fmt: skip
        axes.set_yticks(places, [shown(row.values) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(kind)
        axes.grid(alpha=0.15, color=INK)
    return figure
