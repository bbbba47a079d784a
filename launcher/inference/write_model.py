"""Write a checkpoint one tensor at a time, into a folder that appears only once it is whole."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from rich.console import Console
from torch import Tensor

from launcher.files import allow_by_umask, disk_errors, user_path
from launcher.progress import Bars

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Entry:
    """One tensor to write; dtype as safetensors names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


def write_checkpoint(entries: Sequence[Entry], folder: Path, shard_gb: float, console: Console) -> None:
    """Write the tensors, in files of at most shard_gb GB. Raises ValueError if the disk has no room for them."""
    total = sum(entry.size for entry in entries)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(
            f"the merged model takes {total / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB free: "
            "free some, or give --out on another disk"
        )
    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(shard_gb * 1e9),
    )
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        show(done)

    with Bars(console).bar("merging", total, unit="bytes") as show:
        for file, names in split.filename_to_tensors.items():
            write_safetensors(folder / file, [by_name[name] for name in names], tick)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(file: Path, entries: list[Entry], tick: Callable[[int], None]) -> None:
    """Write tensors one at a time. The safetensors library can only write tensors that are all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in sorted(entries, key=lambda entry: -BYTES.get(entry.dtype, 1)):  # keeps every tensor aligned
        places = [at, at + entry.size]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": places}
        at += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.make()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)}, planned {entry.shape}"
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            assert len(data) == entry.size, f"{entry.name}: {len(data)} bytes, planned {entry.size}"
            opened.seek(8 + len(text) + header[entry.name]["data_offsets"][0])
            opened.write(data)
            tick(entry.size)
        opened.flush()
        os.fsync(opened.fileno())


@contextmanager
def new_folder(out: Path, option: str) -> Iterator[Path]:
    """A folder to fill. It is renamed to `out` when the block succeeds, and removed when it raises.

    Raises ValueError if `out` is not empty, also if another start has just filled it, or the disk is full.
    """
    out = user_path(out).absolute()
    try:
        os.lstat(out)
    except OSError as error:  # a name that is too long, a folder that may not be read
        if not isinstance(error, FileNotFoundError):
            raise ValueError(f"{option} {out} cannot be made ({error.strerror}): give another folder") from None
    taken = ValueError(f"{option} {out} exists and is not empty: give another folder, or remove it first")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise taken
    partial = out.with_name(f".{out.name[:200]}.{uuid.uuid4().hex}.tmp")
    try:
        with disk_errors("the result", out, f"give another folder with {option}", reads=True):
            partial.mkdir(parents=True)
            yield partial
            allow_by_umask(partial)
            try:
                os.rename(partial, out)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise taken from None
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
