"""`loldu doctor`: checks whether machines are ready for a run. Each problem names its node and the remedy."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.cluster import hostfile as hostfiles
from launcher.cluster.agent import together
from launcher.cluster.environment import differences
from launcher.cluster.fleet import AGENT, Fleet, by_srun, over_ssh
from launcher.cluster.slurm_jobs import ask
from launcher.engines.registry import names
from launcher.files import user_path

GREET_S = 60.0
SHARED_S = 5.0  # how long a network file system may take to show what another node wrote
CONNECT_S = 5.0
SKEW_S = 2.0  # beyond this, file times and logs mislead
FREE_GB = 5.0
SLOW = 3.0  # a pair this many times slower than the median pair is reported
DEEPSPEED = names(lambda info: "deepspeed" in info.packages, word="and")
OPTIONAL = {
    "flash-attn": ("flash_attn", "pip install flash-attn; without it attention is SDPA"),
    "bitsandbytes": ("bitsandbytes", "pip install bitsandbytes; needed for --quantize"),
    "deepspeed": ("deepspeed", f"pip install deepspeed; needed for --sharding {DEEPSPEED}"),
}
OK, NOTE, BAD = "ok", "note", "BAD"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    where: str
    result: str  # ok, note (works, but worth knowing), BAD
    found: str
    remedy: str = ""


def doctor(
    hostfile: str | None = None,
    *,
    ssh_port: int | None = None,
    ssh_config: str | None = None,
    folder: str = ".",
    port: int = 29500,
    quick: bool = False,
    as_json: bool = False,
) -> int:
    """Run all checks and print the findings; returns 1 if one of them is BAD, else 0."""
    lines = nodes(hostfile, ssh_port, ssh_config)
    with Fleet(lines) as fleet:
        progress = print_progress if not as_json else None
        findings = examine(fleet, os.path.abspath(folder), port, quick=quick, progress=progress)
    bad = [finding for finding in findings if finding.result == BAD]
    if as_json:
        print(json.dumps({"ok": not bad, "nodes": list(lines), "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        show(findings)
        print(f"{len(bad)} problem{'s'[: len(bad) != 1]} on {len(lines)} node{'s'[: len(lines) != 1]}")
    return 1 if bad else 0


def nodes(hostfile: str | None, ssh_port: int | None, ssh_config: str | None) -> dict[str, list[str]]:
    """The command that starts an agent on each node: hosts of a file, nodes of this Slurm job, or this machine."""
    if hostfile is not None:
        return {
            host.name: over_ssh(
                host.name, folder=os.getcwd(), python=sys.executable, ssh_port=ssh_port, ssh_config=ssh_config
            )
            for host in hostfiles.read(hostfile)
        }
    if os.environ.get("SLURM_JOB_NODELIST"):
        answer = ask(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]])
        if answer.returncode:
            raise ValueError(f"scontrol cannot list the nodes of this job: {answer.stderr.strip()}")
        return {node: by_srun(node, sys.executable) for node in answer.stdout.split()}
    return {"here": [sys.executable, "-u", str(AGENT)]}


def print_progress(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def examine(
    fleet: Fleet, folder: str, port: int, *, quick: bool = False, progress: Callable[[str], None] | None = None
) -> list[Finding]:
    """Run all checks on all nodes. A node that does not answer is a finding; the other nodes are still checked.

    quick: skip importing the optional packages.
    """
    report = progress or (lambda text: None)
    report("connecting to the nodes, reading versions and devices")
    problems = fleet.greet(GREET_S)
    findings = [Finding("reachable", name, BAD, text, "see above") for name, text in problems.items()]
    names = [name for name in fleet.agents if name not in problems]
    facts, lost = fleet.ask_all("facts", 120.0, {name: {"folder": folder} for name in names})
    findings += [
        Finding("answers", name, BAD, text, "log in to the node and look at it") for name, text in lost.items()
    ]
    names = [name for name in names if name in facts]
    if not names:
        return findings
    findings += check_environment(facts) + check_gpus(facts) + check_disk(facts)
    findings += check_clocks(fleet, names)
    if not quick:
        report("importing the optional packages")
        findings += check_optional(fleet, facts)
    if len(names) > 1:
        report(f"writing and reading {folder} on every node")
        findings += check_folder(fleet, names, folder)
        report(f"connecting every pair of nodes on port {port}")
        reached = addresses(facts)
        open_ports = check_ports(fleet, names, reached, port)
        findings += open_ports
        blocked = {finding.where for finding in open_ports if finding.result == BAD}
        report("all-reduce between every pair of nodes")
        findings += check_pairs(fleet, names, reached, port + 1, blocked)
    else:
        report("all-reduce between two processes on this machine")
        with Fleet({"first": [sys.executable, "-u", str(AGENT)], "second": [sys.executable, "-u", str(AGENT)]}) as two:
            two.greet(GREET_S)
            alone = {"first": "127.0.0.1", "second": "127.0.0.1"}
            single_gpu = 0 < len(facts[names[0]]["gpus"]) < 2  # NCCL refuses two processes on one GPU
            if not single_gpu and names == ["here"]:
                findings += check_pairs(two, list(alone), alone, _free_port(port + 1), set(), one_machine=True)
    return findings


def check_environment(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Compare interpreter, packages and code of each node with those of the first node."""
    first = next(iter(facts))
    head = facts[first]["environment"]
    needed = {name: head[name] for name in ("torch", "transformers", "peft")}
    shown = ", ".join([f"Python {head['python'].split()[0]}", *(f"{name} {has}" for name, has in needed.items())])
    findings = []
    for name, fact in facts.items():
        differ = differences(fact["environment"], head)
        if differ:
            remedy = f"install the versions that {first} has, or share one environment"
            findings.append(Finding("versions", name, BAD, "; ".join(differ), remedy))
        elif "missing" in needed.values():
            findings.append(Finding("versions", name, BAD, shown, "pip install -e . in the project's folder"))
        else:
            findings.append(Finding("versions", name, OK, shown))
    return findings


def check_gpus(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Compare the GPUs of each node with those of the node that has most; a different driver is a note."""
    findings = []
    most = max(facts, key=lambda name: len(facts[name]["gpus"]))
    for name, fact in facts.items():
        gpus, driver = fact["gpus"], fact["driver"]
        kinds = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
        found = (
            f"{kinds}, driver {driver}" if gpus else f"none{f' ({driver})' if driver else ''}, {fact['cores']} cores"
        )
        if gpus != facts[most]["gpus"]:
            remedy = f"{most} has {len(facts[most]['gpus'])}: run nvidia-smi on {name}, or leave {name} out"
            findings.append(Finding("GPUs", name, BAD, found, remedy))
        elif gpus and not fact["usable_gpus"]:
            has = fact["environment"]["torch"]
            remedy = f"install a torch that fits this driver (pytorch.org/get-started); {name} has torch {has}"
            findings.append(Finding("GPUs", name, BAD, f"{found}; torch can use none of them", remedy))
        elif driver != facts[most]["driver"]:
            findings.append(Finding("GPUs", name, NOTE, found, f"{most} has driver {facts[most]['driver']}"))
        else:
            findings.append(Finding("GPUs", name, OK, found))
    return findings


def check_disk(facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Check the free space for runs, factors and temporary files."""
    findings = []
    for name, fact in facts.items():
        free = fact["free_gb"]
        full = [place for place, left in free.items() if left < FREE_GB]
        found = ", ".join(f"{place} {left:g} GB" for place, left in free.items())
        remedy = f"free some space in {', '.join(full)}: a run needs {FREE_GB:g} GB or more" if full else ""
        findings.append(Finding("free disk", name, BAD if full else OK, found, remedy))
    return findings


def check_clocks(fleet: Fleet, names: Sequence[str]) -> list[Finding]:
    """Compare clocks with this machine's. The fastest of three requests counts; half its time is the uncertainty."""

    def ask(name: str) -> tuple[float, float]:
        best = (float("inf"), 0.0)
        for _ in range(3):
            began = time.time()
            try:
                there = fleet.agents[name].ask("ping", 20.0)
            except Exception:
                break
            took = time.time() - began
            best = min(best, (took, there - began - took / 2))
        return best

    findings = []
    for name, (took, skew) in together(ask, names).items():
        if took == float("inf"):
            findings.append(Finding("clock", name, BAD, "no answer in 20 s", "the node is very slow: look at its load"))
        elif abs(skew) > SKEW_S + took:
            findings.append(Finding("clock", name, BAD, f"{skew:+.1f} s", "start chronyd or ntpd; check timedatectl"))
        else:
            findings.append(Finding("clock", name, OK, f"{skew:+.2f} s ± {took / 2:.2f} s"))
    return findings


def check_optional(fleet: Fleet, facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Check whether the optional packages import. A missing package is a note, not a problem."""

    def installed(versions: Mapping[str, str]) -> list[str]:
        return [module for package, (module, _) in OPTIONAL.items() if versions[package] != "missing"]

    each = {name: {"names": installed(fact["environment"])} for name, fact in facts.items()}
    errors, lost = fleet.ask_all("import", 150.0, each)
    findings = []
    for package, (module, remedy) in OPTIONAL.items():
        for name, fact in facts.items():
            version = fact["environment"][package]
            if version == "missing":
                findings.append(Finding(package, name, NOTE, "not installed", remedy))
            elif reason := lost.get(name) or errors[name][module]:
                findings.append(Finding(package, name, NOTE, f"{version}, not ready: {reason}", remedy))
            elif package == "flash-attn" and not fact["gpus"]:
                findings.append(Finding(package, name, NOTE, f"{version}, but no GPU: attention is SDPA"))
            else:
                findings.append(Finding(package, name, OK, f"{version}, ready"))
    return findings


def check_folder(fleet: Fleet, names: Sequence[str], folder: str) -> list[Finding]:
    """Check that the folder is shared: each node writes a file, then each node reads all of them."""
    place = user_path(folder) / f".loldu-doctor-{uuid.uuid4().hex}"
    each = {name: {"file": str(place / name), "text": name} for name in names}
    _, unwritten = fleet.ask_all("write", 30.0, each)
    findings = [
        Finding("shared folder", name, BAD, f"cannot write: {text}", f"check the permissions of {folder}")
        for name, text in unwritten.items()
    ]
    files = {str(place / name): name for name in names if name not in unwritten}
    unseen, unread = fleet.ask_all("unseen", 30.0, {name: {} for name in names}, files=files, limit_s=SHARED_S)
    for name in names:
        missing = [files[file] for file in unseen.get(name, files)]
        if missing:
            remedy = f"{folder} is not shared by all nodes: give a --folder on a shared file system"
            found = unread.get(name) or f"does not see the files that {', '.join(missing)} wrote"
            findings.append(Finding("shared folder", name, BAD, found, remedy))
        elif name not in unwritten:
            findings.append(Finding("shared folder", name, OK, f"sees every file in {folder}"))
    fleet.ask_all("remove", 30.0, {name: {"folder": str(place)} for name in names})
    return findings


def addresses(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The address of each node for the others: where ssh reached it, else its first own address, else its host name."""
    found = {}
    for name, fact in facts.items():
        known = (fact["reached_at"], *fact["addresses"])
        own = [address for address in known if address and not address.startswith(("127.", "::1"))]
        found[name] = own[0] if own else fact["host"]
    return found


def check_ports(fleet: Fleet, names: Sequence[str], reached: Mapping[str, str], port: int) -> list[Finding]:
    """Check the port: each node listens on it, and every other node connects."""
    findings = []
    _, taken = fleet.ask_all("listen", 20.0, {name: {} for name in names}, port=port, seconds=20.0)
    for name, text in taken.items():
        findings.append(Finding("port", name, BAD, f"{port}: {text}", "another program uses it: give another --port"))
    targets = {name: {other: reached[other] for other in names if other not in (name, *taken)} for name in names}
    each = {name: {"addresses": to, "limit_s": CONNECT_S} for name, to in targets.items()}
    times, lost = fleet.ask_all("connect", 20.0, each, port=port)
    for server in names:
        seen = {name: lost.get(name) or times[name][server] for name in names if server in targets[name]}
        failed = {name: answer for name, answer in seen.items() if isinstance(answer, str)}
        for client, text in failed.items():
            remedy = f"open port {port} and the ports above 32767 between the nodes (firewall on {server}), "
            remedy += "or correct the host name"
            findings.append(Finding("port", f"{client} -> {server}", BAD, f"{reached[server]}:{port}: {text}", remedy))
        if seen and not failed:
            findings.append(Finding("port", server, OK, f"{port} open to all nodes, {max(seen.values()):.1f} ms"))
    return findings


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Every pair once, in rounds in which each node is in at most one pair (the circle method)."""
    circle: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    half, planned = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        pairs = [(a, b) for a, b in zip(circle[:half], reversed(circle[half:]), strict=True) if a and b]
        planned.append(pairs)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return planned


def check_pairs(
    fleet: Fleet,
    names: Sequence[str],
    reached: Mapping[str, str],
    port: int,
    blocked: set[str],
    *,
    one_machine: bool = False,
) -> list[Finding]:
    """Run an all-reduce between each pair: is it correct, and is it much slower than the median pair?"""
    times: dict[tuple[str, str], dict[str, Any]] = {}
    findings = []
    for at, pairs in enumerate(rounds(names)):
        pairs = [(a, b) for a, b in pairs if f"{b} -> {a}" not in blocked and f"{a} -> {b}" not in blocked]
        each = {
            name: {"rank": side, "address": reached[pair[0]], "port": port + at, "device": side if one_machine else 0}
            for pair in pairs
            for side, name in enumerate(pair)
        }
        answers, failed = fleet.ask_all("all_reduce", 180.0, each)
        for a, b in pairs:
            where = f"{a} + {b}"
            reasons = [failed[name] for name in (a, b) if name in failed]
            if reasons:
                remedy = "see the ports above, or select the network with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
                findings.append(Finding("all-reduce", where, BAD, reasons[0].splitlines()[0][:200], remedy))
            elif not (answers[a]["right"] and answers[b]["right"]):
                remedy = f"leave {a} or {b} out: its memory or network is faulty"
                findings.append(Finding("all-reduce", where, BAD, "wrong sums", remedy))
            else:
                times[a, b] = answers[a]
    middle = statistics.median(found["seconds"] for found in times.values()) if times else 0.0
    for (a, b), found in times.items():
        seconds = found["seconds"]
        text = f"correct, {seconds * 1e3:.1f} ms for {found['megabytes']:g} MB ({found['backend']})"
        if len(times) > 2 and seconds > SLOW * middle and seconds > 0.005:
            remedy = f"{seconds / middle:.1f} times the median pair: check the cables and load of {a} and {b}"
            findings.append(Finding("all-reduce", f"{a} + {b}", NOTE, text, remedy))
        else:
            findings.append(Finding("all-reduce", f"{a} + {b}", OK, text))
    return findings


def _free_port(wanted: int) -> int:
    import socket

    for port in (wanted, 0):
        try:
            with socket.create_server(("", port)) as server:
                return int(server.getsockname()[1])
        except OSError:
            continue
    return wanted


def show(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "node", "", "found", "what to do")
    style = {OK: "green", NOTE: "yellow", BAD: "bold red"}
    for finding in findings:
        mark = f"[{style[finding.result]}]{finding.result}[/]"
        table.add_row(finding.check, finding.where, mark, _literal(finding.found), _literal(finding.remedy))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _literal(text: str) -> str:
    from rich.markup import escape

    return escape(text)
