"""The gradients behind LoRA-SB in a run: the same in any grouping, cached by base and data, refused if there are
none."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.data import batches, encode, records
from launcher.tasks.choose import task_of
from launcher.training.run import run
from launcher.training.sample_gradients import SampleGradients

MODULES = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qv"]
IDENTITY = {"base": "b", "dtype": "float32", "quantize": "none", "data": "d"}


@pytest.fixture
def small(stories, alpaca_file, tmp_path):
    file = tmp_path / "records.json"
    file.write_text(json.dumps(json.loads(alpaca_file.read_text())[:60]))
    return Config(
        model=ModelConfig(model=str(stories)),
        data=DataConfig(data=str(file), prompt_template="short", max_length=64),
        adapter=AdapterConfig(method="lorasb", rank=4, targets=("q_proj", "v_proj"), options=("samples=10",)),
        optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=4, max_steps=1),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )


def first_step(config, stories, **changes):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    train = encode.encode(records.load_splits(config.data.data, None, 0)[0], tokenizer, config.data)
    values = {
        "identity": IDENTITY,
        "pad_id": 0,
        "load": lambda: AutoModelForCausalLM.from_pretrained(stories),
        **changes,
    }
    return SampleGradients(config, 10, task_of(config), train, **values)


def test_gradients_are_those_of_the_mean_loss_over_the_samples(small, stories):
    """Against autograd on one batch of all ten: float32 sums in another order."""
    ours = first_step(small, stories)
    model = AutoModelForCausalLM.from_pretrained(stories)
    batch = batches.collate(ours.train, ours.samples, pad_id=0)

    model(**batch, use_cache=False).loss.backward()

    assert len(ours.samples) == 10
    for at, name in enumerate(MODULES):
        expected = model.get_submodule(name).weight.grad
        torch.testing.assert_close(ours(MODULES[at:]), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_one_weight_at_a_time_makes_more_passes_and_the_same_gradients(small, stories):
    together, apart = first_step(small, stories), first_step(small, stories, bytes_at_once=1)

    sums = [(together(MODULES[at:]), apart(MODULES[at:])) for at in range(len(MODULES))]

    assert (together.passes, apart.passes) == (1, len(MODULES))
    assert all(torch.equal(one, other) for one, other in sums)


def test_the_digest_names_base_data_and_samples(small, stories):
    same = first_step(small, stories).digest
    other_seed = replace(small, optimizer=replace(small.optimizer, seed=1))

    assert first_step(small, stories).digest == same
    assert first_step(other_seed, stories).digest != same
    for part in IDENTITY:
        assert first_step(small, stories, identity={**IDENTITY, part: "other"}).digest != same


def test_a_second_run_takes_the_factors_from_the_cache_and_other_data_do_not(small, tmp_path, capsys):
    def told(config, name):
        assert run(replace(config, run=replace(config.run, output=str(tmp_path / name))), "test") == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("factors of"))

    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads((tmp_path / "records.json").read_text())[::-1]))

    assert "10 made, 0 from" in told(small, "first")
    assert "0 made, 10 from" in told(small, "second")
    assert "0 made, 10 from" in told(replace(small, optimizer=replace(small.optimizer, learning_rate=1e-2)), "rate")
    assert "10 made, 0 from" in told(replace(small, data=replace(small.data, data=str(other))), "third")


def test_equal_weights_at_two_places_have_factors_of_their_own(small, stories, tmp_path):
    """Their gradients differ, though the cache knows weights by their content."""
    model = AutoModelForCausalLM.from_pretrained(stories)
    first, second = (model.model.layers[i].self_attn.q_proj for i in (0, 1))
    second.weight.data.copy_(first.weight)
    twins = tmp_path / "twins"
    model.save_pretrained(twins)
    AutoTokenizer.from_pretrained(stories).save_pretrained(twins)

    assert run(replace(small, model=ModelConfig(model=str(twins))), "test") == 0

    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    one, other = (
        next(value for name, value in saved.items() if f"layers.{i}.self_attn.q_proj" in name and "write" in name)
        for i in (0, 1)
    )
    assert not torch.equal(one, other)


def test_a_run_whose_factors_were_lost_and_differ_when_made_again_does_not_go_on(small, tmp_path, monkeypatch, capsys):
    """Another kernel's rounding would flip a few signs; here all are flipped."""
    longer = replace(small, optimizer=replace(small.optimizer, max_steps=2))
    assert run(small, "test") == 0
    shutil.rmtree(tmp_path / "cache")
    sums = SampleGradients.__call__
    monkeypatch.setattr(SampleGradients, "__call__", lambda self, modules: sums(self, modules).roll(1, 0))

    lost = run(longer, "test")
    said = capsys.readouterr().err
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cache")
    again = run(longer, "test")

    assert (lost, again) == (2, 0)
    assert "gone from the cache, and made again they differ" in said
