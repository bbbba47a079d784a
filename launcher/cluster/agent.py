"""What runs on each host: `python launcher/cluster/agent.py`. Takes JSON lines, does what they say, answers in kind.

It lives exactly as long as its line to the one who started it: when that ends, or is silent for too long, every process
it started ends too. The standard library alone, but for the all-reduce of `doctor`.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SAY = "@loldu "  # before each of our lines: a login shell may print words of its own
BEAT_S = 2.0
SILENT_S = 12.0  # without a word for so long the other side is gone
GRACE_S = 2.0  # between TERM and KILL, when all is to end
speaking = threading.Lock()


def main() -> int:
    here = Path(__file__).resolve()
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != here.parent]
    sys.path.insert(0, str(here.parents[2]))
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: os.close(0))  # as if the line had ended
    started: dict[int, subprocess.Popen[bytes]] = {}
    threading.Thread(target=beat, daemon=True).start()
    say(hello=socket.gethostname())
    heard, waiting = time.monotonic(), b""
    try:
        while time.monotonic() - heard < SILENT_S:
            if not select.select([0], [], [], 1.0)[0]:
                continue
            new = os.read(0, 1 << 16)
            if not new:
                break
            heard, waiting = time.monotonic(), waiting + new
            *lines, waiting = waiting.split(b"\n")
            for line in lines:
                if line.strip():
                    obey(json.loads(line), started)
    except (OSError, ValueError):
        pass
    end(started)
    return 0


def obey(order: dict[str, Any], started: dict[int, subprocess.Popen[bytes]]) -> None:
    """Processes are started by this thread, which stays: they die with it. All else takes time, and a thread."""
    number, do = order.pop("id", None), order.pop("do", "")
    if do == "start":
        say(id=number, ok=start(started, **order))
    elif do == "signal":
        for process in started.values():
            if process.poll() is None:
                process.send_signal(order["number"])
    elif do:
        threading.Thread(target=answer, args=(number, ORDERS[do], order), daemon=True).start()


def answer(number: int, do: Callable[..., Any], order: dict[str, Any]) -> None:
    try:
        say(id=number, ok=do(**order))
    except Exception as error:
        say(id=number, error=f"{type(error).__name__}: {error}")


def say(**words: Any) -> None:
    with speaking:
        try:
            os.write(1, (SAY + json.dumps(words) + "\n").encode())
        except OSError:
            os._exit(1)  # nobody listens; the main thread's processes die with it


def beat() -> None:
    while True:
        time.sleep(BEAT_S)
        say(alive=True)


def start(
    started: dict[int, subprocess.Popen[bytes]], *, command: list[str], environ: dict[str, str], ranks: list[list[int]]
) -> int:
    """One process for each (rank, local rank); their lines and ends are told as they come."""
    for rank, local in ranks:
        mine = {"RANK": str(rank), "LOCAL_RANK": str(local), "LOLDU_PARENT": str(os.getpid())}
        process = subprocess.Popen(
            command, env=os.environ | environ | mine, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started[rank] = process
        threading.Thread(target=tell, args=(rank, process), daemon=True).start()
    return len(ranks)


def tell(rank: int, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        say(rank=rank, line=line.decode(errors="replace").rstrip("\r\n"))
    say(rank=rank, exit=process.wait())


def end(started: dict[int, subprocess.Popen[bytes]]) -> None:
    """TERM, then KILL, for each process and what it started."""
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
    """Who this host is and what it has."""
    from launcher.cluster.environment import environment

    gpus, driver = nvidia()
    reached = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "host": socket.gethostname(),
        "environment": environment(recipe),
        "gpus": gpus,
        "driver": driver,
        "reached_at": reached[2] if len(reached) == 4 else "",
        "addresses": own_addresses(),
        "clock": time.time(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free_gb": {name: round(shutil.disk_usage(path).free / 1e9, 1) for name, path in places(folder).items()},
    }


def nvidia() -> tuple[list[str], str]:
    """Names of the GPUs, and the driver's version; nothing without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return [], ""
    words = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [f"{name} ({memory})" for name, memory, _ in rows], rows[0][2] if rows else done.stdout.strip()[:200]


def own_addresses() -> list[str]:
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=20)
    return done.stdout.split()


def places(folder: str) -> dict[str, Path]:
    """Where runs, factors and temporary files go; the nearest folder that exists."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = {}
    for name, path in (("folder", Path(folder)), ("cache", cache), ("/tmp", Path("/tmp"))):
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
    """Those of the files that do not hold their text, also not after limit_s."""
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
    """Open a port and take every visitor for so long. Raises OSError where another program holds it."""
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
    """By name the milliseconds until a connection stands, or why there is none. All at once."""
    return together(lambda name: connect_one(addresses[name], port, limit_s), addresses)


def connect_one(address: str, port: int, limit_s: float) -> float | str:
    began = time.monotonic()
    try:
        socket.create_connection((address, port), timeout=limit_s).close()
    except OSError as error:
        return str(error)
    return (time.monotonic() - began) * 1e3


def import_packages(names: list[str], limit_s: float = 120.0) -> dict[str, str]:
    """By name nothing where `import name` works, else why not. Each in a process of its own: some crash."""
    return together(lambda name: import_one(name, limit_s), names)


def import_one(name: str, limit_s: float) -> str:
    words = [sys.executable, "-c", f"import {name}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"no end of `import {name}` in {limit_s:.0f} s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"it ended with {done.returncode}")


def together(do: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    """do(name) for all names at once, by name."""
    names = list(names)
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        return dict(zip(names, pool.map(do, names), strict=True))


def all_reduce(
    rank: int, address: str, port: int, device: int = 0, megabytes: float = 4.0, limit_s: float = 60.0
) -> dict[str, Any]:
    """Sum a tensor with one other process; whether each number is right, and the seconds of one round (best of 5)."""
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


ORDERS: dict[str, Callable[..., Any]] = {
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
