"""A run's settings from a YAML or JSON file with the fields of `Config`, or from the config.json of an earlier run.

    model: {model: my-model}
    optimizer:
      learning_rate: 3e-2

Read strictly: an unknown name, a duplicate name or a value of a wrong type is an error. Relative paths in the file are
relative to the current folder, as on the command line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from launcher.config import Config, from_dict
from launcher.files import read_text

SUFFIXES = (".yaml", ".yml", ".json")


def read_config(file: Path) -> Config:
    """The settings of a file. Raises ValueError that names the file and, for bad YAML or JSON, the line.

    The config.json of a run also records versions and the like, which are ignored. The new run gets its own folder and
    starts from the beginning.
    """
    try:
        text = read_text(file)
        values = _json(text) if file.suffix == ".json" else _yaml(text)
        recorded = isinstance(values, dict) and "config" in values
        config = from_dict(Config, values["config"] if recorded else values)
        return replace(config, run=replace(config.run, output=None, resume="auto")) if recorded else config
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{file}: it is nested too deeply for settings") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for at, (name, _) in enumerate(pairs):
            if name in dict(pairs[:at]):
                raise ValueError(f"{name} is there twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _yaml(text: str) -> Any:
    import yaml  # takes a tenth of a second

    class Loader(yaml.SafeLoader):
        """YAML 1.2's plain values: 3e-2 is a number, and no, off and 1:30 are text, unlike in YAML 1.1."""

        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key.value, str):
                    raise ValueError(f"line {key.start_mark.line + 1}: expected a name before the colon")
                if key.value in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}not YAML ({error.problem or error.context})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML ({str(error).splitlines()[0]})") from None
