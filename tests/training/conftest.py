"""The settings of a small run."""

import json

import pytest

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


@pytest.fixture
def small(stories, alpaca_file, tmp_path):
    """Six quick steps of a real Llama with 260,032 parameters."""
    records = tmp_path / "records.json"
    records.write_text(json.dumps(json.loads(alpaca_file.read_text())[:400]))
    return Config(
        model=ModelConfig(model=str(stories)),
        data=DataConfig(data=str(records), eval_records=20, prompt_template="short", max_length=96),
        adapter=AdapterConfig(rank=16, targets=("all-linear",)),
        optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=4, max_steps=6),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False, save_every=2),
    )
