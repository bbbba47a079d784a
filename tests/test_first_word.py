"""A run shows its first line before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "peft", "numpy", "rich")


def test_the_first_line_comes_before_torch_is_imported():
    code = f"""
import sys, builtins, loldu
told = print
def first(*words, **how):
    told(*words, [name for name in {HEAVY!r} if name in sys.modules])
    raise SystemExit
builtins.print = first
from launcher.cli import main
main(["train", "llama2_alpaca_loldu", "--tiny"])
"""

    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)

    assert done.stdout == "starting llama2_alpaca_loldu []\n"
