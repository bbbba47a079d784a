"""What a run shows: text of files is shown as it is, never interpreted, and a closed terminal does not end the run."""

import errno
import io
import sys

import pytest
from rich.console import Console

from launcher.training.report import Screen, read_events

HOSTILE = ["[/INST]", "[/b]", r"\[x\]", "[bold red]loud[/]", "[link=file:///etc/passwd]here[/link]"]


@pytest.fixture
def shown(capsys):
    return lambda: capsys.readouterr().out


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_never_markup(text, shown):
    screen = Screen(is_main=True)

    screen.say(text)
    screen.banner(text)
    screen.table("Answers", ["question", text], [[text, "a"]])
    with screen.bar("factors", 1) as bar:
        bar(1, text)

    assert shown().count(text) == 5


@pytest.mark.parametrize("text", HOSTILE)
def test_a_note_of_a_progress_bar_is_never_markup(text):
    screen, out = Screen(is_main=True), io.StringIO()
    screen.console = Console(file=out, force_terminal=True, width=200)

    with screen.bar("factors", 1) as bar:
        bar(1, text)

    assert text in out.getvalue()


def test_escape_sequences_are_written_out(shown):
    screen = Screen(is_main=True)

    screen.say("a\x1b[2Jb")
    screen.table("Answers", ["question"], [["\x1b]0;title\x07"]])

    out = shown()
    assert "\x1b" not in out
    assert r"a\x1b[2Jb" in out
    assert r"\x1b]0;title\x07" in out


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def flush(self):
        self.write("")


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch):
    screen = Screen(is_main=True)
    monkeypatch.setattr(sys, "stdout", Gone())

    screen.say("a line")
    screen.table("Held-out records", ["", "before"], [["loss", "1"]])


def test_lines_of_events_that_are_no_objects_are_left_out(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_text('{"step": 1}\n[1]\n"text"\n{"step": 2\n' + "[" * 100_000 + "\n")

    assert read_events(file) == [{"step": 1}]
