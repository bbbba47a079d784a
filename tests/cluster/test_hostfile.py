"""Hostfiles and their filters: DeepSpeed's format, every problem with its line."""

import os
import re
from pathlib import Path

import pytest

from launcher.cluster.hostfile import Host, Hosts, choose, parse, read

EXAMPLES = Path(__file__).resolve().parents[2] / "hostfiles"
TWO = "# the lab\nnode1 slots=4   # the fast one\n\n  node2\tslots=2\n"


def test_a_hostfile_of_deepspeed_is_read():
    assert parse(TWO) == [Host("node1", (0, 1, 2, 3)), Host("node2", (0, 1))]


@pytest.mark.parametrize(
    "file", sorted(path for path in EXAMPLES.iterdir() if path.suffix != ".md"), ids=lambda p: p.name
)
def test_the_examples_are_read(file):
    hosts = read(str(file))

    assert all(host.slots for host in hosts)


def test_every_problem_is_listed_with_its_line():
    text = "node1 slots=4\nnode1 slots=4\nnode2\nnode3 slots=x\n-oProxyCommand=id slots=1\nme@node4 slots=1\nnode5 slots=0\nnode6 slots=1 gpu\n"  # fmt: skip  # noqa: E501

    with pytest.raises(ValueError, match="has 7 problems") as error:
        parse(text, "my hosts")

    lines = str(error.value).splitlines()
    assert lines[0] == "my hosts has 7 problems:"
    assert [int(re.search(r"line (\d+)", line)[1]) for line in lines[1:]] == [2, 3, 4, 5, 6, 7, 8]
    assert "node1 is already on line 1" in lines[1]
    assert "expected `node2 slots=N`, got `node2`" in lines[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no host is listed"),
        ("# only words\n", "no host is listed"),
        ("node1 slots=\u0663\n", "line 1: expected `node1 slots=N`, got"),
        ("localhost slots=1\nnode2 slots=1\n", "line 1: localhost means a different machine on each host"),
    ],
)
def test_a_file_that_cannot_mean_anything_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_missing_file_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"No such file.*node1 slots=8.*hostfiles/"):
        read(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("node2", None, [Host("node2", (0, 1))]),
        ("node2@node1:1,3", None, [Host("node1", (1, 3), True), Host("node2", (0, 1))]),
        (None, "node1", [Host("node2", (0, 1))]),
        (None, "node2:0", [Host("node1", (0, 1, 2, 3)), Host("node2", (1,), True)]),
    ],
)
def test_filters_choose_hosts(include, exclude, left):
    assert choose(parse(TWO), include, exclude) == left


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node3", None, "no such host; the file has node1, node2"),
        ("node2:5", None, "node2 has slots 0 .. 1, not 5"),
        ("node2:x", None, "expected slots as in node2:0,2"),
        ("node2@node2", None, "named twice"),
        (None, "node1@node2", "leaves no host"),
    ],
)
def test_a_filter_with_an_unknown_name_is_refused(include, exclude, message):
    with pytest.raises(ValueError, match=message):
        choose(parse(TWO), include, exclude)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"env": ("NAME",)}, "expects NAME=VALUE"),
        ({"port": 0}, "--port expects a number from 1 to 65535"),
        ({"include": "a", "exclude": "b"}, "--include and --exclude cannot be used together"),
    ],
)
def test_a_mistake_in_the_options_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Hosts(hostfile="x", **wrong)


def test_a_fifo_is_refused_instead_of_waited_at_for_ever(tmp_path):
    os.mkfifo(tmp_path / "hosts")

    with pytest.raises(ValueError, match=r"hosts: .*; expected lines such as: node1 slots=8"):
        read(str(tmp_path / "hosts"))
