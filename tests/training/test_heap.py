"""Freed activations go back to the system, which glibc does only at the end of its heap."""

import subprocess
import sys

import pytest

from launcher.training.heap import Heap

HOLES = """
from pathlib import Path
import torch
from launcher.training.heap import Heap

def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

for _ in range(2):
    torch.ones(8 << 18)  # of 8 MiB: freed, it makes glibc take such sizes from the heap
before = resident_mib()
parts = [torch.ones(3 << 18) for _ in range(100)]
del parts[:-1]  # holes of 3 MiB below the last one
print(resident_mib() - before)
assert Heap(every_s=0).trim()
print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_the_holes_below_a_tensor_that_stays_are_given_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert before > 200
    assert after < 20


def test_it_is_done_now_and_then():
    heap = Heap(every_s=3600)

    assert not heap.trim()
