"""Progress of long work: a bar on a terminal, lines with the time left in a log file."""

import io
import re
import time

import pytest
from rich.console import Console

from launcher import progress
from launcher.progress import Bars, counts, duration, growth


def on_a_terminal(width: int = 100) -> Bars:
    return Bars(Console(file=io.StringIO(), force_terminal=True, width=width))


def in_a_file() -> Bars:
    return Bars(Console(file=io.StringIO(), force_terminal=False))


def said(bars: Bars) -> str:
    return bars.console.file.getvalue()


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only when the test sets it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_so_often_with_the_time_left(clock):
    bars = in_a_file()

    with bars.bar("factors", 100) as show:
        for done in range(1, 101):
            clock[0] += 1.0
            show(done, "layers.0.q_proj")

    lines = said(bars).splitlines()
    assert lines[0] == "factors 6/100 layers.0.q_proj, 2 min left"
    assert lines[-2:] == ["factors 96/100 layers.0.q_proj, 4 s left", "factors 100/100 layers.0.q_proj"]
    assert len(lines) == 17


def test_hours_of_work_get_fewer_lines(clock):
    bars = in_a_file()

    with bars.bar("training", 10_000) as show:
        for done in range(1, 10_001):
            clock[0] += 10.0
            show(done)

    assert 1400 < len(said(bars).splitlines()) < 1800  # one a minute of 28 hours; every 5 s would be 20,000


def test_brief_work_leaves_no_line_when_it_is_over_at_once(clock):
    quick, slow = in_a_file(), in_a_file()

    for bars, seconds in ((quick, 1.0), (slow, 4.0)):
        with bars.bar("evaluating", 2, brief=True) as show:
            for done in (1, 2):
                clock[0] += seconds
                show(done)

    assert said(quick) == ""
    assert said(slow) == "evaluating 2/2\n"


def test_a_total_that_is_not_known_yet_is_counted_without_one(clock):
    bars = in_a_file()

    with bars.bar("reading") as show:
        clock[0] += 6.0
        show(7)
        clock[0] += 6.0
        show(8, of=16)

    assert said(bars).splitlines() == ["reading 7", "reading 8/16, 12 s left"]


def test_a_resumed_bar_counts_the_time_of_its_own_part_alone(clock):
    bars = in_a_file()

    with bars.bar("training", 1000, 900) as show:
        clock[0] += 10.0
        show(910)

    assert said(bars) == "training 910/1000, 2 min left\n"


def test_time_before_the_first_number_of_resumed_work_does_not_count(clock):
    """As in a sweep: a run starts, resumes at its step 900, and its file then shows a step."""
    bars = in_a_file()

    with bars.bar("run", brief=True) as show:
        show(0, "starting")
        clock[0] += 100.0
        show(900, of=1000)
        clock[0] += 10.0
        show(910, of=1000)

    assert said(bars).splitlines() == ["run 900/1000", "run 910/1000, 2 min left"]


def test_work_that_goes_back_to_a_checkpoint_is_counted_from_there(clock):
    bars = in_a_file()

    with bars.bar("run", 1000, 947) as show:
        clock[0] += 100.0
        show(900)
        clock[0] += 10.0
        show(910)

    assert said(bars).splitlines() == ["run 900/1000", "run 910/1000, 2 min left"]


def test_a_bar_inside_another_stands_below_it_and_disappears():
    bars = on_a_terminal()

    with bars.bar("training", 4) as outer:
        outer(1)
        with bars.bar("evaluating", 8, brief=True) as inner:
            inner(4)
            assert [task.description for task in bars._live.tasks] == ["training", "evaluating"]
        assert [task.description for task in bars._live.tasks] == ["training"]
        outer(4)

    assert "training" in said(bars)
    with bars.bar("saving", 1) as show:  # the console can show the next one
        show(1)


def test_the_bar_ends_with_an_error_in_its_block():
    bars = on_a_terminal()

    with pytest.raises(ZeroDivisionError), bars.bar("training", 4):
        raise ZeroDivisionError

    with bars.bar("training", 1) as show:
        show(1)
    assert "1/1" in said(bars)


@pytest.mark.parametrize("bars", [on_a_terminal(), in_a_file()])
def test_a_note_is_one_line_and_does_nothing_to_the_terminal(bars):
    with bars.bar("factors", 1) as show:
        show(1, "a\x1b[2J\nb")

    assert r"a\x1b[2J\nb" in said(bars)


def test_bytes_written_by_a_library_are_seen_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.01)
    seen = []

    with growth(seen.append, tmp_path / "adapter", 3000):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "a").write_bytes(bytes(1000))
        deadline = time.monotonic() + 60
        while 1000 not in seen and time.monotonic() < deadline:
            time.sleep(0.01)

    assert 1000 in seen
    assert seen[-1] == 3000


def test_counts_and_durations_are_short():
    assert [counts(3, 10), counts(3, 0), counts(1_200_000_000, 4_000_000_000, "bytes"), counts(5, 7, "bytes")] == [
        "3/10",
        "3",
        "1.2/4.0 GB",
        "5/7 B",
    ]
    assert [duration(s) for s in (40.2, 170, 7500)] == ["40 s", "3 min", "2 h 05 min"]
    assert re.fullmatch(r"\d+ min", duration(59 * 60))
