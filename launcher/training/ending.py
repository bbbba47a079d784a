"""How several ranks end when one of them fails: the screen's first lines name that rank and the cause.

A rank posts its error in the store before it leaves the process group. The others then lose their connections, look for
that post, and show it instead of their connection error. A rank that was killed posts nothing, so the others know that
too.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from launcher.processes import PATIENCE_S, POLL_S, Communicator, is_agreed
from launcher.text import printable

COMMON_S = 0.5  # in this time all ranks with the same mistake have posted it
LOST = re.compile(r"gloo|nccl|process ?group|connection (closed|reset|refused)|broken pipe|key-value store", re.I)
FEW = 8  # ranks that are named


def post(error: Exception, comm: Communicator | None) -> None:
    """Tell the other ranks why this one ends. Call it before leaving the process group: then the others end too."""
    if comm is not None and comm.store is not None:
        _quietly(comm.store.set, _key(comm.ranks.rank), json.dumps({"text": text_of(error), "lost": lost(error)}))


def tell(error: Exception, comm: Communicator, ended: Callable[[], bool] = lambda: False) -> tuple[bool, bool]:
    """Print why this run of several ranks ends, in one line. Every failing rank calls this, after `post`.

    ended: whether this rank's launcher has asked it to end, so that another one has printed the line. Returns whether
    the error is this rank's own, and whether this rank is the first of those that are left.
    """
    rank, mine = comm.ranks.rank, text_of(error)
    if is_agreed(error):
        if not rank:
            _print(mine)
        return True, not rank
    if not lost(error):
        alike = lambda: [other for other, post in _posted(comm, but=rank).items() if mine in post["text"]]  # noqa: E731
        first = not _within(COMMON_S, alike) or rank < min(alike())
        if first:  # else a lower rank prints the same
            _print(mine if alike() else f"rank {rank}: {mine}")
        return True, not rank
    everyone = set(range(comm.ranks.world_size)) - {rank}
    _within(PATIENCE_S, lambda: _causes(comm) or everyone <= _posted(comm, but=rank).keys())
    causes, posted = _causes(comm), _posted(comm, but=rank)
    missing = sorted(everyone - posted.keys())
    first = rank == min([rank, *posted])
    if causes:
        _within(2 * COMMON_S, ended)  # that rank prints first
        _print(f"rank {rank} ends, because rank {min(causes)} failed: {causes[min(causes)]}")
    elif missing and (first or not _within(PATIENCE_S, ended)):
        names = ", ".join(map(str, missing[:FEW])) + (" and more" if len(missing) > FEW else "")
        several = "s" if len(missing) > 1 else ""
        _print(
            f"rank{several} {names} ended without a word, as when killed or out of memory: look at the log of that "
            f"rank and of its machine first; the same command resumes from the last checkpoint (rank {rank} lost the "
            f"connection: {mine.splitlines()[0][:200]})"
        )
    elif not missing:
        _print(f"rank {rank} lost the connection to the other ranks: {mine.splitlines()[0]}")
    return False, first


def cause(error: Exception, comm: Communicator) -> str:
    """Why this run ends, for its folder: this rank's own error, else that of the rank that ended first. After `tell`,
    which waits for the other ranks."""
    if not lost(error):
        return text_of(error)
    if causes := _causes(comm):
        return f"rank {min(causes)}: {causes[min(causes)]}"
    missing = sorted(set(range(comm.ranks.world_size)) - {comm.ranks.rank} - _posted(comm, but=comm.ranks.rank).keys())
    if missing:
        return f"rank {missing[0]} ended without a word, as when killed or out of memory"
    return f"rank {comm.ranks.rank} lost the connection to the other ranks: {text_of(error)}"


def text_of(error: Exception) -> str:
    """The text to show for an error: the message, with the type unless it is a mistake of the user."""
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"


def lost(error: Exception) -> bool:
    """Whether an error only shows that another rank has ended."""
    if isinstance(error, ValueError):
        return False
    kinds = (TimeoutError, ConnectionError, *(getattr(dist, name) for name in ("DistError",) if hasattr(dist, name)))
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and bool(LOST.search(str(error))))


def _key(rank: int) -> str:
    return f"loldu/ended/{rank}"


def _posted(comm: Communicator, *, but: int) -> dict[int, Any]:
    """What the other ranks have posted; nothing if the store ended with rank 0."""
    found: dict[int, Any] = {}
    for rank in set(range(comm.ranks.world_size)) - {but}:
        if _quietly(comm.store.check, [_key(rank)]) and (text := _quietly(comm.store.get, _key(rank))):
            found[rank] = json.loads(text)
    return found


def _causes(comm: Communicator) -> dict[int, str]:
    return {rank: post["text"] for rank, post in _posted(comm, but=comm.ranks.rank).items() if not post["lost"]}


def _quietly(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except RuntimeError:  # torch's DistError: the process that keeps the store is gone
        return None


def _within(seconds: float, look: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + seconds
    while not (seen := bool(look())) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return seen


def _print(text: str) -> None:
    print(f"error: {printable(text)}", file=sys.stderr, flush=True)
