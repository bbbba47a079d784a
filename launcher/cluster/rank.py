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
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
STOPPED = 75  # as in exit_codes.py, which cannot be imported yet; for a rank an agreed stop is a success
SHARED_S = 60.0  # how long a network file system may take to show a new file


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
    try:
        if "--log" in own:
            log_to(log_file(run, os.environ, per_node=starter is not None))
        check_folder(run, os.environ.get("LOLDU_ATTEMPT"))
        check_environment(os.environ.get("LOLDU_ENVIRONMENT"), command[0])
        if starter is not None:
            words = starter_command(starter, os.environ, command)
            print(f"{socket.gethostname()}: {shlex.join(words)}", flush=True)
            os.environ.pop("LOLDU_TOKEN", None)
            signals.restore_defaults()
            os.execv(words[0], words)
        meet(os.environ, signals)
        signals.redeliver()
        code = run_recipe(command)
        signals.ignore()
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
        self.count = 0
        for signum in SIGNALS:
            signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.seen.add(signum)
        self.count += 1

    def redeliver(self) -> None:
        """Send the remembered signals as soon as the recipe has installed its handlers."""
        threading.Thread(target=self._watch, daemon=True).start()

    def restore_defaults(self) -> None:
        """Restore the default handlers, as exec would, and send the remembered signals."""
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        for seen in self.seen:
            os.kill(os.getpid(), seen)

    def ignore(self) -> None:
        """Ignore signals from now on: all is saved.

        Another rank may have passed the request on, so this one can end before its own signal comes. Python restores
        the default handlers early in its shutdown, and a rank killed there would count as failed.
        """
        for signum in (*SIGNALS, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)

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
    """Append standard output and error of this process and its children to a file. Raises ClusterError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_to_append(file)
    except OSError as error:
        raise ClusterError(f"cannot write the log {file} on {socket.gethostname()}: {error.strerror}") from None
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def open_to_append(file: Path) -> int:
    """A descriptor at the end of a file. Raises OSError for a symbolic link, which could lead to any other file."""
    return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)


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


def meet(environ: MutableMapping[str, str], signals: EarlySignals) -> None:
    """Wait for all ranks, then forget the job's token. Raises ClusterError naming the missing rank."""
    use_project()
    from launcher.cluster.rendezvous import TOKEN, RendezvousError
    from launcher.cluster.rendezvous import meet as meet_all

    try:
        meet_all(environ, asked=lambda: signals.count)
    except RendezvousError as error:
        raise ClusterError(str(error)) from None
    environ.pop(TOKEN, None)  # what the recipe starts, or logs of its environment, need not know it


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
    tail = ""
    with contextlib.suppress(OSError), open(log, errors="replace") as file:
        tail = "".join(deque(file, maxlen=12))
    text = f"rank {environ.get('RANK', '0')} on {socket.gethostname()} ended with exit code {code}:\n{tail}  ({log})\n"
    with contextlib.suppress(OSError), os.fdopen(open_to_append(run / "logs" / "failures"), "a") as file:
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
