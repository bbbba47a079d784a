"""The agent on each host, `python launcher/cluster/agent.py`: reads requests and writes replies as JSON lines.

The agent ends when its standard input closes or stays silent too long, and ends every process that it started. It uses
only the standard library, except for the all-reduce of `loldu doctor`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

PREFIX = "@loldu "  # marks our lines: a login shell may print its own lines
HEARTBEAT_S = 2.0
SILENT_S = 12.0  # after this long without a message the other side counts as gone
POLL_S = 0.5  # between two looks whether a silent process has ended
GRACE_S = 2.0  # between TERM and KILL
LINE_BYTES = 1 << 16
MOST_WAITING = 1 << 26  # bytes of an unfinished request
output_lock = threading.Lock()


def main() -> int:
    here = Path(__file__).resolve()
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != here.parent]
    sys.path.insert(0, str(here.parents[2]))
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: os.close(0))  # as if standard input had been closed
    started: dict[int, subprocess.Popen[bytes]] = {}
    threading.Thread(target=heartbeat, daemon=True).start()
    send(hello=socket.gethostname())
    last_message, waiting = time.monotonic(), b""
    try:
        while time.monotonic() - last_message < SILENT_S:
            if not select.select([0], [], [], 1.0)[0]:
                continue
            new = os.read(0, 1 << 16)
            if not new:
                break
            last_message, waiting = time.monotonic(), waiting + new
            *lines, waiting = waiting.split(b"\n")
            if len(waiting) > MOST_WAITING:
                break
            for line in lines:
                if line.strip():
                    handle(json.loads(line), started)
    except (OSError, ValueError):
        pass
    terminate(started)
    return 0


def handle(message: dict[str, Any], started: dict[int, subprocess.Popen[bytes]]) -> None:
    """Act on one request. Ranks are started by this thread, since they die with the thread that started them; every
    other request runs in a separate thread."""
    number, request = message.pop("id", None), message.pop("request", "")
    if request == "start":
        send(id=number, ok=start(started, **message))
    elif request == "signal":
        for process in started.values():
            if process.poll() is None:
                process.send_signal(message["number"])
    elif request:
        threading.Thread(target=reply, args=(number, REQUESTS[request], message), daemon=True).start()


def reply(number: int, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        send(id=number, ok=function(**arguments))
    except Exception as error:
        send(id=number, error=f"{type(error).__name__}: {error}")


def send(**message: Any) -> None:
    with output_lock:
        try:
            os.write(1, (PREFIX + json.dumps(message) + "\n").encode())
        except OSError:
            os._exit(1)  # the other side is gone; the ranks die with the main thread


def heartbeat() -> None:
    while True:
        time.sleep(HEARTBEAT_S)
        send(alive=True)


def start(
    started: dict[int, subprocess.Popen[bytes]],
    *,
    command: list[str],
    environ: dict[str, str],
    ranks: list[list[int]],
    logs: str = "",
) -> int:
    """Start one process for each (rank, local rank); forward its output, also into logs, and its exit code."""
    for rank, local in ranks:
        mine = {"RANK": str(rank), "LOCAL_RANK": str(local), "LOLDU_PARENT": str(os.getpid())}
        process = subprocess.Popen(
            command, env=os.environ | environ | mine, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started[rank] = process
        log = Path(logs) / f"rank{rank}@{socket.gethostname()}.log" if logs else None
        threading.Thread(target=forward_output, args=(rank, process, log), daemon=True).start()
    return len(ranks)


def forward_output(rank: int, process: subprocess.Popen[bytes], log: Path | None) -> None:
    """Send each line of a rank, and append it to its log; lines without an end are cut into pieces."""
    file = open_log(log) if log else None
    for line in lines_of(process):
        if file is not None:
            try:
                file.write(line)
            except OSError as error:
                send(rank=rank, line=f"warning: cannot write {log}: {error.strerror}; this log ends here")
                file = None
        send(rank=rank, line=line.decode(errors="replace").rstrip("\r\n"))
    send(rank=rank, exit=process.wait())


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """The lines of a process until it has ended, also if one that it left behind keeps its output open."""
    assert process.stdout is not None
    output, waiting, ended = process.stdout.fileno(), b"", False
    while True:
        if select.select([output], [], [], 0.0 if ended else POLL_S)[0]:
            new = os.read(output, LINE_BYTES)
            if not new:
                break
            *lines, waiting = (waiting + new).split(b"\n")
            yield from (line + b"\n" for line in lines)
            if len(waiting) >= LINE_BYTES:
                yield waiting
                waiting = b""
        elif ended:
            break
        else:
            ended = process.poll() is not None
    if waiting:
        yield waiting


def open_log(log: Path) -> BinaryIO | None:
    """The log, to append to; None if it cannot be written. A symbolic link is not followed."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        return None
    return open(descriptor, "wb", buffering=0)


def terminate(started: dict[int, subprocess.Popen[bytes]]) -> None:
    """Send TERM, then KILL, to each process and its children."""
    for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        deadline = time.monotonic() + seconds
        for process in started.values():
            if process.poll() is None or number == signal.SIGKILL:
                try:
                    os.killpg(process.pid, number)
                except OSError:
                    continue
        while time.monotonic() < deadline and any(process.poll() is None for process in started.values()):
            time.sleep(0.05)


def facts(recipe: str = "", folder: str = ".") -> dict[str, Any]:
    """Describe this host: names and addresses, software, GPUs, clock, free disk."""
    from launcher.cluster.environment import environment

    gpus, driver = nvidia()
    reached = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "host": socket.gethostname(),
        "environment": environment(recipe),
        "gpus": gpus,
        "driver": driver,
        "usable_gpus": usable_by_torch() if gpus else 0,
        "reached_at": reached[2] if len(reached) == 4 else "",
        "addresses": own_addresses(),
        "clock": time.time(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free_gb": {name: round(shutil.disk_usage(path).free / 1e9, 1) for name, path in places(folder).items()},
    }


def nvidia() -> tuple[list[str], str]:
    """The names of the GPUs and the driver version; both empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return [], ""
    words = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [f"{name} ({memory})" for name, memory, _ in rows], rows[0][2] if rows else done.stdout.strip()[:200]


def usable_by_torch() -> int:
    """How many GPUs torch can use; it is imported in another process, which takes seconds."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return int(done.stdout) if done.stdout.strip().isdigit() else 0


def own_addresses() -> list[str]:
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=20)
    return done.stdout.split()


def places(folder: str) -> dict[str, Path]:
    """The folders of runs, factors and temporary files, or their nearest existing parents."""
    wanted = {"folder": Path(folder), "/tmp": Path("/tmp")}
    with contextlib.suppress(RuntimeError):  # no home directory: a run then needs --cache
        wanted["cache"] = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = {}
    for name, path in wanted.items():
        path = path.absolute()
        while not path.exists():
            path = path.parent
        found[name] = path
    return found


def write_file(file: str, text: str) -> bool:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)
    return True


def unseen(files: dict[str, str], limit_s: float = 10.0) -> list[str]:
    """The files that do not hold the expected text within limit_s."""
    deadline = time.monotonic() + limit_s
    while True:
        left = [file for file, text in files.items() if text_of(file) != text]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def text_of(file: str) -> str | None:
    try:
        return Path(file).read_text()
    except OSError:
        return None


def remove_folder(folder: str) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return True


def listen(port: int, seconds: float) -> bool:
    """Accept connections on a port for some seconds. Raises OSError if another program uses it."""
    server = socket.create_server(("", port), backlog=64)
    server.settimeout(0.2)

    def take() -> None:
        deadline = time.monotonic() + seconds
        with server:
            while time.monotonic() < deadline:
                try:
                    server.accept()[0].close()
                except TimeoutError:
                    continue

    threading.Thread(target=take, daemon=True).start()
    return True


def connect(addresses: dict[str, str], port: int, limit_s: float) -> dict[str, float | str]:
    """Connect to all addresses at once; for each name the milliseconds it took, or the error."""
    return together(lambda name: connect_one(addresses[name], port, limit_s), addresses)


def connect_one(address: str, port: int, limit_s: float) -> float | str:
    began = time.monotonic()
    try:
        socket.create_connection((address, port), timeout=limit_s).close()
    except OSError as error:
        return str(error)
    return (time.monotonic() - began) * 1e3


def import_packages(names: list[str], limit_s: float = 120.0) -> dict[str, str]:
    """For each name the error of `import name`, empty if it works. Each in its own process, since some crash."""
    return together(lambda name: import_one(name, limit_s), names)


def import_one(name: str, limit_s: float) -> str:
    words = [sys.executable, "-c", f"import {name}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"`import {name}` did not end within {limit_s:.0f} s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"it ended with exit code {done.returncode}")


def together(do: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    """Call do(name) for all names at once; the results by name."""
    names = list(names)
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        return dict(zip(names, pool.map(do, names), strict=True))


def all_reduce(
    rank: int, address: str, port: int, device: int = 0, megabytes: float = 4.0, limit_s: float = 60.0
) -> dict[str, Any]:
    """Sum a tensor with one other process: is every element correct, and the seconds of one round (best of 5)."""
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    where = torch.device("cuda", device) if on_gpu else torch.device("cpu")
    limit = datetime.timedelta(seconds=limit_s)
    store = dist.TCPStore(address, port, 2, rank == 0, timeout=limit)
    if on_gpu:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=2, timeout=limit)
    try:
        numbers = int(megabytes * 1e6 / 4)
        best, right = float("inf"), True
        for turn in range(6):  # the first one also opens the connections
            mine = torch.arange(numbers, dtype=torch.float32, device=where) % 1000 + rank + turn
            expected = 2 * (torch.arange(numbers, dtype=torch.float32, device=where) % 1000) + 1 + 2 * turn
            began = time.perf_counter()
            dist.all_reduce(mine)
            if on_gpu:
                torch.cuda.synchronize(where)
            best = min(best, time.perf_counter() - began) if turn else best
            right = right and bool(torch.equal(mine, expected))
    finally:
        dist.destroy_process_group()
    return {"right": right, "seconds": best, "megabytes": megabytes, "backend": "nccl" if on_gpu else "gloo"}


REQUESTS: dict[str, Callable[..., Any]] = {
    "facts": facts,
    "write": write_file,
    "unseen": unseen,
    "listen": listen,
    "connect": connect,
    "import": import_packages,
    "all_reduce": all_reduce,
    "remove": remove_folder,
    "ping": time.time,
}

if __name__ == "__main__":
    raise SystemExit(main())
