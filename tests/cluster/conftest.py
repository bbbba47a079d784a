"""One Slurm for the session, sshd on its nodes, and the curve that every way of starting must give."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from real_cluster import COUNT, RECIPE, Cluster, losses, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Slurm with node1 and node2."""
    if reason := why_not():
        pytest.skip(reason)
    # A slow machine asks for the end of a job later than the five minutes for which Slurm remembers it by default.
    with Cluster(tmp_path_factory.mktemp("slurm"), settings=("MinJobAge=3600",)) as cluster:
        if "mode=ns" not in (cluster.folder / "etc" / "cluster").read_text():
            pytest.skip("needs namespaces: without them both nodes share one host name and one loopback")
        yield cluster


@pytest.fixture(scope="session")
def crash_loop(cluster, tmp_path_factory):
    """A job each start of which is requeued before it has saved a step: its folder and its id.

    Slurm takes 20 s to start it four times; begun before the first training, it does so behind the other tests.
    """
    run = tmp_path_factory.mktemp("loop") / "run"
    words = ["submit", COUNT, "--setup=scontrol requeue $SLURM_JOB_ID", "--", f"--output={run}", "--steps=500"]
    return run, cluster.loldu(*words, "--never-save").stdout.split()[1].rstrip(":")


@pytest.fixture(scope="session")
def one_process(cluster, crash_loop, stories, alpaca_file, tmp_path_factory):
    """The losses of 20 steps by one process, and the options they were made with (without --output)."""
    folder = tmp_path_factory.mktemp("one")
    few = folder / "few.json"  # the first of them: reading all 5,000 at every start would cost more than the training
    few.write_text(json.dumps(json.loads(alpaca_file.read_text())[:100]))
    options = [
        f"--model={stories}", f"--data={few}", "--prompt-template=short", "--max-length=96", "--rank=16",
        "--targets", "all-linear", "--learning-rate=1e-3", "--batch-size=4", "--max-steps=20", "--save-every=2",
        "--dtype=float32", "--eval-records=4", f"--cache={folder / 'cache'}",
    ]  # fmt: skip
    cluster.run(sys.executable, RECIPE, *options, f"--output={folder / 'run'}", timeout_s=300)
    return losses(folder / "run"), options


@pytest.fixture(scope="session")
def ssh(cluster, tmp_path_factory):
    """sshd on both nodes with keys of its own: `config` for ssh, a `hostfile`, and how to reach into a node."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "openssh-server"]):
            subprocess.run(["apt-get", *words], env=quiet, check=True, capture_output=True, timeout=600)
        sshd = shutil.which("sshd", path="/usr/sbin")
    folder = tmp_path_factory.mktemp("ssh")
    os.makedirs("/run/sshd", exist_ok=True)
    for key in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    words = (cluster.folder / "etc" / "cluster").read_text().split()
    net = dict(word.split("=") for word in words)["net"]
    (folder / "sshd_config").write_text(
        f"Port 2222\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        f"PidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    (folder / "known").write_text(f"* {(folder / 'host.pub').read_text()}")
    nodes = "".join(f"Host node{n}\n  HostName {net}.{100 + n}\n" for n in (1, 2))
    others = (
        f"Host asleep\n  HostName {net}.77\nHost locked\n  HostName {net}.101\n  IdentityFile {folder}/stranger\n"
        f"Host closed\n  HostName {net}.102\n  Port 9\n"
    )
    (folder / "config").write_text(
        f"{nodes}{others}Host * !locked\n  IdentityFile {folder}/user\nHost *\n  Port 2222\n  User root\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n"
    )
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    servers = []
    for node in ("node1", "node2"):
        inside = ["nsenter", "-t", str(cluster.node_pid(node)), "-m", "-u", "-i", "-n", "-p"]
        servers.append(subprocess.Popen([*inside, sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=(folder / node).open("w")))  # fmt: skip  # noqa: E501
    yield SimpleNamespace(config=folder / "config", hostfile=folder / "hosts", folder=folder)
    for server in servers:
        server.kill()
        server.wait()
