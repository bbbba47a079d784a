"""The configuration: every mistake is found on construction and says what to type."""

import pytest

from launcher.config import AdapterConfig, Config, DataConfig, OptimizerConfig, RunConfig, as_dict, from_dict


def test_a_config_survives_json():
    """What config.json holds builds the same config again."""
    config = Config(adapter=AdapterConfig(rank=7, targets=("k_proj",)), data=DataConfig(eval_records=3))

    assert from_dict(Config, as_dict(config)) == config


def test_an_unknown_name_lists_the_nearest_valid_ones():
    values = as_dict(Config())
    values["optimizer"]["learning_rat"] = 1.0

    with pytest.raises(ValueError, match=r"unknown setting optimizer\.learning_rat; did you mean learning_rate"):
        from_dict(Config, values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterConfig(rank=0), r"--rank \(adapter.rank\) is at least 1, got 0"),
        (lambda: AdapterConfig(targets=()), "--targets all-linear"),
        (lambda: AdapterConfig(targets=("all-linear", "q_proj")), "all-linear stands alone"),
        (lambda: AdapterConfig(options=("scale",)), "written name=value"),
        (lambda: DataConfig(max_length=4), "--max-length .* is at least 8"),
        (lambda: DataConfig(exact_match=True), "give --eval-records N or --eval-data FILE"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate. is a positive number"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate. is a positive number"),
        (lambda: OptimizerConfig(weight_decay=float("nan")), "weight_decay. is at least 0"),
        (lambda: OptimizerConfig(max_steps=0, epochs=0), "nothing to train"),
        (lambda: OptimizerConfig(warmup_ratio=1.0), "warmup_ratio. lies in"),
        (lambda: OptimizerConfig(adam_beta2=1.0), "adam_beta2. lies in"),
        (lambda: RunConfig(patience=3), "give --eval-every N"),
        (lambda: Config(run=RunConfig(eval_every=5)), "--eval-every 5 needs held-out records"),
        (lambda: Config(run=RunConfig(show_samples=2)), "--show-samples 2 needs held-out records"),
    ],
)
def test_a_mistake_names_the_setting_and_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
