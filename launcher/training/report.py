"""The output of a run: events.jsonl, trackers and the screen. Rank 0 writes; the other ranks show errors only."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launcher.files import open_regular, parse_json, replacing, write_atomically
from launcher.progress import Bars
from launcher.reports.read import same_records
from launcher.text import printable

log = logging.getLogger(__name__)


class Events:
    """events.jsonl: one JSON object per line, each step once, even after a resume.

    A checkpoint holds the seal of the lines before it; a resume drops the lines after it.
    """

    def __init__(self, file: Path, resumed_step: int, seal: dict[str, Any] | None):
        written = _bytes_of(file) if seal else b""
        kept = written[: seal["bytes"]] if seal else b""
        if seal and hashlib.sha256(kept).hexdigest() != seal["sha256"]:
            lines = [json.dumps(event) + "\n" for event in read_events(file) if event["step"] <= resumed_step]
            log.warning("%s changed since the checkpoint; the %d lines that can be read are kept", file, len(lines))
            kept = "".join(lines).encode()
        self._digest, self._bytes = hashlib.sha256(kept), len(kept)
        with replacing(file) as temporary:
            temporary.write_bytes(kept)
        self._file = open(file, "ab")  # noqa: SIM115 (open for the whole run)

    def write(self, event: dict[str, Any]) -> None:
        line = (json.dumps(event) + "\n").encode()
        self._digest.update(line)
        self._bytes += len(line)
        self._file.write(line)
        self._file.flush()

    def seal(self) -> dict[str, Any]:
        """Length and checksum of the lines so far, for a checkpoint."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def sync(self) -> None:
        """Write the lines to the disk: called before a checkpoint of these steps is complete."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Log:
    """A JSONL file of the run folder beside events.jsonl: measurements, or answers of the model.

    A resume drops the lines after its step. Unlike events these lines differ between two equal runs.
    """

    def __init__(self, file: Path, resumed_step: int):
        kept = [event for event in read_events(file) if event["step"] <= resumed_step] if resumed_step else []
        write_atomically(file, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = open(file, "a")  # noqa: SIM115 (open for the whole run)

    def write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events of a run, without lines that are cut short, damaged, or not an object with a step."""
    events = []
    for line in _bytes_of(file).decode(errors="replace").splitlines():
        with suppress(ValueError):
            event = parse_json(line)
            if isinstance(event, dict) and type(event.get("step")) is int:
                events.append(event)
    return events


def before_and_after(evaluations: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the last evaluation, beside the first one on the same held-out records if there is one."""
    alike = same_records(evaluations)
    both = alike if len(alike) == 1 < len(evaluations) else [alike[0], alike[-1]]
    names = [name for name in both[-1] if name not in ("step", "held_out")]
    shared = [name for name in names if name in both[0]]  # a resume may have asked for more
    headings = ["before" if line["step"] == 0 else f"step {line['step']}" for line in both[:-1]] + ["after"]
    label = lambda name: "loss" if name == "eval_loss" else name.replace("_", " ")  # noqa: E731
    return ["", *headings], [[label(name), *(f"{line[name]:.4f}" for line in both)] for name in shared]


def _bytes_of(file: Path) -> bytes:
    """The bytes of a file; none if there is no regular file."""
    try:
        with open_regular(file) as opened:
            return opened.read()
    except FileNotFoundError:
        return b""


class Screen(Bars):
    """Progress bars and results for a person; with is_main False nothing is shown.

    Text of files and models is never markup, and its control characters are escaped.
    """

    def __init__(self, is_main: bool):
        super().__init__(Console(file=cast(IO[str], _Output()), quiet=not is_main))
        logging.basicConfig(handlers=[_Notes(self)], level=logging.WARNING, format="%(message)s", force=True)
        logging.captureWarnings(True)
        if not is_main:
            logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("launcher.data").setLevel(logging.INFO if is_main else logging.ERROR)

    def say(self, text: str) -> None:
        """A line of plain text."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def banner(self, text: str) -> None:
        """A framed text that must not be overlooked."""
        self.console.print(Panel(Text(printable(text)), border_style="yellow"))

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", show_lines=len(header) > 3)
        for name in header:
            table.add_column(Text(name), overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print(table)


class _Output:
    """Standard output, whatever it is at the time. A closed terminal, or a log on a full disk, does not end the run."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a closed file is a ValueError
            return sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding
        return getattr(sys.stdout, name)


class _Notes(logging.Handler):
    """Log records as lines of the screen, since standard error would break a progress bar."""

    def __init__(self, screen: Screen):
        super().__init__()
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        style = "bold red" if record.levelno >= logging.ERROR else "yellow"
        label = Text(f"{record.levelname.lower()}: ", style=style)
        text = self.format(record).strip()
        if record.name == "py.warnings":  # file:line: Category: message, then a line of source
            text = re.sub(r"^.*?:\d+: ", "", text.partition("\n  ")[0])
        self.screen.console.print(label + Text(printable(text)), soft_wrap=True)


class Throughput:
    """Tokens per second over about the last ten seconds."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def add(self, tokens: int) -> float:
        now = time.monotonic()
        self._marks.append((now, self._marks[-1][1] + tokens))
        while len(self._marks) > 2 and now - self._marks[0][0] > 10:
            self._marks.pop(0)
        (since, before), total = self._marks[0], self._marks[-1][1]
        return (total - before) / max(now - since, 1e-9)


STATUS = Path("/proc/self/status")


def memory_gib() -> float:
    """Peak memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if STATUS.exists():  # getrusage's maximum begins at that of the process that started this one
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def open_trackers(names: tuple[str, ...], output: Path, config: dict[str, Any]) -> list[Any]:
    """accelerate's trackers by name, writing into the run folder."""
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState(cpu=not torch.cuda.is_available())
    flat = {f"{part}.{name}": str(value) for part, values in config.items() for name, value in values.items()}
    trackers = []
    for name in names:
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", logging_dir=str(output))
        else:
            tracker = WandBTracker("loldu", name=output.name, dir=str(output))
        tracker.start()
        tracker.store_init_configuration(flat)
        trackers.append(tracker)
    return trackers


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises ValueError naming the install command of a tracker that is missing."""
    from accelerate.tracking import is_tensorboard_available, is_wandb_available

    there = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in names:
        if not there[name]():
            raise ValueError(f"--trackers {name} is not installed: pip install {name}")
