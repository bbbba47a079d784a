"""Tokenised data on disk, made once by all processes of a machine, and mapped into the memory of each.

Each result is one file in the folder of the factor cache, tokenised/<key>.safetensors. The key is a hash of everything
that the tokens depend on. One process of each machine compares the file with its own digest when it is found.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open

from launcher.config import DataConfig
from launcher.data.crew import ALONE, Crew, Tick
from launcher.data.encode import Encoder
from launcher.data.encoded import CHUNK, DataReport, Encoded, Encodes, Tally, encoded, little_endian
from launcher.data.forms import Record
from launcher.data.stored import Stored
from launcher.factorization.cache import put

log = logging.getLogger(__name__)
FORMAT = 5  # changes whenever `encode` gives other tokens or another report for the same records
TENSORS = {"offsets": "I64", "targets": "I64", "ids": "I32", "loss": "BOOL"}  # in the file's order, so all are aligned
COPY_BYTES = 1 << 24


def encode_once(
    records: Sequence[Record],
    tokenizer: Any,
    config: DataConfig,
    folder: Path,
    crew: Crew = ALONE,
    kind: type[Encodes] = Encoder,
) -> Encoded:
    """What an encoder of this kind gives, from the cache in folder, or made by the crew and mapped from its file there.

    Called by all processes of the crew with the same records. Warns if the cache cannot be written. Raises the
    encoder's errors, on all processes.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):  # a pure Python tokenizer has no content to make a key of
        return crew.comm.each("data", lambda: encoded(kind(records[0], tokenizer, config), records))

    def look() -> list[Any]:
        file = folder / "tokenised" / f"{_key(records, tokenizer, config, kind)}.safetensors"
        return [str(file), _verified(file, kind)]

    machines = crew.led("data", look)
    (name, digest), file = machines[0], Path(machines[0][0])
    with ExitStack() as stack:
        if None in [found for _, found in machines]:
            work = stack.enter_context(crew.folder(folder))
            encoder = crew.comm.each("data", lambda: kind(records[0], tokenizer, config))
            made = _make(encoder, records, work, file, crew, mine=digest is None)
            name, digest = made if digest is None else (name, digest)
        found = crew.comm.each("data", lambda: _read(Path(name), digest, kind))  # before the folder is removed
    found.report.log()
    return found


def encoded_before(
    records: Sequence[Record], tokenizer: Any, config: DataConfig, folder: Path, kind: type[Encodes] = Encoder
) -> Encoded | None:
    """What `encode_once` has in the cache for these records; None if it would have to tokenise them."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return None
    file = folder / "tokenised" / f"{_key(records, tokenizer, config, kind)}.safetensors"
    digest = _verified(file)
    return None if digest is None else _read(file, digest, kind)


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _make(
    encoder: Encodes, records: Sequence[Record], work: Path, file: Path, crew: Crew, *, mine: bool
) -> tuple[str, str]:
    """Tokenise on all processes of a machine, then write the file on its first; returns its name and digest.

    mine: whether this machine lacks the file; otherwise the result has no meaning.
    """

    def tokenise(tick: Tick) -> None:
        if mine:
            chunks = crew.claims(work.name, -(-len(records) // CHUNK))
            _write_part(encoder, records, chunks, work / f"part-{crew.comm.ranks.rank}", tick)

    def join(tick: Tick) -> list[str]:
        if not (mine and crew.leads):
            return ["", ""]
        pieces = _Pieces(work)
        report = encoder.report(pieces.tallies, len(records))
        try:
            put(file.parent.parent, file, lambda partial: pieces.write(partial, report, tick))
            return [str(file), pieces.digest]
        except ValueError as error:
            _warn_once(f"the tokenised data cannot be kept for the next start: {error}")
        made = work / "tokenised.safetensors"
        pieces.write(made, report, tick)
        return [str(made), pieces.digest]

    own = len(records) if mine and crew.leads else 0  # the machine's total is reported by its first process
    crew.work("tokenising", own, tokenise)
    made: list[list[str]] = []
    crew.work("writing tokens", 0, lambda tick: made.append(join(tick)))
    name, digest = crew.led("data", lambda: made[0])[0]
    return name, digest


def _write_part(encoder: Encodes, records: Sequence[Record], chunks: Iterator[int], folder: Path, tick: Tick) -> None:
    """Tokenise these chunks one after the other, into files of a folder, and an index of what they hold."""
    folder.mkdir()
    index, done = [], 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "xb")) for name in ("lengths", "targets", "ids", "loss")}
        for chunk in chunks:
            some = records[chunk * CHUNK : (chunk + 1) * CHUNK]
            with _uncollected():
                part = encoder.part(list(some))
            for name, opened in files.items():
                opened.write(little_endian(getattr(part, name)))
            index.append([chunk, dataclasses.asdict(part.tally)])
            done += len(some)
            tick(done)
    (folder / "index.json").write_text(json.dumps(index))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python's collector off: it would walk through all imported modules again and again, a sixth of the time, for
    lists of tokens that are in no cycle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Pieces:
    """The files of all processes of a machine, to be written as one."""

    def __init__(self, work: Path):
        chunks: list[tuple[int, Path, Tally, int, int]] = []  # number, folder, counts, samples and tokens before it
        for folder in sorted(work.glob("part-*")):
            samples = tokens = 0
            for number, tally in json.loads((folder / "index.json").read_text()):
                counted = Tally(**tally)
                chunks.append((number, folder, counted, samples, tokens))
                samples, tokens = samples + counted.kept, tokens + counted.tokens
        self.chunks = sorted(chunks, key=lambda chunk: chunk[0])
        self.tallies = [tally for _, _, tally, _, _ in self.chunks]
        self.digest = ""  # of what was written: `Encoded.digest`

    def write(self, file: Path, report: DataReport, tick: Tick) -> None:
        """Write the file that `_read` reads, a little at a time."""
        lengths, targets = (self._counts(name) for name in ("lengths", "targets"))
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
        sizes = {"offsets": len(offsets), "targets": len(targets), "ids": report.tokens, "loss": report.tokens}
        sha = hashlib.sha256()
        header_size = len(_header(sizes, report, "0" * 64))
        with open(file, "xb") as opened:
            opened.seek(header_size)
            opened.write(little_endian(offsets))
            opened.write(little_endian(targets))
            for done, name in enumerate(("ids", "loss")):
                for data in self._bytes(name):
                    opened.write(data)
                    sha.update(data)
                tick(done)
            sha.update(little_endian(offsets))
            self.digest = sha.hexdigest()
            header = _header(sizes, report, _with_targets(self.digest, targets))
            assert len(header) == header_size
            opened.seek(0)
            opened.write(header)

    def _counts(self, name: str) -> np.ndarray:
        found = [
            np.fromfile(folder / name, dtype="<i8", count=tally.kept, offset=8 * samples)
            for _, folder, tally, samples, _ in self.chunks
        ]
        return np.concatenate(found)

    def _bytes(self, name: str) -> Iterator[bytes]:
        width, opened = {"ids": 4, "loss": 1}[name], dict[Path, BinaryIO]()
        with ExitStack() as stack:
            for _, folder, tally, _, tokens in self.chunks:
                if folder not in opened:
                    opened[folder] = stack.enter_context(open(folder / name, "rb"))
                opened[folder].seek(width * tokens)
                left = width * tally.tokens
                while left:
                    data = opened[folder].read(min(left, COPY_BYTES))
                    assert data, f"{folder / name} is shorter than its index says"
                    left -= len(data)
                    yield data


def _header(sizes: dict[str, int], report: DataReport, digest: str) -> bytes:
    """The beginning of a safetensors file with these tensors one after the other."""
    about = {"report": json.dumps(dataclasses.asdict(report)), "digest": digest}
    header: dict[str, Any] = {"__metadata__": about}
    at = 0
    for name, dtype in TENSORS.items():
        end = at + sizes[name] * {"I64": 8, "I32": 4, "BOOL": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": [sizes[name]], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _verified(file: Path, kind: type[Encodes] = Encoder) -> str | None:
    """The digest of the tokens in a file; None if it is missing or, with a warning, damaged."""
    try:
        if file.exists() and not file.is_file():  # opening a FIFO would wait for ever
            raise ValueError("it is not a regular file")
        with safe_open(file, framework="pt") as opened:
            expected = opened.metadata()["digest"]
        found = _read(file, None, kind)
        digest = found.digest()
        if _with_targets(digest, found.targets.numpy()) != expected:
            raise ValueError("its tokens differ from their digest")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): the data are tokenised again", file, error)
        return None
    with suppress(OSError):  # the cache is pruned by the time of last use
        os.utime(file)
    return digest


def _read(file: Path, digest: str | None, kind: type[Encodes] = Encoder) -> Encoded:
    """The file's content, mapped and not read; digest: of its tokens, if they have been verified."""
    with safe_open(file, framework="pt") as opened:
        report = json.loads(opened.metadata()["report"])
        report["notes"] = tuple(report["notes"])
        if wrong := [name for name, kind in TENSORS.items() if opened.get_slice(name).get_dtype() != kind]:
            raise ValueError(f"its {', '.join(wrong)} are of another type")
        tensors = {name: opened.get_tensor(name) for name in TENSORS}
    return Encoded(**tensors, report=kind.report_type(**report), known_digest=digest)


def _with_targets(digest: str, targets: np.ndarray) -> str:
    return hashlib.sha256(f"{digest} {targets.tolist()}".encode()).hexdigest()


def _key(records: Sequence[Record], tokenizer: Any, config: DataConfig, kind: type[Encodes] = Encoder) -> str:
    """sha256 of the JSON text of everything that the tokens depend on, the records last."""
    depends_on = [
        FORMAT, tokenizers.__version__, tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map),
        *kind.key(records[0], tokenizer, config), config.max_length, config.loss_on, config.on_bad_record, [],
    ]  # fmt: skip
    sha = hashlib.sha256(json.dumps(depends_on, sort_keys=True).removesuffix("]]").encode())
    each: Callable[[], Iterator[str]] = lambda: (json.dumps(record, sort_keys=True) for record in records)  # noqa: E731
    for number, text in enumerate(records.sorted_json() if isinstance(records, Stored) else each()):
        sha.update(f", {text}".encode() if number else text.encode())
    sha.update(b"]]")
    return sha.hexdigest()
