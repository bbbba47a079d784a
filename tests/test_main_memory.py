"""What a process gives back of the memory that it frees."""

import platform
import subprocess
import sys

import pytest

FREED = """
import sys
from launcher.main_memory import map_large_blocks, resident_bytes

if sys.argv[1] == "mapped":
    map_large_blocks()
del (first := [bytearray(16 << 20)])[0]  # glibc then keeps blocks up to this size in the heap
before = resident_bytes()
large, small = [], []
for _ in range(30):  # as layers that are gathered, with the activations of each behind it
    large.append(bytearray(4 << 20))
    small.append(bytearray(2000))
large.clear()
print(resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc raises its limit")
@pytest.mark.parametrize(("how", "least", "most"), [("mapped", -1, 10 << 20), ("by default", 60 << 20, 140 << 20)])
def test_large_blocks_leave_no_holes_once_they_are_mapped(how, least, most):
    command = [sys.executable, "-c", FREED, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert least < float(done.stdout) < most
