"""A plan on the screen, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.planning.predict import Plan, Way
from launcher.progress import duration as minutes
from launcher.text import padding, printable

PARTS = (
    ("fixed", "Python, libraries, tokens"),
    ("weights", "weights of the base"),
    ("factors", "frozen factors"),
    ("trained", "trained numbers"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("gathered", "gathered from other processes"),
    ("activations", "activations of a micro-batch, with the loss"),
    ("unpacked", "one quantised weight, unpacked"),
)


def gb(size: float) -> str:
    """12.3 GB, 4.5 MB or 67 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min, 4.2 s, 12 ms."""
    if seconds >= 120:
        return minutes(seconds)
    return f"{seconds:.3g} s" if seconds >= 1 or not seconds else f"{seconds * 1000:.3g} ms"


def as_json(found: Plan, command: str | None) -> str:
    """Everything; peak_bytes is the predicted peak of one process of the requested run."""
    asked, way = found.asked, found.recommended()
    assert asked.takes is not None
    return json.dumps(
        {
            "peak_bytes": round(asked.takes.peak),
            "fits": asked.why_not is None,
            "asked": _way(found, asked),
            "ways": [_way(found, each) for each in found.ways],
            "recommended": _way(found, way) if way else None,
            "command": command,
            "model": {
                "name": found.config.model.model, "parameters": found.parts.numbers,
                "method": found.config.adapter.method, "trained": found.parts.trained_numbers,
            },
            "machines": {
                "processes": found.machines.processes, "nodes": found.machines.nodes, "gpu": found.machines.gpu,
                "bytes_per_process": round(found.machines.room()), "rates": found.machines.said,
            },
            "data": {
                "samples": found.sampled.of, "lengths_from": found.sampled.how,
                "padding": round(1 - found.work.token_share, 4), "tokens_per_step": round(found.work.tokens_per_step),
                "passes_per_step": found.work.passes,
            },
            "steps": found.steps if found.known else None,
            "factor_seconds": round(found.factor_s, 3),
            "cache_bytes": {"factors": round(found.factor_bytes), "tokens": round(found.token_bytes)},
            "notes": found.notes,
        },
        indent=2,
    )  # fmt: skip


def _way(found: Plan, way: Way) -> dict[str, Any]:
    takes = {name: round(value) for name, value in asdict(way.takes).items()} if way.takes else None
    return {
        "sharding": way.sharding, "precision": way.precision, "dtype": way.dtype,
        "gradient_checkpointing": way.checkpointing, "fits": way.why_not is None, "why_not": way.why_not,
        "peak_bytes": takes.pop("peak") if takes else None, "sent_bytes_per_step": takes.pop("sent") if takes else None,
        "bytes": takes, "step_seconds": way.step_s if takes else None,
        "train_seconds": way.step_s * found.steps if takes and found.known else None,
    }  # fmt: skip


def show(found: Plan, command: str | None, data: str) -> None:
    """Print the plan."""
    console = Console(highlight=False)

    def say(text: str, *, copied: bool = False) -> None:
        console.print(Text(printable(text)), soft_wrap=copied or not console.is_terminal)

    config, machines, asked = found.config, found.machines, found.asked
    where = f"{machines.processes} process{'es' if machines.processes > 1 else ''}"
    where += f" on {machines.nodes} machines" if machines.nodes > 1 else ""
    say(f"model: {config.model.model}, {found.parts.numbers:,} parameters")
    say(f"method: {config.adapter.method}, {found.parts.trained_numbers:,} trained numbers")
    how, is_text = found.sampled.how, found.resolved.task.text
    lengths = f"; lengths from {how}; {padding(found.work.token_share)}" if is_text else f" ({how})"
    say(f"data: {data}, {found.sampled.of:,} samples{lengths}")
    say(f"machines: {where}, {gb(machines.room())} for each process; {machines.said}")
    for note in found.notes:
        say(f"note: {note}")
    assert asked.takes is not None
    table = Table(title=f"One process of the run as asked ({_name(asked)})", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    takes = asdict(asked.takes)
    for part, label in PARTS:
        if takes[part]:
            table.add_row(label, gb(takes[part]))
    table.add_row("peak", gb(asked.takes.peak), end_section=True)
    other = next((w for w in found.ways if _twin(w, asked)), None)
    if other is not None and other.takes is not None:
        how = "with" if other.checkpointing else "without"
        table.add_row(f"activations {how} checkpointing", gb(other.takes.activations))
        table.add_row(f"peak {how} checkpointing", gb(other.takes.peak), end_section=True)
    table.add_row("sent in a step", gb(asked.takes.sent))
    if found.factored:
        table.add_row(f"factors of {found.factored} weights on disk", gb(found.factor_bytes))
        table.add_row("time to make them", duration(found.factor_s))
    if found.token_bytes:
        table.add_row("tokens on disk", gb(found.token_bytes))
    passes = found.work.passes
    table.add_row(f"time of a step ({passes} pass{'es' if passes > 1 else ''})", duration(asked.step_s))
    if found.known:
        table.add_row(f"time of {found.steps:,} steps", duration(asked.step_s * found.steps))
    console.print(table)
    console.print(_table(found))
    for line in reasons(found):
        say(line)
    if command is None:
        say("Nothing fits: lower --micro-batch-size or --max-length, or plan more or larger GPUs (--gpus, --nodes).")
        return
    way = found.recommended()
    assert way is not None
    assert way.takes is not None
    as_asked = " as asked" if way.asked else ""
    lasts = f"about {duration(way.step_s * found.steps)}" if found.known else f"{duration(way.step_s)} a step"
    say(f"Recommended{as_asked}: {_name(way)}, {gb(way.takes.peak)} a process, {lasts}:")
    say(f"  {command}", copied=True)


def _table(found: Plan) -> Table:
    table = Table(title="All ways", title_justify="left")
    for name in ("sharding", "precision", "peak", "check-\npointed", "sent", "step", "fits"):  # 80 columns in all
        table.add_column(name, justify="left" if name in ("sharding", "precision", "fits") else "right")
    for way in [way for way in found.ways if not way.checkpointing]:
        twin = next((other for other in found.ways if _twin(other, way)), way)
        if way.takes is None:
            table.add_row(way.sharding, way.precision, "", "", "", "", "refused")
            continue
        fits = "yes" if way.why_not is None else "checkpointed" if twin.why_not is None else "no"
        less = gb(twin.takes.peak) if twin is not way and twin.takes else ""
        table.add_row(
            way.sharding, way.precision, gb(way.takes.peak), less, gb(way.takes.sent), duration(way.step_s), fits
        )
    return table


def reasons(found: Plan) -> list[str]:
    """Why the others do not fit, a line for each reason."""
    lines: list[str] = []
    refused: dict[str, list[Way]] = {}
    for way in found.ways:
        if way.why_not is None or way.checkpointing:
            continue
        refused.setdefault(way.why_not.replace(f" {way.quantize} ", " ", 1), []).append(way)
    for ways in refused.values():
        shardings = " and ".join(dict.fromkeys(way.sharding for way in ways))
        precisions = ", ".join(dict.fromkeys(way.precision for way in ways))
        lines.append(f"{shardings}, {precisions}: {ways[0].why_not}")
    return lines


def _twin(way: Way, of: Way) -> bool:
    """Whether the two differ only in checkpointing."""
    same = (way.sharding, way.dtype, way.quantize) == (of.sharding, of.dtype, of.quantize)
    return same and way.checkpointing != of.checkpointing


def _name(way: Way) -> str:
    return f"{way.sharding}, {way.precision}{', gradient checkpointing' if way.checkpointing else ''}"
