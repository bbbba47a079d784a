"""`loldu factorize` and `loldu cache ls | verify | prune`. Each prints its result and returns an exit code."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.config import AdapterConfig
from launcher.factorization import cache
from launcher.files import user_path
from launcher.options import Option
from launcher.processes import Communicator, Ranks, connect
from launcher.progress import Bars
from launcher.text import one_line

if TYPE_CHECKING:
    from adapters.base import Factorization
    from adapters.factors import Factors
    from launcher.factorization.make import Factored, FactorRequest

GB = 1e9
Folder = Annotated[str | None, Option(name="cache")]


def factorize(
    *,
    model: str,
    rank: int = 64,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    exclude: Sequence[str] = (),
    method: str = AdapterConfig.method,
    options: Sequence[str] = (),
    dtype: Literal["float32", "bfloat16"] = "float32",
    cache_folder: Folder = None,
    cache_per_node: bool = False,
    verify_base: bool = False,
    trust_remote_code: bool = False,
    comm: Communicator | None = None,
    console: Console | None = None,
) -> int:
    """Compute and cache the factors that a run with these settings needs, using all processes that were started.

    Args:
        model: Folder of the base model, or its hub name if it is in the hub cache.
        rank: Trained parameters per weight, at most its smaller dimension.
        targets: Last parts of module names, or all-linear.
        exclude: Modules to leave out.
        method: The --method of the run: one of ours whose factors come from the weights.
        options: The --options of the run, as name=value.
        dtype: The --dtype of the run.
        cache_folder: Cache folder; default: the user's cache directory.
        cache_per_node: The cache folder is a different one on each node, and each node computes all factors.
        verify_base: Read the weights again instead of trusting the size and time of their files.
        trust_remote_code: Run Python code from the model's folder. Only for models that you trust.
        comm: The processes that share the work.
        console: Where to print.

    Raises ValueError for a missing model, targets that match nothing, a weight that cannot be factored, or a cache that
    is not writable.
    """
    from adapters.checkpoint_files import local_folder  # with torch and transformers, which take seconds to import
    from launcher.factorization import share
    from launcher.factorization.targets import targets_of

    comm = comm or connect(Ranks.from_environment())
    console = (console or Console()) if comm.ranks.is_main else Console(quiet=True)
    started, folder = time.monotonic(), _folder(cache_folder)
    adapter = AdapterConfig(
        method=method, rank=rank, targets=tuple(targets), exclude=tuple(exclude), options=tuple(options)
    )
    how = _factorization(adapter)

    def look() -> list[FactorRequest]:
        path = local_folder(model)
        if path is None:
            raise ValueError(
                f"there is no model {model}, neither as a folder nor in the hub cache; fetch it with: "
                f"hf download {shlex.quote(model)}"
            )
        return targets_of(path, targets, exclude, rank, how, dtype=dtype, trust_remote_code=trust_remote_code)

    requests = comm.each("the weights to factor", look)  # a node without the model is named on all
    if not how.chooses_rank and (clamped := [request for request in requests if request.rank < rank]):
        console.print(f"--rank {rank} is reduced to the smaller dimension of {len(clamped)} weights")
    with Bars(console).bar("factors", len(requests)) as bar:
        on_progress = lambda done, total, weight: bar(done, weight, of=total)  # noqa: E731
        done = share.factorize(requests, folder, comm, on_progress, verify_base=verify_base, per_node=cache_per_node)
    if not comm.ranks.is_main:
        return 0

    headings = ("module", "shape", "rank", "weights", "computed now", "residual", "on disk")
    _show(console, headings, _kinds(requests, done, folder))
    made = sum(how.made for how in done.values())
    _print(
        console,
        f"{len(done)} weights factored, {made} of them now, in {time.monotonic() - started:.1f} s with "
        f"{comm.ranks.world_size} process{'es' * (comm.ranks.world_size > 1)}; cache folder {folder}",
    )
    return 0


def _factorization(adapter: AdapterConfig) -> Factorization:
    """How the method factors weights. Raises ValueError for an unknown method or option, or one without factors."""
    from adapters import METHODS, FactorConfig
    from launcher.methods import peft_config

    config = peft_config(adapter)
    if not isinstance(config, FactorConfig):
        known = ", ".join(name for name, kind in METHODS.items() if issubclass(kind, FactorConfig))
        raise ValueError(f"--method {adapter.method} has no factors to make; these have: {known}")
    if config.factors_from_gradients:
        raise ValueError(f"--method {adapter.method} makes its factors from gradients of the data, when a run starts")
    return config.factorization()


def _kinds(requests: Sequence[FactorRequest], done: Mapping[str, Factored], folder: Path) -> list[tuple[str, ...]]:
    """A table row for each kind of module: its weights, how many were computed now, and their size on disk."""
    kinds: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for request in requests:
        kinds.setdefault((request.module.rpartition(".")[2], request.shape), []).append(request.module)
    rows: list[tuple[str, ...]] = []
    for (name, (m, n)), modules in kinds.items():
        ranks = sorted({done[module].rank for module in modules})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        found = [entry for module in modules if (entry := cache.find(folder, done[module].key))]
        residual = max((entry.about["residual"] for entry in found), default=float("nan"))
        made, size = sum(done[module].made for module in modules), sum(entry.file.stat().st_size for entry in found)
        rows.append((name, f"{m} x {n}", shown, str(len(modules)), str(made), f"{residual:.1e}", _bytes(size)))
    return rows


def cache_ls(cache_folder: Folder = None, console: Console | None = None) -> int:
    """List the cached factors, most recently used first.

    Args:
        cache_folder: Cache folder; default: the user's cache directory.
    """
    console, folder = console or Console(), _folder(cache_folder)
    cache.check_folder(folder)
    total, found, rows = 0, cache.entries(folder), []
    for entry in found:
        about, stat = dict.fromkeys(cache.TYPES, "?") | {"shape": []} | entry.about, entry.file.stat()
        total += stat.st_size
        marks = "".join(f" {word}" for word in ("normalize", "embedding", "transposed") if about.get(word))
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(stat.st_mtime))
        shape = " x ".join(map(str, about["shape"])) + marks
        of, size = (about["name"], about["method"], shape, str(about["rank"]), about["dtype"]), _bytes(stat.st_size)
        rows.append((used, *map(one_line, of), size, entry.key[:8]))
    _show(console, ("used", "name", "method", "shape", "rank", "dtype", "size", "key"), rows)
    tokenised = [file.stat().st_size for file in (folder / "tokenised").glob("*.safetensors")]
    data = f", {len(tokenised)} tokenised data sets, {_bytes(sum(tokenised))}" if tokenised else ""
    _print(console, f"{len(found)} weights, {_bytes(total)}{data} in {folder}")
    return 0


def cache_verify(cache_folder: Folder = None, console: Console | None = None) -> int:
    """Check every cached file against its checksums, and factors against the weights of their base model.

    Factors whose base model is gone or has changed are not compared. A damaged or wrong file is renamed, and the exit
    code is 1 then.

    Args:
        cache_folder: Cache folder; default: the user's cache directory.
    """
    from launcher.factorization.make import compare_with_base

    console, folder = console or Console(), _folder(cache_folder)
    good, compared = 0, 0

    def misfit(factors: Factors, entry: cache.Entry) -> str | None:
        nonlocal compared
        was_compared, why = compare_with_base(factors, entry)
        compared += was_compared and why is None
        return why

    def count(entry: cache.Entry) -> None:
        nonlocal good
        good += 1
        bar(good, str(entry.about.get("name", "?")))

    cache.check_folder(folder)
    total = len(list((folder / "factors").glob("*.safetensors")))
    with Bars(console).bar("verifying", total) as bar:
        damaged = cache.verify(folder, count, misfit)
    for file in damaged:
        _print(console, f"damaged: {file}")
    again = "; damaged factors are computed again when a run needs them" if damaged else ""
    unseen = f", the base models of {good - compared} are gone or changed" if good > compared else ""
    of = f"; {compared} compared with their base model{unseen}" if good else ""
    _print(console, f"{good} weights are good, {len(damaged)} damaged{again}{of}")
    return 1 if damaged else 0


def cache_prune(
    cache_folder: Folder = None,
    max_gb: float | None = None,
    older_than_days: float | None = None,
    console: Console | None = None,
) -> int:
    """Remove cached files unused for a number of days, then the least recently used until a size is reached.

    Args:
        cache_folder: Cache folder; default: the user's cache directory.
        max_gb: Keep at most this many GB (10^9 bytes); 0 empties the cache.
        older_than_days: Remove files that were not used for this many days.
    """
    if max_gb is None and older_than_days is None:
        raise ValueError(
            "nothing to prune by: give --max-gb X, --older-than-days N or both (--max-gb 0 empties the cache)"
        )
    for option, value in (("--max-gb", max_gb), ("--older-than-days", older_than_days)):
        if value is not None and not value >= 0:
            raise ValueError(f"{option} is at least 0, got {value}")
    console, folder = console or Console(), _folder(cache_folder)
    days = None if older_than_days is None else older_than_days * 86400
    pruned = cache.prune(folder, None if max_gb is None else max_gb * GB, days)
    _print(
        console,
        f"removed {pruned.files} files ({_bytes(pruned.freed_bytes)}); {_bytes(pruned.left_bytes)} left in {folder}",
    )
    return 0


def _folder(cache_folder: str | None) -> Path:
    return user_path(cache_folder) if cache_folder else cache.default_folder()


def _print(console: Console, text: str) -> None:
    """Print one line literally: names of folders and weights are neither markup nor escape sequences."""
    console.print(one_line(text), soft_wrap=True, markup=False, highlight=False)


def _show(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on a terminal, tab-separated lines elsewhere."""
    if console.is_terminal and rows:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    elif rows:
        for row in [columns, *rows]:
            print("\t".join(row), file=console.file)  # rich would turn the tabs into spaces


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
