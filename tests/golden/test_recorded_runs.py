"""What runs leave is what earlier versions left: cache keys, adapters, checkpoints, config.json and losses."""

import json

import pytest
from recorded_runs import RECORDED, configs, record

RECORD = json.loads(RECORDED.read_text())


def same(found, recorded, where=""):
    """Equal, but for the rounding of other processors in floats."""
    if isinstance(recorded, dict):
        assert found.keys() == recorded.keys(), where
        for key, value in recorded.items():
            same(found[key], value, f"{where}.{key}")
    elif isinstance(recorded, list):
        assert len(found) == len(recorded), where
        for number, (one, other) in enumerate(zip(found, recorded, strict=True)):
            same(one, other, f"{where}[{number}]")
    elif isinstance(recorded, float):
        # full fine-tuning and quantised bases amplify the last bit most: 1e-4 after 20 steps
        assert found == pytest.approx(recorded, rel=1e-4, abs=1e-6), where
    else:
        assert found == recorded, where


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


@pytest.mark.parametrize("name", list(configs()))
def test_a_run_writes_the_recorded_bytes_and_losses(name, tokens, tmp_path):
    same(record(name, configs()[name], tmp_path, tokens), RECORD[name], name)
