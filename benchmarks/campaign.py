"""A campaign: many training runs with a search for each method's learning rate. It resumes, and processes share it.

A run in the results file is not repeated; the values of its row that `Study.what` gives identify it. The learning rate
is searched with seed 0 on the validation split, on a grid of half decades: three values around a first guess, and more
while the best is at an edge. Then other seeds are trained with it and evaluated on the test split.

Several processes may run the same campaign: each takes a run that is not in the file and that no other is at. Each run
is made in a process of its own, which gives its memory back when it ends.
"""

from __future__ import annotations

import fcntl
import json
import math
import platform
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from launcher.files import alone

REPO = Path(__file__).resolve().parents[1]
RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
OURS = ("loldu", "lolduxs", "svfit", "svft", "loraxs", "lorasb")  # a core between frozen factors


@dataclass(frozen=True)
class Study:
    """What a campaign runs. A cell is a model and a task; a row identifies a run."""

    results: Path
    methods: Mapping[str, Mapping[str, Any]]  # with the first guess of a learning rate under "rate"
    plan: tuple[tuple[str, str, str], ...]  # (method, model, task) in the order of running
    what: Callable[[str, str, str, float, int, str], dict[str, Any]]  # model, task, method, rate, seed, split -> row
    measure: Callable[[dict[str, Any], Path], dict[str, Any]]  # row, work folder -> the row and what came out
    prepare: Callable[[Path, Path], None]  # write models and data from the first folder into the second
    seeds: tuple[int, ...]
    without_search: Collection[str] = ()  # tasks at the first cell's best rate

    @property
    def first(self) -> tuple[str, str]:
        return self.plan[0][1:]


class Campaign:
    """The results so far, and the runs that are left."""

    def __init__(self, study: Study, shared: Path):
        self.study, self.shared = study, shared
        self.found: list[dict[str, Any]] = self.read()

    def read(self) -> list[dict[str, Any]]:
        return json.loads(self.study.results.read_text())["runs"] if self.study.results.exists() else []

    def result(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return next((old for old in self.found if row.items() <= old.items()), None)

    def loss(self, row: dict[str, Any]) -> float:
        """Held-out loss of a run in the results; infinite if it diverged."""
        result = self.result(row)
        assert result is not None, row
        return math.inf if result["loss"] is None else result["loss"]

    def searched(self, name: str, model: str, task: str, rate: float) -> dict[str, Any]:
        return self.study.what(model, task, name, rate, 0, "validation")

    def missing(self, name: str, model: str, task: str) -> list[dict[str, Any]]:
        """The runs of a method on a model and a task that can be made now; none if all are done."""
        if task in self.study.without_search:
            searching = self.missing(name, *self.study.first)
        else:
            rates = self.rates(name, model, task)
            searching = self.not_found(self.searched(name, model, task, rate) for rate in rates)
        if searching:
            return searching
        best = self.best(name, model, task)
        return self.not_found(self.study.what(model, task, name, best, seed, "test") for seed in self.study.seeds)

    def not_found(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if self.result(row) is None]

    def rates(self, name: str, model: str, task: str) -> list[float]:
        """The learning rates to try: three around the guess (the first cell's best, if known), then beyond an edge."""
        guess = self.study.methods[name]["rate"]
        if (model, task) != self.study.first and not self.missing(name, *self.study.first):
            guess = self.best(name, *self.study.first)
        low = high = RATES.index(guess)
        low, high = low - 1, high + 1
        while True:
            rows = [self.searched(name, model, task, rate) for rate in RATES[low : high + 1]]
            if any(self.result(row) is None for row in rows):
                return [row["rate"] for row in rows]
            losses = [self.loss(row) for row in rows]
            best = losses.index(min(losses))
            if best == 0 and low > 0:
                low -= 1
            elif best == len(losses) - 1 and high < len(RATES) - 1:
                high += 1
            else:
                return [row["rate"] for row in rows]

    def best(self, name: str, model: str, task: str) -> float:
        """The learning rate with the lowest validation loss, once all were tried."""
        if task in self.study.without_search:
            model, task = self.study.first
        rates = self.rates(name, model, task)
        return min(rates, key=lambda rate: self.loss(self.searched(name, model, task, rate)))

    def tested(self, name: str, model: str, task: str) -> list[dict[str, Any]]:
        """The test runs, or none while some are missing."""
        if self.missing(name, model, task):
            return []
        best = self.best(name, model, task)
        return [self.result(self.study.what(model, task, name, best, seed, "test")) or {} for seed in self.study.seeds]

    def run_all(self, only: Collection[str] = ()) -> None:
        """Make the runs that are left (of these methods only, if any are given) and that no other process is at."""
        with (
            tempfile.TemporaryDirectory() as temporary,
            self.study.results.with_suffix(".lock").open("w") as held,
            ProcessPoolExecutor(1, max_tasks_per_child=1) as one_run,
        ):
            work = Path(temporary)
            self.study.prepare(self.shared, work)
            while (row := self.take(only, held.fileno())) is not None:
                done = one_run.submit(self.study.measure, row, work).result()
                self.save(done)
                print(*(done[key] for key in ("model", "task", "method", "rate", "seed", "loss", "cpu_s")), flush=True)

    def take(self, only: Collection[str], held: int) -> dict[str, Any] | None:
        """The next run, kept from other processes until this one ends by a lock on one byte of an open file."""
        for name, model, task in self.study.plan:
            if only and name not in only:
                continue
            self.found = self.read()
            for row in self.missing(name, model, task):
                with suppress(OSError):  # another process is at it
                    fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(json.dumps(row).encode()))
                    self.found = self.read()  # it may have finished in between
                    if self.result(row) is None:
                        return row
        return None

    def save(self, row: dict[str, Any]) -> None:
        """Add a row to the results file, which other processes may have changed."""
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=REPO).stdout.strip()
        head = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": f"{platform.machine()}, 1 thread"}
        partial = self.study.results.with_suffix(".tmp")
        with alone(partial.parent):
            self.found = [*self.read(), row]
            rows = ",\n".join(json.dumps(row) for row in self.found)
            partial.write_text(f'{json.dumps(head)[:-1]}, "runs": [\n{rows}\n]}}\n')
            partial.replace(self.study.results)

    def left(self) -> str:
        """How many runs are left, if no search extends beyond an edge, and about how long they take."""
        count, seconds = 0, 0.0
        for name, model, task in self.study.plan:
            missing = len(self.study.seeds)
            searched = True
            if task not in self.study.without_search:
                rates = self.rates(name, model, task)
                tried = sum(self.result(self.searched(name, model, task, rate)) is not None for rate in rates)
                missing, searched = missing + len(rates) - tried, tried == len(rates)
            elif self.missing(name, *self.study.first):
                searched = False
            if searched:
                best, what = self.best(name, model, task), self.study.what
                missing -= sum(
                    self.result(what(model, task, name, best, seed, "test")) is not None for seed in self.study.seeds
                )
            like = [row["cpu_s"] for row in self.found if row["model"] == model and row["task"] == task]
            like = like or [row["cpu_s"] for row in self.found if row["model"] == model] or [12.0]
            count, seconds = count + missing, seconds + missing * mean(like)
        return f"{len(self.found)} runs made, at least {count} left: about {seconds / 60:.0f} minutes of one free core"


def spread(runs: list[dict[str, Any]], key: str) -> str:
    values = [math.inf if run[key] is None else run[key] for run in runs]
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if all(map(math.isfinite, values)) else "diverged"


STYLE = (  # readable on a white and on a dark page
    "text{fill:#333}.grid{stroke:#8884}.ours{fill:#b3261e;stroke:#b3261e}.others{fill:#1f4e9c;stroke:#1f4e9c}"
    ".ours text,text.ours{fill:#b3261e;stroke:none}.others text{fill:#1f4e9c;stroke:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}.ours{fill:#ff8a80;stroke:#ff8a80}"
    ".others{fill:#82b1ff;stroke:#82b1ff}.ours text,text.ours{fill:#ff8a80}.others text{fill:#82b1ff}}"
)


def plot(campaign: Campaign) -> str:
    """Held-out loss against trained numbers on the first cell, as SVG: a bar from the best to the worst seed."""
    cell, methods = campaign.study.first, campaign.study.methods
    drawn = [name for name, spec in methods.items() if "optimizer" not in spec]
    tested = {name: runs for name in drawn if (runs := campaign.tested(name, *cell))}
    tested = {name: runs for name, runs in tested.items() if all(run["loss"] is not None for run in runs)}
    losses = {name: [run["loss"] for run in runs] for name, runs in tested.items()}
    order = sorted(tested, key=lambda name: -mean(losses[name]))  # as the axis has them
    low = math.floor(min(map(min, losses.values())) * 10) / 10
    high = math.ceil(max(map(max, losses.values())) * 10) / 10
    steps = next(iter(tested.values()))[0]["steps"]
    powers = [math.log10(runs[0]["trained"]) for runs in tested.values()]
    first, last = math.floor(min(powers)), math.ceil(max(powers) - 0.01)
    x = lambda trained: 50 + 470 * (math.log10(trained) - first) / (last - first)  # noqa: E731
    y = lambda loss: 20 + 340 * (high - loss) / (high - low)  # noqa: E731
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 410" font-family="sans-serif" font-size="12">',
        f"<style>{STYLE}</style>",
        '<text x="285" y="400" text-anchor="middle">trained numbers</text>',
        f'<text x="50" y="12">held-out loss, {" on ".join(cell)}, {steps} steps</text>',
        '<text x="535" y="12" class="ours">red: a core between frozen factors</text>',
    ]
    for power in range(first, last + 1):
        at = x(10**power)
        parts.append(f'<path d="M{at:.0f} 20V360" class="grid"/><text x="{at:.0f}" y="378" text-anchor="middle">10<tspan dy="-5" font-size="9">{power}</tspan></text>')  # fmt: skip  # noqa: E501
    for tenth in range(round(low * 10), round(high * 10) + 1):
        at = y(tenth / 10)
        parts.append(f'<path d="M50 {at:.0f}H520" class="grid"/><text x="44" y="{at + 4:.0f}" text-anchor="end">{tenth / 10:.1f}</text>')  # fmt: skip  # noqa: E501
    line = 382.0  # of the last label; each is as near its point as the label below allows
    for name in reversed(order):
        at, found = x(tested[name][0]["trained"]), losses[name]
        ours = methods[name].get("method", "loldu") in OURS
        line = min(line - 15.5, y(mean(found)) + 4)
        parts += [
            f'<g class="{"ours" if ours else "others"}">'
            f'<path d="M{at:.1f} {y(min(found)):.1f}V{y(max(found)):.1f}" stroke-width="2"/>'
            f'<circle cx="{at:.1f}" cy="{y(mean(found)):.1f}" r="4"/>'
            f'<path d="M{at + 5:.1f} {y(mean(found)):.1f}L532 {line - 4:.1f}" stroke-width="0.4"/>'
            f'<text x="535" y="{line:.1f}">{mean(found):.3f}  {name}</text></g>',
        ]
    return "\n".join([*parts, "</svg>\n"])
