"""The SVFit recipe is LoLDU's run with another adapter."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
import llama2_alpaca_loldu
import llama2_alpaca_svfit

from launcher.methods import peft_config
from launcher.training.run import run


@pytest.mark.parametrize("name", ["llama2_alpaca", "tiny"])
def test_it_differs_from_loldus_run_in_adapter_and_rate_alone(name):
    theirs, ours = (getattr(recipe, name)() for recipe in (llama2_alpaca_loldu, llama2_alpaca_svfit))

    optimizer = replace(ours.optimizer, learning_rate=theirs.optimizer.learning_rate)

    assert replace(ours, adapter=theirs.adapter, optimizer=optimizer) == theirs
    assert (ours.adapter.rank, ours.adapter.targets) == (theirs.adapter.rank, theirs.adapter.targets)
    assert peft_config(ours.adapter).method == "svfit"


@pytest.mark.slow  # 6 s
def test_the_embedded_run_trains_singular_values(tmp_path):
    """As many as LoLDU's run trains diagonal entries; the loss falls."""
    config = llama2_alpaca_svfit.tiny()
    quick = replace(
        config,
        data=replace(config.data, eval_data=None, exact_match=False),
        optimizer=replace(config.optimizer, max_steps=12, batch_size=8),
        run=replace(config.run, output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), show_samples=0),
    )

    assert run(quick, "test") == 0

    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert saved["resolved"]["trained"] == 3584
    assert sum(losses[-3:]) < sum(losses[:3])
