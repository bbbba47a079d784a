"""The rank entry: rank numbers, early signals, the run folder of another start."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cluster import rank

ENTRY = Path(rank.__file__)


def test_slurm_variables_become_torch_variables():
    step = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}

    assert rank.number(step, per_node=False) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    }  # fmt: skip
    assert rank.number(step, per_node=True) == {"NODE_RANK": "1"}
    assert rank.number({**step, "RANK": "0"}, per_node=False) == {}  # a starter has set it already


RECIPE = """
import sys, time
print("importing", flush=True)
time.sleep(1)
from launcher.training.stop import StopRequest
with StopRequest() as stop:
    deadline = time.monotonic() + 120
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
    assert process.wait(120) == 0


LATE = """
import builtins, os, signal
class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGTERM, write=os.write):
        write(1, b"signalled\\n")
        kill(me, number)
builtins.late = Late()  # freed when Python shuts down, after the handlers in Python are gone
raise SystemExit(75)
"""


def test_a_signal_that_comes_when_all_is_saved_does_not_make_the_rank_fail(tmp_path):
    """One rank's request reaches the others before their own signal does, and a fast one is done by then."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(LATE)

    done = subprocess.run([sys.executable, ENTRY, "--run", tmp_path, "--", recipe], stdout=subprocess.PIPE, text=True)

    assert (done.stdout, done.returncode) == ("signalled\n", 0)


def test_a_stop_signal_ends_a_rank_that_waits_for_others(tmp_path):
    """The second one at once; the first leaves the others some seconds to come."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOLDU_TOKEN": "x"}
    words = [sys.executable, ENTRY, "--run", tmp_path, "--", "recipe.py"]
    process = subprocess.Popen(words, env=os.environ | place, stderr=subprocess.PIPE, text=True)
    while True:
        try:  # from another address: a port of its own choice could be the one asked, and answer itself
            socket.create_connection(("127.0.0.1", int(port)), timeout=5, source_address=("127.0.0.2", 0)).close()
            break
        except ConnectionError:
            assert process.poll() is None
            time.sleep(0.05)

    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)

    assert process.wait(60) == 2
    assert "stopped by a signal" in process.stderr.read()


def test_the_recipe_does_not_see_the_token_of_the_job(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import os\nassert 'LOLDU_TOKEN' not in os.environ\n")
    environ = os.environ | {"LOLDU_TOKEN": "secret", "WORLD_SIZE": "1", "RANK": "0"}

    done = subprocess.run([sys.executable, ENTRY, "--run", tmp_path, "--", recipe], env=environ)

    assert done.returncode == 0


@pytest.mark.parametrize("name", ["failures", "rank3@HOST.log"])
def test_a_link_in_the_log_folder_is_not_written_through(tmp_path, name):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("raise RuntimeError('no more')\n")
    (tmp_path / "logs").mkdir()
    target = tmp_path / "thesis.tex"
    target.write_text("years of work")
    (tmp_path / "logs" / name.replace("HOST", socket.gethostname())).symlink_to(target)

    subprocess.run([sys.executable, ENTRY, "--run", tmp_path, "--log", "--", recipe], env=os.environ | {"RANK": "3"})

    assert target.read_text() == "years of work"


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
