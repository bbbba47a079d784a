"""The plan of a global batch: every row once, micro-batches of similar length, ranks with similar work."""

import math
import random

import pytest
import torch

from launcher.data.encoded import Encoded
from launcher.data.microbatches import GlobalBatches, plan, positions, token_share

# lengths of the first 128 records of Alpaca at 256 tokens, as a geometric-like spread
SPREAD = [random.Random(step).choice([*range(30, 110), *range(40, 90), 160, 200, 256]) for step in range(128)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("bounds", [(0, 0), (8, 0), (8, 700), (1, 0), (0, 300)])
@pytest.mark.parametrize("count", [1, 2, 7, 24, 128])
def test_every_row_is_dealt_out_once_and_all_ranks_have_as_many_rounds(world, bounds, count):
    made = plan(SPREAD[:count], world, *bounds)

    assert sorted(place for rank in made for part in rank for place in part) == list(range(count))
    assert len(made) == world
    assert len({len(rank) for rank in made}) == 1


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_both_bounds_hold(world):
    made = plan(SPREAD, world, 8, 700)

    parts = [part for rank in made for part in rank]
    assert max(len(part) for part in parts) <= 8
    assert max(positions(part, SPREAD) for part in parts) <= 700


def test_a_row_longer_than_the_limit_is_a_micro_batch_of_its_own():
    made = plan([900, 50, 50, 50], 1, 4, 200)

    assert [0] in made[0]


@pytest.mark.parametrize(("world", "least"), [(1, 0.95), (2, 0.93), (4, 0.90), (8, 0.82)])
def test_little_of_what_is_computed_is_padding(world, least):
    mean = sum(SPREAD) // len(SPREAD)

    assert token_share(plan(SPREAD, world, 8, 8 * mean), SPREAD) >= least


def test_without_bounds_each_rank_has_one_micro_batch_and_the_work_is_even():
    made = plan(SPREAD, 4)

    work = [positions(rank[0], SPREAD) for rank in made]
    assert {len(rank) for rank in made} == {1}
    assert max(work) < 1.1 * min(work)


def test_rows_of_equal_length_are_dealt_out_evenly():
    made = plan([64] * 32, 4, 4)

    assert {len(part) for rank in made for part in rank} == {4}
    assert token_share(made, [64] * 32) == 1.0


def test_with_fewer_rows_than_ranks_some_ranks_wait():
    made = plan([5, 9], 4, 8)

    assert made == [[[1]], [[0]], [[]], [[]]]


@pytest.fixture
def batches():
    """64 samples of SPREAD's lengths in steps of 16; a third of each sample's tokens carry loss."""
    lengths = SPREAD[:64]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    data = Encoded(
        ids=torch.zeros(int(offsets[-1]), dtype=torch.int32), loss=torch.zeros(int(offsets[-1]), dtype=torch.bool),
        offsets=offsets, targets=torch.tensor(lengths) // 3, report=None,
    )  # fmt: skip

    def make(**changed):
        settings = {"seed": 1, "batch_size": 16, "world_size": 2, "most_rows": 4, "most_tokens": 0, **changed}
        return GlobalBatches(data=data, rows=range(64), **settings)

    return make


def test_a_step_has_the_same_samples_on_any_number_of_ranks_and_under_any_bound(batches):
    expected = batches(world_size=1, most_rows=0).at(3)

    for world_size in (1, 2, 4, 8):
        for bound in ({"most_rows": 1}, {"most_rows": 8}, {"most_tokens": 300}):
            batch = batches(world_size=world_size, **bound).at(3)
            assert (batch.rows, batch.tokens, batch.targets) == (expected.rows, expected.tokens, expected.targets)


def test_the_bound_on_positions_is_that_of_mean_samples_unless_it_is_given(batches):
    assert batches().most_positions == math.ceil(4 * sum(SPREAD[:64]) / 64)
    assert batches(most_tokens=300).most_positions == 300
    assert batches(most_rows=0).most_positions == 0


def test_the_token_share_of_the_run_counts_the_slowest_rank(batches):
    one, eight = batches(world_size=1).token_share(), batches(world_size=8).token_share()

    assert 0.7 < eight < one < 1
    assert batches(most_rows=1, world_size=1).token_share() == 1
