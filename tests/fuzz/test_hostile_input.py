"""Hostile and unlucky input ends in one line and exit code 2, within 10 s, without a traceback, touching nothing else.

benchmarks/hostile.py runs all cases; here each N-th of them. A fault that its committed results name is expected.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import harness
import pytest
from cases import KINDS
from format_cases import FORMAT_KINDS
from hostile_parts import ASK, train_words

REPO = Path(__file__).resolve().parents[2]
RESULTS = REPO / "benchmarks" / "results" / "hostile.json"
SLOW_EVERY = 40


@pytest.fixture(scope="module")
def materials(stories, tmp_path_factory):
    """The small model and a finished run of it."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    from hostile import materials, preload

    preload()
    return materials(stories, tmp_path_factory.mktemp("hostile") / "materials")


def known_faults():
    if not RESULTS.exists():
        return set()
    return {(one["kind"], one["case"]) for one in json.loads(RESULTS.read_text())["faults"]}


def check(materials, kind, start, every, tmp_path):
    from hostile import try_case

    expected, wrong = known_faults(), []
    for at, case in enumerate(list((KINDS | FORMAT_KINDS)[kind](materials))[start::every]):
        ended, found = try_case(case, tmp_path / str(at))
        if found and (kind, case.name) not in expected:
            wrong.append(f"{case.name}: {'; '.join(found)}: {ended.error[-500:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ["cluster", "cache"])
def test_hostile_input_of_the_cluster_commands_and_the_cache_is_one_line(materials, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    check(materials, kind, 0, 10, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS | FORMAT_KINDS)
def test_a_sample_of_all_hostile_input_is_one_line(materials, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    check(materials, kind, 5, SLOW_EVERY, tmp_path)


def test_sound_input_is_accepted(materials, tmp_path):
    """Or every case would pass."""
    ended = harness.run(lambda: harness.command(train_words(tmp_path, materials)), tmp_path, 60)

    assert harness.faults(ended, codes=(0,)) == []


@pytest.mark.parametrize("place", [".", "adapter", "model"])
def test_generate_answers_with_sound_files(materials, place, tmp_path):
    """Or its cases would all be the same mistake in an option."""
    model = materials.model if place == "model" else materials.run / place
    ended = harness.run(lambda: harness.command(["generate", str(model), *ASK]), tmp_path, 60)

    assert harness.faults(ended, codes=(0,)) == []


def explode():
    raise RuntimeError("no more")


def hang():
    time.sleep(60)
    return 2


def swell():
    kept = b"x" * 600_000_000
    time.sleep(0.1)
    print("error: it fits", file=sys.stderr)
    return 2 if kept else 0


def chatter():
    print("error: one\nerror: two", file=sys.stderr)
    return 2


def colour():
    print("error: \x1b[2J", file=sys.stderr)
    return 2


@pytest.mark.parametrize(
    ("act", "fault", "limit_s"),
    [(explode, "traceback", 60), (hang, "exit code -9", 1), (swell, "GB", 60), (chatter, "2 lines", 60),
     (colour, "escape", 60), (lambda: os.kill(os.getpid(), signal.SIGUSR1), "exit code -10", 60)],
)  # fmt: skip
def test_the_harness_sees_every_kind_of_fault(act, fault, limit_s, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "LIMIT_BYTES", 100_000_000)  # a gigabyte takes a slow machine seconds

    ended = harness.run(act, tmp_path, limit_s)

    assert any(fault in found for found in harness.faults(ended)), harness.faults(ended)


def test_a_file_that_a_command_touches_is_seen(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = harness.snapshot(tmp_path)

    harness.run(lambda: (tmp_path / "thesis.tex").write_text("") and 0, tmp_path)

    assert harness.snapshot(tmp_path) != before
