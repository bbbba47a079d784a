"""`loldu sweep`: check all runs, start those that have not finished, and compare them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.exit_codes import DONE
from launcher.files import disk_errors, user_path, write_atomically
from launcher.options import Misread
from launcher.recipes import find_recipe, run_name
from launcher.sweeps import grid, results
from launcher.sweeps.check import check, settings_of
from launcher.sweeps.grid import Variant
from launcher.sweeps.run import Sweep, submit_all, train_all
from launcher.text import one_line, printable


def sweep(
    recipe: str,
    *,
    vary: tuple[str, ...],
    seeds: int = 1,
    output: str | None = None,
    processes: int = 1,
    slurm: str | None = None,
    dry_run: bool = False,
    recipe_options: tuple[str, ...] = (),
) -> int:
    """Train every combination of some options and compare them: loldu sweep RECIPE --vary method=loldu,lora [options]

    Runs that have finished are not repeated: the same command resumes, also with more values. Other options are those
    of the recipe and apply to all runs. Exit codes: 0 all runs finished, 1 some failed, 75 stopped and saved, 2 invalid
    options.

    Args:
        recipe: A recipe by name, a Python file, or a YAML or JSON file of settings, as for loldu train.
        vary: The options to vary, as OPTION=VALUE,VALUE: --vary method=loldu,lora learning-rate=1e-3,3e-3
        seeds: How many seeds each combination is trained with: the recipe's --seed and the next ones.
        output: Folder of the sweep, with a run folder for each run. Default: runs/sweep-RECIPE.
        processes: Processes of each run on this machine, started with torchrun.
        slurm: Submit the runs as a Slurm job array, with these options of loldu submit: "--gpus-per-node 1 --time 60"
        dry_run: Print the command of each run and start nothing.
        recipe_options: The options of the recipe.
    """
    if seeds < 1:
        raise Misread(f"--seeds must be at least 1, got {seeds}")
    if seeds > grid.MOST_RUNS:
        raise Misread(f"--seeds must be at most {grid.MOST_RUNS:,}, got {seeds:,}")
    if processes < 1:
        raise Misread(f"--processes must be at least 1, got {processes}")
    if slurm is not None and processes > 1:
        raise Misread("--processes is for this machine: put --gpus-per-node or --processes-per-node into --slurm")
    varied: dict[str, tuple[str, ...]] = grid.read_vary(vary)
    given = {word.partition("=")[0].replace("_", "-").removeprefix("--") for word in recipe_options if word[:2] == "--"}
    if both := sorted(given & varied.keys()):
        raise Misread(f"--{both[0]} is both varied and given: leave one out")
    if seeds > 1 and results.SEED in varied:
        raise Misread("--seeds and --vary seed=... both set the seed: leave one out")
    file = find_recipe(recipe)
    if seeds > 1:
        code, settings = settings_of(recipe, (), recipe_options)
        if settings is None:
            return code
        first = settings.config.optimizer.seed
        varied |= {results.SEED: tuple(str(first + number) for number in range(seeds))}
    planned = grid.variants(varied)
    folder = user_path(output or Path("runs") / f"sweep-{run_name(file)}")
    code = check(recipe, planned, recipe_options, folder, None if slurm is not None else processes)
    if code != DONE:
        return code
    plan = Sweep(recipe, recipe_options, varied, planned, folder, processes)
    if dry_run:
        for variant in planned:
            print(printable(f"loldu train {shlex.join([recipe, *plan.options(variant)])}"))
        return DONE
    with disk_errors("the sweep", folder, "give --output elsewhere"):
        folder.mkdir(parents=True, exist_ok=True)
        if _foreign(folder, planned):
            raise ValueError(f"{folder} holds other files and is not a sweep: give another --output")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if slurm is None:
        code = train_all(plan, console)
    elif plan.unfinished():
        return submit_all(plan, shlex.split(slurm), console)
    _report(plan, console)
    return code


def _foreign(folder: Path, planned: Sequence[Variant]) -> bool:
    """Whether a folder holds something, but nothing of a sweep."""
    names = {path.name for path in folder.iterdir()}
    return bool(names) and not names & {".lock", "results.json", "sweep.json", *(variant.name for variant in planned)}


def _report(plan: Sweep, console: Console) -> None:
    """Print the table, the best configuration as a command, and write results.json and the report."""
    found, kind = results.rows(plan.folder, plan.variants)
    runs = [run.folder for row in found for run in row.runs]
    with disk_errors("the results", plan.folder, "give --output elsewhere"):
        write_atomically(plan.folder / "results.json", json.dumps(results.as_json(found, kind), indent=2) + "\n")
    if not runs:
        return
    headings, cells = results.table(found, kind)
    if sys.stdout.isatty():
        shown = Table(*headings, box=SIMPLE)
        for row in cells:
            shown.add_row(*map(escape, row))
        Console().print(shown)
    else:
        print("\n".join("\t".join(map(one_line, row)) for row in [headings, *cells]))
    from launcher.reports.commands import write_report
    from launcher.sweeps.picture import picture

    figure = None if results.differ(found) else picture(found, plan.vary, kind)
    page = write_report(runs, plan.folder / "report.html", {"Sweep": figure} if figure is not None else {})
    console.print(printable(f"report {page}"))
    for remark in results.remarks(found):
        console.print(printable(f"note: {remark}"))
    chosen = results.best(found)
    if chosen is None:
        return
    options = [*plan.recipe_options, *grid.as_options(chosen.values)]
    so_far = " so far" if plan.unfinished() else ""
    best = printable(f"best{so_far}: {grid.shown(chosen.values)}, {kind} {chosen.loss:.4f}")
    console.print(f"{best}. Train it again, or use it:")
    print(printable(f"  loldu train {shlex.join([plan.recipe, *options])}"))
    print(printable(f"  loldu chat {shlex.quote(str(chosen.runs[0].folder))}"))
