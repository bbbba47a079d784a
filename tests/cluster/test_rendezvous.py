"""The meeting of ranks: a missing rank is named, and another program on the port changes nothing."""

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.cluster import rendezvous
from launcher.cluster.rendezvous import RendezvousError

TOKEN = "7" * 64


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def meet_all(numbers, world, port, limit_s, token=TOKEN, address="127.0.0.1"):
    """Run each rank in its own thread; returns the errors by rank."""
    raised = {}

    def one(number):
        place = {
            "RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": address, "MASTER_PORT": str(port),
            "LOLDU_TOKEN": token,
        }  # fmt: skip
        try:
            rendezvous.meet(place, limit_s)
        except RendezvousError as error:
            raised[number] = str(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


@contextlib.contextmanager
def head(port, world=2, limit_s=30.0):
    """Rank 0 waiting in a thread; the errors that it raised, after the block."""
    seen = {}
    thread = threading.Thread(target=lambda: seen.update(meet_all([0], world, port, limit_s)))
    thread.start()
    yield seen
    thread.join(60)
    assert not thread.is_alive()


def connect(port):
    deadline = time.monotonic() + 20
    while True:
        try:  # from another address: a port of its own choice could be the one asked, and answer itself
            return socket.create_connection(("127.0.0.1", port), timeout=5, source_address=("127.0.0.2", 0))
        except ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_ranks_meet_and_leave_the_port_free():
    port = free_port()

    assert meet_all(range(5), 5, port, 20.0) == {}

    socket.create_server(("", port)).close()  # torch opens it next


def test_all_ranks_learn_which_rank_is_missing():
    raised = meet_all([0, 1, 3], 4, free_port(), 1.5)

    assert sorted(raised) == [0, 1, 3]
    assert all("rank 2 of 4 did not connect" in text for text in raised.values())


def test_a_rank_that_cannot_reach_rank_0_names_the_address():
    port = free_port()

    raised = meet_all([1], 2, port, 0.5)

    assert f"rank 1 on {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:{port}" in raised[1]


def test_a_port_that_another_program_uses_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]

        raised = meet_all([0], 2, port, 5.0)

    assert f"port {port} on {socket.gethostname()} cannot be opened (Address already in use)" in raised[0]


ZEROS = b"0" * 32 + b" " + b"0" * 64
STRANGERS = {
    "nothing": b"",
    "a line break": b"\n",
    "a web browser": b"GET / HTTP/1.0\r\n\r\n",
    "bytes that are no UTF-8": b"\xff\xfe\x80\x81\n",
    "zeros": b"\0" * 5000,
    "an endless line": b"x" * 2_000_000,
    "the words of an earlier version": b"loldu-rank 1\n",
    "a rank that does not know the token": b"loldu-rank 1 %s\n" % ZEROS,
    "a unicode digit": "loldu-rank ² ".encode() + ZEROS + b"\n",
    "a rank of 400 digits": b"loldu-rank " + b"1" * 400 + b" " + ZEROS + b"\n",
    "a negative rank": b"loldu-rank -1 %s\n" % ZEROS,
    "TLS": bytes.fromhex("16030100f8010000f40303") + b"\x11" * 200,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_closed_and_logged_and_the_ranks_meet(said, capfd):
    port = free_port()
    with head(port) as seen:
        with connect(port) as line, contextlib.suppress(OSError):
            line.sendall(said)
            line.shutdown(socket.SHUT_WR)
            line.settimeout(10)
            while line.recv(4096):  # until rank 0 closes
                pass

        assert meet_all([1], 2, port, 20.0) == {}

    assert seen == {}
    assert f"closed a connection from 127.0.0.2 to 127.0.0.1:{port}" in capfd.readouterr().out


@pytest.mark.timeout(60)
def test_random_bytes_from_many_strangers_change_nothing():
    port, chance = free_port(), random.Random(0)
    with head(port, world=3) as seen:
        for _ in range(200):
            with contextlib.suppress(OSError), connect(port) as line:
                line.sendall(
                    chance.choice([b"", b"loldu-rank 1 ", b"loldu "]) + chance.randbytes(chance.randrange(2000))
                )

        assert meet_all([1, 2], 3, port, 20.0) == {}

    assert seen == {}


@pytest.mark.timeout(60)
def test_silent_connections_beyond_any_limit_do_not_keep_the_ranks_out():
    port = free_port()
    with head(port) as seen, contextlib.ExitStack() as lines:
        for _ in range(3 * rendezvous.MOST_PENDING):
            lines.enter_context(connect(port))

        assert meet_all([1], 2, port, 20.0) == {}

    assert seen == {}


def test_a_job_with_another_token_is_not_joined(capfd):
    port = free_port()
    with head(port) as seen:
        raised = meet_all([1], 2, port, 1.0, token="8" * 64)

        assert "does not know this job's token" in raised[1]
        assert meet_all([1], 2, port, 20.0) == {}

    assert seen == {}
    assert "it does not know this job's token" in capfd.readouterr().out


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "said", [b"go\n", b"loldu " + b"0" * 32 + b"\n" + b"0" * 64 + b" \n", b"x" * 100_000, b"\xff\n", b""]
)
def test_a_stranger_in_place_of_rank_0_is_not_believed(said):
    """It has taken the port first: neither its start message nor its error counts, and the token is not sent to it."""
    heard = []

    def answer(server):
        server.settimeout(0.2)
        while not done.is_set():
            with contextlib.suppress(OSError):
                line, _ = server.accept()
                with line:
                    line.sendall(said)
                    line.settimeout(0.5)
                    heard.append(line.recv(4096))

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        stranger = threading.Thread(target=answer, args=(server,))
        stranger.start()
        raised = meet_all([1], 2, server.getsockname()[1], 1.0)
        done.set()
        stranger.join()

    assert "cannot reach rank 0" in raised[1]
    assert TOKEN.encode() not in b"".join(heard)


def test_rank_0_listens_only_where_the_others_were_told():
    port = free_port()

    (alone,) = rendezvous.listen("127.0.0.1", port, 2, several_nodes=False)
    with alone:
        assert alone.getsockname()[0] == "127.0.0.1"
    everywhere = rendezvous.listen("127.0.0.1", port, 2, several_nodes=True)
    with everywhere[0]:
        assert everywhere[0].getsockname()[0] in ("::", "0.0.0.0")  # the other nodes mean another address
    foreign = rendezvous.listen("192.0.2.1", port, 2, several_nodes=True)  # as behind a translated address
    with foreign[0]:
        assert foreign[0].getsockname()[0] in ("::", "0.0.0.0")


def test_a_missing_token_is_warned_about(capfd):
    port = free_port()

    assert meet_all([0, 1], 2, port, 20.0, token="") == {}

    assert "LOLDU_TOKEN is not set" in capfd.readouterr().out


def test_the_module_imports_nothing_beyond_the_standard_library():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import launcher.cluster.rendezvous; print(*sys.modules)"
    place = str(Path(rendezvous.__file__).parents[2])

    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code, place], capture_output=True, text=True, check=True
    ).stdout

    assert {name.partition(".")[0] for name in loaded.split()} - set(sys.stdlib_module_names) <= {
        "launcher",
        "__main__",
    }
