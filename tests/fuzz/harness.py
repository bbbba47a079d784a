"""Runs one command line in a forked process, with limits on time and memory, and judges how it ended.

A fork shares the libraries that this process has imported, so a case costs what the command itself costs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 10.0
LIMIT_BYTES = 1_000_000_000  # beyond what the libraries take


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int  # -9: it was killed at the limit
    out: str
    error: str
    seconds: float
    extra_bytes: int  # of peak memory, beyond what this process held at the start
    queued_s: float = 0.0  # of these seconds, what it and its children waited for a processor: the machine may be busy


def command(words: Sequence[str]) -> int:
    """`loldu WORDS`; `train OPTIONS` starts the recipe that most users start with, `train-file FILE` that file."""
    from launcher import cli

    started = {"train": ["train", "llama2_alpaca_loldu"], "train-file": ["train"]}.get(words[0], words[:1])
    return cli.main([*started, *words[1:]])


def run(act: Callable[[], int], cwd: Path, limit_s: float = 2 * LIMIT_S) -> Ended:
    """Call act in a child process; its standard input is closed, so that nothing can ask and wait."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        began, before = time.monotonic(), _bytes(os.getpid(), "VmRSS")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setsid()
                os.chdir(cwd)
                for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out.fileno()), (2, error.fileno())):
                    os.dup2(file, number)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))
                # Room for a runaway command to be noticed, without the machine running out of memory.
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 31, 1 << 31))
                code = act()
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code & 255)
        status, peak, queued_s, deadline = None, before, 0.0, began + limit_s
        waited: dict[int, float] = {}  # of the command and each process that it starts and waits for
        while status is None:
            done, found = os.waitpid(child, os.WNOHANG)
            if done:
                status = found
                break
            waited |= {process: _queued_s(process) for process in _family(child)}
            peak, queued_s = max(peak, _bytes(child, "VmHWM")), sum(waited.values())
            if time.monotonic() > deadline + queued_s or peak - before > 8 * LIMIT_BYTES:
                with contextlib.suppress(OSError):
                    os.killpg(child, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.01)
        seconds = time.monotonic() - began
        out.seek(0)
        error.seek(0)
        texts = [file.read(1 << 20).decode(errors="replace") for file in (out, error)]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(code, texts[0], texts[1], seconds, max(0, peak - before), queued_s)


def _bytes(process: int, kind: str) -> int:
    """Memory of a process: VmRSS what it holds now, VmHWM the most that it has held."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) * 1024
    return 0


def _family(process: int) -> list[int]:
    """The process and its descendants."""
    found = [process]
    for each in found:
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _queued_s(process: int) -> float:
    """How long its main thread was ready to run, and waited for a processor; 0 if the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def faults(ended: Ended, *, codes: Sequence[int] = (2,)) -> list[str]:
    """What is wrong with an ending: expected is one line on standard error for a mistake, soon, and no traceback."""
    found = []
    if ended.code not in codes:
        found.append(f"exit code {ended.code}")
    if "Traceback (most recent call last)" in ended.error + ended.out:
        found.append("traceback")
    if ended.seconds - ended.queued_s > LIMIT_S:
        found.append(f"{ended.seconds - ended.queued_s:.0f} s")
    if ended.extra_bytes > LIMIT_BYTES:
        found.append(f"{ended.extra_bytes / 1e9:.1f} GB")
    if ended.code == 2:
        lines = [line for line in ended.error.splitlines() if not line.startswith("warning: ")]
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1:
            found.append(f"{len(errors)} lines of error")
    if "\x1b" in ended.error + ended.out:
        found.append("escape sequence on the terminal")
    return found


def snapshot(folder: Path, apart_from: Sequence[str] = ()) -> dict[str, str]:
    """The files below a folder with their digests, to see whether a command touched any."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any(name == part or name.startswith(f"{part}/") for part in apart_from):
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            with open(path, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            found[name] = "other"
    return found
