"""How the rows of one global batch are divided: micro-batches of similar length, ranks with similar work.

The loss of a step is a sum over the tokens of its batch, so their order inside the batch is free: every plan gives the
same step up to rounding. The plan is a pure function of the lengths, and every rank computes the same one.

A micro-batch of b rows, the longest of n tokens, computes b n positions; those without a token are padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

from launcher.config import Config
from launcher.data.batches import batch_indices, epoch_order, pack, row_lengths, target_tokens
from launcher.data.encoded import Encoded

Plan = list[list[list[int]]]  # [rank][round] -> places in the batch, longest first; every rank has as many rounds
LOOK_AHEAD = 20  # steps whose padding is reported at the start


class GlobalBatch(NamedTuple):
    """The samples of one optimizer step and who computes them."""

    rows: list[Any]  # sample numbers, or lists of them when packing
    tokens: int  # prompts included, padding not
    targets: int  # tokens that carry loss
    dealt: Plan
    token_share: float  # of the positions that all ranks compute; the rest is padding

    def of_rank(self, rank: int) -> list[list[Any]]:
        """The rows of each of this rank's micro-batches."""
        return [[self.rows[place] for place in places] for places in self.dealt[rank]]


@dataclass(frozen=True, kw_only=True)
class GlobalBatches:
    """The global batches of a run, by step. Every rank computes the same from the same settings."""

    data: Encoded
    rows: Sequence[Any]  # what batch_size counts: sample numbers, or lists of them when packing
    seed: int
    batch_size: int
    world_size: int
    most_rows: int  # of a micro-batch; 0: no bound
    most_tokens: int  # positions of a micro-batch; 0: those of most_rows rows of mean length
    flat: bool = False  # a micro-batch is one row of all its tokens, without padding
    _last: list[tuple[int, GlobalBatch]] = field(default_factory=list, compare=False, repr=False)

    @cached_property
    def most_positions(self) -> int:
        """The bound on the positions of a micro-batch; 0: none."""
        if self.most_tokens or not self.most_rows:
            return self.most_tokens
        return mean_positions(row_lengths(self.data, self.rows), self.most_rows)

    def at(self, step: int) -> GlobalBatch:
        """The batch of step 1, 2, ... The last one requested is kept: a thread requests batches ahead of the step."""
        if self._last and self._last[0][0] == step:
            return self._last[0][1]
        self._last[:] = [(step, batch := self._made(step))]
        return batch

    def _made(self, step: int) -> GlobalBatch:
        rows = [self.rows[i] for i in batch_indices(self.seed, step - 1, self.batch_size, len(self.rows))]
        lengths = row_lengths(self.data, rows)
        dealt = plan(lengths, self.world_size, self.most_rows, self.most_positions, flat=self.flat)
        share = token_share(dealt, lengths, flat=self.flat)
        return GlobalBatch(rows, sum(lengths), target_tokens(self.data, rows), dealt, share)

    def token_share(self) -> float:
        """Share of the computed positions that are tokens, over the first steps of an epoch; the rest is padding."""
        tokens, computed = 0, 0.0
        for step in range(1, 1 + min(LOOK_AHEAD, -(-len(self.rows) // self.batch_size))):
            batch = self.at(step)
            tokens += batch.tokens
            computed += batch.tokens / batch.token_share
        return tokens / computed


def global_batches(config: Config, data: Encoded, world_size: int, *, flat: bool = False) -> GlobalBatches:
    """The global batches of a run on these samples."""
    optimizer, rows = config.optimizer, range(len(data))
    packed: list[list[int]] = []
    if config.data.packing:
        order = epoch_order(optimizer.seed, 0, len(data)).tolist()
        packed = pack(data.lengths, order, config.data.max_length)
    return GlobalBatches(
        data=data,
        rows=packed or rows,
        seed=optimizer.seed,
        batch_size=optimizer.batch_size,
        world_size=world_size,
        most_rows=optimizer.micro_batch_size,
        most_tokens=optimizer.micro_batch_tokens,
        flat=flat,
    )


def plan(lengths: Sequence[int], world: int, most_rows: int = 0, most_tokens: int = 0, *, flat: bool = False) -> Plan:
    """Deal out rows of these lengths to world ranks, in micro-batches within both bounds (0: none).

    flat: there is no padding.
    A row longer than most_tokens is a separate micro-batch. Each round is one forward pass of every rank, as engines
    need whose forward pass is a collective. With fewer rows than ranks there is one round, and some ranks get an empty
    micro-batch in it.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    if len(order) < world:
        return [[order[rank : rank + 1]] for rank in range(world)]
    most_rows = most_rows or len(order)
    limit = most_tokens or len(order) * max(lengths, default=0)
    cut, size = partial(_cut, order, lengths, most_rows, flat=flat), partial(positions, lengths=lengths, flat=flat)
    parts = cut(limit)
    count = min(-(-len(parts) // world) * world, len(order) // world * world)
    if len(parts) <= count:
        # The smallest bound that needs no more micro-batches: their sizes come close to each other.
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(cut(middle)) <= count else (middle, high)
        parts = cut(high)
    else:
        count = -(-len(parts) // world) * world
    while len(parts) < count:  # halve the one with most positions
        parts.sort(key=lambda part: (len(part) == 1, -size(part), part))
        if len(parts[0]) == 1:
            break
        half = len(parts[0]) // 2
        parts[:1] = [parts[0][:half], parts[0][half:]]
    return _deal(parts, size, world)


def mean_positions(lengths: Sequence[int], rows: int) -> int:
    """Positions of a micro-batch of so many rows of the mean length."""
    return math.ceil(rows * sum(lengths) / len(lengths))


def positions(part: Sequence[int], lengths: Sequence[int], *, flat: bool = False) -> int:
    """Positions that a micro-batch computes, padding included."""
    if flat:
        return sum(lengths[place] for place in part)
    return len(part) * max((lengths[place] for place in part), default=0)


def token_share(made: Plan, lengths: Sequence[int], *, flat: bool = False) -> float:
    """Share of the positions that are tokens, where every round lasts as long as its slowest rank's micro-batch."""
    rounds = zip(*made, strict=True)
    computed = len(made) * sum(max(positions(part, lengths, flat=flat) for part in parts) for parts in rounds)
    return sum(lengths) / computed if computed else 1.0


def _cut(
    order: Sequence[int], lengths: Sequence[int], most_rows: int, most_tokens: int, *, flat: bool
) -> list[list[int]]:
    """Consecutive parts of the sorted rows, each as large as the bounds allow."""
    parts: list[list[int]] = []
    computed = 0
    for place in order:
        full = not parts or len(parts[-1]) == most_rows
        more = lengths[place if flat or full else parts[-1][0]]  # padded to the first, which is the longest
        if full or computed + more > most_tokens:
            parts.append([])
            computed, more = 0, lengths[place]
        parts[-1].append(place)
        computed += more
    return parts


def _deal(parts: list[list[int]], size: Callable[[Sequence[int]], int], world: int) -> Plan:
    """One part for each rank in each round, the largest of a round to the rank with the least work so far."""
    parts = sorted(parts, key=lambda part: (-size(part), part))
    parts += [[] for _ in range(-len(parts) % world)]
    made: Plan = [[] for _ in range(world)]
    work = [0] * world
    for start in range(0, len(parts), world):
        ranks = sorted(range(world), key=lambda rank: (work[rank], rank))
        for rank, part in zip(ranks, parts[start : start + world], strict=True):
            made[rank].append(part)
            work[rank] += size(part)
    return made
