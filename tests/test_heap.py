"""Freed activations go back to the system, which glibc's own settings do not do."""

import os
import subprocess
import sys

import pytest

from launcher.heap import CHOSEN, return_freed_memory

HOLES = """
import sys
from pathlib import Path
from launcher.heap import return_freed_memory
if sys.argv[1] == "ours":
    assert return_freed_memory()
import torch

def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

for _ in range(2):
    torch.ones(8 << 18)  # of 8 MiB: freed, it makes glibc take such sizes from the heap
before = resident_mib()
parts = [torch.ones(3 << 18) for _ in range(100)]
del parts[:-1]  # holes of 3 MiB below the last one
print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_the_holes_below_a_tensor_that_stays_are_given_back():
    environment = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    grown = {}

    for way in ("ours", "default"):
        done = subprocess.run([sys.executable, "-c", HOLES, way], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[way] = float(done.stdout)

    assert grown["default"] > 200
    assert grown["ours"] < 20


def test_what_the_user_chose_stays():
    environ = {"LD_PRELOAD": "libjemalloc.so.2"}

    assert not return_freed_memory(environ)
    assert "THP_MEM_ALLOC_ENABLE" not in environ
