"""Regular expressions in an adapter's config, tried in a process of their own before PEFT uses them.

Some expressions take centuries to match a module's name, and Python's `re` cannot be interrupted from another thread.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 5.0
PLAIN = re.compile(r"[\w.\-]*")  # dots match any character, in no time
TRY = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for way in (pattern, rf"(.*\.)?({pattern})$", rf".*\.{pattern}\.(\d+)\."):  # as PEFT matches
        for name in names:
            re.match(way, name), re.fullmatch(way, name)
"""


def check_patterns(config: Any, names: Sequence[str], folder: Path) -> None:
    """Raises ValueError for an expression in a PEFT config that is none, or takes longer than LIMIT_S on the names."""
    patterns = [pattern for pattern in dict.fromkeys(_patterns(config)) if not PLAIN.fullmatch(pattern)]
    if not patterns:
        return
    file = folder / "adapter_config.json"
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRY], input=json.dumps([patterns, list(names)]), timeout=LIMIT_S,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{file}: matching {', '.join(patterns)[:200]!r} takes more than {LIMIT_S:.0f} s: get the adapter from a "
            "source you trust, or replace the regular expression by a list of names"
        ) from None
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["it ended"])[-1]
        raise ValueError(f"{file}: {', '.join(patterns)[:200]!r} is no regular expression ({reason[:200]})")


def _patterns(config: Any) -> Iterator[str]:
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            yield value
        elif name == "layers_pattern" and isinstance(value, (list, tuple)):
            yield from (each for each in value if isinstance(each, str))
    for name in ("rank_pattern", "alpha_pattern"):
        value = getattr(config, name, None)
        yield from (each for each in value if isinstance(each, str)) if isinstance(value, dict) else ()
