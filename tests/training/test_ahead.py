"""Batches made ahead equal those that would be made now; an error in the thread is raised where the batch is taken."""

import threading

import pytest
import torch

from launcher.training.ahead import Ahead, pinned


def test_a_batch_that_was_begun_is_made_once_and_in_another_thread():
    ahead, made = Ahead(), []

    def make(rows):
        made.append((list(rows), threading.current_thread() is threading.main_thread()))
        return {"rows": torch.tensor(rows)}

    ahead.begin(lambda: [1, 2], make)
    ahead.begin(lambda: [3], make)

    assert ahead.take([1, 2], make)["rows"].tolist() == [1, 2]
    assert ahead.take([3], make)["rows"].tolist() == [3]
    assert made == [([1, 2], False), ([3], False)]
    ahead.close()


def test_other_rows_are_made_now_and_what_was_begun_is_kept():
    """The samples of a step that diverged are checked one by one."""
    ahead, made = Ahead(), []

    def make(rows):
        made.append(list(rows))
        return {"rows": rows}

    ahead.begin(lambda: [4, 5], make)

    assert ahead.take([7], make)["rows"] == [7]
    assert ahead.take([4, 5], make)["rows"] == [4, 5]
    assert sorted(made) == [[4, 5], [7]]
    ahead.close()


def test_the_same_rows_of_another_step_are_made_now():
    """Few samples: each step has the same rows, and other random numbers."""
    ahead = Ahead()
    ahead.begin(lambda: [0], lambda rows: {"made": "ahead"}, 2)

    assert ahead.take([0], lambda rows: {"made": "now"}, 1)["made"] == "now"
    assert ahead.take([0], lambda rows: {"made": "now"}, 2)["made"] == "ahead"
    ahead.close()


def test_an_error_in_the_thread_is_raised_where_the_batch_is_taken():
    ahead = Ahead()

    def make(rows):
        raise ValueError(f"rows {rows} are damaged")

    ahead.begin(lambda: [1], make)

    with pytest.raises(ValueError, match=r"rows \[1\] are damaged"):
        ahead.take([1], make)
    ahead.close()


@pytest.mark.gpu
def test_a_batch_for_a_gpu_lies_in_pinned_memory():
    batch = pinned({"input_ids": torch.ones(2, 3), "masks": {"full": torch.ones(1)}, "max_length_q": 3})

    assert batch["input_ids"].is_pinned()
    assert batch["masks"]["full"].is_pinned()
    assert batch["max_length_q"] == 3
