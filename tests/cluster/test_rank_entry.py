"""The rank entry: rank numbers, the rendezvous, early signals, the run folder of another start."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.cluster import rank

ENTRY = Path(rank.__file__)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def test_slurm_variables_become_torch_variables():
    step = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}

    assert rank.number(step, per_node=False) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    }  # fmt: skip
    assert rank.number(step, per_node=True) == {"NODE_RANK": "1"}
    assert rank.number({**step, "RANK": "0"}, per_node=False) == {}  # a starter has set it already


def meet_all(numbers, world, port, limit_s):
    """Run each rank in its own thread; returns the errors by rank."""
    raised = {}

    def one(number):
        try:
            rank.meet({"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, limit_s)  # fmt: skip  # noqa: E501
        except rank.ClusterError as error:
            raised[number] = str(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return raised


def test_ranks_meet_and_leave_the_port_free():
    port = free_port()

    assert meet_all(range(5), 5, port, 20.0) == {}

    socket.create_server(("", int(port))).close()  # torch opens it next


def test_all_ranks_learn_which_rank_is_missing():
    raised = meet_all([0, 1, 3], 4, free_port(), 1.0)

    assert sorted(raised) == [0, 1, 3]
    assert all("no word from rank 2 of 4" in text for text in raised.values())


def test_a_rank_that_cannot_reach_rank_0_names_the_address():
    port = free_port()

    raised = meet_all([1], 2, port, 0.5)

    assert f"rank 1 on {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:{port}" in raised[1]


def test_a_foreign_connection_is_not_taken_for_a_rank():
    port = free_port()
    seen = {}
    head = threading.Thread(target=lambda: seen.update(meet_all([0], 2, port, 20.0)))
    head.start()
    for words in (b"GET / HTTP/1.0\r\n\r\n", b"loldu-rank one\n"):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as line:
                    line.sendall(words)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)

    assert meet_all([1], 2, port, 20.0) == {}
    head.join(30)
    assert seen == {}


RECIPE = """
import sys, time
print("importing", flush=True)
time.sleep(1)
from launcher.training.stop import StopRequest
with StopRequest() as stop:
    deadline = time.monotonic() + 20
    while not stop.asked() and time.monotonic() < deadline:
        time.sleep(0.02)
    print("asked by", stop.reason, flush=True)
raise SystemExit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_during_the_imports_reaches_the_run_later(tmp_path, number):
    """An agreed stop of a rank is a success: exit code 75, which a single process returns, becomes 0."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    words = [sys.executable, ENTRY, "--run", tmp_path, "--", recipe]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)

    assert process.stdout.readline() == f"asked by {signal.Signals(number).name}\n"
    assert process.wait(20) == 0


def test_a_crash_is_recorded_with_the_end_of_its_log(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("print('so far so good')\nraise RuntimeError('no more')\n")
    environ = os.environ | {"RANK": "3", "WORLD_SIZE": "1"}

    done = subprocess.run([sys.executable, ENTRY, "--run", tmp_path, "--log", "--", recipe], env=environ)

    assert done.returncode == 1
    noted = (tmp_path / "logs" / "failures").read_text()
    assert noted.startswith(f"rank 3 on {socket.gethostname()} ended with exit code 1:")
    assert "so far so good" in noted
    assert "RuntimeError: no more" in noted


def test_a_run_folder_of_another_start_is_refused(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "attempt").write_text("7.0\n")

    rank.check_folder(tmp_path, "7.0")
    with pytest.raises(rank.ClusterError, match=r"sees '7.0'.*wrote '7.1'.*not shared"):
        rank.check_folder(tmp_path, "7.1", limit_s=0.1)
