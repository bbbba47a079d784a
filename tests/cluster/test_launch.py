"""Two hosts over a real ssh: the curve of one process, and an end for everything that can go wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real_cluster import COUNT, ENTRY, RECIPE, losses, read_losses

pytestmark = pytest.mark.slow


class Launch:
    """`loldu launch` in the background, and its output."""

    def __init__(self, cluster, ssh, tmp_path, recipe, *options, hosts=(), hostfile=None):
        self.cluster, self.run, self.log = cluster, tmp_path / "run", tmp_path / "launch.log"
        words = ["launch", f"--hostfile={hostfile or ssh.hostfile}", f"--ssh-config={ssh.config}", *hosts, recipe]
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENTRY, *map(str, words), f"--output={self.run}", *options], cwd=tmp_path,
            env=cluster.environ, stdout=self.log.open("a"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def at_step(self, step):
        self.cluster.until(
            lambda: len(read_losses(self.run)) >= step or self.process.poll() is not None, f"step {step}"
        )
        assert self.process.poll() is None, self.said

    def end(self, timeout_s=240):
        self.process.wait(timeout_s)
        return self.process.returncode

    @property
    def said(self):
        return self.log.read_text()


def ranks_left(run):
    """Processes of ranks that still run anywhere on this machine; nodes are namespaces of it."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"rank.py") for word in words) and str(run).encode() in words:
            found.append(file.parent.name)
    return found


def test_two_hosts_give_the_curve_of_one_process(cluster, ssh, one_process, tmp_path):
    """Sums in another order: 5e-6 in float32 (measured 1e-6)."""
    expected, options = one_process
    launch = Launch(cluster, ssh, tmp_path, RECIPE, *options)

    assert launch.end() == 0, launch.said

    torch.testing.assert_close(losses(launch.run), expected, atol=5e-6, rtol=0)
    assert "node1 rank 0: device: cpu, 2 processes (ddp)" in launch.said
    assert ranks_left(launch.run) == []


def test_ctrl_c_saves_everywhere_and_the_same_command_resumes(cluster, ssh, tmp_path):
    launch = Launch(cluster, ssh, tmp_path, COUNT, "--steps=100")
    launch.at_step(2)

    launch.process.send_signal(signal.SIGINT)
    code = launch.end()
    done = len(losses(launch.run))
    again = Launch(cluster, ssh, tmp_path, COUNT, "--steps=100")

    assert code == 75, launch.said
    assert "stopped and saved; the same command resumes" in launch.said
    assert 2 <= done < 100
    assert again.end() == 0, again.said
    assert f"begins at step {done}" in again.said
    assert ranks_left(launch.run) == []


def test_a_second_ctrl_c_ends_every_host_at_once(cluster, ssh, tmp_path):
    launch = Launch(cluster, ssh, tmp_path, COUNT, "--steps=500", "--seconds=30")
    cluster.until(lambda: "begins at step 0" in launch.said, "the start")

    launch.process.send_signal(signal.SIGINT)
    cluster.until(lambda: "stopping: saving" in launch.said, "the first answer")
    launch.process.send_signal(signal.SIGINT)

    assert launch.end(30) == 130, launch.said
    cluster.until(lambda: ranks_left(launch.run) == [], "all ranks to be gone", 30)


def test_a_killed_launch_leaves_no_rank_behind(cluster, ssh, tmp_path):
    launch = Launch(cluster, ssh, tmp_path, COUNT, "--steps=500")
    launch.at_step(1)

    launch.process.kill()

    cluster.until(lambda: ranks_left(launch.run) == [], "all ranks to be gone", 60)


def test_a_host_that_dies_ends_all_within_15_seconds_and_is_named(cluster, ssh, tmp_path):
    """Its network is cut, as in a power failure: nothing is sent any more, nothing is closed."""
    launch = Launch(cluster, ssh, tmp_path, COUNT, "--steps=500")
    launch.at_step(1)
    inside = ["nsenter", "-t", str(cluster.node_pid("node2")), "-n", "ip", "link", "set", "eth0"]

    subprocess.run([*inside, "down"], check=True)
    began = time.monotonic()
    try:
        code = launch.end(60)
        took = time.monotonic() - began
        cluster.until(lambda: ranks_left(launch.run) == [], "the ranks of both hosts to be gone", 60)
    finally:
        subprocess.run([*inside, "up"], check=True)

    assert code == 1
    assert "error: node2 is lost (silent for" in launch.said
    assert took < 30  # 15 on a machine that does nothing else


def test_a_rank_that_crashes_ends_all_and_is_named_with_its_error(cluster, ssh, tmp_path):
    launch = Launch(cluster, ssh, tmp_path, COUNT, "--steps=500", "--fail-rank=1")

    code = launch.end(60)

    assert code == 1
    assert "node2 rank 1: RuntimeError: the disk of rank 1 is on fire" in launch.said
    expected = (
        "error: rank 1 on node2 ended with exit code 1: RuntimeError: the disk of rank 1 is on fire; ending the others"
    )
    assert expected in launch.said
    assert read(launch.run / "state") == "failed"
    assert "the disk of rank 1 is on fire" in read(launch.run / "logs" / "rank1@node2.log")
    assert ranks_left(launch.run) == []


def test_a_rank_that_is_killed_is_blamed_and_the_state_says_failed(cluster, ssh, tmp_path):
    launch = Launch(cluster, ssh, tmp_path, COUNT, "--steps=500")
    launch.at_step(1)

    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if b"RANK=0" in words and any(word.startswith(b"LOLDU_TOKEN=") for word in words):
                os.kill(int(file.parent.name), signal.SIGKILL)
    code = launch.end(60)

    assert code == 1
    assert (
        "error: rank 0 on node1 was killed by SIGKILL: out of memory, or killed by hand; ending the others"
        in launch.said
    )
    assert read(launch.run / "state") == "failed"
    assert ranks_left(launch.run) == []


def test_a_stranger_on_the_port_does_not_end_the_run_and_the_token_is_on_no_command_line(cluster, ssh, tmp_path):
    """node2's rank is held back until a stranger in node1 has tried; meanwhile every command line is checked."""
    inside = ["nsenter", "-t", str(cluster.node_pid("node1")), "-n", sys.executable, "-c", STRANGER]
    stranger = subprocess.Popen([*inside, ssh_address(ssh, "node1")], stdout=subprocess.PIPE, text=True)

    launch = Launch(cluster, ssh, tmp_path, COUNT, "--steps=5")
    tokens, lines = set(), []
    while launch.process.poll() is None:
        for file in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                lines.append((file / "cmdline").read_bytes())
                environ = (file / "environ").read_bytes().split(b"\0")
                tokens |= {word.partition(b"=")[2] for word in environ if word.startswith(b"LOLDU_TOKEN=")}
        time.sleep(0.2)
    said, _ = stranger.communicate(timeout=60)

    assert launch.process.returncode == 0, launch.said
    assert "closed" in said
    assert "closed a connection from" in launch.said
    assert len(tokens) == 1
    assert not any(token in line for token in tokens for line in lines)


STRANGER = """
import socket, sys, time
for _ in range(3000):
    try:
        with socket.create_connection((sys.argv[1], 29500), timeout=1) as line:
            line.sendall(b"loldu-rank 1\\n")
            line.recv(100), line.recv(100)
            print("closed"); break
    except OSError:
        time.sleep(0.01)
"""


def read(file):
    return file.read_text().strip() if file.exists() else ""


def test_all_hosts_that_cannot_be_used_are_listed_before_anything_starts(cluster, ssh, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in ("node1", "asleep", "locked", "closed", "nobody")))

    launch = Launch(cluster, ssh, tmp_path, COUNT, hostfile=hostfile)
    code = launch.end(90)

    assert code == 2
    lines = dict(line.strip().split(": ", 1) for line in launch.said.splitlines()[1:-1])
    assert sorted(lines) == ["asleep", "closed", "locked", "nobody"], launch.said
    assert "is the host up" in lines["asleep"]
    assert "Permission denied" in lines["locked"]
    assert "ssh-copy-id locked" in lines["locked"]
    assert "no ssh server answers" in lines["closed"]
    assert "no such host" in lines["nobody"]
    assert not (launch.run / "events.jsonl").exists()


def test_what_differs_between_hosts_is_refused(cluster, ssh, tmp_path):
    """Another interpreter's packages, a folder that is not shared, one machine under two names."""
    own = tmp_path / "own"
    own.mkdir()
    mount = ["nsenter", "-t", str(cluster.node_pid("node2")), "-m"]
    subprocess.run([*mount, "mount", "-t", "tmpfs", "tmpfs", own], check=True)
    entry = tmp_path / "python"
    entry.write_text(f"#!/bin/bash\n[ $(hostname) = node1 ] || exec {sys.base_prefix}/bin/python3 \"$@\"\nexec {sys.executable} \"$@\"\n")  # fmt: skip  # noqa: E501
    entry.chmod(0o755)
    twice = tmp_path / "names"
    twice.write_text("node1 slots=1\nagain slots=1\n")
    config = tmp_path / "config"
    config.write_text(f"Host again\n  HostName {ssh_address(ssh, 'node1')}\n{ssh.config.read_text()}")
    here, there = SimpleNamespace(config=config, hostfile=ssh.hostfile), tmp_path / "there"

    def refused(place, *options, hostfile=None):
        place.mkdir(exist_ok=True)
        return Launch(cluster, here, place, COUNT, hosts=options, hostfile=hostfile)

    launches = refused(there, f"--python={entry}"), refused(own), refused(tmp_path / "twice", hostfile=twice)
    codes = [launch.end() for launch in launches]
    other, alone, same = (launch.said for launch in launches)
    subprocess.run([*mount, "umount", own], check=True)

    assert codes == [2, 2, 2]
    assert "node2: differs from node1: " in other
    assert f"node2: does not see {own}/run" in alone
    assert "again: is the same machine as node1" in same


def ssh_address(ssh, node):
    return ssh.config.read_text().split(f"Host {node}\n  HostName ")[1].split()[0]


def test_a_taken_port_is_named(cluster, ssh, tmp_path):
    inside = ["nsenter", "-t", str(cluster.node_pid("node1")), "-n"]
    hold = "import socket, time; s = socket.create_server(('', 29500)); print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([*inside, sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"

    launch = Launch(cluster, ssh, tmp_path, COUNT)
    code = launch.end(60)
    holder.kill()
    holder.wait()

    assert code == 2
    assert "port 29500 on node1 cannot be opened (Address already in use)" in launch.said


def test_a_rank_that_never_comes_is_named(cluster, ssh, tmp_path):
    """A firewall that swallows the packets to the first host's port; ssh goes through."""
    inside = ["nsenter", "-t", str(cluster.node_pid("node1")), "-n", "ip", "rule"]
    address = ssh_address(ssh, "node2")
    rule = ["to", address, "sport", "29500", "ipproto", "tcp", "blackhole"]
    subprocess.run([*inside, "add", *rule], check=True)
    try:
        launch = Launch(cluster, ssh, tmp_path, COUNT, hosts=["--env=LOLDU_MEET_S=5"])
        code = launch.end(90)
    finally:
        subprocess.run([*inside, "del", *rule], check=True)

    assert code == 2
    assert "rank 1 of 2 did not connect" in launch.said


def on_both_nodes(cluster, ssh, script):
    """The same lines typed on each node; their exit codes and words."""
    environ = " ".join(f"{name}={cluster.environ[name]}" for name in ("PYTHONPATH", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU"))  # fmt: skip  # noqa: E501
    words = ["ssh", "-F", str(ssh.config), "-o", "BatchMode=yes"]
    started = [
        subprocess.Popen(
            [*words, f"node{n + 1}", f"cd {RECIPE.parents[1]} && PATH={Path(sys.executable).parent}:$PATH {environ} {script(n)}"],  # noqa: E501
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for n in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    return [process.returncode for process in started], "\n".join(said)


def test_plain_accelerate_launch_on_each_machine_gives_the_curve_of_one_process(cluster, ssh, one_process, tmp_path):
    expected, options = one_process
    head, run = ssh_address(ssh, "node1"), tmp_path / "run"

    codes, said = on_both_nodes(cluster, ssh, lambda n: (
        f"accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank {n} --main_process_ip {head} "
        f"--main_process_port 29501 {RECIPE} {' '.join(options)} --output={run}"
    ))  # fmt: skip

    assert codes == [0, 0], said
    torch.testing.assert_close(losses(run), expected, atol=5e-6, rtol=0)


def test_plain_torchrun_on_each_machine_starts_one_run(cluster, ssh, tmp_path):
    head, run = ssh_address(ssh, "node1"), tmp_path / "run"

    codes, said = on_both_nodes(cluster, ssh, lambda n: (
        f"torchrun --nnodes 2 --nproc-per-node 2 --node-rank {n} --master-addr {head} --master-port 29502 "
        f"{COUNT} --steps=3 --output={run}"
    ))  # fmt: skip

    assert codes == [0, 0], said
    assert "rank 0 of 4 begins at step 0" in said
    assert len(losses(run)) == 3
