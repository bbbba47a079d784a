"""An answer's text token by token: half characters wait for their other tokens, and a stop text is never shown.

Decoding the whole answer at each token takes time that grows with its square, and tokenizers' own DecodeStream fails on
bytes that are not text, which a sampled answer may hold ("Invalid prefix encountered"). So the tokens since the last
whole character are decoded behind the ones before them, which decide about blanks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Text:
    """Turns tokens into text. What could be the beginning of a stop text is held back until it is known."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [each for each in stop if each]
        self.ids: list[int] = []
        self.decoded = self.shown = ""
        self.stopped = False
        self._before = self._decoded = 0  # tokens that end the text before the last piece, and this piece

    def add(self, token: int, *, last: bool = False) -> str:
        """The new text after this token; last: nothing is held back any more."""
        self.ids.append(token)
        before = self._decode(self.ids[self._before : self._decoded])
        now = self._decode(self.ids[self._before :])
        if last or (len(now) > len(before) and not now.endswith("\ufffd")):
            self.decoded += now[len(before) :]
            self._before, self._decoded = self._decoded, len(self.ids)
        found = [at for at in map(self.decoded.find, self.stop) if at >= 0]
        self.stopped = bool(found)
        return self._show(min(found) if found else len(self.decoded) - (0 if last else self._held()))

    def end(self) -> str:
        """The text that is still held back, if an answer ends without another token."""
        before = self._decode(self.ids[self._before : self._decoded])
        self.decoded += self._decode(self.ids[self._before :])[len(before) :]
        self._before = self._decoded = len(self.ids)
        return "" if self.stopped else self._show(len(self.decoded))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _held(self) -> int:
        """Characters at the end with which a stop text begins."""
        longest = max(map(len, self.stop), default=1) - 1
        ends = (count for count in range(min(longest, len(self.decoded)), 0, -1))
        return next((n for n in ends if any(stop.startswith(self.decoded[-n:]) for stop in self.stop)), 0)

    def _show(self, until: int) -> str:
        new, self.shown = self.decoded[len(self.shown) : until], self.decoded[: max(until, len(self.shown))]
        return new
