"""Records that cannot be used: the reasons, collected for one error or one warning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

SHOWN = 10  # bad records that are named


class BadRecord(ValueError):
    """A record that cannot be used; kind is the reason in few words, the same for all records with this fault."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class BadRecords:
    """The bad records of a source. With policy error they end the run, with skip they are left out."""

    def __init__(
        self, policy: Literal["error", "skip"], first: Sequence[str] = (), kinds: Mapping[str, int] | None = None
    ):
        self.policy = policy
        self.first: list[str] = list(first)
        self.kinds: Counter[str] = Counter(kinds)

    def add(self, error: BadRecord) -> None:
        self.kinds[error.kind] += 1
        if len(self.first) < SHOWN:
            self.first.append(str(error))

    def tell(self, source: str, records: int) -> str | None:
        """Raise ValueError, or with skip return the same text for the log; None if no record is bad."""
        count = self.kinds.total()
        if not count:
            return None
        if count == records or self.policy == "error":
            raise ValueError(self.text(source, records))
        return f"{self.text(source, records)}\n{count:,} left out (--on-bad-record skip)"

    def text(self, source: str, records: int) -> str:
        """The first ten with their reasons, and the count of each kind."""
        count = self.kinds.total()
        if count == 1:
            return self.first[0]
        if count == records and len(self.kinds) == 1:
            return (
                f"{source}: none of the {records:,} records can be used, all for one reason; the first: {self.first[0]}"
            )
        kinds = ", ".join(f"{number:,} x {kind}" for kind, number in self.kinds.most_common())
        more = f"\n  ... and {count - len(self.first):,} more" if count > len(self.first) else ""
        listed = "".join(f"\n  {text}" for text in self.first)
        return f"{source}: {count:,} of {records:,} records cannot be used ({kinds}):{listed}{more}"
