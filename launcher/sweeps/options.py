"""Which arguments of `loldu sweep` are its own, and which are the recipe's. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.options import Misread

# How many words follow an option.
VALUES = {"--seeds": 1, "--output": 1, "--processes": 1, "--dry-run": 0, "--no-dry-run": 0, "--help": 0, "-h": 0}


def split_recipe_options(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split arguments into those of the sweep, with the recipe first, and those of the recipe. Raises Misread."""
    words = list(arguments)
    if {"-h", "--help"} & {*words[:1]} or not words:
        return words, ()
    if words[0].startswith("-"):
        raise Misread(f"the recipe or file comes first: loldu sweep RECIPE {words[0]} ... (loldu sweep --help)")
    own, rest, at = [words[0]], [], 1
    while at < len(words):
        flag, equals, _ = words[at].replace("_", "-").partition("=")
        end = at + 1
        if flag == "--vary" and not equals:
            while end < len(words) and not words[end].startswith("-"):
                end += 1
            own += words[at:end]
        elif flag == "--slurm" and not equals and end < len(words):
            own.append(f"--slurm={words[end]}")  # its value may begin with a dash
            end += 1
        elif flag in ("--vary", "--slurm") or flag in VALUES:
            end += 0 if equals else VALUES.get(flag, 0)
            own += words[at:end]
        else:
            rest.append(words[at])
        at = end
    return own, tuple(rest)
