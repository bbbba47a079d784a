"""Pictures of runs with matplotlib: curves, and every trained number of a run in one map.

Text and axes are drawn in one colour, INK, which the page replaces by its own text colour, so that one picture suits
light and dark pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from launcher.reports.read import Change, Line, Run, layer_order

INK = "#010203"  # a colour that nothing else has
COLOURS = ("#3b82d6", "#e0693e", "#2f9e62", "#a463c9", "#c79a1b", "#d64f84", "#4aa3a2", "#8a7a6a")
DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}  # CSS's names, and matplotlib's
HEIGHT, LEGEND_ROW = 3.0, 0.19  # inches of a curve's figure, and of a line below it in a PNG
POINTS = 1000  # of a curve at most: a page stays small however long a run is
FEW = 3  # points that are marked, since a line of one is not seen
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font
    "svg.hashsalt": "loldu",  # the same run gives the same bytes
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}
MAP_COLUMNS = 96  # cells of a module in the map; more numbers share cells, each cell shows the largest
GAP = 0.006  # between two modules, of the map's width


def curves(runs: Sequence[Run]) -> dict[str, Figure]:
    """One figure for each quantity that any of the runs has, by title."""
    per_step = {"Loss": "loss", "Learning rate": "lr", "Gradient norm": "grad_norm"}
    units = {run.counts for run in runs if run.metrics}
    measured = {
        f"{' or '.join(sorted(units)).capitalize()} per second": "tokens_per_s",
        "Memory (GiB)": "memory_gib",
        "Padding (share of positions)": "padding",
    }
    found: dict[str, Figure] = {}
    for title, name in per_step.items():
        _add(found, title, name, [(run, run.steps) for run in runs], smooth=name == "loss")
    names = dict.fromkeys(name for run in runs for line in run.evaluations for name in line if name != "step")
    for name in names:
        title = {"eval_loss": "Held-out loss"}.get(name, f"Held-out {name.replace('_', ' ')}")
        _add(found, title, name, [(run, run.evaluations) for run in runs], marker="o")
    for title, name in measured.items():
        of = [(run, run.metrics if name != "padding" or run.counts == "tokens" else []) for run in runs]
        _add(found, title, name, of)
    return found


def change_map(changes: Sequence[Change]) -> Figure:
    """Every trained number: a row for each layer, a block of columns for each module, colour for its change."""
    layers = sorted({change.layer for change in changes}, key=layer_order)
    in_order = sorted(changes, key=lambda change: (layer_order(change.layer), "attn" not in change.part))
    parts = list(dict.fromkeys(change.part for change in in_order))
    cells = {part: min(MAP_COLUMNS, max(len(c.change) for c in changes if c.part == part)) for part in parts}
    wide = max(1, round(1 / GAP / sum(cells.values())))  # columns of a cell; a gap has one
    width = wide * sum(cells.values()) + len(parts) - 1
    image = np.full((len(layers), width), np.nan)
    at, centres = 0, []
    for part in parts:
        here = wide * cells[part]
        for change in changes:
            if change.part == part:
                shades = np.repeat(binned(change.change, cells[part]), wide)
                image[layers.index(change.layer), at : at + here] = shades
        centres.append(at + (here - 1) / 2)
        at += here + 1
    bound = float(np.nanquantile(np.abs(image), 0.995)) or 1.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.6 + 0.22 * max(len(layers), 4)), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(image, aspect="auto", cmap="coolwarm", vmin=-bound, vmax=bound, interpolation="nearest")
        turned: dict[str, Any] = {"rotation": 20, "ha": "right"} if len(parts) > 4 else {}
        axes.set_xticks(centres, short_names(parts), **turned)
        every = max(1, len(layers) // 16)
        axes.set_yticks(range(0, len(layers), every), layers[::every])
        axes.set_ylabel("layer")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(shown, ax=axes, label="change", pad=0.01)
    return figure


def short_names(parts: Sequence[str]) -> list[str]:
    """The ends of these names, with as many of their words as tell them apart; a number stays with its word."""
    words = [re.sub(r"\.(?=\d+(?:\.|$))", "\0", part).split(".") for part in parts]
    for count in range(1, max(map(len, words)) + 1):
        names = [".".join(each[-count:]).replace("\0", ".") for each in words]
        if len(set(names)) == len(parts):
            break
    return names


def binned(values: np.ndarray, cells: int) -> np.ndarray:
    """(cells,): of the numbers that share a cell the one with the largest size; NaN if there are fewer numbers."""
    if len(values) <= cells:
        return np.concatenate([values, np.full(cells - len(values), np.nan)])
    return np.array([part[np.abs(part).argmax()] for part in np.array_split(values, cells)])


def svg(figure: Figure) -> str:
    """The figure as an SVG element that takes the page's text colour and width; its legend is in the page."""
    for legend in list(figure.legends):
        legend.remove()
        figure.set_figheight(HEIGHT)
    with matplotlib.rc_context(STYLE):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()[file.getvalue().index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text, count=1)


def png(figure: Figure) -> bytes:
    """The figure on white, with its legend, for a document or a message. Call it before `svg`, which removes that."""
    with matplotlib.rc_context(STYLE):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def mark(number: int) -> tuple[str, str]:
    """Colour and CSS line style of a run by its place."""
    return COLOURS[number % len(COLOURS)], list(DASHES)[number // len(COLOURS) % len(DASHES)]


def _add(
    found: dict[str, Figure],
    title: str,
    name: str,
    sources: Sequence[tuple[Run, Sequence[Line]]],
    *,
    marker: str = "",
    smooth: bool = False,
) -> None:
    drawn = [(number, run, points) for number, (run, lines) in enumerate(sources) if (points := _points(lines, name))]
    if not drawn:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for number, run, points in drawn:
            colour, style = mark(number)
            values = [value for _, value in points]
            line: dict[str, Any] = {"color": colour, "label": run.name, "linestyle": DASHES[style], "markersize": 4}
            line["marker"] = marker or ("o" if len(points) <= FEW else "")
            if smooth and len(values) > 20:
                axes.plot(*zip(*thinned(points), strict=True), color=colour, alpha=0.3, linewidth=0.8)
                means = moving_mean(values, max(2, len(values) // 40))
                points = [(step, mean) for (step, _), mean in zip(points, means.tolist(), strict=True)]
            axes.plot(*zip(*thinned(points), strict=True), linewidth=1.6 if smooth else 1.4, **line)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        steps = [step for _, _, points in drawn for step, _ in points]
        if min(steps) == max(steps):
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
        if name == "padding":
            axes.set_ylim(bottom=0, top=None if any(value for *_, points in drawn for _, value in points) else 1)
        axes.grid(alpha=0.15, color=INK)
        if len(sources) > 1:
            figure.set_figheight(HEIGHT + LEGEND_ROW * len(drawn))
            figure.legend(fontsize=8, loc="outside lower left")
    found[title] = figure


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> Sequence[tuple[float, float]]:
    """At most so many points: of each stretch the lowest and the highest, so that peaks stay."""
    if len(points) <= most:
        return points
    kept: list[tuple[float, float]] = []
    for places in np.array_split(np.arange(len(points)), most // 2):
        stretch = [points[place] for place in places]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _points(lines: Sequence[Line], name: str) -> list[tuple[float, float]]:
    """(step, value) of each line, with a NaN where the held-out records change: a curve breaks there."""
    points: list[tuple[float, float]] = []
    records = None
    for line in lines:
        if isinstance(line.get(name), (int, float)):
            now = line.get("held_out")
            if records is not None and now not in (None, records):
                points.append((line["step"], math.nan))
            points.append((line["step"], float(line[name])))
            records = now or records
    return points


def moving_mean(values: Sequence[float], width: int) -> np.ndarray:
    """The mean over the last width values, fewer at the start."""
    sums = np.cumsum(np.asarray(values, dtype=np.float64))
    counts = np.minimum(np.arange(1, len(sums) + 1), width)
    return (sums - np.concatenate([np.zeros(width), sums])[: len(sums)]) / counts
