"""A content-addressed cache of factors on disk: one safetensors file per weight, and an index for warm starts.

    factors/<key>.safetensors    key = sha256 over the recipe and the bytes that determine the factors (`content_key`)
    tokenised/<key>.safetensors  the tokenised data sets of launcher/data/token_cache.py; prune counts them too
    index/<sha256>.json          (checkpoint file, its size and time, tensor, options) -> key, one small file per entry;
                                 (key, user) -> seal of the factors that this user has made, or compared with the weight

There are no locks, because flock silently does nothing on many shared file systems. A file is written under a temporary
name in the same folder, synced and renamed: a reader sees the whole file or none, and when two jobs write the same key
one valid file remains. With one file per index entry, concurrent writers cannot corrupt or lose each other's entries.

Every header holds a checksum of itself and a sha256 for each MiB of rows, so a rank that reads a few rows of `write`
verifies only those rows. A file that fails is renamed to *.damaged with a warning and counts as missing, so the caller
computes it again. A file's modification time is the time of its last use. Nothing is pickled.

Only files of these folders whose names are keys are ever renamed or removed. The file MARK marks a folder as a cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pwd
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import safetensors
from safetensors import SafetensorError, safe_open

from launcher.files import MOST_BYTES, disk_errors, open_regular, parse_json, read_json, replacing

if TYPE_CHECKING:  # `loldu cache ls` reads headers alone, and torch takes seconds to import
    from torch import Tensor

    from adapters.factors import Factors

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1  # part of every key, so that two versions of this file never read each other's entries
BLOCK_BYTES = 1 << 20  # about the bytes under one checksum: 90 of them for 11008 x 4096 in bfloat16
KINDS = ("factors", "tokenised", "images")
FOLDERS = (*KINDS, "index")
MARK = ".loldu-cache"
MARK_TEXT = "A cache of loldu: factors and tokenised data. Remove files with `loldu cache prune`.\n"
KEY = re.compile(r"[0-9a-f]{64}")
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
LEFT_OVER = re.compile(r"[0-9a-f]{64}\.damaged|\.[0-9a-f]{64}\.(safetensors|json)\.[0-9a-f]{32}\.tmp")
TYPES: Mapping[str, type | tuple[type, ...]] = {  # of a header's fields
    "key": str, "checksums": dict, "name": str, "method": str, "dtype": str, "rank": int, "shape": list,
    "residual": (int, float), "versions": dict,
}  # fmt: skip
WORK = re.compile(r"\.[0-9a-f]{32}\.work")  # a folder of files in progress
ABANDONED_S = 3600.0  # a temporary file this old belongs to a process that was killed


class Entry(NamedTuple):
    """One file of the cache, described by its verified header."""

    key: str
    file: Path
    about: dict[str, Any]  # recipe, name, shape, residual, norms, device, versions, checksums

    @property
    def seal(self) -> str:
        """A digest of the factors themselves: equal seals mean equal numbers."""
        return _checksum(json.dumps(self.about["checksums"], sort_keys=True))[:16]


Misfit = Callable[["Factors", Entry], str | None]  # why factors are not those they should be; None if they are


class Pruned(NamedTuple):
    """How much prune removed, and how much it left."""

    files: int
    freed_bytes: int
    left_bytes: int


def default_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """$XDG_CACHE_HOME/loldu, or ~/.cache/loldu if that is unset or, against its specification, a relative path."""
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "loldu"
    except RuntimeError:
        raise ValueError(
            f"HOME is not set and user {os.getuid()} has no home directory: give a cache folder with --cache DIR"
        ) from None


def check_folder(folder: Path) -> None:
    """Raises ValueError unless the folder is missing, empty or a factor cache: it has MARK, or only a cache's folders.

    Caches that were made before MARK existed have only these folders.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"cannot read the factor cache {folder}: {error.strerror}") from error
    foreign = [name for name in names if name not in FOLDERS]
    if foreign and MARK not in names:
        raise ValueError(
            f"{folder} is not a factor cache (it holds {foreign[0]!r}): give the folder that runs use, with --cache DIR"
        )


def content_key(recipe: Mapping[str, Any], *contents: Tensor) -> str:
    """sha256 (hex) over the recipe as JSON and the bytes of the tensors, row by row, with their shapes and dtypes."""
    digest = hashlib.sha256(json.dumps([FORMAT, recipe], sort_keys=True).encode())
    for tensor in contents:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        for block in tensor.split(_block_rows(tensor)):  # a dense copy of a block, never of a whole panel
            digest.update(_bytes(block))
    return digest.hexdigest()


def find(folder: Path, key: str) -> Entry | None:
    """The entry of a key, read from its header; None if there is none, or if it was damaged (now set aside)."""
    if not _is_key(key):
        return None
    return _reading(_file(folder, key), lambda opened, entry: entry, framework="np")


def load(
    folder: Path, key: str, rows: slice = slice(None), seal: str | None = None, misfit: Misfit = lambda *_: None
) -> Factors | None:
    """The verified factors of a key. With rows, `write` (out, r) holds only those rows; the other factors are whole.

    None if there is no such file, if it holds others than those of this seal, or if it was damaged or
    misfit(factors, entry) says why it does not fit (now set aside): compute the factors again.
    """

    def read(opened: Any, entry: Entry) -> Factors | None:
        return _factors(opened, entry, rows, misfit) if seal in (None, entry.seal) else None

    return _reading(_file(folder, key), read) if _is_key(key) else None


def store(folder: Path, key: str, factors: Factors, about: Mapping[str, Any]) -> Entry:
    """Write factors under their key, in their own dtypes.

    Raises ValueError naming the folder and the remedy if the folder is full or not writable; no partial file stays.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in factors._asdict().items()}
    versions = {"torch": torch.__version__, "safetensors": safetensors.__version__}
    checksums = {name: [_sha(part) for part in tensor.split(_block_rows(tensor))] for name, tensor in tensors.items()}
    about = {**about, "key": key, "versions": versions, "checksums": checksums}
    text = json.dumps(about, sort_keys=True)
    file = _file(folder, key)
    put(folder, file, lambda temporary: save_file(tensors, temporary, {"about": text, "seal": _checksum(text)}))
    return Entry(key, file, about)


def recall(folder: Path, identity: Mapping[str, Any], *, own: bool = False) -> Any | None:
    """The value that the index holds for an identity; None if it has none, or if its file is damaged (logged).

    own: only from a file that this user has written, and no other may write to.
    """
    file, wanted = _index_file(folder, identity)
    try:
        with open_regular(file) as opened:
            status = os.fstat(opened.fileno())
            if own and (status.st_uid != os.getuid() or status.st_mode & 0o022):
                return None
            text, checksum = parse_json(opened.read(MOST_BYTES).decode())
        found, value = parse_json(text)
        if checksum != _checksum(text) or found != wanted:
            raise ValueError("its checksum or its identity does not match")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        log.warning("the index entry %s is damaged (%s) and will be written again", file, error)
        return None
    with suppress(OSError):
        os.utime(file)
    return value


def remember(folder: Path, identity: Mapping[str, Any], value: Any, *, durable: bool = True) -> None:
    """Store a value (JSON data) for an identity in the index. Raises ValueError as `store` does."""
    file, wanted = _index_file(folder, identity)
    text = json.dumps([wanted, value])
    put(folder, file, lambda temporary: temporary.write_text(json.dumps([text, _checksum(text)])), durable=durable)


def entries(folder: Path) -> list[Entry]:
    """Every entry, read from the headers, most recently used first; damaged files are set aside."""
    files = sorted(_files(folder / "factors", ENTRY), key=_used, reverse=True)
    return [
        entry for file in files if (entry := _reading(file, lambda opened, entry: entry, use=False, framework="np"))
    ]


def verify(
    folder: Path,
    on_entry: Callable[[Entry], None] = lambda entry: None,
    misfit: Misfit = lambda *_: None,
) -> list[Path]:
    """Check every byte against its checksum, and what misfit(factors, entry) says; returns the files that failed, under
    their new names.

    Does not count as use: modification times stay.
    """

    def read(opened: Any, entry: Entry) -> None:
        for name in opened.keys():  # noqa: SIM118 (a file of safetensors, not a dict)
            for start in range(0, _length(opened, name), 4096):  # bounded memory
                _rows(opened, entry, name, slice(start, start + 4096))
        _factors(opened, entry, slice(None), misfit)
        on_entry(entry)

    before = set(_files(folder / "factors", LEFT_OVER))
    for file in sorted(_files(folder / "factors", ENTRY)):
        _reading(file, read, use=False)
    return sorted(set(_files(folder / "factors", LEFT_OVER)) - before)


def prune(folder: Path, max_bytes: float | None = None, older_than_s: float | None = None) -> Pruned:
    """Remove files unused for older_than_s seconds, then the least recently used until at most max_bytes are left.

    Damaged files, abandoned temporary files and index entries without a file are removed too. A job that uses the cache
    at the same time computes again whatever it then misses. Raises ValueError for a folder that is not a cache, and
    if a file cannot be removed.
    """
    check_folder(folder)
    now, removed, freed = time.time(), 0, 0
    for file in sorted(file for name in FOLDERS for file in _files(folder / name, LEFT_OVER)):
        if file.suffix == ".damaged" or now - _used(file) > ABANDONED_S:
            removed, freed = removed + 1, freed + _remove(file)
    for work in _files(folder / "tokenised", WORK):
        parts: list[Path] = []
        with suppress(OSError):  # its job has just ended
            parts = [work, *work.iterdir()] if not work.is_symlink() else []
        if parts and now - max(map(_used, parts)) > ABANDONED_S:
            freed += sum(map(_size, parts[1:]))
            removed += len(parts) - 1
            shutil.rmtree(work, ignore_errors=True)
    files = sorted((file for kind in KINDS for file in _files(folder / kind, ENTRY)), key=_used)
    left = sum(_size(file) for file in files)
    for file in files:
        too_old = older_than_s is not None and now - _used(file) > older_than_s
        if too_old or (max_bytes is not None and left > max_bytes):
            size = _remove(file)
            removed, freed, left = removed + 1, freed + size, left - size
    kept = {file.stem for file in _files(folder / "factors", ENTRY)}
    for file in _files(folder / "index", re.compile(r"[0-9a-f]{64}\.json")):
        with suppress(OSError, ValueError, TypeError, KeyError, IndexError):
            _, value = parse_json(read_json(file)[0])
            stale = older_than_s is not None and now - _used(file) > older_than_s
            key = value.get("key") if isinstance(value, dict) else value
            if stale or (isinstance(key, str) and key not in kept):
                _remove(file)
    return Pruned(removed, freed, left)


class _Damaged(Exception):
    """A file whose bytes differ from those that were written."""


def _reading(file: Path, read: Callable[[Any, Entry], T], use: bool = True, framework: str = "pt") -> T | None:
    for attempt in range(10):
        try:
            before = _version(file)
            if not file.is_file():  # opening a FIFO would wait forever
                raise _Damaged("it is not a regular file")
            with safe_open(file, framework=framework) as opened:
                result = read(opened, _header(opened, file))
            break
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ValueError(f"cannot read {file} ({error.strerror}): give another folder with --cache DIR") from error
        except (SafetensorError, RuntimeError, _Damaged) as error:
            # safetensors opens a file twice: another job may have put an equal one in its place in between
            with suppress(OSError):
                if _version(file) != before and attempt < 9:
                    continue
            if not isinstance(error, (SafetensorError, _Damaged)):
                raise  # for example out of memory: the file itself may be good
            aside = file.with_suffix(".damaged")
            with suppress(OSError):  # a read-only cache keeps it
                os.replace(file, aside)
            log.warning(
                "%s is damaged (%s): renamed to %s, its factors will be computed again", file, error, aside.name
            )
            return None
    if use:
        with suppress(OSError):
            os.utime(file)
    return result


def _factors(opened: Any, entry: Entry, rows: slice, misfit: Misfit) -> Factors:
    from adapters.factors import Factors

    found = Factors(*(_rows(opened, entry, name, rows if name == "write" else slice(None)) for name in Factors._fields))
    if why := misfit(found, entry):
        raise _Damaged(f"{why}; it belongs to {_owner(entry.file)}")
    return found


def _owner(file: Path) -> str:
    try:
        uid = file.stat().st_uid
    except OSError:  # no such file any more
        return "an unknown user"
    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:  # a user without a name here
        return f"uid {uid}"


def _header(opened: Any, file: Path) -> Entry:
    header = opened.metadata() or {}
    text = header.get("about", "")
    if header.get("seal") != _checksum(text):
        raise _Damaged("its header does not match its checksum")
    try:
        about = parse_json(text)
    except ValueError as error:
        raise _Damaged(f"its header is not JSON: {error}") from error
    if not isinstance(about, dict) or not {"key", "checksums"} <= about.keys():
        raise _Damaged("its header has no key or no checksums")
    if wrong := [name for name, kind in TYPES.items() if name in about and not isinstance(about[name], kind)]:
        raise _Damaged(f"{', '.join(wrong)} in its header is of the wrong type")
    if not all(isinstance(each, list) for each in about["checksums"].values()):
        raise _Damaged("its header has no lists of checksums")
    if about["key"] != file.stem:
        raise _Damaged(f"it holds the factors of key {about['key'][:12]!r}")
    return Entry(about["key"], file, about)


def _length(opened: Any, name: str) -> int:
    """The number of rows of a tensor."""
    shape = opened.get_slice(name).get_shape()
    if not shape:
        raise _Damaged(f"{name} is a single number")
    return int(shape[0])


def _rows(opened: Any, entry: Entry, name: str, rows: slice) -> Tensor:
    """The given rows of a tensor, read in whole blocks and compared with their checksums."""
    try:
        part = opened.get_slice(name)
        count = part.get_shape()[0]
        start, stop, _ = rows.indices(count)
        per_block = _block_rows(part[:1])
        first = start // per_block * per_block
        end = min(-(-stop // per_block) * per_block, count)
        # A copy: safetensors returns a map of the file, and the verified bytes must be the bytes that are used.
        tensor = part[first:end].clone()
        checksums = entry.about["checksums"][name][first // per_block : -(-end // per_block)]
    except (KeyError, IndexError) as error:
        raise _Damaged(f"{name} is incomplete: {error}") from error
    if len(tensor) and [_sha(block) for block in tensor.split(per_block)] != checksums:
        raise _Damaged(f"{name} does not match its checksum")
    return tensor[start - first : stop - first]


def put(folder: Path, file: Path, write: Callable[[Path], Any], *, durable: bool = True) -> None:
    """Write a file of this cache through write(temporary name), then rename it. Raises ValueError as `store` does."""
    with _writing(folder):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, durable=durable) as temporary:
            write(temporary)


def working_folder(folder: Path) -> Path:
    """A new folder in this cache for files of a work in progress, to be removed by the caller. Raises as `store`."""
    made = folder / "tokenised" / f".{uuid.uuid4().hex}.work"
    with _writing(folder):
        made.mkdir(parents=True)
    return made


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    free = "free some with `loldu cache prune --max-gb X`"
    with disk_errors("cache files", folder, "give another folder with --cache DIR", free=free):
        # For its owner alone: to share a cache, make its folder with the permissions that it should have.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError), open(folder / MARK, "x") as mark:
            mark.write(MARK_TEXT)
        yield


def _files(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of a folder whose names match: nothing else is ours."""
    try:
        return [folder / name for name in os.listdir(folder) if pattern.fullmatch(name)]
    except OSError:
        return []


def _is_key(key: Any) -> bool:
    """Whether a key, which may come from a damaged index, is one; a path such as ../x is not."""
    return isinstance(key, str) and KEY.fullmatch(key) is not None


def _file(folder: Path, key: str) -> Path:
    return folder / "factors" / f"{key}.safetensors"


def _index_file(folder: Path, identity: Mapping[str, Any]) -> tuple[Path, Any]:
    wanted = json.loads(json.dumps(identity, sort_keys=True))
    return folder / "index" / f"{_checksum(json.dumps(wanted, sort_keys=True))}.json", wanted


def _block_rows(tensor: Tensor) -> int:
    return max(1, BLOCK_BYTES // max(1, tensor[0].numel() * tensor.element_size()))


def _bytes(tensor: Tensor) -> Any:
    import torch

    tensor = tensor.contiguous()
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()  # a single element may have any stride


def _sha(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version(file: Path) -> tuple[int, int, int]:
    stat = os.stat(file)
    return stat.st_ino, stat.st_size, stat.st_ctime_ns


def _used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # another job has just removed it
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _remove(file: Path) -> int:
    size = _size(file)
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot remove {file}: {error.strerror}; ask the owner of the cache") from error
    return size
