"""Files on shared disks: written whole or not at all, and read without trusting their kind. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 1 << 20  # of a small file, such as a state, an index entry or a job.json
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(file: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside `file` to write to; when the block ends well it takes the place of `file`.

    Readers and crashes see the old file or the new one. The new one has the permissions that the umask gives, also
    if the library that wrote it chose others. durable: its bytes are on the disk before it is renamed.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")  # a new name: no link can exist there
    try:
        yield temporary
        allow_by_umask(temporary)
        if durable:
            sync(temporary)
        os.replace(temporary, file)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """In this block no other process is in such a block for the same folder, to read a file there and replace it.

    On a file system without locks the block runs all the same. Raises OSError if the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_atomically(file: Path, text: str) -> None:
    """Replace a small text file, whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_or_empty(file: Path) -> str:
    """The stripped text (of at most MOST_BYTES); empty if the file is missing or cannot be read. Damaged characters
    become `\\ufffd`.

    Opening a file makes a network file system look again for what another machine wrote.
    """
    try:
        with open_regular(file) as opened:
            return opened.read(MOST_BYTES).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def user_path(text: str | Path) -> Path:
    """The path that a user gave, with the home folder for ~ or ~name at its beginning.

    A shell does this for --output ~/x, but not for --output=~/x, nor in quotes, nor in a file of settings. Raises
    ValueError if there is no such home folder, and no file of this very name.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        if os.path.lexists(text):
            return Path(text)
        raise ValueError(f"{text}: there is no such home directory; give an absolute path") from None


def open_regular(file: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError for anything else, such as a FIFO, whose opening would wait forever."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return os.fdopen(descriptor, "rb")


def open_to_append(file: Path, flags: int = os.O_WRONLY | os.O_APPEND) -> int:
    """A descriptor of a regular file, which is made if it is missing. Raises OSError for anything else, and for a
    symbolic link, which could lead to any other file."""
    descriptor = os.open(file, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return descriptor


def read_text(file: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file. Raises OSError as `open_regular` does, and ValueError if it is longer or not UTF-8."""
    with open_regular(file) as opened:  # read(n) takes n bytes of memory, however short the file is
        pieces = iter(lambda: opened.read(min(most_bytes + 1, MOST_BYTES)), b"")
        data = b"".join(itertools.islice(pieces, most_bytes // MOST_BYTES + 1))
    if len(data) > most_bytes:
        raise ValueError(f"it is longer than {most_bytes} bytes")
    return data.decode()


def read_json(file: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The JSON value in a file. Raises OSError as `open_regular` does, and ValueError for anything that is not JSON."""
    return parse_json(read_text(file, most_bytes))


def parse_json(text: str) -> Any:
    """The JSON value of a text. Raises ValueError also for too deep nesting, where json raises RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def allow_by_umask(path: Path) -> None:
    """Give a file, or all files below a folder, the permissions of a new file: safetensors makes its files readable to
    the owner alone, whatever the umask.

    The umask is found by making a file: os.umask() would change it for other threads.
    """
    probe = path.with_name(f".{uuid.uuid4().hex}.tmp")
    probe.touch()
    try:
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file() and not file.is_symlink():
                os.chmod(file, probe.stat().st_mode)
    finally:
        probe.unlink()


def digest(file: Path) -> str:
    """sha256 (hex) of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def weights_digest(folder: Path) -> str | None:
    """sha256 (hex) of the weights in the folder of an adapter or a model, with their config: equal for a copy of it.
    None if it has no weights. A file is read once while its size and time stay."""
    found = sorted(file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    if not found:
        return None
    files = found + [file for name in ("adapter_config.json", "config.json") if (file := folder / name).is_file()]
    lines = (f"{_known_digest(file, file.stat().st_size, file.stat().st_mtime_ns)}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _known_digest(file: Path, size: int, time_ns: int) -> str:
    return digest(file)


def sync(path: Path) -> None:
    """Return once a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(
    what: str, folder: Path, remedy: str, *, free: str = "free some", reads: bool = False
) -> Iterator[None]:
    """Turn a full, read-only or foreign disk into the user's mistake (ValueError) with a remedy.

    what: what cannot be written to folder. remedy: what to type instead. free: how to make room. reads: the block also
    reads files from elsewhere, so only errors that a write alone can have are turned.
    """
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in FULL or "No space left" in str(error)  # safetensors wraps it
        written = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"  # not imported for its name
        if reads:
            written = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError))
            written |= getattr(error, "errno", None) in (errno.EROFS, errno.EFBIG)
        if not (full or written):
            raise
        reason = "no space is left" if full else getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"cannot write {what} to {folder}: {reason}; {f'{free}, or ' if full else ''}{remedy}"
        ) from error
