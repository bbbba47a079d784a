"""Read the rows of a file, a folder or a hub dataset, unchecked.

Local files are read here and not through `datasets`: its Arrow schema fills in missing columns and hides the line of a
mistake. Nothing local ever touches the network.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from launcher.data.csv_files import csv_rows
from launcher.data.limits import LimitExceeded, limits
from launcher.files import user_path
from launcher.text import first_line

CSV = (".csv", ".tsv")
TEXT = (".json", ".jsonl", ".ndjson", ".txt", *CSV)
SUFFIXES = (*TEXT, ".parquet")
PACKED = (".gz", ".zst")  # after one of TEXT
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")  # `image_files` reads them
FORMS = (
    "{instruction, input, output}, {prompt, completion}, {messages: [{role, content}]} or "
    "{conversations: [{from, value}]}"
)
COLUMNS = {"instruction", "messages", "conversations", "conversation", "prompt", "question", "text"}  # of one record
TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")  # in this order, if there are several
UNPACK_AT_ONCE = 2**22
ROWS_AT_ONCE = 1000
BLANK = re.compile(r"[ \t\n\r]*")
SMALL = 2**26  # bytes; a part of a file may unpack to any size up to this


class Source(NamedTuple):
    """A file, folder or hub name, and its weight: below 1 the share of its records, above 1 how often they are used."""

    name: str
    weight: float


def source_of(text: str) -> Source:
    """Split `b.parquet:0.3` into name and weight. Raises ValueError for a weight that is not above 0."""
    name, _, weight = text.rpartition(":")
    if not name or user_path(text).exists() or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight):
        return Source(text, 1.0)
    if not 0 < float(weight) <= 1000:
        raise ValueError(f"the weight of {text} lies above 0 and is at most 1000, got {weight}")
    return Source(name, float(weight))


def load_rows(source: str, option: str) -> list[Any]:
    """The rows of `each_row`, all in memory."""
    return list(each_row(source, option))


def each_row(source: str, option: str) -> Iterator[Any]:
    """The rows of a file, a folder, or a hub dataset NAME[:CONFIGURATION[:SPLIT]], unchecked.

    They are read as they are taken, so that few are in memory (a JSON file whose records are not a plain list, and CSV,
    are read at once). Raises ValueError naming the option, the file and the line of a mistake, perhaps after the rows
    before it.
    """
    path = user_path(source)
    if not is_local(source):
        return _read_hub(source, option)
    return _read_folder(path, option) if path.is_dir() else _read_file(path, option)


def is_local(source: str) -> bool:
    """Whether a source is a path and not the name of a hub dataset."""
    return (
        user_path(source).exists() or _unpacked_name(source).endswith(SUFFIXES) or source.startswith((".", "~", os.sep))
    )


def holds_csv(source: str) -> bool:
    """Whether a source is a CSV file or a folder with one: there every value is text."""
    path = user_path(source)
    files = path.rglob("*") if path.is_dir() else [path]
    return any(_unpacked_name(file.name).endswith(CSV) for file in files)


def _unpacked_name(name: str) -> str:
    name = name.lower()
    return next((name.removesuffix(ending) for ending in PACKED if name.endswith(ending)), name)


def _read_hub(name: str, option: str) -> Iterator[Any]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}", name):
        raise ValueError(
            f"{option} {name!r} is neither a file nor the name of a hub dataset: "
            "give FILE.json, FILE.jsonl, FILE.parquet, or a name such as tatsu-lab/alpaca"
        )
    import datasets

    try:
        dataset, configuration, split = [*name.split(":"), None, None][:3]
        if split is None and option == "--eval-data":
            splits = datasets.load_dataset(dataset, configuration)
            found = splits[_split(list(splits), f"{option} {name}", option)]
        else:
            found = datasets.load_dataset(dataset, configuration, split=split or "train")
        yield from _in_parts(found)
    except Exception as error:  # the hub, its client and the network have many error classes with no common parent
        raise ValueError(
            f"{option} {name}: there is no such file, and the hub dataset of that name cannot be read "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
            "for a local file give its path with the ending: FILE.json, FILE.jsonl or FILE.parquet"
        ) from error


def _in_parts(dataset: Any) -> Iterator[Any]:
    """The rows of a `datasets.Dataset`, without decoding images as its own iterator does."""
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        yield from map(_unfilled, dataset.select(range(start, min(start + ROWS_AT_ONCE, len(dataset)))).to_list())


def _unfilled(row: Any) -> Any:
    """A row of an Arrow table without the nulls with which Arrow fills the objects of a list: all get the same fields,
    so that each tool would have the parameters of all tools."""
    found = {}
    for name, value in row.items():
        fills = isinstance(value, list) or name == "chat_template_kwargs"
        found[name] = _without_nulls(value) if fills else value
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _read_folder(path: Path, option: str) -> Iterator[Any]:
    """The rows of a folder that `datasets` saved, or of its files of one split, in the order of their names."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # damaged Arrow files raise many classes
            raise ValueError(f"{option} {path} is not a folder that `datasets` saved: {first_line(error)}") from error
        if not isinstance(found, datasets.DatasetDict):
            return _in_parts(found)
        return _in_parts(found[_split(list(found), f"{option} {path}", option)])
    files = [file for file in sorted(path.rglob("*")) if _unpacked_name(file.name).endswith(SUFFIXES)]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files and any(file.suffix.lower() in IMAGES for file in path.rglob("*")):
        raise ValueError(f"{option} {path} holds images: give --image-column image and an image model")
    if not files:
        raise ValueError(f"{option} {path} is a folder without a file that can be read: {', '.join(SUFFIXES)}")
    splits = {file: _split_in_name(str(file.relative_to(path))) for file in files}
    if all(splits.values()):
        wanted = _split([split for split in splits.values() if split], f"{option} {path}", option)
        files = [file for file in files if splits[file] == wanted]
    elif any(splits.values()):
        odd = ", ".join(file.name for file in files if not splits[file])
        raise ValueError(f"{option} {path}: some files are named after a split and others are not ({odd}): give a file")
    return (row for file in files for row in _read_file(file, option))


def _split_in_name(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((word for word in words if word in (*TRAINING, *HELD_OUT)), None)


def _split(names: list[str], where: str, option: str) -> str:
    """Of several splits the one an option means. Raises ValueError listing them if none is."""
    names = list(dict.fromkeys(names))
    wanted = HELD_OUT if option == "--eval-data" else TRAINING
    found = next((name for name in wanted if name in names), names[0] if len(names) == 1 else None)
    if found is None:
        raise ValueError(f"{where} has the splits {', '.join(names)}: expected one named {' or '.join(wanted)}")
    return found


def _read_file(path: Path, option: str) -> Iterator[Any]:
    suffix = Path(_unpacked_name(path.name)).suffix
    _check_file(path, suffix, option)
    if suffix == ".parquet":
        return _parquet_rows(path, option)
    if suffix == ".txt":
        return ({"text": text} for text in [_text(path, option)])
    if suffix in (".csv", ".tsv"):
        return csv_rows(_text(path, option), "\t" if suffix == ".tsv" else ",", f"{option} {path}")
    return _json_rows(path, option) if suffix == ".json" else _line_rows(_pieces(path, option), path, option)


def _json_rows(path: Path, option: str) -> Iterator[Any]:
    """The records of a JSON file: those of a list one by one, else of the whole text, which also finds the mistakes."""
    try:
        yield from _listed(_pieces(path, option))
    except _NoList as error:
        yield from itertools.islice(_whole_json(_text(path, option), path, option), error.before, None)


def _whole_json(text: str, path: Path, option: str) -> Iterator[Any]:
    try:
        yield from _rows(_parsed(text), path, option)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data") or not text.lstrip().startswith("{"):
            raise ValueError(f"{option} {path}, line {error.lineno}, is not JSON: {error.msg}") from error
        # several objects one after the other: JSON lines under another ending
        yield from _line_rows(iter([text]), path, option)
    except _NotJSON as error:
        raise ValueError(f"{option} {path} is not JSON that can be read: {error}") from None


def _line_rows(pieces: Iterator[str], path: Path, option: str) -> Iterator[Any]:
    """The records of JSON lines, from their text in pieces."""
    found = False
    for number, line in enumerate(_split_lines(pieces), 1):
        if line.strip():
            found = True
            try:
                yield _parsed(line)
            except (json.JSONDecodeError, _NotJSON) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(
                    f"{option} {path}, line {number}, is not JSON: {reason} (one record a line is expected)"
                ) from None
    if not found:
        raise _empty(path, option)


def _split_lines(pieces: Iterator[str]) -> Iterator[str]:
    """The lines of a text in pieces. Not splitlines(): U+2028 may stand inside a JSON string."""
    begun: list[str] = []
    for piece in pieces:
        first, *lines = piece.split("\n")
        begun.append(first)
        if lines:
            yield "".join(begun)
            yield from lines[:-1]
            begun = lines[-1:]
    yield "".join(begun)


class _NoList(Exception):
    """A text that is not a list of JSON values; before: how many values of it were taken until that was found."""

    def __init__(self, before: int):
        self.before = before


def _listed(pieces: Iterator[str]) -> Iterator[Any]:
    """The values of a JSON list whose text comes in pieces, one by one. Raises _NoList."""
    text, at, taken = "", 0, 0
    decode = json.JSONDecoder().raw_decode

    def more() -> bool:
        """Add at least as much text as is left, so that long values are not parsed too often; False at the end."""
        nonlocal text, at
        parts, size = [text[at:]], 0
        while size <= len(parts[0]) and (piece := next(pieces, None)) is not None:
            parts.append(piece)
            size += len(piece)
        text, at = "".join(parts), 0
        return size > 0

    expected = "["
    while True:
        at = BLANK.match(text, at).end()  # type: ignore[union-attr]
        if at == len(text):
            if more():
                continue
            if expected:
                raise _NoList(taken)
            return
        if text[at] in "[,]" and text[at] in expected:
            expected = {"[": "]v", ",": "v", "]": ""}[text[at]]
            at += 1
            continue
        if "v" not in expected:
            raise _NoList(taken)
        try:
            value, stop = decode(text, at)
        except json.JSONDecodeError as error:
            cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")
            if cut and more():
                continue
            raise _NoList(taken) from None
        except (RecursionError, ValueError):
            raise _NoList(taken) from None
        if stop == len(text) and more():  # a number may continue
            continue
        taken, at, expected = taken + 1, stop, ",]"
        yield value


def _text(path: Path, option: str) -> str:
    """The whole text. Raises ValueError for an empty file."""
    text = "".join(_pieces(path, option))
    if not text.strip():
        raise _empty(path, option)
    return text


def _empty(path: Path, option: str) -> ValueError:
    return ValueError(f"{option} {path} is empty; expected {FORMS}")


def _pieces(path: Path, option: str) -> Iterator[str]:
    """The unpacked text of a file in pieces, without a byte order mark. Raises ValueError if it is not UTF-8."""
    decoder, done, begun = codecs.getincrementaldecoder("utf-8")(), 0, False
    for data in itertools.chain(_unpack(path, option), [b""]):
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            byte = done + len(data) - len(error.object) + error.start  # object: also what was left of the last piece
            raise ValueError(f"{option} {path} is not UTF-8 text (byte {byte}): save it as UTF-8") from error
        done += len(data)
        if text:
            yield text if begun else text.removeprefix("\ufeff")
            begun = True


def _check_file(path: Path, suffix: str, option: str) -> None:
    """Raises ValueError for what is missing, no plain file, or of another kind."""
    try:
        status = path.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, names, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "give FILE.json, FILE.jsonl or FILE.parquet"
            raise ValueError(f"{option} {path}: there is no such file; {hint}") from None
        raise ValueError(f"{option} {path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a named pipe" if stat.S_ISFIFO(status.st_mode) else "no plain file"
        raise ValueError(
            f"{option} {path} is {kind}: the data are read again by other processes and when a run is resumed, "
            "so write them to a file"
        )
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{option} {path}: data is read from {', '.join(SUFFIXES)} (text also with {' or '.join(PACKED)}), "
            f"not from {suffix or path}" + (" (images: --image-column image)" if suffix in (".zip", *IMAGES) else "")
        )
    if status.st_size > limits().read_bytes:
        raise LimitExceeded(f"{option} {path} has {status.st_size:,} bytes: {limits().raised('read_bytes')}")


def _unpack(path: Path, option: str) -> Iterator[bytes]:
    """The file's bytes, unpacked by its first bytes. Stops if a part of an archive unpacks to far more bytes."""
    most, size = limits(), 0
    before = packed = 0  # the bytes unpacked, and those read for them, when the ratio was last looked at
    with path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        try:
            file = _opened(raw, magic)
            while piece := file.read(UNPACK_AT_ONCE):
                size += len(piece)
                if size > most.read_bytes:
                    raise LimitExceeded(f"{option} {path} unpacks to more bytes: {most.raised('read_bytes')}")
                if file is not raw and size - before > SMALL:
                    if size - before > most.read_ratio * (raw.tell() - packed):
                        raise LimitExceeded(
                            f"{option} {path} unpacks to more than read_ratio times its size, from byte {packed:,} on: "
                            f"{most.raised('read_ratio')}, or unpack it first"
                        )
                    before, packed = size, raw.tell()
                yield piece
        except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile and pyarrow's errors are OSErrors
            raise ValueError(f"{option} {path} cannot be read: {first_line(error)}") from error


def _opened(raw: BinaryIO, magic: bytes) -> Any:
    """What reads the unpacked bytes, or raw itself."""
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=raw)
    if magic == b"\x28\xb5\x2f\xfd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return raw


class _NotJSON(Exception):
    """JSON that Python cannot hold."""


def _parsed(text: str) -> Any:
    """json.loads, whose JSONDecodeError stays; other faults of the text are a _NotJSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _NotJSON("it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise _NotJSON(str(error)) from None


def _parquet_rows(path: Path, option: str) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if size > limits().read_bytes:
            raise LimitExceeded(f"{option} {path} unpacks to {size:,} bytes: {limits().raised('read_bytes')}")
        for batch in file.iter_batches(ROWS_AT_ONCE):
            yield from map(_unfilled, batch.to_pylist())
    except LimitExceeded:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{option} {path} is not a parquet file: {first_line(error)}") from error


def _rows(data: Any, path: Path, option: str) -> list[Any]:
    """The records of a parsed JSON file: the file itself, or a list in its object (a split, or the only list)."""
    if isinstance(data, dict) and not data.keys() & COLUMNS:
        lists = [key for key, value in data.items() if isinstance(value, list)]
        wanted = (*(HELD_OUT if option == "--eval-data" else TRAINING), "data")
        key = lists[0] if len(lists) == 1 else next((name for name in wanted if name in lists), None)
        if key is None:
            raise ValueError(
                f"{option} {path} is an object with {', '.join(map(repr, data)) or 'nothing in it'}: "
                f"expected a list of records, or an object with one list (or lists named {' or '.join(wanted)})"
            )
        data = data[key]
    return data if isinstance(data, list) else [data]
