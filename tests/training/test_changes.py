"""Resuming with other settings: what changes the learning curve is refused, what does not is logged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig, as_dict
from launcher.training.changes import changes
from launcher.training.loop import learning_rate_at
from launcher.training.run import run

CONSTANT = OptimizerConfig(schedule="constant", max_steps=10)
COSINE = OptimizerConfig(schedule="cosine", max_steps=10)


def compared(before, now, steps_before=10, steps=10, **run):
    recorded = {"config": as_dict(Config(optimizer=before)), "resolved": {"steps": steps_before}}
    return changes(recorded, Config(optimizer=now, run=RunConfig(**run)), steps)


@pytest.mark.parametrize(
    ("before", "change", "steps", "named"),
    [
        (COSINE, {"learning_rate": 0.02}, 10, "--learning-rate 0.02 (was 0.001)"),
        (CONSTANT, {"learning_rate": 0.02}, 10, "--learning-rate 0.02 (was 0.001)"),
        (COSINE, {"max_steps": 20}, 20, "--max-steps 20 (was 10)"),
        (COSINE, {"max_steps": 5}, 5, "--max-steps 5 (was 10)"),
        (COSINE, {"schedule": "linear"}, 10, "--schedule linear (was cosine)"),
        (COSINE, {"warmup_ratio": 0.2}, 10, "--warmup-ratio 0.2 (was 0.0)"),
        (replace(CONSTANT, warmup_ratio=0.2), {"max_steps": 20}, 20, "--max-steps 20 (was 10)"),  # a longer warm-up
        (CONSTANT, {"weight_decay": 0.1}, 10, "--weight-decay 0.1 (was 0.0)"),
        (CONSTANT, {"clip_norm": 0.5}, 10, "--clip-norm 0.5 (was 1.0)"),
        (CONSTANT, {"adam_beta2": 0.99}, 10, "--adam-beta2 0.99 (was 0.999)"),
    ],
)
def test_a_setting_that_changes_a_step_changes_the_curve(before, change, steps, named):
    found = compared(before, replace(before, **change), steps=steps)

    assert found.curve == (named,)


def test_what_is_trained_of_a_pipeline_belongs_to_the_curve():
    began = Config(model=ModelConfig(train_text_encoder=True), optimizer=COSINE)
    now = Config(model=ModelConfig(attention="sdpa"), optimizer=COSINE)

    found = changes({"config": as_dict(began), "resolved": {"steps": 10}}, now, 10)

    assert found.curve == ("--train-text-encoder False (was True)",)
    assert found.other == ()


@pytest.mark.parametrize(
    ("before", "change", "steps"),
    [
        (CONSTANT, {"max_steps": 20}, 20),
        (CONSTANT, {"max_steps": 5}, 5),
        (COSINE, {"max_steps": 0, "epochs": 2.0}, 10),  # another way to set the same number of steps
        (COSINE, {"micro_batch_size": 2}, 10),
    ],
)
def test_a_setting_that_leaves_every_step_as_it_is_changes_no_curve(before, change, steps):
    found = compared(before, replace(before, **change), steps=steps)

    assert found.curve == ()
    assert found.other


def test_folders_and_limits_of_a_start_are_not_compared():
    assert compared(COSINE, COSINE, output="elsewhere", max_seconds=9.0, resume="never").other == ()
    assert compared(COSINE, COSINE, save_every=5).other == ("--save-every 5 (was 0)",)


def test_a_setting_that_is_newer_than_the_run_counts_as_unchanged():
    recorded = {"config": as_dict(Config(optimizer=COSINE)), "resolved": {"steps": 10}}
    del recorded["config"]["optimizer"]["clip_norm"]

    assert changes(recorded, Config(optimizer=replace(COSINE, clip_norm=0.5)), 10).curve == ()


@pytest.fixture
def begun(stories, alpaca_file, tmp_path):
    """Four steps of six, saved."""
    records = tmp_path / "records.json"
    records.write_text(json.dumps(json.loads(alpaca_file.read_text())[:60]))
    config = Config(
        model=replace(Config().model, model=str(stories)),
        data=DataConfig(data=str(records), prompt_template="short", max_length=64),
        adapter=replace(Config().adapter, rank=4),
        optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=4, max_steps=6),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache")),
    )

    def stop(training, event):
        if event["step"] == 3:
            training.stop.request("the test")

    assert run(config, "test", on_step=stop) == 75
    return config


def rates(config):
    lines = map(json.loads, (Path(config.run.output) / "events.jsonl").read_text().splitlines())
    return [line["lr"] for line in lines if "lr" in line]


def recorded_optimizer(config):
    return json.loads((Path(config.run.output) / "config.json").read_text())["config"]["optimizer"]


def test_a_resume_with_another_learning_rate_is_refused_and_the_run_is_left_as_it_was(begun, capsys):
    faster = replace(begun, optimizer=replace(begun.optimizer, learning_rate=1e-2))
    before = rates(begun)

    assert run(faster, "test") == 2

    said = capsys.readouterr().err
    assert "--learning-rate 0.01 (was 0.001) would change the learning curve" in said
    assert "--accept-changes" in said
    assert rates(begun) == before
    assert run(begun, "test") == 0


def test_accepted_changes_are_named_and_recorded(begun, capsys):
    accepted = replace(begun, optimizer=replace(begun.optimizer, learning_rate=1e-2))
    accepted = replace(accepted, run=replace(accepted.run, accept_changes=True))

    assert run(accepted, "test") == 0

    assert "resuming with changed settings: --learning-rate 0.01 (was 0.001)" in capsys.readouterr().out
    assert rates(begun)[4:] == [learning_rate_at(step, 6, accepted.optimizer) for step in (5, 6)]
    assert recorded_optimizer(begun)["learning_rate"] == 1e-2


def test_a_run_that_would_end_before_its_checkpoint_is_refused(begun, capsys):
    shorter = replace(begun, optimizer=replace(begun.optimizer, max_steps=2))

    assert run(shorter, "test") == 2

    assert "is at step 4, and this run would end at step 2" in capsys.readouterr().err
