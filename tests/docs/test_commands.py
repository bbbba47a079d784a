"""Every command and snippet of the documentation runs, names options that exist, and links to files that exist.

The blocks of a page run in order in one folder, which holds copies of recipes/ and hostfiles/. A comment on the line
before a block changes what happens with it:

    <!-- not run: REASON -->   it is not executed, for the reason given; its options are checked nevertheless
    <!-- slow -->              it is executed in the slow tier only
    <!-- ci: NAME -->          .ci/run executes it on a fresh clone
    <!-- file: NAME -->        it is written to this file, which later blocks of the page use
    <!-- change: NAME -->      it is a change of this file, which the page's own test makes
    <!-- run: WHERE -->        the page's own test executes it
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from launcher.cli import COMMANDS, main
from launcher.config import Config
from launcher.sweeps.options import split_recipe_options

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page.relative_to(PROJECT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "hostfiles/*.md", "recipes/**/*.md")
    for page in PROJECT.glob(pattern)
)
EXECUTED = ("bash", "python")
BLOCK_TIMEOUT_S = 600
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
FOREIGN = {  # options of other programs that the text names
    "accelerate": "--cpu --config-file --main-process-ip --main-process-port --machine-rank --multi-gpu --num-machines "
    "--num-processes",
    "torchrun": "--standalone --nnodes --nproc-per-node --node-rank --master-addr --master-port",
    "ruff": "--check",
    "apptainer": "--nv",
    "systemd-run": "--user",
    "vllm": "--chat-template --enable-lora --lora-modules --max-lora-rank",
}


@dataclass(frozen=True)
class Block:
    """A fenced code block of a page."""

    page: str
    line: int
    language: str
    text: str
    marks: dict[str, str]  # what the comment before it says: {"not run": "needs a GPU"}

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, each with the marks on the line before it."""
    found: list[Block] = []
    fence, start, language, body = "", 0, "", []
    lines = (PROJECT / page).read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        opening = re.match(r"\s*(```+)(\w*)", line)
        if not fence and opening:
            fence, language, start, body = opening[1], opening[2], number, []
        elif fence and line.strip() == fence:
            comment = re.fullmatch(r"\s*<!-- ([\w ]+?)(?:: (.*))? -->", lines[start - 2]) if start > 1 else None
            marks = {comment[1]: comment[2] or ""} if comment else {}
            found.append(Block(page, start, language, "\n".join(body) + "\n", marks))
            fence = ""
        elif fence:
            body.append(line)
    assert not fence, f"{page}:{start}: the code block is never closed"
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}


def is_executed_by_its_page(block: Block, *, slow: bool) -> bool:
    marked = {"not run", "ci", "file", "change", "run", *(() if slow else ("slow",))} & block.marks.keys()
    return block.language in EXECUTED and not marked


@pytest.fixture(scope="session")
def commands_folder(tmp_path_factory) -> Path:
    """A folder with a `loldu` that runs this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "loldu").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m launcher "$@"\n')
    (folder / "loldu").chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory) -> Path:
    """One factor cache for all pages."""
    return tmp_path_factory.mktemp("cache")


def execute(page: str, folder: Path, commands: Path, cache_home: Path, *, slow: bool) -> None:
    """Run the blocks of a page in order, and write its files."""
    for name in ("recipes", "hostfiles"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": f"{PROJECT}:{folder / 'recipes'}",
        "XDG_CACHE_HOME": str(cache_home),
        "ACCELERATE_USE_CPU": "true",
    }
    for block in BLOCKS[page]:
        if "file" in block.marks:
            (folder / block.marks["file"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.marks["file"]).write_text(block.text)
        elif is_executed_by_its_page(block, slow=slow):
            command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
            done = subprocess.run(
                [*command, block.text],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=BLOCK_TIMEOUT_S,
            )
            assert done.returncode == 0, f"{block} failed:\n{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(is_executed_by_its_page(block, slow=False) for block in BLOCKS[page])]
)
def test_the_quick_blocks_of_a_page_run(page, tmp_path, commands_folder, cache_home):
    execute(page, tmp_path, commands_folder, cache_home, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any("slow" in block.marks for block in BLOCKS[page])])
def test_all_blocks_of_a_page_run(page, tmp_path, commands_folder, cache_home):
    execute(page, tmp_path, commands_folder, cache_home, slow=True)


@pytest.mark.parametrize("page", PAGES)
def test_each_block_names_its_language_and_says_why_it_is_not_run(page):
    for block in BLOCKS[page]:
        assert block.language, f"{block} names no language: bash and python are executed, text is not"
        if "not run" in block.marks:
            assert len(block.marks["not run"].split()) >= 2, f"{block} does not give the reason why it is not run"
        if "ci" in block.marks:
            assert page == "README.md", f"{block}: .ci/run reads README.md alone"
        assert block.marks.keys() <= {"not run", "slow", "ci", "file", "change", "run"}, (
            f"{block} has an unknown mark {block.marks}"
        )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"```.*?```", "", (PROJECT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (PROJECT / page).parent / name if name else PROJECT / page
        assert target.exists(), f"{page} links to {link}, which does not exist"
        if heading:
            assert heading in anchors(target), f"{page} links to {link}; its headings are {sorted(anchors(target))}"


def anchors(page: Path) -> set[str]:
    """The anchors that a host makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def options_of(command: str) -> frozenset[str]:
    """The options that `loldu COMMAND --help` shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return frozenset(OPTION.findall(shown.getvalue()))


@cache
def settings() -> frozenset[str]:
    """The options of every recipe: the fields of Config."""

    def names(kind: type) -> Iterator[str]:
        hints = get_type_hints(kind)
        for field in fields(kind):
            if is_dataclass(hints[field.name]):
                yield from names(hints[field.name])
            else:
                yield "--" + field.name.replace("_", "-")

    return frozenset({*names(Config), "--tiny", "--help"})


def flags(words: list[str]) -> set[str]:
    """The options among words; --no-X counts as --X."""
    named = {word.partition("=")[0].replace("_", "-") for word in words if re.match(r"--[a-z]", word)}
    return {re.sub("^--no-", "--", option) for option in named}


def commands_in(block: Block) -> Iterator[list[str]]:
    """The words of each command of a bash block; `&&`, `|` and `;` end a command."""
    for line in block.text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a here-document's text or the like
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word in (";", "&&", "||", "|", "&"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def named_options(words: list[str]) -> Iterator[tuple[str, set[str], frozenset[str]]]:
    """(whose they are, the options a command names, those that exist) for loldu and for recipes."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    recipe = next((place for place, word in enumerate(words) if re.search(r"recipes/\w+\.py$", word)), None)
    if words[:2] == ["loldu", "train"] or ("launcher" in words and "train" in words):
        start = words.index("train") + 1
        of_recipe = {"--glue"} if "roberta_glue_loldu" in words[start : start + 1] else set()
        yield "loldu train", flags(words[start:]), settings() | of_recipe
    elif words[:1] == ["loldu"]:
        name = " ".join(words[1:3]) if " ".join(words[1:3]) in COMMANDS else " ".join(words[1:2])
        assert name in COMMANDS, f"there is no command loldu {name}"
        own, settings_given = words[2:], []
        if name == "submit" and "--" in own:
            own, settings_given = own[: own.index("--")], own[own.index("--") :]
        elif name == "launch":
            recipes = {path.stem for path in (PROJECT / "recipes").glob("*.py")}
            start = next((at for at, word in enumerate(own) if Path(word).stem in recipes), len(own))
            own, settings_given = own[:start], own[start:]
        elif name == "sweep":
            own, settings_given = split_recipe_options(own)
            settings_given = [
                *settings_given,
                *(f"--{word.partition('=')[0]}" for word in own if re.match(r"[a-z-]+=", word)),
            ]
        elif name == "plan":  # takes a recipe's options beside its own
            settings_given = sorted(flags(own) - options_of(name))
            own = [word for word in own if word.partition("=")[0] not in settings_given]
        yield f"loldu {name}", flags(own), options_of(name)
        yield "a recipe", flags(settings_given), settings()
    elif recipe is not None:
        of_recipe = settings() | ({"--glue"} if "glue" in words[recipe] else set())
        yield words[recipe], flags(words[recipe + 1 :]), frozenset(of_recipe)


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_options_that_exist(page):
    """Also in the blocks that are not run."""
    for block in BLOCKS[page]:
        if block.language != "bash":
            continue
        for words in commands_in(block):
            for whose, named, known in named_options(words):
                assert named <= known, f"{block}: {whose} has no option {', '.join(sorted(named - known))}"


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(("CHANGELOG", "docs/log"))])
def test_the_text_names_options_that_exist(page):
    """Options in inline code: of a recipe, a command, a script of benchmarks/ or another program."""
    text = re.sub(r"```.*?```", "", (PROJECT / page).read_text(), flags=re.DOTALL)
    named = {option for code in re.findall(r"`([^`]+)`", text) for option in OPTION.findall(code.replace("_", "-"))}
    known = set(settings()).union(*(options_of(command) for command in COMMANDS))
    known |= {option for options in FOREIGN.values() for option in options.split()}
    scripts = [*(PROJECT / "benchmarks").glob("*.py"), PROJECT / "recipes/roberta_glue_loldu.py"]
    known |= {option for script in scripts for option in OPTION.findall(script.read_text())}

    assert named <= known, f"{page} names {', '.join(sorted(named - known))}, which no command has"


def test_the_checks_of_this_file_can_fail(tmp_path):
    """A block without a language, a missing option and a failing command are each found."""
    block = Block("x.md", 1, "bash", "loldu merge runs/x --out y --quantise nf4 | cat\n", {})
    merge = next(named_options(next(commands_in(block))))

    assert merge[1] - merge[2] == {"--quantise"}
    assert is_executed_by_its_page(block, slow=False)
    assert not is_executed_by_its_page(Block("x.md", 1, "bash", "", {"slow": ""}), slow=False)
    assert not is_executed_by_its_page(Block("x.md", 1, "bash", "", {"not run": "needs a GPU"}), slow=True)


@pytest.mark.slow
def test_each_script_of_the_benchmarks_shows_its_help():
    """The scripts of the tables still import what they measure."""
    scripts = sorted((PROJECT / "benchmarks").glob("*.py"))

    def asked(script: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, "--help"],
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )

    with ThreadPoolExecutor(4) as few:  # each holds half a gigabyte of imports
        shown = dict(zip((script.name for script in scripts), few.map(asked, scripts), strict=True))

    assert {name: done.stdout for name, done in shown.items() if done.returncode} == {}
    assert len(scripts) > 10


def strings_of(source: str) -> Iterator[str]:
    """Every string of a Python file, and the fixed parts of its f-strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_errors_of_the_troubleshooting_page_are_errors_of_the_code():
    """Each part of a quoted error, between the places where names and numbers stand, is in a string of the code."""
    files = [*(PROJECT / "adapters").rglob("*.py"), *(PROJECT / "launcher").rglob("*.py"), PROJECT / "loldu.py"]
    said = "\n".join(string for file in files for string in strings_of(file.read_text()))
    rows = re.findall(r"^\| (.*?) \|", (PROJECT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]

    parts = {part.strip(" :;") for text in quoted for part in text.split("...")} - {""}

    assert len(quoted) > 30
    assert {part for part in parts if part not in said} == set()
