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

    with pytest.raises(ValueError, match=r"setting optimizer\.learning_rat; did you mean optimizer\.learning_rate"):
        from_dict(Config, values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterConfig(rank=0), r"--rank \(adapter.rank\) must be at least 1, got 0"),
        (lambda: AdapterConfig(targets=()), "--targets all-linear"),
        (lambda: AdapterConfig(targets=("all-linear", "q_proj")), "all-linear cannot be combined with names"),
        (lambda: AdapterConfig(options=("scale",)), "has the form name=value"),
        (lambda: DataConfig(max_length=4), "--max-length .* must be at least 8"),
        (lambda: DataConfig(exact_match=True), "give --eval-records N or --eval-data FILE"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate. must be a finite number"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate. must be above 0, got 0.0"),
        (lambda: OptimizerConfig(learning_rate=1e38), r"learning_rate. must be at most 1,000, got 1e\+38"),
        (lambda: OptimizerConfig(epochs=float("inf")), "epochs. must be a finite number"),
        (lambda: OptimizerConfig(epochs=1e300), "epochs. must be at most 1,000,000"),
        (lambda: OptimizerConfig(batch_size=10**30), "batch_size. must be below 2.63"),
        (lambda: OptimizerConfig(batch_size=10**18), "batch_size. must be at most 10,000,000"),
        (lambda: OptimizerConfig(seed=2**63), "seed. must be below 2.63"),
        (lambda: OptimizerConfig(seed=-1), "seed. must be at least 0"),
        (lambda: AdapterConfig(rank="8"), "rank. must be a whole number, got '8'"),
        (lambda: AdapterConfig(rank=True), "rank. must be a whole number, got True"),
        (lambda: AdapterConfig(targets="all-linear"), "targets. must be a list, got 'all-linear'"),
        (lambda: AdapterConfig(targets=(1,)), "targets. must be a list; each entry must be text"),
        (lambda: DataConfig(packing="yes"), "packing. must be true or false, got 'yes'"),
        (lambda: DataConfig(data=None), "data. must be text, got None"),
        (lambda: RunConfig(sharding="half"), "sharding. must be one of none, ddp, "),
        (lambda: RunConfig(trackers=("tensorbord",)), "each entry must be one of tensorboard, wandb"),
        (lambda: OptimizerConfig(weight_decay=float("nan")), "weight_decay. must be a finite number"),
        (lambda: OptimizerConfig(max_steps=0, epochs=0), "nothing to train"),
        (lambda: OptimizerConfig(warmup_ratio=1.0), "warmup_ratio. must be below 1, got 1.0"),
        (lambda: OptimizerConfig(adam_beta2=1.0), "adam_beta2. must be below 1, got 1.0"),
        (lambda: RunConfig(patience=3), "give --eval-every N"),
        (lambda: Config(run=RunConfig(eval_every=5)), "--eval-every 5 needs held-out records"),
        (lambda: Config(run=RunConfig(show_samples=2)), "--show-samples 2 needs held-out records"),
    ],
)
def test_a_mistake_names_the_setting_and_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
