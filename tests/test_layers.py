"""Imports go down only: a room knows those below it, and none above."""

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from adapters import METHODS
from launcher.config import DataConfig
from launcher.engines.registry import ENGINES
from launcher.tasks.registry import REGISTERED

PROJECT = Path(__file__).resolve().parents[1]
SMALL = {
    "launcher.config",
    "launcher.devices",
    "launcher.files",
    "launcher.optimizers",
    "launcher.packages",
    "launcher.engines.registry",
    "launcher.exit_codes",
    "launcher.processes",
    "launcher.progress",
}
ROOMS = {"launcher.factorization", "launcher.data", "launcher.models", "launcher.tasks", "launcher.engines"}
BELOW_TRAINING = {"adapters", "launcher.availability", "launcher.methods", *SMALL, *ROOMS}
MAY_IMPORT = {  # beside itself; in the order in which data flows
    "adapters": set(),  # they run on a laptop with no launcher in sight
    "launcher.shipped": set(),
    "launcher.run_folder": set(),
    "launcher.engines.registry": {"launcher.shipped"},  # plain data: what each engine can do
    "launcher.tasks.registry": set(),
    "launcher.optimizers": set(),
    "launcher.gradnormlorp": set(),
    "launcher.config": {"launcher.engines.registry", "launcher.optimizers", "launcher.tasks.registry"},
    "launcher.files": set(),
    "launcher.owner": {"launcher.files"},
    "launcher.packages": set(),
    "launcher.exit_codes": set(),
    "launcher.config_file": {"launcher.config", "launcher.files"},
    "launcher.recipes": {"launcher.config_file", "launcher.files", "launcher.shipped"},  # finds and starts them
    "launcher.devices": set(),
    "launcher.processes": {
        "launcher.devices", "launcher.engines.registry", "launcher.shipped", "launcher.text",
    },
    "launcher.text": set(),
    "launcher.progress": {"launcher.text"},
    "launcher.main_memory": set(),
    "launcher.availability": {"adapters"},
    "launcher.methods": {"adapters", "launcher.config"},
    "launcher.factorization": {
        "adapters", "launcher.config", "launcher.devices", "launcher.files", "launcher.methods", "launcher.options",
        "launcher.processes",        "launcher.progress", "launcher.text",
    },
    "launcher.data": {
        "launcher.config", "launcher.factorization", "launcher.files", "launcher.processes", "launcher.progress",
        "launcher.text",
    },
    "launcher.models": {
        "adapters", "launcher.config", "launcher.engines.registry", "launcher.files", "launcher.methods",
        "launcher.text",
    },
    "launcher.tasks": {
        "adapters", "launcher.config", "launcher.data", "launcher.files", "launcher.methods", "launcher.models",
        "launcher.progress", "launcher.tasks.registry",
    },
    "launcher.training.checkpoint_index": set(),
    "launcher.training.checkpoint": {
        "launcher.files", "launcher.processes", "launcher.progress", "launcher.training.checkpoint_index",
    },
    "launcher.engines": {
        "launcher.shipped", "launcher.engines.registry", "launcher.config", "launcher.processes", "launcher.models",
        "launcher.main_memory", "launcher.optimizers", "launcher.training.checkpoint",
    },
    "launcher.training": {
        "launcher.text", "launcher.reports", "launcher.training.checkpoint", "launcher.training.checkpoint_index",
        "launcher.main_memory", "launcher.owner", "launcher.run_folder",
        *BELOW_TRAINING,
    },
    "launcher.evaluation": {
        "adapters", "launcher.inference", "launcher.options", "launcher.progress", "launcher.text", *SMALL, *ROOMS,
    },
    "launcher.planning": {
        "launcher.main_memory", "launcher.options", "launcher.start", "launcher.text", "launcher.training",
        *BELOW_TRAINING,
    },
    "launcher.inference": {"adapters", "launcher.options", "launcher.text", *SMALL, *ROOMS},
    "launcher.serving": {
        "adapters", "launcher.main_memory", "launcher.options", "launcher.text", "launcher.inference", *SMALL, *ROOMS,
    },
    # reads what runs wrote, without torch
    "launcher.reports": {
        "launcher.exit_codes", "launcher.files", "launcher.owner", "launcher.run_folder", "launcher.text",
    },
    # starts commands, and knows only how they end and which packages they need
    "launcher.cluster": {
        "launcher.exit_codes", "launcher.files", "launcher.packages", "launcher.engines.registry", "launcher.text",
        "launcher.recipes", "launcher.options", "launcher.owner", "launcher.run_folder", "launcher.start",
    },
    "launcher.sweeps": {  # starts runs, and compares them by their reports
        "launcher.config", "launcher.exit_codes", "launcher.files", "launcher.methods", "launcher.options",
        "launcher.processes", "launcher.progress", "launcher.recipes", "launcher.shipped", "launcher.start",
        "launcher.text", "launcher.training", "launcher.reports", "launcher.cluster",
    },
    "launcher.options": {"launcher.config"},
    "launcher.start": {
        *SMALL, "launcher.config_file", "launcher.options", "launcher.recipes", "launcher.text",
        "launcher.training",
    },
    "launcher.cli": {
        "launcher.config", "launcher.exit_codes", "launcher.options", "launcher.planning", "launcher.start",
        "launcher.cluster", "launcher.sweeps",
    },
    "launcher.__main__": {"loldu"},
    "launcher": set(),
    "loldu": {"adapters", "launcher.config", "launcher.cli", "launcher.start"},
    "recipes": {"loldu", "launcher.config"},
}  # fmt: skip


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


ENGINE_NAMES = re.compile(rf"\b({'|'.join(ENGINES.keys() - {'none'})})\b|sharding none")


def test_the_benchmarks_import_names_that_exist():
    """Inside their functions too; a script is run too seldom to show that a name has moved."""
    scripts = [*(PROJECT / "benchmarks").rglob("*.py"), *(PROJECT / "recipes").rglob("*.py")]

    names = {name for script in scripts for name in imported(script) if name.startswith(("launcher.", "adapters."))}

    assert len(names) > 50
    for name in sorted(names):
        pkgutil.resolve_name(name)


def engine_names(file: Path) -> Iterator[str]:
    """Where a file writes an engine's name in a string that is no docstring, or compares one with "none"."""
    tree = ast.parse(file.read_text())
    documented = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    docstrings = {id(statement.value) for statement in documented}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if found := ENGINE_NAMES.search(node.value):
                yield f"{file.relative_to(PROJECT)}:{node.lineno} names the engine {found[0]}"
        elif isinstance(node, ast.Compare) and re.search(r"(sharding|engine).*'none'", ast.unparse(node)):
            yield f"{file.relative_to(PROJECT)}:{node.lineno} compares an engine: {ast.unparse(node)}"


def test_only_the_engines_room_names_an_engine():
    """Everything else asks the registry what an engine can do."""
    files = [file for file in (PROJECT / "launcher").rglob("*.py") if file.parent.name != "engines"]

    found = [place for file in [*files, PROJECT / "loldu.py"] for place in engine_names(file)]

    assert not found
    assert list(engine_names(PROJECT / "launcher" / "engines" / "registry.py"))  # the rule sees names


COMMAND = "loldu"  # also a method, so its name alone proves nothing
METHOD_CLASSES = {config.__name__ for config in METHODS.values()}
METHOD_MODULES = {config.__module__ for config in METHODS.values()}
METHOD_NAMES = re.compile(  # spelled as in code or as in papers: lorasb, lora_sb, LoRA-SB
    "|".join("[-_]?".join(name) for name in METHODS if name != COMMAND), re.IGNORECASE
)


def method_names(file: Path) -> Iterator[str]:
    """Where a file names one of our methods: in code, strings, comments or imports, or by comparing with the command's
    name."""
    text, where = file.read_text(), file.relative_to(PROJECT)
    for number, line in enumerate(text.splitlines(), 1):
        for found in METHOD_NAMES.finditer(line):
            yield f"{where}:{number} names the method {found[0]}"
    for name in imported(file):
        if METHOD_MODULES & {name, name.rpartition(".")[0]} or name.rpartition(".")[2] in METHOD_CLASSES:
            yield f"{where} imports {name}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare) and f"'{COMMAND}'" in ast.unparse(node):
            yield f"{where}:{node.lineno} compares a method: {ast.unparse(node)}"


def test_only_the_settings_and_the_recipes_name_a_method_of_ours():
    """The launcher asks a method what it needs, so that a new one is one file in adapters/."""
    files = [file for file in (PROJECT / "launcher").rglob("*.py") if file != PROJECT / "launcher" / "config.py"]

    assert not [place for file in files for place in method_names(file)]
    seen = {place.rpartition(" ")[2] for place in method_names(PROJECT / "adapters" / "__init__.py")}
    assert seen >= {"LoRASB", "lora_sb", "ALLoRA", "adapters.loldu.LoLDUConfig"}  # the rule sees every spelling


def test_the_registry_is_read_without_torch():
    code = "import sys, launcher.engines.registry, launcher.config; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def files_outside(folder: str) -> list[Path]:
    return [file for file in (PROJECT / "launcher").rglob("*.py") if file.parent.name != folder]


def fields_that_choose_a_task() -> set[str]:
    """The settings that the `wants` of the registered tasks read."""
    wants = [
        node
        for name in REGISTERED
        for node in ast.walk(ast.parse((PROJECT / "launcher" / "tasks" / f"{name}.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "wants"
    ]
    read = [node for want in wants for node in ast.walk(want) if isinstance(node, ast.Attribute)]
    of_a_part = {node.attr for node in read if isinstance(node.value, ast.Attribute)}  # config.PART.SETTING
    return of_a_part & {field.name for field in fields(DataConfig)}


def task_names(file: Path) -> Iterator[str]:
    """Where a file imports a task, compares a task's name, or reads a setting that chooses one."""
    chosen, where = fields_that_choose_a_task(), file.relative_to(PROJECT)
    for name in imported(file):
        if any(name == f"launcher.tasks.{task}" or name.startswith(f"launcher.tasks.{task}.") for task in REGISTERED):
            yield f"{where} imports {name}"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in chosen:
            yield f"{where}:{node.lineno} reads the setting {node.attr}"
        elif isinstance(node, ast.Compare):
            compared = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            if compared & {*REGISTERED} and re.search(r"\btask", ast.unparse(node)):
                yield f"{where}:{node.lineno} compares a task: {ast.unparse(node)}"


def test_only_the_folder_of_tasks_names_a_task():
    """Everything else calls the task that `task_of` returns. The settings are checked where they are defined."""
    files = [file for file in files_outside("tasks") if file.name != "config.py"]

    found = [place for file in files for place in task_names(file)]

    assert not found
    assert list(task_names(PROJECT / "launcher" / "tasks" / "label.py"))  # the rule sees settings
