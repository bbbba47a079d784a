"""Entry of one rank: `python launcher/cluster/rank.py --run RUN [--log] [--starter …] -- RECIPE OPTIONS`.

srun and `loldu launch` start it once per process, or once per node with a starter. It installs signal handlers before
importing more than the standard library, since imports take seconds and a warning may arrive at any time. It sets RANK
and its family, checks that this node has the run folder and the environment of the first node, waits for the other
ranks, runs the recipe in this process, and records a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
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
STOPPED = 75  # as in exit_codes.py, which cannot be imported yet; for a rank an agreed stop is a success
SHARED_S = 60.0  # how long a network file system may take to show a new file
MEET_S = 300.0


class ClusterError(Exception):
    """A problem of the cluster that a person must fix; printed without a traceback."""


def main(arguments: list[str]) -> int:
    signals = EarlySignals()
    die_with_parent(os.environ.pop("LOLDU_PARENT", None))
    if arguments[:1] == ["environment"]:  # printed for the batch script, which passes it to every rank
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
            signals.restore_defaults()
            os.execv(words[0], words)
        meet(os.environ)
        signals.redeliver()
        code = run_recipe(command)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    code = 0 if code == STOPPED else code
    if code and "--log" in own:
        record_failure(run, code, os.environ)
    return code


def die_with_parent(parent: str | None) -> None:
    """Ask Linux to kill this rank when the agent that started it dies. Does nothing on other systems."""
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        raise SystemExit(1)


class EarlySignals:
    """Remembers signals that arrive before the recipe has installed its handlers, and sends them again afterwards."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        for signum in SIGNALS:
            signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.seen.add(signum)

    def redeliver(self) -> None:
        """Send the remembered signals as soon as the recipe has installed its handlers."""
        threading.Thread(target=self._watch, daemon=True).start()

    def restore_defaults(self) -> None:
        """Restore the default handlers, as exec would, and send the remembered signals."""
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
    """RANK and its family, computed from the variables of a Slurm step; empty if RANK is already set."""
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
    """logs/rank0@HOST.log, or logs/node0@HOST.log if a starter starts the ranks of a node."""
    who = f"node{environ.get('NODE_RANK', '0')}" if per_node else f"rank{environ.get('RANK', '0')}"
    return run / "logs" / f"{who}@{socket.gethostname()}.log"


def log_to(file: Path) -> None:
    """Append standard output and error of this process and its children to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def check_folder(run: Path, attempt: str | None, limit_s: float = SHARED_S) -> None:
    """Check that this node sees the file that the first node wrote for this start. Raises ClusterError."""
    if attempt is None:
        return
    file, deadline = run / "logs" / "attempt", time.monotonic() + limit_s
    while (found := _read(file)) != attempt:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{socket.gethostname()} sees {found or 'nothing'!r} in {file}, but the first node wrote {attempt!r}: "
                "the run folder is not shared. Start on a file system that all nodes share, or give --output there"
            )
        time.sleep(0.5)


def check_environment(expected: str | None, recipe: str) -> None:
    """Check that interpreter, packages and code are those of the first node. Raises ClusterError."""
    if expected is None:
        return
    use_project()
    from launcher.cluster.environment import differences, environment

    differ = differences(environment(recipe), json.loads(expected))
    if differ:
        raise ClusterError(
            f"{socket.gethostname()} differs from the first node: {'; '.join(differ)}. Install the same versions on "
            "all nodes, or put the environment on a shared file system"
        )


def meet(environ: Mapping[str, str], limit_s: float | None = None) -> None:
    """Wait until all ranks have connected to rank 0, or name the missing ones; afterwards the port is free again.

    torch would wait longer, and its error would not name the node that cannot be reached.
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
        raise ClusterError(
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
                raise ClusterError(text) from None
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
            raise ClusterError(
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
            raise ClusterError(answer)
        time.sleep(0.2)


def run_recipe(command: list[str]) -> int:
    """Run the recipe or file of settings in this process, as `loldu train` would; returns its exit code."""
    use_project()
    try:
        from launcher.start import train

        return train(command)
    except BaseException:
        traceback.print_exc()
        return 1


def starter_command(starter: str, environ: Mapping[str, str], command: list[str]) -> list[str]:
    """The torchrun or accelerate launch command of this node."""
    nodes, each = environ["SLURM_NNODES"], environ["LOLDU_PER_NODE"]
    if not command[0].endswith(".py"):  # settings, which only `loldu train` reads
        command = ["-m", "launcher", "train", *command]
    address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    if starter == "torchrun":
        return [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={each}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", f"--rdzv-id={environ['LOLDU_ATTEMPT']}",
            *command,
        ]  # fmt: skip
    # Without --cpu, which would start one process per node outside the group; CPU nodes set ACCELERATE_USE_CPU=true.
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_machines={nodes}",
        f"--num_processes={int(nodes) * int(each)}", f"--machine_rank={environ['NODE_RANK']}",
        f"--main_process_ip={address}", f"--main_process_port={port}", *command,
    ]  # fmt: skip


def record_failure(run: Path, code: int, environ: Mapping[str, str]) -> None:
    """Append the end of this rank's log to logs/failures, which the batch script prints.

    srun reports only the exit codes of ranks that it killed.
    """
    log = log_file(run, environ, per_node="NODE_RANK" in environ)
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, errors="replace") as file:
        tail = "".join(deque(file, maxlen=12))
    text = f"rank {environ.get('RANK', '0')} on {socket.gethostname()} ended with exit code {code}:\n{tail}  ({log})\n"
    with open(run / "logs" / "failures", "a") as file:
        file.write(text)


def use_project() -> None:
    """Import from this checkout, whether or not it is installed, and never from this file's own folder."""
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
