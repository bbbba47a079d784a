"""Check all runs of a sweep before any starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher.config import Config, as_dict
from launcher.exit_codes import DONE, MISTAKE
from launcher.files import read_json
from launcher.start import instead_of_training, train
from launcher.sweeps import grid, results
from launcher.sweeps.grid import Variant

SECTIONS = ("model", "data", "adapter", "optimizer")  # of a config; what decides a run's result


class Settings(NamedTuple):
    """The config of a run, and the one that replaces it if the recipe's own model is not available."""

    config: Config
    instead: Callable[[], Config] | None


def settings_of(recipe: str, variant_options: Sequence[str], options: Sequence[str]) -> tuple[int, Settings | None]:
    """The settings of a run with these options; else the exit code, and the error has been printed."""
    found: list[Settings] = []

    def keep(config: Config, name: str, **more: Any) -> int:
        found.append(Settings(config, more.get("instead")))
        return DONE

    logging.disable(logging.WARNING)  # the run itself logs them
    try:
        with instead_of_training(keep):
            code = train([recipe, *options, *variant_options])
    finally:
        logging.disable(logging.NOTSET)
    if found:
        return code, found[0]
    return code or MISTAKE, None  # --help among the options ends without settings


def check(recipe: str, planned: Sequence[Variant], options: Sequence[str], folder: Path, processes: int | None) -> int:
    """Check all runs before any starts; processes: None for a cluster, whose nodes are checked there.

    Raises ValueError for settings that do not fit together, two equal runs, and finished runs of other settings.
    """
    known: list[tuple[Variant, Settings]] = []
    for variant in planned:
        code, settings = settings_of(recipe, variant.options, options)
        if settings is None:
            return code
        for other, same in known:
            if same.config == settings.config:
                raise ValueError(f"{grid.shown(other.values)} and {grid.shown(variant.values)} are the same run")
        known.append((variant, settings))
    from launcher.methods import peft_config  # with torch, which takes seconds to import
    from launcher.processes import Ranks
    from launcher.training.resolve import resolve

    for variant, settings in known:
        try:
            if processes is None:
                peft_config(settings.config.adapter)
            else:
                resolve(settings.config, Ranks(world_size=processes, local_world_size=processes))
        except ValueError as error:
            raise ValueError(f"{grid.shown(variant.values)}: {error}") from None
        if results.is_finished(folder / variant.name):
            _same_settings(folder / variant.name, settings)
    return DONE


def _same_settings(folder: Path, settings: Settings) -> None:
    """Raises ValueError if a finished run has other settings than this sweep would give it."""
    try:
        recorded = read_json(folder / "config.json")["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} cannot be read: remove {folder} to repeat the run") from None
    differ = _differences(recorded, settings.config)
    if differ and settings.instead is not None:
        differ = _differences(recorded, settings.instead()) and differ
    if differ:
        raise ValueError(
            f"{folder} finished with other settings ({differ[0]}): give the sweep another --output, or remove that run"
        )


def _differences(recorded: Mapping[str, Any], config: Config) -> list[str]:
    now = as_dict(config)
    return [
        f"--{name.replace('_', '-')} was {recorded[part][name]}, now {value}"
        for part in SECTIONS
        for name, value in now[part].items()
        if name in recorded.get(part, {}) and recorded[part][name] != value
    ]
