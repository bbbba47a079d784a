"""Reads hostfiles in DeepSpeed's format, strictly: every mistake in the file is listed with its line.

    # two machines with eight GPUs each
    node1 slots=8
    node2 slots=8

Filters have DeepSpeed's syntax: --include node1@node2:0,2 (all of node1, two slots of node2), --exclude node2:1.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace

from launcher.files import read_text, user_path

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts of a run, and how to reach them."""

    hostfile: str
    """File with a line `name slots=n` for each host; hostfiles/ has examples."""
    include: str | None = None
    """Use only these hosts or slots: node1@node2:0,2"""
    exclude: str | None = None
    """Leave out these hosts or slots: node2@node3:1"""
    ssh_port: int | None = None
    """Port of the ssh servers; default: as ssh is configured."""
    ssh_config: str | None = None
    """Configuration file for ssh, instead of ~/.ssh/config."""
    python: str = sys.executable
    """Python interpreter on the hosts; default: the one that runs this command."""
    master_addr: str | None = None
    """Address of the first host for the other hosts; default: the address at which ssh reached it."""
    port: int = 29500
    """Port on the first host where the processes meet (MASTER_PORT)."""
    env: tuple[str, ...] = ()
    """NAME=VALUE, set for every process in addition to the forwarded variables (NCCL_*, HF_*, OMP_* and others)."""

    def __post_init__(self) -> None:
        for word in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", word, re.DOTALL):
                raise ValueError(f"--env expects NAME=VALUE, got {word!r}")
        for name, value in (("port", self.port), ("ssh-port", self.ssh_port)):
            if value is not None and not 1 <= value <= 65535:
                raise ValueError(f"--{name} expects a number from 1 to 65535, got {value}")
        if self.include is not None and self.exclude is not None:
            raise ValueError("--include and --exclude cannot be used together: give one of them")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: tuple[int, ...]  # indices of GPUs, one process for each
    chosen: bool = False  # a filter picked these slots: the processes then see only these GPUs


def read(file: str) -> list[Host]:
    """The hosts in the order of the file; the first one is the head node. Raises ValueError listing every mistake."""
    try:
        text = read_text(user_path(file))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file of at most a megabyte"
        raise ValueError(
            f"--hostfile {file}: {reason}; expected lines such as: node1 slots=8 (examples: hostfiles/)"
        ) from None
    return parse(text, file)


def parse(text: str, file: str = "hostfile") -> list[Host]:
    """The hosts in the text of a hostfile. Raises ValueError listing every mistake with its line."""
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    problems = []
    for at, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        name, given = words[0], words[1:]
        wrong = ""
        if not NAME.fullmatch(name):
            wrong = f"{name[:300]!r} is not a host name (give users and IPv6 addresses a short name in ~/.ssh/config)"
        elif name in lines:
            wrong = f"{name} is already on line {lines[name]}"
        elif len(given) != 1 or not re.fullmatch(r"slots=[0-9]+", given[0]):
            wrong = f"expected `{name} slots=N`, got `{' '.join(words)}`"
        elif not 1 <= int(given[0][6:]) <= 1024:
            wrong = f"{name} has {given[0]}; expected 1 to 1024 slots, one for each process (or remove the line)"
        if wrong:
            problems.append(f"  line {at}: {wrong}")
        else:
            hosts[name] = Host(name, tuple(range(int(given[0][6:]))))
        lines.setdefault(name, at)
    local = [name for name in hosts if name == "localhost" or name.startswith("127.")]
    if local and len(hosts) > 1:
        problems.append(
            f"  line {lines[local[0]]}: {local[0]} means a different machine on each host: give its network name"
        )
    if not hosts and not problems:
        problems.append("  no host is listed; expected lines such as: node1 slots=8")
    if problems:
        raise ValueError("\n".join([f"{file} has {len(problems)} problem{'s'[: len(problems) > 1]}:", *problems]))
    return list(hosts.values())


def choose(hosts: list[Host], include: str | None = None, exclude: str | None = None) -> list[Host]:
    """The hosts and slots that a filter leaves. Raises ValueError for hosts and slots that the file does not have."""
    text, flag = (include, "--include") if include is not None else (exclude, "--exclude")
    if text is None:
        return hosts
    known = {host.name: host for host in hosts}
    named: dict[str, tuple[int, ...]] = {}
    problems = []
    for part in text.split("@"):
        name, _, slots = part.strip().partition(":")
        if name not in known:
            problems.append(f"  {part!r}: no such host; the file has {', '.join(known)}")
        elif name in named:
            problems.append(f"  {name} is named twice")
        elif slots and not re.fullmatch(r"[0-9]+(,[0-9]+)*", slots):
            problems.append(f"  {part!r}: expected slots as in {name}:0,2")
        else:
            wanted = tuple(sorted({int(slot) for slot in slots.split(",")})) if slots else known[name].slots
            missing = [str(slot) for slot in wanted if slot not in known[name].slots]
            if missing:
                problems.append(f"  {name} has slots 0 to {len(known[name].slots) - 1}, not {', '.join(missing)}")
            named[name] = wanted
    if problems:
        raise ValueError("\n".join([f"{flag} {text}:", *problems]))
    chosen = []
    for host in hosts:
        mine = named.get(host.name, ())
        slots_left = mine if include is not None else tuple(slot for slot in host.slots if slot not in mine)
        if slots_left:
            chosen.append(replace(host, slots=slots_left, chosen=slots_left != host.slots))
    if not chosen:
        raise ValueError(f"{flag} {text} leaves no host")
    return chosen
