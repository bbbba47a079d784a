"""Files on shared disks: written whole or not at all, with a remedy where the disk is full. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(file: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside `file` to write to; when the block ends well it takes the place of `file`.

    Readers and crashes see the old file or the new one. The new one has the permissions that the umask gives, also
    where the library that wrote it chose others. durable: its bytes are on the disk before it is renamed.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")  # a new name: no link can lie there
    try:
        yield temporary
        allow_by_umask(temporary)
        if durable:
            sync(temporary)
        os.replace(temporary, file)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomically(file: Path, text: str) -> None:
    """Replace a small text file, whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_or_empty(file: Path) -> str:
    """The stripped text; empty where the file is missing or cannot be read. Damaged characters become `\\ufffd`.

    Opening a file makes a network file system look again for what another machine wrote.
    """
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


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
            written |= getattr(error, "errno", None) == errno.EROFS
        if not (full or written):
            raise
        reason = "no space is left" if full else getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"cannot write {what} to {folder}: {reason}; {f'{free}, or ' if full else ''}{remedy}"
        ) from error
