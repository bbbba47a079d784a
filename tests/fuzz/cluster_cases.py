"""Hostile hostfiles, arrays, names and options of the commands that start runs elsewhere."""

# ruff: noqa: E501 (tables of inputs)

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile_parts import Case, Materials

HOSTFILES = {
    "nothing": "", "spaces": "  \n\t\n", "no slots": "node1\n", "slots of words": "node1 slots=many\n", "minus": "node1 slots=-1\n",
    "zero": "node1 slots=0\n", "10^9 slots": "node1 slots=1000000000\n", "400 digits": f"node1 slots={'1' * 400}\n",
    "an Arabic digit": "node1 slots=٣\n", "an option": "-oProxyCommand=touch${IFS}owned slots=1\n", "a command": "$(touch owned) slots=1\n",
    "a back quote": "`touch owned` slots=1\n", "a semicolon": "a;touch slots=1\n", "a user": "root@node1 slots=1\n", "IPv6": "::1 slots=1\n",
    "twice": "a slots=1\na slots=1\n", "localhost and others": "localhost slots=1\nnode2 slots=1\n", "a null byte": "a\0 slots=1\n",
    "an escape sequence": "\x1b[2J slots=1\n", "a path": "../x slots=1\n", "a long name": "x" * 100_000 + " slots=1\n", "JSON": "{}",
    "no UTF-8": "\udcff slots=1\n", "many lines": "x y z\n" * 10_000, "a bell": "a\x07 slots=1\n", "a line separator": "a\u2028b slots=1\n",
}  # fmt: skip


def cluster_cases(materials: Materials) -> Iterator[Case]:
    """Hostfiles, arrays, names and options of the commands that start runs elsewhere."""
    for name, text in HOSTFILES.items():
        for command in ("launch", "doctor"):

            def write(folder: Path, text: str = text, command: str = command) -> list[str]:
                (folder / "hosts").write_bytes(text.encode("utf-8", "surrogateescape"))
                words = [command, f"--hostfile={folder / 'hosts'}"]
                return [*words, "llama2_alpaca_loldu", f"--output={folder / 'run'}"] if command == "launch" else words

            yield Case("cluster", f"{command}: hostfile of {name}", write)
    for name, make in {
        "a FIFO": os.mkfifo,
        "a folder": lambda path: path.mkdir(),
        "a device": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        for option in ("hostfile", "array"):

            def special(folder: Path, make: Any = make, option: str = option) -> list[str]:
                make(folder / "file")
                words = [f"--{option}={folder / 'file'}", "llama2_alpaca_loldu"]
                return ["launch", *words] if option == "hostfile" else ["submit", *words[::-1], "--dry-run"]

            yield Case("cluster", f"--{option}: {name}", special)
    for name, text in {
        "nothing": "",
        "an open quote": "--rank 8 'x\n",
        "an output": "--output x\n",
        "no UTF-8": "\udcff\n",
    }.items():

        def array(folder: Path, text: str = text) -> list[str]:
            (folder / "array").write_bytes(text.encode("utf-8", "surrogateescape"))
            return ["submit", "llama2_alpaca_loldu", f"--array={folder / 'array'}", "--dry-run"]

        yield Case("cluster", f"an array of {name}", array)
    injections = (
        "a\n#SBATCH --uid=0",
        "a\rb",
        "a\u2028b",
        "$(touch owned)",
        "`touch owned`",
        '"; touch owned #',
        "\x1b[2J",
        "a\\",
    )
    for option in (
        "name",
        "partition",
        "account",
        "qos",
        "constraint",
        "time",
        "host-suffix",
        "python",
        "container",
        "sbatch",
        "srun",
    ):
        for value in injections:

            def submit(folder: Path, option: str = option, value: str = value) -> list[str]:
                return ["submit", "llama2_alpaca_loldu", f"--{option}={value}", "--dry-run", "--", f"--output={folder / 'run'}"] if option != "name" else ["submit", "llama2_alpaca_loldu", f"--name={value}", "--dry-run"]  # fmt: skip

            yield Case("cluster", f"submit --{option}={value!r}", submit, (0, 2))
