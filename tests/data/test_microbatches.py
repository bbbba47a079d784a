"""The plan of a global batch: every row once, micro-batches of like length, ranks with like work."""

import random

import pytest

from launcher.data.microbatches import plan, positions, token_share

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


def test_a_row_longer_than_the_bound_stands_alone():
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
