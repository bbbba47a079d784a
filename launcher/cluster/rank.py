"""One rank of a run: `python launcher/cluster/rank.py --run RUN [--log] [--starter …] -- RECIPE OPTIONS`.

Slurm's srun and `loldu launch` start it once per process (or per node, with a starter). Nothing but the standard
library is imported before the signals are caught: imports take seconds, and a warning may come at any time. It numbers
itself, checks that this node sees the same folder and the same environment as the first one, meets the other ranks,
runs the recipe in this process, and notes how that ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
STOPPED = 75  # of exit_codes.py, which is not to be imported yet; for a rank an agreed stop is no failure
SHARED_S = 60.0  # a network file system may take so long to show a new file
MEET_S = 300.0


class Trouble(Exception):
    """Something about the cluster that a person must put right; shown without a traceback."""


def main(arguments: list[str]) -> int:
    signals = EarlySignals()
    die_with_parent(os.environ.pop("LOLDU_PARENT", None))
    if arguments[:1] == ["environment"]:  # what the batch script compares the nodes with
        use_project()
        from launcher.cluster.environment import environment

        print(json.dumps(environment(arguments[1])))
        return 0
    at = arguments.index("--")
    own, command = arguments[:at], arguments[at + 1 :]
    run = Path(own[own.index("--run") + 1])
    starter = own[own.index("--starter") + 1] if "--starter" in own else None
    os.environ.update(number(os.environ, per_node=starter is not None))
    if "--log" in own:
        log_to(log_file(run, os.environ, per_node=starter is not None))
    try:
        check_folder(run, os.environ.get("LOLDU_ATTEMPT"))
        check_environment(os.environ.get("LOLDU_ENVIRONMENT"), command[0])
        if starter is not None:
            words = starter_command(starter, os.environ, command)
            print(f"{socket.gethostname()}: {' '.join(words)}", flush=True)
            signals.give_back()
            os.execv(words[0], words)
        meet(os.environ)
        signals.hand_on()
        code = run_recipe(command)
    except Trouble as trouble:
        print(f"error: {trouble}", file=sys.stderr, flush=True)
        code = 2
    code = 0 if code == STOPPED else code
    if code and "--log" in own:
        record_failure(run, code, os.environ)
    return code


def die_with_parent(parent: str | None) -> None:
    """An agent that is killed takes its ranks with it; on Linux, where a process can ask for that."""
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        raise SystemExit(1)


class EarlySignals:
    """Signals that come before the recipe has put its own handlers in; they are sent again once it has."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        for signum in SIGNALS:
            signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.seen.add(signum)

    def hand_on(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def give_back(self) -> None:
        """Before exec, which puts the default handlers in: what came until now counts as it would have then."""
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        for seen in self.seen:
            os.kill(os.getpid(), seen)

    def _watch(self) -> None:
        waiting = set(SIGNALS)
        while waiting:
            waiting = {signum for signum in waiting if signal.getsignal(signum) == self._remember}
            for signum in self.seen - waiting:
                os.kill(os.getpid(), signum)
            self.seen &= waiting
            time.sleep(0.1)


def number(environ: Mapping[str, str], *, per_node: bool) -> dict[str, str]:
    """RANK and its family from Slurm's variables of a step; nothing where they are set already."""
    if "RANK" in environ or "SLURM_PROCID" not in environ:
        return {}
    if per_node:
        return {"NODE_RANK": environ["SLURM_NODEID"]}
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(int(environ["SLURM_NTASKS"]) // int(environ["SLURM_NNODES"])),
    }


def log_file(run: Path, environ: Mapping[str, str], *, per_node: bool) -> Path:
    """logs/rank0@HOST.log, or node0@HOST.log where a starter makes the ranks of a node."""
    who = f"node{environ.get('NODE_RANK', '0')}" if per_node else f"rank{environ.get('RANK', '0')}"
    return run / "logs" / f"{who}@{socket.gethostname()}.log"


def log_to(file: Path) -> None:
    """Standard output and error of this process and its children go to the file's end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def check_folder(run: Path, attempt: str | None, limit_s: float = SHARED_S) -> None:
    """Whether this node sees what the first one wrote for this very start."""
    if attempt is None:
        return
    file, deadline = run / "logs" / "attempt", time.monotonic() + limit_s
    while (found := _read(file)) != attempt:
        if time.monotonic() > deadline:
            raise Trouble(
                f"{socket.gethostname()} sees {found or 'nothing'!r} in {file}, the first node wrote {attempt!r}: is "
                "it one shared folder on all nodes? Start on the shared file system, or give --output there"
            )
        time.sleep(0.5)


def check_environment(expected: str | None, recipe: str) -> None:
    """Interpreter, packages and code as on the first node."""
    if expected is None:
        return
    use_project()
    from launcher.cluster.environment import differences, environment

    differ = differences(environment(recipe), json.loads(expected))
    if differ:
        raise Trouble(
            f"{socket.gethostname()} differs from the first node: {'; '.join(differ)}. Install the same on all nodes, "
            "or put the environment on the shared file system"
        )


def meet(environ: Mapping[str, str], limit_s: float | None = None) -> None:
    """Wait until all ranks are there, over one TCP port, and say who is missing; then the port is free again.

    torch would wait longer, and end without saying which node cannot reach which.
    """
    world = int(environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return
    rank, address, port = int(environ["RANK"]), environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    limit_s = float(environ.get("LOLDU_MEET_S", MEET_S)) if limit_s is None else limit_s
    deadline = time.monotonic() + limit_s
    if rank == 0:
        _receive(world, address, port, deadline, limit_s)
    else:
        _visit(rank, address, port, deadline, limit_s)


def _receive(world: int, address: str, port: int, deadline: float, limit_s: float) -> None:
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world)
        else:
            server = socket.create_server(("", port), backlog=world)
    except OSError as error:
        raise Trouble(
            f"port {port} on {socket.gethostname()} cannot be opened ({os.strerror(error.errno or 0)}): another "
            "program may hold it; start again with another --port"
        ) from None
    guests: dict[int, socket.socket] = {}
    with server:
        while len(guests) < world - 1:
            left = deadline - time.monotonic()
            server.settimeout(max(left, 0.01))
            try:
                guest, _ = server.accept()
                guest.settimeout(5.0)
                word = guest.makefile("r").readline().split()
                if word[:1] == ["loldu-rank"] and word[1:] and word[1].isdigit() and 0 < int(word[1]) < world:
                    guests[int(word[1])] = guest
            except TimeoutError:
                if left > 0:
                    continue
                missing = ", ".join(str(other) for other in range(1, world) if other not in guests)
                text = (
                    f"waited {limit_s:.0f} s on {address}:{port}: no word from rank {missing} of {world}; "
                    "look at the log of that rank and at its node first"
                )
                for guest in guests.values():
                    with contextlib.suppress(OSError):
                        guest.sendall(f"{text}\n".encode())
                raise Trouble(text) from None
            except OSError:
                continue  # somebody else knocked
    for guest in guests.values():
        with contextlib.suppress(OSError):  # one that has left meanwhile ends the run by itself
            guest.sendall(b"go\n")
    for guest in guests.values():
        with contextlib.suppress(OSError):
            guest.recv(1)  # they hang up first, so the port is free for torch at once
        guest.close()


def _visit(rank: int, address: str, port: int, deadline: float, limit_s: float) -> None:
    here, refused = socket.gethostname(), "no answer"
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Trouble(
                f"rank {rank} on {here} cannot reach rank 0 at {address}:{port} within {limit_s:.0f} s ({refused}): "
                "is a firewall between the nodes, or does that name mean something else here? loldu doctor tells"
            )
        try:
            with socket.create_connection((address, port), timeout=min(left, 10.0)) as line:
                line.sendall(f"loldu-rank {rank}\n".encode())
                line.settimeout(left + 5.0)
                answer = line.makefile("r").readline().strip()
        except OSError as error:
            refused, answer = str(error), ""
        if answer == "go":
            return
        if answer:
            raise Trouble(answer)
        time.sleep(0.2)


def run_recipe(command: list[str]) -> int:
    """The recipe as `python RECIPE OPTIONS` would run it, in this process; its exit code."""
    use_project()
    sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
    sys.argv = list(command)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def starter_command(starter: str, environ: Mapping[str, str], command: list[str]) -> list[str]:
    """torchrun or accelerate launch, once per node."""
    nodes, each = environ["SLURM_NNODES"], environ["LOLDU_PER_NODE"]
    address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    if starter == "torchrun":
        return [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={each}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", f"--rdzv-id={environ['LOLDU_ATTEMPT']}",
            *command,
        ]  # fmt: skip
    # Not --cpu, which starts one plain process per node: on CPU nodes ACCELERATE_USE_CPU=true says it.
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_machines={nodes}",
        f"--num_processes={int(nodes) * int(each)}", f"--machine_rank={environ['NODE_RANK']}",
        f"--main_process_ip={address}", f"--main_process_port={port}", *command,
    ]  # fmt: skip


def record_failure(run: Path, code: int, environ: Mapping[str, str]) -> None:
    """The end of this rank's log, for the batch script to show: srun itself only knows whom it killed."""
    log = log_file(run, environ, per_node="NODE_RANK" in environ)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, errors="replace") as file:
        tail = "".join(deque(file, maxlen=12))
    text = f"rank {environ.get('RANK', '0')} on {socket.gethostname()} ended with exit code {code}:\n{tail}  ({log})\n"
    with open(run / "logs" / "failures", "a") as file:
        file.write(text)


def use_project() -> None:
    """Imports come from this checkout, installed or not, and never from this file's own folder."""
    here = Path(__file__).resolve()
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != here.parent]
    if str(here.parents[2]) not in sys.path:
        sys.path.insert(0, str(here.parents[2]))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
