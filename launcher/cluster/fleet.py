"""Agents on several hosts: started over ssh, with srun or on this machine, asked together, ended together."""

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

from launcher.cluster.agent import PREFIX
from launcher.files import parse_json, user_path
from launcher.text import one_line

AGENT = Path(__file__).resolve().with_name("agent.py")
HEARTBEAT_S = 2.0
LINE_CHARACTERS = 1 << 20  # of one message; an agent's longest is a line of a rank
DEAD_S = 10.0  # after this long without a message a host counts as dead
ADVICE = {
    "Permission denied": "ssh needs a login without a password: ssh-copy-id {host}, or set a key in ~/.ssh/config",
    "Host key verification failed": "the host key is unknown: run ssh {host} once by hand and compare the key",
    "Could not resolve hostname": "no such host: put its address in ~/.ssh/config or /etc/hosts, or correct the name",
    "Connection refused": "no ssh server answers there: is the --ssh-port right?",
    "timed out": "no answer: is the host up and not behind a firewall?",
    "No route to host": "no route: is the host up?",
}


class Lost(Exception):
    """A host that cannot be reached, or stopped answering."""


class Agent:
    """The connection to one host. Replies go to `answers`, all other messages to the queue of the fleet."""

    def __init__(self, name: str, command: Sequence[str], messages: queue.Queue[tuple[Agent, dict[str, Any]]]):
        self.name, self._messages = name, messages
        self.last_message = time.monotonic()
        self.greeted = threading.Event()
        self.answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.noise: deque[str] = deque(maxlen=20)  # other output: of ssh, or of the login shell
        self._numbers = iter(range(1, 1 << 30))
        # In its own session, so that a Ctrl-C at the terminal does not end ssh: we forward it to the ranks.
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", bufsize=1, start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline(LINE_CHARACTERS):
            self.last_message = time.monotonic()
            message = _parse(line)
            if message is None:
                self.noise.append(one_line(line.rstrip(), 500))
            elif "hello" in message:
                self.greeted.set()
            elif isinstance(number := message.get("id"), int):
                if number in self.answers:
                    self.answers[number].put(message)
            elif "alive" not in message:
                self._messages.put((self, message))
        self.process.wait()
        self._messages.put((self, {"gone": self.last_words()}))
        self.greeted.set()

    def send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            pass  # the reading thread notices that the host is gone

    def ask(self, request: str, timeout_s: float, **arguments: Any) -> Any:
        """The result of a request on the host. Raises Lost, or RuntimeError with the error that the host raised."""
        number = next(self._numbers)
        replies = self.answers[number] = queue.Queue()
        self.send(id=number, request=request, **arguments)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = replies.get(timeout=0.2)
                break
            except queue.Empty:
                if (reason := self.dead()) and replies.empty():
                    raise Lost(reason) from None
                if time.monotonic() > deadline:
                    raise Lost(
                        f"no answer to '{request}' in {timeout_s:.0f} s: the host is very slow or hangs"
                    ) from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def dead(self) -> str | None:
        """Why this host counts as dead; None if it is alive, or has ended and its last messages are still read."""
        if not self._reader.is_alive():
            return self.last_words()
        silent = time.monotonic() - self.last_message
        return f"silent for {silent:.0f} s: the host or its network is down" if silent > DEAD_S else None

    def last_words(self) -> str:
        text = "; ".join(self.noise) or f"the connection ended with exit code {self.process.poll()}"
        advice = [remedy.format(host=self.name) for sign, remedy in ADVICE.items() if sign in text]
        return "; ".join([text, *advice[:1]])


def _parse(line: str) -> dict[str, Any] | None:
    """A message of our agent; None for anything that ssh or the login shell prints."""
    if not line.startswith(PREFIX):
        return None
    try:
        message = parse_json(line[len(PREFIX) :])
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


class Fleet:
    """Agents by host name; a context manager that leaves nothing running."""

    def __init__(self, commands: Mapping[str, Sequence[str]]):
        self.messages: queue.Queue[tuple[Agent, dict[str, Any]]] = queue.Queue()
        self.agents = {name: Agent(name, command, self.messages) for name, command in commands.items()}
        self._open = True
        threading.Thread(target=self._heartbeat, daemon=True).start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections; each agent then ends the processes that it started."""
        self._open = False
        for agent in self.agents.values():
            assert agent.process.stdin is not None
            with contextlib.suppress(OSError):
                agent.process.stdin.close()
        deadline = time.monotonic() + 3.5  # an agent gives its processes 2 s
        for agent in self.agents.values():
            try:
                agent.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                agent.process.kill()
                agent.process.wait()

    def _heartbeat(self) -> None:
        while self._open:
            for agent in self.agents.values():
                agent.send(request="")
            time.sleep(HEARTBEAT_S)

    def greet(self, timeout_s: float) -> dict[str, str]:
        """Wait until every agent has started; problems by host."""
        deadline, problems = time.monotonic() + timeout_s, {}
        for name, agent in self.agents.items():
            if not agent.greeted.wait(max(0.0, deadline - time.monotonic())):
                problems[name] = f"no answer in {timeout_s:.0f} s: the host is very slow, or its login shell hangs"
            elif agent.process.poll() is not None or agent.process.stdout is None:
                problems[name] = agent.last_words()
        return problems

    def ask_all(
        self, request: str, timeout_s: float, each: Mapping[str, Mapping[str, Any]] | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Ask all hosts at once, or only those in `each`, with their own arguments; answers and problems by host."""
        answers: dict[str, Any] = {}
        problems: dict[str, str] = {}

        def ask(agent: Agent, own: Mapping[str, Any]) -> None:
            try:
                answers[agent.name] = agent.ask(request, timeout_s, **{**arguments, **own})
            except (Lost, RuntimeError) as error:
                problems[agent.name] = str(error)

        wanted = each if each is not None else {name: {} for name in self.agents}
        threads = [threading.Thread(target=ask, args=(self.agents[name], own)) for name, own in wanted.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers, problems


def over_ssh(
    host: str, *, folder: str, python: str, ssh_port: int | None = None, ssh_config: str | None = None
) -> list[str]:
    """The ssh command that starts an agent on a host, in the same folder and with the same interpreter as here."""
    quote = shlex.quote

    def or_exit(test: str, error: str) -> str:
        return f"{test} || {{ echo {quote(error)}; exit 1; }}; "

    steps = (
        or_exit(f"cd {quote(folder)}", f"has no folder {folder}: start on a file system that all hosts share")
        + or_exit(
            f"[ -x {quote(python)} ]", f"has no interpreter {python}: give one that all hosts have, with --python"
        )
        + or_exit(f"[ -f {quote(str(AGENT))} ]", f"has no {AGENT}: use the same checkout on all hosts")
        + f"exec {quote(python)} -u {quote(str(AGENT))}"
    )
    return [
        "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ConnectionAttempts=1",
        "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=3", "-o", "ControlMaster=no", "-o", "LogLevel=ERROR",
        *(["-p", str(ssh_port)] if ssh_port else []), *(["-F", str(user_path(ssh_config))] if ssh_config else []),
        "--", host, f"exec /bin/sh -c {quote(steps)}",
    ]  # fmt: skip


def by_srun(node: str, python: str) -> list[str]:
    """The srun command that starts an agent on a node of the current Slurm job."""
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
