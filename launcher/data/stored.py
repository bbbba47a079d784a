"""Records on disk, as JSON: the processes of a machine share them, and none holds them all in memory."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np

from launcher.config import DataConfig
from launcher.data.files import source_of
from launcher.data.forms import Record, as_conversation
from launcher.data.records import chosen_places, each_record, warn_of_overlap

RECORDS, KIND = "records.json", "kind.json"
TOLD_EVERY = 1000  # records between two calls of `told`


@dataclass(frozen=True, eq=False)
class Stored(Sequence[Record]):
    """Some of the records of a file, in some order, each parsed when it is requested."""

    lines: mmap.mmap | bytes
    ends: np.ndarray  # (records of the file,) int64: where each line ends
    places: np.ndarray  # (S,) int64: which records, perhaps some of them several times
    conversations: bool  # whether each is given as a conversation

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> Stored: ...
    def __getitem__(self, i: int | slice) -> Record | Stored:
        if isinstance(i, slice):
            return Stored(self.lines, self.ends, self.places[i], self.conversations)
        record = json.loads(self._line(int(self.places[i])))
        return as_conversation(record) if self.conversations else record

    def sorted_json(self) -> Iterator[str]:
        """Each record as json.dumps(record, sort_keys=True) writes it."""
        for i, place in enumerate(self.places.tolist()):
            # a record of texts alone is stored so
            yield json.dumps(self[i], sort_keys=True) if self.conversations else self._line(place).decode()

    def texts(self) -> Iterator[bytes]:
        """Each record once, as it is stored."""
        return map(self._line, np.unique(self.places).tolist())

    def _line(self, place: int) -> bytes:
        start = int(self.ends[place - 1]) if place else 0
        return self.lines[start : int(self.ends[place])]


def store_splits(
    config: DataConfig,
    folder: Path,
    told: Callable[[int], None] = lambda records: None,
    each: Callable[..., Iterator[Record]] | None = None,
) -> None:
    """Read and check the data of a run, and write its records and their splits to files of an empty folder.

    Warns if records are both trained and held out. told is called with the number of records so far. each(source,
    option=...) reads a source; by default as instructions or conversations. Raises ValueError as `records.splits_of`
    does.
    """
    sources = [source_of(text) for text in ([config.data] if isinstance(config.data, str) else config.data)]
    each = each or partial(each_record, columns=config.columns, on_bad_record=config.on_bad_record)
    ends, talks = array("q"), bytearray()  # of each record: where its line ends; whether its source has conversations
    with open(folder / RECORDS, "xb") as file:

        def write(source: str, option: str) -> int:
            """Write the records of a source; returns how many there are."""
            first, conversations = len(ends), False
            for record in each(source, option=option):
                conversations |= "messages" in record
                file.write(json.dumps(record, sort_keys="messages" not in record).encode())
                ends.append(file.tell())
                if len(ends) % TOLD_EVERY == 0:
                    told(len(ends))
            talks.extend([conversations] * (len(ends) - first))
            return len(ends) - first

        counts = [(source, write(source.name, "--data")) for source in sources]
        others = None if config.eval_data is None else write(config.eval_data, "--eval-data")
    train, held_out = chosen_places(counts, config.eval_records, others, fewer=config.fewer_eval_records)
    if others is not None:
        held_out = [place + len(ends) - others for place in held_out]
    for name, numbers in (("ends", ends), ("train", train), ("held_out", held_out)):
        np.save(folder / f"{name}.npy", np.array(numbers, dtype=np.int64), allow_pickle=False)
    # One conversation among the records that are used makes all of them conversations.
    all_talk = any(talks[place] for places in (train, held_out) for place in places)
    (folder / KIND).write_text(json.dumps({"conversations": all_talk}))
    warn_of_overlap(*(records.texts() for records in stored_splits(folder)))


def stored_splits(folder: Path) -> tuple[Stored, Stored]:
    """(training, held-out) records that `store_splits` wrote."""
    with open(folder / RECORDS, "rb") as file:
        lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.seek(0, 2) else b""
    ends = np.load(folder / "ends.npy", mmap_mode="r", allow_pickle=False)
    conversations = json.loads((folder / KIND).read_text())["conversations"]
    train, held_out = (
        Stored(lines, ends, np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False), conversations)
        for name in ("train", "held_out")
    )
    return train, held_out
