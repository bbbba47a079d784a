"""Heartbeats of all ranks while factors are made, through the key-value store: no collective, no NCCL watchdog.

Every rank posts a few times a second that it is alive and what it works on; rank 0 posts a summary that all ranks read.
So all ranks learn within seconds which rank failed at which weight, even if it was killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from launcher.processes import Communicator, Stopped, agreed

OnProgress = Callable[[int, int, str], None]  # weights done on all ranks, weights in all, one in progress
BEAT_S = 0.2  # between two heartbeats
SILENCE_S = 7.0  # without a heartbeat for so long a rank counts as dead; all ranks report it within 10 s


class Watch:
    """Posts this rank's state and reads that of all ranks. With a single process nothing is exchanged."""

    def __init__(
        self,
        comm: Communicator,
        token: str,
        total: int,
        on_progress: OnProgress,
        kept: str = "finished weights are kept",
    ):
        self.ranks, self.store, self.prefix = comm.ranks, comm.store, f"loldu/factorize/{token}"
        self.own: dict[str, Any] = {"beat": 0, "done": 0, "total": total, "weight": "", "error": None}
        self.on_progress, self.kept = on_progress, kept
        self.heard: dict[Any, tuple[int, float]] = {}  # rank -> its last heartbeat and when it changed
        self.told = False
        self.left = False  # whether a rank has set own["left"]: it has failed, and reports it when all have stopped

    def beat(self, done: int, weight: str, finished: bool = False) -> bool:
        """Post what this rank is doing; True when all ranks have finished. Raises the error of a rank that failed."""
        self.own |= {"beat": self.own["beat"] + 1, "done": done, "weight": weight, "finished": finished}
        news = self._exchange()
        self.left = bool(news.get("left"))
        if news["error"]:
            self.told = True
            text = news["error"]["text"]
            if news["error"].get("stopped"):
                raise Stopped("another rank")
            raise agreed(ValueError(text) if news["error"]["mistake"] else RuntimeError(text))
        self.on_progress(news["done"], news["total"], news["weight"])
        return bool(news["finished"])

    def tell(self, error: BaseException) -> None:
        """Post that this rank failed, and wait until the others have read it.

        Once one process exits, a launcher may end the others, and the store ends with the process that keeps it.
        """
        if self.store is None:
            return
        if not self.told:
            plain = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            text = f"rank {self.ranks.rank} failed at {self.own['weight'] or 'the end'}: {plain}"
            self.own["error"] = {"text": text, "mistake": isinstance(error, (ValueError, OSError))}
            self.own["error"]["stopped"] = isinstance(error, Stopped)
            with suppress(RuntimeError, LookupError):
                self._exchange()
        if self.ranks.is_main or not self.told:
            time.sleep(5 * BEAT_S)

    def _exchange(self) -> dict[str, Any]:
        if self.store is None:
            return self.own
        try:
            self.store.set(f"{self.prefix}/{self.ranks.rank}", json.dumps(self.own))
            if self.ranks.is_main:
                news = self._sum_up()
                self.store.set(f"{self.prefix}/all", json.dumps(news))
                return news
            if self.store.check([f"{self.prefix}/all"]):
                news = json.loads(self.store.get(f"{self.prefix}/all"))
            else:
                news = {"beat": 0, "done": 0, "total": 0, "weight": "", "error": None, "finished": False}
        except RuntimeError as error:  # torch's DistError: the process that keeps the store is gone
            raise RuntimeError(f"lost the key-value store: rank 0 is gone, look at its log first ({error})") from error
        if self._silent("all", news["beat"]):
            raise RuntimeError(
                f"no heartbeat from rank 0 for {SILENCE_S:.0f} s: it died or hangs, look at its log first"
            )
        return news

    def _sum_up(self) -> dict[str, Any]:
        """Rank 0's summary: the progress of all ranks, and the first that failed or fell silent."""
        words = [self.own]
        for rank in range(1, self.ranks.world_size):
            key = f"{self.prefix}/{rank}"
            words.append(json.loads(self.store.get(key)) if self.store.check([key]) else {"beat": 0})
            if self._silent(rank, words[rank]["beat"]):
                at = words[rank].get("weight") or "the start"
                text = f"no heartbeat from rank {rank} for {SILENCE_S:.0f} s, the last one at {at}: it died or hangs"
                remedy = f"look at its log, then start again: {self.kept}"
                words[rank]["error"] = {"text": f"{text}; {remedy}", "mistake": False}
        return {
            "beat": self.own["beat"],
            "done": sum(word.get("done", 0) for word in words),
            "total": sum(word.get("total", 0) for word in words),
            "weight": next((word["weight"] for word in words if word.get("weight")), ""),
            "error": next((word["error"] for word in words if word.get("error")), None),
            "finished": all(word.get("finished") for word in words),
            "left": any(word.get("left") for word in words),
        }

    def _silent(self, who: Any, beat: int) -> bool:
        now = time.monotonic()
        if who not in self.heard or self.heard[who][0] != beat:
            self.heard[who] = (beat, now)
        return now - self.heard[who][1] > SILENCE_S
