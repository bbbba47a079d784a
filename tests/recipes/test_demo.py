"""The embedded default, as the README's first command runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_demo_elicits_the_pretrained_skills(tmp_path):
    """From under 15 % exact answers on held-out words to over 60 %, by training 3,584 numbers."""
    command = [sys.executable, "recipes/llama2_alpaca_loldu.py", "--tiny", "--output", str(tmp_path / "run")]

    done = subprocess.run(
        [*command, "--cache", str(tmp_path / "cache")],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    before, after = (event["exact_match"] for event in events if "exact_match" in event)
    assert before < 0.15
    assert after > 0.60
    assert "3,584 trainable parameters" in done.stdout
    assert "loldu chat" in done.stdout
    assert "before" in done.stdout
