"""Agents on several hosts at once: started over ssh, by srun or here, asked together, ended together."""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.cluster.agent import SAY

AGENT = Path(__file__).resolve().with_name("agent.py")
BEAT_S = 2.0
DEAD_S = 10.0  # without a word for so long a host counts as dead
ADVICE = {
    "Permission denied": "ssh does not let you in without a password: ssh-copy-id {host}, or a key in ~/.ssh/config",
    "Host key verification failed": "its key is not known here: type ssh {host} once by hand, and compare the key",
    "Could not resolve hostname": "no such host: put its address in ~/.ssh/config or /etc/hosts, or correct the name",
    "Connection refused": "no ssh server answers there: is it the right --ssh-port?",
    "timed out": "no answer: is the host up, and not behind a firewall?",
    "No route to host": "no way there: is the host up?",
}


class Lost(Exception):
    """A host that cannot be reached, or no longer."""


class Agent:
    """One host's line. What it says arrives in the fleet's queue, what it answers in `answers`."""

    def __init__(self, name: str, command: Sequence[str], said: queue.Queue[tuple[Agent, dict[str, Any]]]):
        self.name, self._said = name, said
        self.heard = time.monotonic()
        self.greeted = threading.Event()
        self.answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.noise: deque[str] = deque(maxlen=20)  # what ssh or the login shell said beside us
        self._numbers = iter(range(1, 1 << 30))
        # In a session of its own: a Ctrl-C at the terminal is ours to hand on, not ssh's to die of.
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", bufsize=1, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard = time.monotonic()
            if not line.startswith(SAY):
                self.noise.append(line.rstrip())
                continue
            words = json.loads(line[len(SAY) :])
            if "hello" in words:
                self.greeted.set()
            elif words.get("id") in self.answers:
                self.answers[words["id"]].put(words)
            elif "alive" not in words:
                self._said.put((self, words))
        self.process.wait()
        self._said.put((self, {"gone": self.process.returncode}))
        self.greeted.set()

    def send(self, **order: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            pass  # the reader notices, and says so

    def ask(self, do: str, timeout_s: float, **order: Any) -> Any:
        """What the order returns there. Raises Lost, or RuntimeError with the error that was raised there."""
        number = next(self._numbers)
        box = self.answers[number] = queue.Queue()
        self.send(id=number, do=do, **order)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = box.get(timeout=0.2)
                break
            except queue.Empty:
                if reason := self.dead():
                    raise Lost(reason) from None
                if time.monotonic() > deadline:
                    raise Lost(f"no answer to '{do}' in {timeout_s:.0f} s: it is very slow, or hangs") from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def dead(self) -> str | None:
        """Why this host counts as dead, if it does."""
        if self.process.poll() is not None:
            return self.last_words()
        silent = time.monotonic() - self.heard
        return f"silent for {silent:.0f} s: it is down, or its network" if silent > DEAD_S else None

    def last_words(self) -> str:
        words = "; ".join(self.noise) or f"its line ended with exit code {self.process.poll()}"
        advice = [text.format(host=self.name) for sign, text in ADVICE.items() if sign in words]
        return "; ".join([words, *advice[:1]])


class Fleet:
    """Agents by host name; a context manager that leaves nothing running."""

    def __init__(self, commands: Mapping[str, Sequence[str]]):
        self.said: queue.Queue[tuple[Agent, dict[str, Any]]] = queue.Queue()
        self.agents = {name: Agent(name, command, self.said) for name, command in commands.items()}
        self._open = True
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The end of a line ends what was started behind it."""
        self._open = False
        for agent in self.agents.values():
            assert agent.process.stdin is not None
            with contextlib.suppress(OSError):
                agent.process.stdin.close()
        deadline = time.monotonic() + 3.5  # an agent gives its processes two
        for agent in self.agents.values():
            try:
                agent.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                agent.process.kill()
                agent.process.wait()

    def _beat(self) -> None:
        while self._open:
            for agent in self.agents.values():
                agent.send(do="")
            time.sleep(BEAT_S)

    def greet(self, timeout_s: float) -> dict[str, str]:
        """Wait for every agent to be there; problems by host."""
        deadline, problems = time.monotonic() + timeout_s, {}
        for name, agent in self.agents.items():
            if not agent.greeted.wait(max(0.0, deadline - time.monotonic())):
                problems[name] = f"no agent in {timeout_s:.0f} s: the host is very slow, or its login shell hangs"
            elif agent.process.poll() is not None or agent.process.stdout is None:
                problems[name] = agent.last_words()
        return problems

    def ask_all(
        self, do: str, timeout_s: float, orders: Mapping[str, Mapping[str, Any]] | None = None, **order: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Ask every host (or those in orders, each its own) at once: answers, and problems, by host."""
        answers: dict[str, Any] = {}
        problems: dict[str, str] = {}

        def ask(agent: Agent, mine: Mapping[str, Any]) -> None:
            try:
                answers[agent.name] = agent.ask(do, timeout_s, **{**order, **mine})
            except (Lost, RuntimeError) as error:
                problems[agent.name] = str(error)

        wanted = orders if orders is not None else {name: {} for name in self.agents}
        threads = [threading.Thread(target=ask, args=(self.agents[name], mine)) for name, mine in wanted.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers, problems


def over_ssh(
    host: str, *, folder: str, python: str, ssh_port: int | None = None, ssh_config: str | None = None
) -> list[str]:
    """The command that starts an agent on a host, in the same folder and by the same interpreter as here."""
    quote = shlex.quote

    def or_end(test: str, what: str) -> str:
        return f"{test} || {{ echo {quote(what)}; exit 1; }}; "

    steps = (
        or_end(f"cd {quote(folder)}", f"has no folder {folder}: start on a file system that all hosts share")
        + or_end(f"[ -x {quote(python)} ]", f"has no interpreter {python}: same path on all hosts, or --python")
        + or_end(f"[ -f {quote(str(AGENT))} ]", f"has no {AGENT}: same checkout on all hosts")
        + f"exec {quote(python)} -u {quote(str(AGENT))}"
    )
    return [
        "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ConnectionAttempts=1",
        "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=3", "-o", "ControlMaster=no", "-o", "LogLevel=ERROR",
        *(["-p", str(ssh_port)] if ssh_port else []), *(["-F", ssh_config] if ssh_config else []),
        "--", host, f"exec /bin/sh -c {quote(steps)}",
    ]  # fmt: skip


def by_srun(node: str, python: str) -> list[str]:
    """The command that starts an agent on a node of the Slurm job we are in."""
    return [
        "srun",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
        "--export=ALL",
        python,
        "-u",
        str(AGENT),
    ]
