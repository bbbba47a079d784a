"""A run that an engine does not support is refused by its flags, naming an engine that does."""

import re

import pytest

from launcher.config import AdapterConfig, Config, ModelConfig
from launcher.engines.choose import Demands, check_carries, check_sharding, refusal
from launcher.engines.engine import engine_class
from launcher.engines.registry import ENGINES, configured_by_accelerate, fitting, give, names
from launcher.methods import peft_config
from launcher.processes import Ranks
from launcher.training.resolve import check_carried

ALL_DEMANDS = [
    Demands(method="m", quantize=quantize, from_gradients=gradients, reads_4bit_class=reads)
    for quantize in ("none", "int8", "nf4")
    for gradients in (False, True)
    for reads in (False, True)
]


@pytest.mark.parametrize("demands", ALL_DEMANDS)
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_a_refusal_suggests_can_carry_the_run(name, demands):
    if refusal(ENGINES[name], demands) is None:
        check_carries(name, demands)
        return

    with pytest.raises(ValueError, match=rf"under --sharding {name}") as refused:
        check_carries(name, demands)

    suggested = re.search(r"give --sharding (\w+)", str(refused.value))[1]
    check_carries(suggested, demands)
    assert check_sharding(suggested, Ranks(0, 6, 0, 6), environ={}) == suggested


@pytest.mark.parametrize("sharding", ["fsdp2", "hsdp", "zero3"])
def test_lorasb_is_refused_where_no_process_has_the_whole_base(sharding):
    config = Config(adapter=AdapterConfig(method="lorasb"))

    with pytest.raises(ValueError, match=f"lorasb cannot be trained under --sharding {sharding}: .* whole base: give"):
        check_carried(config, peft_config(config.adapter), sharding)

    check_carried(config, peft_config(config.adapter), "ddp")
    other = AdapterConfig(method="loraxs")
    check_carried(Config(adapter=other), peft_config(other), sharding)


def test_a_quantised_base_under_zero3_is_sent_to_an_engine_that_shards_it():
    config = Config(model=ModelConfig(quantize="nf4"))

    with pytest.raises(ValueError, match=r"nf4 is not supported under --sharding zero3: .* give --sharding fsdp2, or"):
        check_carried(config, peft_config(config.adapter), "zero3")

    check_carried(config, peft_config(config.adapter), "fsdp2")


def test_under_accelerate_the_suggestion_is_a_configuration_that_gives_the_engine():
    """--sharding alone would be refused next, as another engine than the one accelerate was configured for."""
    environ = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

    assert give(ENGINES["hsdp"], environ) == "--sharding hsdp"
    assert give(ENGINES["ddp"], environ) == (
        "accelerate launch --config_file recipes/accelerate/ddp.yaml with --sharding ddp"
    )
    assert configured_by_accelerate({}) is None


def test_an_engine_whose_packages_are_missing_is_refused_and_never_suggested(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ninja" else object())

    with pytest.raises(ValueError, match="--sharding zero2 needs ninja: pip install ninja"):
        check_sharding("zero2", Ranks(0, 2, 0, 2), environ={})

    assert [info.name for info in fitting(lambda info: True)] == ["ddp", "fsdp2", "hsdp"]


def test_names_are_listed_as_a_sentence_has_them():
    assert names() == "none, ddp, fsdp2, hsdp, zero2 or zero3"
    assert names(lambda info: info.grouped) == "hsdp"


@pytest.mark.parametrize("name", ["none", "ddp", "fsdp2", "hsdp"])
def test_every_engine_offers_what_the_loop_calls(name):
    methods = ("load", "backward", "reduce", "update", "pieces", "restore", "whole_state")

    assert all(callable(getattr(engine_class(name), method)) for method in methods)
