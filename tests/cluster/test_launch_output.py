"""How `loldu launch` handles the messages of its hosts: which rank is named as the cause, and what is printed."""

import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.cluster import agent, fleet, launch
from launcher.cluster.hostfile import Host

HOSTS = [Host("node1", (0,)), Host("node2", (0,))]


class Fleet:
    """Two hosts whose messages are given; each message is (host, message)."""

    def __init__(self, *messages):
        self.sent = []
        self.agents = {
            host.name: SimpleNamespace(name=host.name, dead=lambda: None, send=lambda **words: self.sent.append(words))
            for host in HOSTS
        }
        self.messages = queue.Queue()
        for host, message in messages:
            self.messages.put((self.agents[host], message))


@pytest.fixture
def outcome(tmp_path, capfd, monkeypatch):
    """The exit code, standard output and standard error for some messages."""
    monkeypatch.setattr(launch, "LAST_WORDS_S", 0.5)

    def call(*messages, signals=None, state=""):
        (tmp_path / "state").write_text(state)
        code = launch.follow(Fleet(*messages), HOSTS, tmp_path, signals or launch.StopSignals())
        return code, *capfd.readouterr()

    return call


def line(rank, text):
    return f"node{rank + 1}", {"rank": rank, "line": text}


def ended(rank, code):
    return f"node{rank + 1}", {"rank": rank, "exit": code}


def test_the_rank_whose_error_ended_the_others_is_blamed(outcome):
    """Rank 0 loses its connection and is the first to leave; rank 1 is the one whose disk is full."""
    code, _, error = outcome(
        line(0, "RuntimeError: [gloo/pair.cc] Connection closed by peer [198.18.0.2]"), ended(0, 1),
        line(1, "OSError: [Errno 28] No space left on device"), ended(1, 1),
    )  # fmt: skip

    assert code == 1
    assert error.startswith(
        "error: rank 1 on node2 ended with exit code 1: OSError: [Errno 28] No space left on device"
    )
    assert error.count("\n") == 1


def test_a_mistake_of_one_rank_is_printed_with_its_exit_code(outcome):
    code, _, error = outcome(line(1, "error: model.safetensors is damaged"), ended(1, 2))

    assert code == 2
    assert "rank 1 on node2 ended with exit code 2: error: model.safetensors is damaged" in error


def test_a_host_that_is_lost_when_its_ranks_have_ended_well_does_not_end_the_others(outcome):
    """They may be saving."""
    code, _, error = outcome(
        ended(1, 0), ("node2", {"gone": 255}), line(0, "saved"), ended(0, 0), state="finished",
    )  # fmt: skip

    assert (code, error) == (0, "")


def test_a_host_counts_as_lost_only_when_its_last_messages_were_read():
    """A rank's exit code may still be in the pipe when the connection has ended."""
    code = f'print({agent.PREFIX!r} + \'{{"rank": 0, "exit": 0}}\')'
    messages = queue.Queue()
    host = fleet.Agent("node1", [sys.executable, "-c", code], messages)

    while host.dead() is None:
        time.sleep(0.001)

    assert [messages.get_nowait()[1] for _ in range(2)] == [
        {"rank": 0, "exit": 0},
        {"gone": "the connection ended with exit code 0"},
    ]


def test_a_process_that_a_rank_leaves_behind_does_not_hold_its_exit_code_back(monkeypatch):
    """A tracker's helper, for example, inherits the rank's output."""
    monkeypatch.setattr(agent, "POLL_S", 0.05)
    code = "import subprocess as s; print('pid', s.Popen(['sleep', '600']).pid, flush=True); print('last', end='')"
    sent = []
    monkeypatch.setattr(agent, "send", lambda **message: sent.append(message))
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)

    agent.forward_output(3, rank, None)
    os.kill(int(sent[0]["line"].split()[1]), signal.SIGKILL)

    assert sent[1:] == [{"rank": 3, "line": "last"}, {"rank": 3, "exit": 0}]


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (11, "SIGSEGV"), (7, "SIGBUS"), (35, "signal 35")])
def test_a_killed_rank_is_named_with_its_signal(outcome, number, name):
    code, _, error = outcome(ended(1, -number), line(0, "Connection reset by peer"), ended(0, 1))

    assert code == 1
    assert f"rank 1 on node2 was killed by {name}" in error


def test_the_errors_of_the_other_ranks_stay_in_their_logs(outcome):
    _, out, _ = outcome(
        line(0, "step 1"), line(0, "ConnectionError: connection closed"), ended(0, 1), line(1, "noise"),
        line(1, "ValueError: no"), ended(1, 1),
    )  # fmt: skip

    assert "step 1" in out
    assert "noise" not in out


def test_if_every_rank_lost_its_connection_the_first_one_is_named(outcome):
    """As when a host's network fails for a moment."""
    code, _, error = outcome(line(0, "connection reset"), ended(0, 1), line(1, "connection reset"), ended(1, 1))

    assert code == 1
    assert "rank 0 on node1" in error


def test_escape_sequences_of_a_rank_do_not_reach_the_terminal(outcome):
    _, out, error = outcome(line(0, "\x1b]0;owned\x07\x1b[32mgreen\x1b[0m"), line(0, "error: \x1b[2J"), ended(0, 2))

    assert "\x1b" not in out + error
    assert r"\x1b]0;owned\x07green" in out


def test_a_closed_reader_asks_the_run_to_save_and_stop(tmp_path, monkeypatch):
    """As in `loldu launch ... | head -3`."""
    fleet, signals = Fleet(line(0, "step 1"), line(0, "step 2")), launch.StopSignals()

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(launch, "discard_output", lambda: monkeypatch.setattr("builtins.print", lambda *_, **__: None))
    (tmp_path / "state").write_text("stopped\n")
    fleet.messages.put((fleet.agents["node1"], {"rank": 0, "exit": 0}))
    fleet.messages.put((fleet.agents["node2"], {"rank": 1, "exit": 0}))

    code = launch.follow(fleet, HOSTS, tmp_path, signals)

    assert code == 75
    assert {"request": "signal", "number": signal.SIGTERM} in fleet.sent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_each_way_to_ask_is_counted(number):
    with launch.StopSignals() as signals:
        os.kill(os.getpid(), number)
        time.sleep(0.05)

        assert signals.count == 1


def test_nohup_is_respected_and_ctrl_z_does_not_suspend(capfd):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTSTP)
            time.sleep(0.05)

            assert signals.count == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "cannot be suspended" in capfd.readouterr().err


def test_lines_of_a_login_shell_are_not_messages(tmp_path):
    from launcher.cluster.fleet import _parse

    for text in ("Welcome!\n", "@loldu \n", "@loldu [1]\n", "@loldu {\n", f"@loldu {'[' * 100_000}\n", ""):
        assert _parse(text) is None
    assert _parse('@loldu {"alive": true}\n') == {"alive": True}


def test_a_log_that_cannot_be_written_does_not_end_its_rank(tmp_path, monkeypatch):
    """A full disk, a folder in its place, or a link to somewhere else."""
    from launcher.cluster import agent

    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")

    assert agent.open_log(tmp_path / "folder") is None
    assert agent.open_log(tmp_path / "link") is None
    assert not (tmp_path / "elsewhere").exists()
    sent = []
    monkeypatch.setattr(agent, "send", lambda **words: sent.append(words))
    import subprocess
    import sys

    words = [sys.executable, "-c", "print('one'); print('x' * 200_000, end='')"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    agent.forward_output(0, process, Path("/dev/full"))

    lines = [words["line"] for words in sent if "line" in words]
    assert "No space left" in lines[0]
    assert lines[1] == "one"
    assert sum(text.count("x") for text in lines[2:]) == 200_000
    assert sent[-1] == {"rank": 0, "exit": 0}
