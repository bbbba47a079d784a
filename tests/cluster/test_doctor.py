"""`loldu doctor`: it finds nothing on healthy nodes, and names the node and the remedy on broken ones."""

import itertools
import json
import subprocess
import sys
import time

import pytest
from real_cluster import ENTRY

from launcher.cluster import doctor


class Answers:
    """A fleet whose agents answer `ping` with a wrong clock, late, or never."""

    def __init__(self, **clocks):
        self.agents = {name: self.agent(clock) for name, clock in clocks.items()}

    @staticmethod
    def agent(clock):
        class Agent:
            def ask(self, request, timeout_s):
                assert request == "ping"
                return clock()

        return Agent()


def fact(**changed):
    environment = {"python": "3.11.7 (/venv/bin/python)", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
    return {
        "host": "h", "environment": environment, "gpus": [], "driver": "", "reached_at": "", "addresses": [],
        "usable_gpus": 8,
        "cores": 8, "free_gb": {"folder": 100.0, "cache": 100.0, "/tmp": 100.0},
    } | changed  # fmt: skip


def bad(findings):
    return [(finding.check, finding.where) for finding in findings if finding.result == doctor.BAD]


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_no_node_is_in_two_pairs_at_a_time(nodes):
    names = [f"node{n}" for n in range(nodes)]

    planned = doctor.rounds(names)

    met = sorted(tuple(sorted(pair)) for pairs in planned for pair in pairs)
    assert met == sorted(itertools.combinations(names, 2))
    assert all(len({name for pair in pairs for name in pair}) == 2 * len(pairs) for pairs in planned)


def test_gpus_that_torch_cannot_use_are_reported():
    gpus = {"gpus": ["NVIDIA H100 (80 GiB)"] * 2, "driver": "580.1"}

    findings = doctor.check_gpus({"a": fact(**gpus, usable_gpus=2), "b": fact(**gpus, usable_gpus=0)})

    assert bad(findings) == [("GPUs", "b")]
    assert "torch can use none of them" in findings[1].found
    assert "torch 2.13.0" in findings[1].remedy


def test_a_wrong_clock_is_reported_but_a_slow_answer_is_not():
    def late():
        time.sleep(0.05)
        return time.time()

    def hangs():
        raise TimeoutError

    fleet = Answers(right=time.time, ahead=lambda: time.time() + 60, late=late, hangs=hangs)

    findings = doctor.check_clocks(fleet, list(fleet.agents))

    assert bad(findings) == [("clock", "ahead"), ("clock", "hangs")]
    assert "+60.0 s" in findings[1].found
    assert "timedatectl" in findings[1].remedy


def test_a_node_with_different_versions_or_gpus_or_a_full_disk_is_reported():
    other = fact()["environment"] | {"torch": "2.12.1"}
    facts = {
        "node1": fact(gpus=["H100"] * 8, driver="570.1"),
        "node2": fact(gpus=["H100"] * 7, driver="570.1"),
        "node3": fact(gpus=["H100"] * 8, driver="550.2", environment=other, free_gb={"folder": 1.0, "/tmp": 90.0}),
    }

    assert bad(doctor.check_environment(facts)) == [("versions", "node3")]
    assert "torch 2.12.1 instead of 2.13.0" in doctor.check_environment(facts)[2].found
    assert bad(doctor.check_gpus(facts)) == [("GPUs", "node2")]
    assert doctor.check_gpus(facts)[2].result == doctor.NOTE
    assert bad(doctor.check_disk(facts)) == [("free disk", "node3")]


def test_a_slow_pair_and_a_wrong_sum_are_reported():
    """Of six pairs one is ten times slower than the median, one sums incorrectly, one does not answer."""

    class Fleet:
        def ask_all(self, request, timeout_s, each):
            answers = {name: {"right": True, "seconds": 0.01, "megabytes": 4.0, "backend": "gloo"} for name in each}
            if met(each, "a", "b"):
                answers["a"]["seconds"] = answers["b"]["seconds"] = 0.1
            if met(each, "a", "c"):
                answers["c"]["right"] = False
            return answers, ({"d": "Timeout"} if met(each, "b", "d") else {})

    def met(each, one, other):
        return one in each and other in each and each[one]["address"] == each[other]["address"]

    findings = doctor.check_pairs(Fleet(), list("abcd"), {name: name for name in "abcd"}, 29501, set())

    by_pair = {frozenset(finding.where.split(" + ")): finding for finding in findings}
    assert len(by_pair) == 6
    assert by_pair[frozenset("ab")].result == doctor.NOTE
    assert "10.0 times the median pair" in by_pair[frozenset("ab")].remedy
    assert by_pair[frozenset("ac")].found == "wrong sums"
    assert by_pair[frozenset("bd")].found == "Timeout"
    assert sum(finding.result == doctor.OK for finding in findings) == 3


def test_the_table_shows_node_and_remedy_and_prints_text_literally(capsys):
    doctor.show([doctor.Finding("port", "node1 -> node2", doctor.BAD, "[red]refused[/red]", "open the firewall")])

    out = capsys.readouterr().out
    assert "node1 -> node2" in out
    assert "[red]refused[/red]" in out
    assert "open the firewall" in out


def results(text):
    found = json.loads(text)
    return found, {(f["check"], f["where"]): f for f in found["findings"] if f["result"] == "BAD"}


@pytest.mark.slow
def test_healthy_hosts_have_no_problem(cluster, ssh, tmp_path):
    words = [sys.executable, "-c", ENTRY, "doctor", f"--hostfile={ssh.hostfile}", f"--ssh-config={ssh.config}"]

    done = cluster.run(*words, f"--folder={tmp_path}", "--json")

    found, problems = results(done.stdout)
    assert problems == {}
    assert found["ok"]
    kinds = {f["check"] for f in found["findings"]}
    assert kinds >= {
        "bitsandbytes",
        "deepspeed",
        "versions",
        "GPUs",
        "free disk",
        "clock",
        "flash-attn",
        "shared folder",
        "port",
        "all-reduce",
    }
    (pair,) = (f for f in found["findings"] if f["check"] == "all-reduce")
    assert pair["where"] == "node1 + node2"
    assert "correct" in pair["found"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_broken_host_is_reported_with_the_remedy(cluster, ssh, tmp_path, monkeypatch, capsys):
    """A folder that is not shared, a port that is blocked in one direction, a host that is down."""
    monkeypatch.setattr(doctor, "SHARED_S", 1.0)
    monkeypatch.setattr(doctor, "CONNECT_S", 1.0)
    own = tmp_path / "own"
    own.mkdir()
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\nasleep slots=1\n")
    inside = ["nsenter", "-t", str(cluster.node_pid("node2")), "-m", "-n"]
    address = ssh.config.read_text().split("Host node1\n  HostName ")[1].split()[0]
    rule = ["to", address, "sport", "29500", "ipproto", "tcp", "prohibit"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", own], check=True)
    subprocess.run([*inside, "ip", "rule", "add", *rule], check=True)
    try:
        code = doctor.doctor(str(hostfile), ssh_config=str(ssh.config), folder=str(own), quick=True, as_json=True)
    finally:
        subprocess.run([*inside, "ip", "rule", "del", *rule], check=True)
        subprocess.run([*inside, "umount", own], check=True)

    found, problems = results(capsys.readouterr().out)
    assert code == 1
    assert not found["ok"]
    assert set(problems) == {
        ("reachable", "asleep"), ("shared folder", "node1"), ("shared folder", "node2"), ("port", "node1 -> node2"),
    }  # fmt: skip
    assert "firewall on node2" in problems["port", "node1 -> node2"]["remedy"]


@pytest.mark.slow
def test_inside_a_slurm_job_its_nodes_are_checked(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/bash\nexec {sys.executable} -c "$ENTRY" doctor --quick --json --folder={tmp_path}\n')
    log = tmp_path / "log"

    job = cluster.run("sbatch", "--parsable", "-N2", f"--output={log}", script, environ={"ENTRY": ENTRY}).stdout.strip()
    cluster.ended(job)

    found = json.loads(log.read_text()[log.read_text().index("{") :])
    assert found["nodes"] == ["node1", "node2"]
    assert found["ok"], found
    assert ("all-reduce", "node1 + node2") in {(f["check"], f["where"]) for f in found["findings"]}
