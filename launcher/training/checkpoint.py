"""Checkpoints of the trained state: sharded safetensors, a JSON index, checksums, one rename.

    checkpoints/step-000123/rank-00000.safetensors   rows of named tensors, each rank its own
                            index.json               which file holds which rows, checksums, and `meta` of the run
                            COMPLETE                 sha256 of index.json, written last

Everything is written to step-000123.tmp and renamed when complete, so a killed save leaves the older ones as they were.
A reader of any world size takes the rows it needs. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from launcher.files import allow_by_umask, digest, disk_errors, sync
from launcher.processes import Communicator

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER_NAME = re.compile(r"step-(\d{6,})$")


class NewerFormat(ValueError):
    """A checkpoint that a later version wrote: to go on from an older one would throw its steps away."""


@dataclass(frozen=True)
class Piece:
    """Rows start .. start + len(rows) of a tensor of the given full shape; the whole of it by default."""

    rows: Tensor
    shape: tuple[int, ...]
    start: int = 0

    @staticmethod
    def whole(tensor: Tensor) -> Piece:
        return Piece(tensor, tuple(tensor.shape))


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint on disk."""

    folder: Path
    step: int
    meta: dict[str, Any]
    tensors: dict[str, dict[str, Any]]

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Rows start .. start + count of a tensor (all by default), whatever files they lie in."""
        entry = self.tensors[name]
        shape = entry["shape"]
        if not shape:
            start, count = 0, 1
        stop = (shape[0] if shape else 1) if count is None else start + count
        found = []
        for piece in sorted(entry["pieces"], key=lambda piece: piece["start"]):
            low, high = max(start, piece["start"]), min(stop, piece["start"] + piece["rows"])
            if low < high:
                with safe_open(self.folder / piece["file"], framework="pt") as opened:
                    if shape:
                        found.append(opened.get_slice(name)[low - piece["start"] : high - piece["start"]])
                    else:
                        found.append(opened.get_tensor(name))
        return found[0] if len(found) == 1 else torch.cat(found)


def save(
    root: Path,
    step: int,
    pieces: Mapping[str, Piece],
    meta: dict[str, Any],
    comm: Communicator,
    before: Callable[[], None] = lambda: None,
) -> Path:
    """Write one checkpoint; every rank calls it with the rows it holds (replicated tensors: rank 0 alone).

    before() is called on rank 0, in another thread, and has ended when the checkpoint becomes complete. Raises
    ValueError on every rank where one of them cannot write; what was there before stays.
    """
    final = root / f"step-{step:06d}"
    partial = final.with_suffix(".tmp")
    file = f"rank-{comm.ranks.rank:05d}.safetensors"

    def write() -> dict[str, Any]:
        if not pieces:
            return {}
        with _disk_errors(root):
            save_file({name: piece.rows.detach().cpu().contiguous() for name, piece in pieces.items()}, partial / file)
            allow_by_umask(partial / file)
            if not comm.ranks.is_main:  # rank 0 does it with the index
                sync(partial / file)
            return {
                "file": file,
                "sha256": digest(partial / file),
                "pieces": {
                    name: {
                        "shape": list(piece.shape),
                        "dtype": str(piece.rows.dtype).removeprefix("torch."),
                        "start": piece.start,
                        "rows": piece.rows.shape[0] if piece.rows.ndim else 1,
                    }
                    for name, piece in pieces.items()
                },
            }

    def begin() -> None:
        with _disk_errors(root):
            for killed in root.glob("step-*.tmp"):
                shutil.rmtree(killed, ignore_errors=True)
            partial.mkdir(parents=True)

    try:
        comm.from_main("checkpoint folder", begin)
        written = [part for part in comm.together("checkpoint rows", write) if part]
        comm.from_main("checkpoint index", lambda: _seal(partial, final, step, written, meta, before))
    except ValueError:
        if comm.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


class Saver:
    """Saves one checkpoint after another, in the background where asked for: training then waits for the copy alone.

    Whoever else speaks to the comm waits first, so that all ranks say the same things in the same order.
    """

    def __init__(self, root: Path, comm: Communicator, *, background: bool):
        self.root, self.comm, self.background = root, comm, background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self,
        step: int,
        pieces: Mapping[str, Piece],
        meta: dict[str, Any],
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """As `save`, and then after(); raises what the save before this one failed with."""
        self.wait()

        def work(pieces: Mapping[str, Piece]) -> None:
            save(self.root, step, pieces, meta, self.comm, before)
            after()

        def work_aside(pieces: Mapping[str, Piece]) -> None:
            try:
                work(pieces)
            except Exception as error:
                self._error = error

        if not self.background:
            work(pieces)
            return
        copies = {name: replace(piece, rows=piece.rows.detach().cpu().clone()) for name, piece in pieces.items()}
        # a daemon: where other ranks have died it would wait for their rows, and keep this process from ending
        self._thread = threading.Thread(target=work_aside, args=(copies,), name="save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is done. Raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error


def newest(root: Path) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint; damaged ones are passed over, each with a warning that names it.

    Raises NewerFormat where a later version wrote one that would be passed over.
    """
    folders = [(int(match[1]), path) for path in root.glob("step-*") if (match := FOLDER_NAME.match(path.name))]
    for number, (_, folder) in enumerate(sorted(folders, reverse=True), start=1):
        try:
            return load(folder)
        except NewerFormat:
            raise
        except ValueError as error:
            last = number == len(folders)
            log.warning("%s; %s", error, "none is left" if last else "going back to the checkpoint before it")
    return None


def load(folder: Path) -> Checkpoint:
    """Open and verify a checkpoint. Raises ValueError naming what is missing or damaged, or NewerFormat."""
    try:
        sealed = (folder / "COMPLETE").read_bytes().strip()
        raw = (folder / "index.json").read_bytes()
    except OSError as error:
        raise ValueError(f"checkpoint {folder} is not complete: {error.strerror or error} ({error.filename})") from None
    if hashlib.sha256(raw).hexdigest().encode() != sealed:
        raise ValueError(f"checkpoint {folder} is damaged: index.json differs from its checksum in COMPLETE")
    index = json.loads(raw)
    if index["format"] > FORMAT:
        raise NewerFormat(
            f"checkpoint {folder} has format {index['format']}, this version reads up to {FORMAT}: a later version "
            "wrote it; go on with that one, or give another --output"
        )
    for name, checksum in index["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder} is damaged: {name} is missing")
        if digest(folder / name) != checksum:
            raise ValueError(f"checkpoint {folder} is damaged: {name} differs from its checksum")
    return Checkpoint(folder, index["step"], index["meta"], index["tensors"])


def prune(root: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the last keep_last checkpoints and the best; 0 keeps all."""
    steps = sorted(int(match[1]) for path in root.glob("step-*") if (match := FOLDER_NAME.match(path.name)))
    for step in steps[:-keep_last] if keep_last else []:
        if step != best_step:
            shutil.rmtree(root / f"step-{step:06d}", ignore_errors=True)


def set_aside_after(root: Path, step: int) -> None:
    """Take the checkpoints after a step out of the row, so that the run can go on from that step."""
    for path in root.glob("step-*"):
        if (match := FOLDER_NAME.match(path.name)) and int(match[1]) > step:
            aside = path.with_name(f"{path.name}.before-{time.time_ns()}")
            os.replace(path, aside)
            log.warning("set %s aside as %s", path, aside.name)


def _seal(
    partial: Path, final: Path, step: int, written: list[dict[str, Any]], meta: Any, before: Callable[[], None]
) -> None:
    tensors: dict[str, dict[str, Any]] = {}
    for part in written:
        for name, piece in part["pieces"].items():
            entry = tensors.setdefault(name, {"shape": piece["shape"], "dtype": piece["dtype"], "pieces": []})
            entry["pieces"].append({"file": part["file"], "start": piece["start"], "rows": piece["rows"]})
    files = {part["file"]: part["sha256"] for part in written}
    text = json.dumps({"format": FORMAT, "step": step, "meta": meta, "files": files, "tensors": tensors})
    with _disk_errors(final.parent):
        (partial / "index.json").write_text(text)
        (partial / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
        # All at once: a journal commits together what waits for it, which takes a quarter of the time of one by one.
        mine = [partial / name for name in ("rank-00000.safetensors", "index.json", "COMPLETE")]
        with ThreadPoolExecutor(2 + len(mine)) as pool:  # the folder holds their names
            waiting = [pool.submit(before), *(pool.submit(sync, file) for file in (*mine, partial) if file.exists())]
        for future in waiting:
            future.result()
        shutil.rmtree(final, ignore_errors=True)  # of the same step, from before a resume
        os.replace(partial, final)
        sync(final.parent)


def _disk_errors(root: Path) -> AbstractContextManager[None]:
    return disk_errors("checkpoints", root, "give --output elsewhere")
