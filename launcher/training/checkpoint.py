"""Checkpoints of the trained state: sharded safetensors, a JSON index, checksums, one rename.

    checkpoints/step-000123/rank-00000.safetensors   rows of named tensors, each rank its own
                            index.json               which file holds which rows, checksums, and `meta` of the run
                            COMPLETE                 sha256 of index.json, written last

Everything is written to step-000123.tmp and renamed when complete, so a killed save leaves older checkpoints intact.
A reader on any number of processes reads the rows it needs. No pickle.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from launcher.files import allow_by_umask, digest, disk_errors, open_regular, sync
from launcher.processes import SLOW_S, Communicator
from launcher.progress import Bars, growth
from launcher.training.checkpoint_index import DTYPES, Index, TensorEntry, read_format, read_index

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER_NAME = re.compile(r"step-([0-9]{6,12})")
INDEX_BYTES = 1 << 30  # a longer index.json is not read


class NewerFormat(ValueError):
    """A checkpoint that a later version wrote: resuming from an older one would discard its steps."""


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
    meta: dict[str, Any]  # identity, progress, world_size, events
    tensors: dict[str, TensorEntry]

    def read(self, name: str, shape: Sequence[int], start: int = 0, count: int | None = None) -> Tensor:
        """Rows start .. start + count of a tensor of that full shape (all by default), from all files that hold some.

        Raises ValueError if the checkpoint has no such tensor, has it in another shape, or a number is not finite.
        """
        entry = self.tensors.get(name)
        if entry is None or tuple(entry.shape) != tuple(shape):
            has = f"has it as {tuple(entry.shape)}" if entry else "has no such tensor"
            raise ValueError(f"the run trains {name} as {tuple(shape)}, but checkpoint {self.folder} {has}")
        if not shape:
            start, count = 0, 1
        stop = (shape[0] if shape else 1) if count is None else start + count
        found = []
        for piece in sorted(entry.pieces, key=lambda piece: piece.start):
            low, high = max(start, piece.start), min(stop, piece.start + piece.rows)
            if low < high:
                with safe_open(self.folder / piece.file, framework="pt") as opened:
                    if shape:
                        found.append(opened.get_slice(name)[low - piece.start : high - piece.start])
                    else:
                        found.append(opened.get_tensor(name))
        rows = found[0] if len(found) == 1 else torch.cat(found)
        if not rows.isfinite().all():
            raise ValueError(f"checkpoint {self.folder} is damaged: {name} has numbers that are NaN or infinite")
        return rows


def save(
    root: Path,
    step: int,
    pieces: Mapping[str, Piece],
    meta: dict[str, Any],
    comm: Communicator,
    before: Callable[[], None] = lambda: None,
) -> Path:
    """Write one checkpoint. Every rank calls this with the rows it holds; of a replicated tensor only rank 0 has any.

    before() runs on rank 0 in another thread and ends before the checkpoint becomes complete. Raises ValueError on all
    ranks if one of them cannot write, or holds a number that is not finite; older checkpoints stay.
    """
    final, partial = root / f"step-{step:06d}", _partial(root, step)
    file = f"rank-{comm.ranks.rank:05d}.safetensors"

    def write() -> dict[str, Any]:
        if not pieces:
            return {}
        if bad := [name for name, piece in pieces.items() if not piece.rows.isfinite().all()]:
            raise ValueError(
                f"{bad[0]} has numbers that are NaN or infinite after step {step} ({len(bad)} tensors have), so no "
                "checkpoint is written: resume from the one before, with a lower --learning-rate"
            )
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
        refuse_links(root)
        with _disk_errors(root):
            for killed in root.glob("step-*.tmp"):
                shutil.rmtree(killed, ignore_errors=True)
            partial.mkdir(parents=True)

    try:
        comm.from_main("checkpoint folder", begin)
        written = [part for part in comm.together("checkpoint rows", write, SLOW_S) if part]
        comm.from_main("checkpoint index", lambda: _seal(partial, final, step, written, meta, before), SLOW_S)
    except ValueError:
        if comm.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _partial(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}.tmp"


class Saver:
    """Saves one checkpoint after another. In the background, training waits only for a copy of the rows.

    Call `wait` before any other use of the comm, so that all ranks send their messages in the same order.
    """

    def __init__(self, root: Path, comm: Communicator, *, background: bool):
        self.root, self.comm, self.background = root, comm, background
        self._thread: threading.Thread | None = None
        self._writes: tuple[int, int] = 0, 0  # the step that the thread saves, and its bytes
        self._error: Exception | None = None

    def save(
        self,
        step: int,
        pieces: Mapping[str, Piece],
        meta: dict[str, Any],
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """As `save`, then call after(). Raises the error of the save before this one."""
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
        # A daemon: if other ranks have died it waits for their rows, and must not keep this process from exiting.
        self._writes = step, self._bytes(pieces)
        self._thread = threading.Thread(target=work_aside, args=(copies,), name="save", daemon=True)
        self._thread.start()

    @contextmanager
    def bar(self, bars: Bars, step: int, pieces: Mapping[str, Piece]) -> Iterator[None]:
        """Show how much of this checkpoint is written, unless that is done in the background."""
        with nullcontext() if self.background else self._bar(bars, step, self._bytes(pieces)):
            yield

    def _bytes(self, pieces: Mapping[str, Piece]) -> int:
        """Bytes that all ranks write."""
        sharded = any(tuple(piece.rows.shape) != tuple(piece.shape) for piece in pieces.values())
        writers = self.comm.ranks.world_size if sharded else 1
        return writers * sum(piece.rows.nbytes for piece in pieces.values())

    @contextmanager
    def _bar(self, bars: Bars, step: int, total: int) -> Iterator[None]:
        with (
            bars.bar("saving", total, unit="bytes", brief=True) as show,
            growth(show, _partial(self.root, step), total),
        ):
            yield

    def finish(self, bars: Bars) -> None:
        """As `wait`, with a bar if the last save is not done yet."""
        waits = self._thread is not None and self._thread.is_alive()
        with self._bar(bars, *self._writes) if waits else nullcontext():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is done. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error


def newest(root: Path) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint. A damaged one is skipped with a warning that names it.

    Raises NewerFormat rather than skip a checkpoint that a later version wrote.
    """
    folders = _folders(root)
    for number, (_, folder) in enumerate(sorted(folders, reverse=True), start=1):
        try:
            return load(folder)
        except NewerFormat:
            raise
        except ValueError as error:
            last = number == len(folders)
            log.warning("%s; %s", error, "no older one is left" if last else "trying the checkpoint before it")
    return None


def load(folder: Path) -> Checkpoint:
    """Open and verify a checkpoint. Raises ValueError naming what is missing or damaged, or NewerFormat."""

    def damaged(what: object) -> ValueError:
        return ValueError(f"checkpoint {folder} is damaged: {what}")

    try:
        with open_regular(folder / "COMPLETE") as opened:
            sealed = opened.read(100).strip()
        with open_regular(folder / "index.json") as opened:
            raw = opened.read(INDEX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"checkpoint {folder} is not complete: {error.strerror or error} ({error.filename})") from None
    if len(raw) > INDEX_BYTES:
        raise damaged(f"index.json is larger than {INDEX_BYTES} bytes")
    if hashlib.sha256(raw).hexdigest().encode() != sealed:
        raise damaged("index.json differs from its checksum in COMPLETE")
    try:
        if (written := read_format(raw)) > FORMAT:
            raise NewerFormat(
                f"checkpoint {folder} has format {written}, this version reads up to {FORMAT}: a later version wrote "
                "it; resume with that one, or give another --output"
            )
        index = read_index(raw)
    except NewerFormat:
        raise
    except ValueError as error:
        raise damaged(f"index.json: {error}") from None
    if (match := FOLDER_NAME.fullmatch(folder.name)) and int(match[1]) != index.step:
        raise damaged(f"its index is that of step {index.step}")
    for name, checksum in index.files.items():
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise damaged(f"{name} is missing")
        if digest(folder / name) != checksum:
            raise damaged(f"{name} differs from its checksum")
    try:
        _check_files(folder, index)
    except (ValueError, SafetensorError) as error:
        raise damaged(error) from None
    return Checkpoint(folder, index.step, json.loads(raw)["meta"], index.tensors)


def _check_files(folder: Path, index: Index) -> None:
    """Raises ValueError if the files do not hold what the index says."""
    headers: dict[str, Any] = {}
    with ExitStack() as stack:
        for file in index.files:
            headers[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
        names = {file: set(opened.keys()) for file, opened in headers.items()}
        for name, tensor in index.tensors.items():
            for piece in tensor.pieces:
                if name not in names[piece.file]:
                    raise ValueError(f"{piece.file} has no {name}")
                found, expected = headers[piece.file].get_slice(name), [piece.rows, *tensor.shape[1:]]
                there = [found.get_shape(), found.get_dtype()]
                if there != [expected if tensor.shape else [], DTYPES[tensor.dtype]]:
                    raise ValueError(f"{name} in {piece.file} is {there[1]} {there[0]}, not as the index says")


def _folders(root: Path) -> list[tuple[int, Path]]:
    """The checkpoints' folders with their steps; symbolic links are skipped."""
    named = ((FOLDER_NAME.fullmatch(path.name), path) for path in root.glob("step-*") if not path.is_symlink())
    return [(int(match[1]), path) for match, path in named if match]


def refuse_links(*folders: Path) -> None:
    """Raises ValueError for a folder of a run that is a symbolic link: its target is not ours to delete."""
    for folder in folders:
        if folder.is_symlink():
            raise ValueError(
                f"{folder} is a symbolic link to {os.readlink(folder)}, where a run would delete old checkpoints and "
                "results: give --output a folder on that disk, or remove the link"
            )


def prune(root: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the last keep_last checkpoints and the best; 0 keeps all."""
    refuse_links(root)
    for step, folder in sorted(_folders(root))[:-keep_last] if keep_last else []:
        if step != best_step:
            shutil.rmtree(folder, ignore_errors=True)


def set_aside_after(root: Path, step: int) -> None:
    """Rename the checkpoints after a step, so that the run resumes from that step."""
    for number, path in _folders(root):
        if number > step:
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
        # All at once: a journal commits waiting files together, in a quarter of the time that one after the other
        # takes.
        mine = [partial / name for name in ("rank-00000.safetensors", "index.json", "COMPLETE")]
        with ThreadPoolExecutor(2 + len(mine)) as pool:  # the folder itself holds the names
            waiting = [pool.submit(before), *(pool.submit(sync, file) for file in (*mine, partial) if file.exists())]
        for future in waiting:
            future.result()
        shutil.rmtree(final, ignore_errors=True)  # a checkpoint of the same step from before a resume
        os.replace(partial, final)
        sync(final.parent)


def _disk_errors(root: Path) -> AbstractContextManager[None]:
    return disk_errors("checkpoints", root, "give --output elsewhere")
