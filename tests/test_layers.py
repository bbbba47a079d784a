"""Imports go down only: a room knows those below it, and none above."""

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SMALL = {"launcher.config", "launcher.exit_codes", "launcher.processes"}
ROOMS = {"launcher.factorization", "launcher.data", "launcher.models", "launcher.tasks", "launcher.engines"}
BELOW_TRAINING = {"adapters", "launcher.availability", *SMALL, *ROOMS}
MAY_IMPORT = {  # beside itself; in the order in which data flows
    "adapters": set(),  # they run on a laptop with no launcher in sight
    "launcher.config": set(),
    "launcher.exit_codes": set(),
    "launcher.processes": set(),
    "launcher.availability": {"adapters"},
    "launcher.factorization": {"adapters", "launcher.processes"},
    "launcher.data": {"launcher.config", "launcher.factorization"},
    "launcher.models": {"adapters", "launcher.config"},
    "launcher.tasks": {"launcher.config", "launcher.data"},
    "launcher.training.checkpoint": {"launcher.processes"},
    "launcher.engines": {"launcher.config", "launcher.processes", "launcher.models", "launcher.training.checkpoint"},
    "launcher.training": BELOW_TRAINING | {"launcher.training.checkpoint"},
    "launcher.inference": {"adapters", *SMALL, *ROOMS},
    "launcher.reports": {"launcher.exit_codes"},  # reads what runs wrote, without torch
    "launcher.cluster": {"launcher.exit_codes"},  # starts commands, and knows of what they do how they end
    "launcher.cli": BELOW_TRAINING | {"launcher.training", "launcher.inference", "launcher.cluster"},
    "launcher.__main__": {"loldu"},
    "launcher": set(),
    "loldu": {"launcher.cli"},
    "recipes": {"loldu", "launcher.config"},
}


def imported(file: Path) -> Iterator[str]:
    """Full names of the modules, or names in modules, that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively, in line {node.lineno}: write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str | None:
    """The longest known beginning of a module's name; None for another package's."""
    parts = name.split(".")
    beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if beginning in MAY_IMPORT), None)


def test_every_import_goes_down():
    files = [file for room in ("adapters", "launcher", "recipes") for file in (PROJECT / room).rglob("*.py")]
    upward = []
    used: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}

    for file in [*files, PROJECT / "loldu.py"]:
        room = room_of(".".join(file.relative_to(PROJECT).with_suffix("").parts))
        assert room is not None, f"{file} is in no room"
        for name in imported(file):
            other = room_of(name)
            if other is not None and other != room:
                used[room].add(other)
                if other not in MAY_IMPORT[room]:
                    upward.append(f"{file.relative_to(PROJECT)} imports {name}")

    assert not upward
    assert used["launcher.training"] == MAY_IMPORT["launcher.training"]  # the files were found, and read
