"""`loldu launch`: run a recipe on several hosts over ssh. Checks all hosts, starts every rank, merges their output, and
ends all ranks together."""

from __future__ import annotations

import os
import queue
import re
import secrets
import shutil
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.cluster import hostfile, runs
from launcher.cluster.environment import differences
from launcher.cluster.fleet import Fleet, over_ssh
from launcher.cluster.hostfile import Host, Hosts
from launcher.cluster.rendezvous import TOKEN
from launcher.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, STOPPED
from launcher.files import read_or_empty
from launcher.recipes import find_recipe
from launcher.text import one_line, without_colours

GREET_S = 60.0
FACTS_S = 120.0
LAST_WORDS_S = 5.0  # after one rank has failed, for the other ranks to print their errors
FORWARDED = (
    "NCCL_", "GLOO_", "HF_", "OMP_", "MKL_", "TOKENIZERS_", "TORCH_", "PYTORCH_", "CUDA_", "XDG_CACHE_HOME",
    "ACCELERATE_USE_CPU", "LOLDU_MEET_S", "WANDB_",
)  # fmt: skip


def launch(recipe: str, hosts: Hosts, recipe_options: Sequence[str] = (), *, name: str | None = None) -> int:
    """Run a recipe on all hosts; returns the exit code. Nothing is started unless every host passes every check."""
    chosen = hostfile.choose(hostfile.read(hosts.hostfile), hosts.include, hosts.exclude)
    file = find_recipe(recipe)
    run = runs.run_folder(name, file, recipe_options)
    given = runs.option("--output", recipe_options)
    command = (str(file), *recipe_options, *(() if given == str(run) else (f"--output={run}",)))
    if shutil.which("ssh") is None:
        raise ValueError("ssh is not on PATH: install OpenSSH's client (apt-get install openssh-client)")
    lines = {
        host.name: over_ssh(
            host.name, folder=os.getcwd(), python=hosts.python, ssh_port=hosts.ssh_port, ssh_config=hosts.ssh_config
        )
        for host in chosen
    }
    runs.check_folder(run)
    with StopSignals() as signals, Fleet(lines) as fleet:
        attempt = uuid.uuid4().hex
        runs.write(run / "logs" / "attempt", attempt)
        head = check(fleet, chosen, file, run, attempt)
        address = hosts.master_addr or head
        runs.write(run / "control", "run\n")
        first = f"{chosen[0].name} ({address}:{hosts.port})"
        total = sum(len(host.slots) for host in chosen)
        counted = f"{total} process{'es'[: 2 * (total > 1)]} on {len(chosen)} host{'s'[: len(chosen) > 1]}"
        print(f"{counted}, meeting on {first}; run folder {one_line(str(run))}", flush=True)
        start(fleet, chosen, hosts, command, run, attempt, address)
        code = follow(fleet, chosen, run, signals)
    # All ranks have ended. One that was killed could not write how, and rank 0 may have saved while others failed.
    unsaid = {MISTAKE: ("", "running"), FAILED: ("", "running", "stopped"), INTERRUPTED: ("", "running")}
    if read_or_empty(run / "state") in unsaid.get(code, ()):
        runs.write(run / "state", "failed\n")
    return code


class StopSignals:
    """Counts Ctrl-C, TERM, USR2 and a closed terminal: the first asks to save and stop, the second ends the run.

    Ctrl-Z is refused: the hosts would take a suspended launch for a lost one and end the run.
    """

    def __init__(self) -> None:
        self.count, self._before = 0, {}  # type: ignore[var-annotated]

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                self._before[number] = signal.signal(number, self._on_signal)
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._on_suspend)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def _on_suspend(self, number: int, frame: FrameType | None) -> None:
        os.write(2, b"loldu launch cannot be suspended: the run would end. Ctrl-C saves and stops\n")


def check(fleet: Fleet, hosts: Sequence[Host], recipe: Path, run: Path, attempt: str) -> str:
    """Check that every host is reachable, has the same environment and code, a GPU per slot, and sees the run folder.

    Returns the address of the first host. Raises ValueError listing all problems.
    """
    problems = fleet.greet(GREET_S)
    _refuse(problems)
    facts, problems = fleet.ask_all("facts", FACTS_S, recipe=str(recipe), folder=str(run))
    _refuse(problems)
    head = facts[hosts[0].name]
    gpus = any(fact["gpus"] for fact in facts.values())
    unseen, unread = fleet.ask_all("unseen", 30.0, files={str(run / "logs" / "attempt"): attempt})
    for host in hosts:
        fact, wrong = facts[host.name], []
        differ = differences(fact["environment"], head["environment"])
        if differ:
            wrong.append(f"differs from {hosts[0].name}: {'; '.join(differ)}: install the same versions on all hosts")
        if gpus and len(fact["gpus"]) <= max(host.slots):
            wrong.append(f"slots={max(host.slots) + 1}, but it has {len(fact['gpus'])} GPUs: correct the hostfile")
        if unseen.get(host.name) != []:
            why = unread.get(host.name, "no such file")
            wrong.append(f"does not see {run}: start on a file system that all hosts share ({why})")
        if wrong:
            problems[host.name] = "; ".join(wrong)
    twice: dict[str, str] = {}
    for host in hosts:
        if (other := twice.setdefault(_machine(facts[host.name]), host.name)) != host.name:
            problems[host.name] = f"is the same machine as {other}: list each machine once"
    _refuse(problems)
    reached = head["reached_at"]
    if (not reached or reached.startswith("127.") or reached == "::1") and len(hosts) > 1:
        return next((address for address in head["addresses"] if not address.startswith("127.")), reached)
    return reached or "127.0.0.1"


def _machine(fact: Mapping[str, Any]) -> str:
    return f"{fact['host']} {' '.join(sorted(fact['addresses']))} {fact['reached_at'] if not fact['addresses'] else ''}"


def _refuse(problems: Mapping[str, str]) -> None:
    if problems:
        lines = [f"  {name}: {text}" for name, text in problems.items()]
        raise ValueError("\n".join(["nothing was started:", *lines, "loldu doctor --hostfile FILE shows more"]))


def start(
    fleet: Fleet, hosts: Sequence[Host], options: Hosts, command: Sequence[str], run: Path, attempt: str, address: str
) -> None:
    """Start all ranks on all hosts, numbered in the order of the hostfile."""
    entry = str(Path(__file__).resolve().with_name("rank.py"))
    total, first, each = sum(len(host.slots) for host in hosts), 0, {}
    shared = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    shared.pop("CUDA_VISIBLE_DEVICES", None)  # applies to this machine only
    shared |= dict(word.split("=", 1) for word in options.env)
    shared[TOKEN] = secrets.token_hex(32)  # over ssh's standard input, never on a command line
    for host in hosts:
        environ = shared | {
            "WORLD_SIZE": str(total), "LOCAL_WORLD_SIZE": str(len(host.slots)), "MASTER_ADDR": address,
            "MASTER_PORT": str(options.port), "LOLDU_ATTEMPT": attempt, "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        if host.chosen:
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.slots))
        words = [options.python, entry, "--run", str(run), "--", *command]
        ranks = [[first + local, local] for local in range(len(host.slots))]
        each[host.name] = {"command": words, "environ": environ, "ranks": ranks, "logs": str(run / "logs")}
        first += len(host.slots)
    _, problems = fleet.ask_all("start", 60.0, each)
    _refuse(problems)


class Output:
    """What `loldu launch` prints. When its reader goes away (as in `| head`), the run is asked to save and stop."""

    def __init__(self, hosts: Sequence[Host], signals: StopSignals):
        self._width, self._signals = max(len(host.name) for host in hosts), signals

    def print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            discard_output()
            self._signals.count = max(1, self._signals.count)

    def line(self, host: str, rank: int, text: str) -> None:
        self.print(f"{host:<{self._width}} rank {rank}: {one_line(text)}")


def discard_output() -> None:
    """Send standard output nowhere from now on: Python would fail again when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@dataclass
class Failure:
    """The first rank that failed, or a lost host; with it the exit code of the launch."""

    text: str
    code: int
    since: float
    consequence: bool = False  # it lost its connection to another rank, which is the one to blame


def follow(fleet: Fleet, hosts: Sequence[Host], run: Path, signals: StopSignals) -> int:
    """Print the output of all ranks until they have ended; returns the exit code. A failing host or rank ends all.

    A host whose ranks have all ended well may be lost: the others save. Once a rank has failed, the errors that the
    others get from it go only into their logs.
    """
    output, handled = Output(hosts, signals), 0
    host_of = dict(enumerate(host.name for host in hosts for _ in host.slots))
    left = set(host_of)
    last_lines: dict[int, deque[str]] = {rank: deque(maxlen=50) for rank in left}
    failure: Failure | None = None
    while left and not (failure and time.monotonic() > failure.since + LAST_WORDS_S):
        if signals.count > handled:
            handled += 1
            if handled > 1:
                output.print("ending all processes at once")
                return INTERRUPTED
            output.print("stopping: saving on all hosts (a second signal ends all processes at once)")
            for agent in fleet.agents.values():
                agent.send(request="signal", number=int(signal.SIGTERM))
        try:
            agent, message = fleet.messages.get(timeout=0.2)
        except queue.Empty:
            message = {}
            for agent in (agent for name, agent in fleet.agents.items() if name in {host_of[rank] for rank in left}):
                if (reason := agent.dead()) and not failure and fleet.messages.empty():
                    message = {"gone": reason}
                    break
        if "line" in message:
            text = without_colours(str(message["line"])).rsplit("\r", 1)[-1]
            last_lines[message["rank"]].append(text)
            if failure is None:
                output.line(agent.name, message["rank"], text)
        elif "exit" in message:
            left.discard(message["rank"])
            if message["exit"] != 0 and (failure is None or failure.consequence):
                mine = _failure(agent.name, message["rank"], message["exit"], last_lines[message["rank"]])
                if failure is None or not mine.consequence:
                    failure = mine
            if failure is not None and not failure.consequence:
                break
        elif "gone" in message and not failure and agent.name in {host_of[rank] for rank in left}:
            failure = Failure(f"{agent.name} is lost ({one_line(str(message['gone']))}); ending all hosts", FAILED, 0.0)
    if failure is not None:
        _print_error(f"{failure.text} (logs of all ranks: {one_line(str(run / 'logs'))})")
        return INTERRUPTED if signals.count and failure.code == INTERRUPTED else failure.code
    state = read_or_empty(run / "state")
    if state == "stopped":
        output.print(f"stopped and saved; the same command resumes (run folder {one_line(str(run))})")
    return STOPPED if state == "stopped" else FAILED if state == "failed" else DONE


CONSEQUENCE = re.compile(
    "connection (closed|reset|refused)|broken pipe|DistNetworkError|DistStoreError|DistBackendError|TCPStore|gloo|NCCL|"
    "no word from rank|did not connect|ends, because rank|ended without a word|lost the connection",
    re.IGNORECASE,
)
ERROR_LINE = re.compile(r"error: .*|[A-Za-z_.]*(Error|Exception|Interrupt)\b.*")


def _failure(host: str, rank: int, exit_code: int, lines: Sequence[str]) -> Failure:
    """How a rank ended and why: its last line that looks like an error, else its last line."""
    errors = [line for line in lines if ERROR_LINE.match(line)] or [line for line in lines if line.strip()]
    cause = errors[-1] if errors else ""
    if exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else f"signal {-exit_code}"
        how, cause = f"was killed by {name}", "out of memory, or killed by hand" if name == "SIGKILL" else cause
    else:
        how = f"ended with exit code {exit_code}"
    code = exit_code if exit_code in (MISTAKE, INTERRUPTED) else FAILED
    text = f"rank {rank} on {host} {how}{f': {one_line(cause, 300)}' if cause else ''}; ending the others"
    consequence = exit_code in (FAILED, -signal.SIGABRT) and CONSEQUENCE.search(cause) is not None
    return Failure(text, code, time.monotonic(), consequence)


def _print_error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
