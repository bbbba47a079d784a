"""PEFT's own adapters and full fine-tuning under the sharding engines give the losses of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import Runs
from peft import DeloraConfig, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from launcher.config import AdapterConfig, ModelConfig
from launcher.models.build import build
from launcher.models.skeleton import skeleton

CURVE = 5e-6  # float32: the same sums in another order (measured 2e-6)
ENGINES = ["fsdp2", "zero2", "zero3"]
RESUMED = [  # the method, the engine that wrote its checkpoint, the engine that resumes
    ("lora", "fsdp2", "zero3"), ("lora", "zero3", "fsdp2"),
    ("dora", "zero2", "fsdp2"), ("dora", "fsdp2", "zero3"),
    ("full", "fsdp2", "zero3"), ("full", "zero3", "zero2"), ("full", "zero2", "fsdp2"),
    ("loraxs", "zero3", "zero2"),
    ("saved", "fsdp2", "zero2"), ("saved", "zero2", "zero3"),
]  # fmt: skip
CPU = torch.device("cpu")
HOW: dict = {"dtype": "float32", "attention": "sdpa"}


def method(name, *options, **settings):
    settings = {"targets": ("all-linear",), **settings}
    return lambda config: replace(
        config,
        adapter=AdapterConfig(method=name, rank=6, options=options, **settings),
        optimizer=replace(config.optimizer, max_steps=3),
        run=replace(config.run, save_every=2),
    )


METHODS = {
    "lora": method("lora"),
    "dora": method("lora", "use_dora=true", targets=("q_proj", "down_proj")),
    "full": method("full"),
    "loraxs": method("loraxs"),
    "saved": method("lora", targets=("q_proj",), modules_to_save=("embed_tokens",)),
}


@pytest.fixture(scope="module")
def runs(stories, alpaca_file, tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("methods"), stories, alpaca_file)
    for name, change in METHODS.items():
        runs.alone(name, change=change)
    entries = [(name, engine) for name in METHODS for engine in ENGINES]
    runs.start(
        2,
        *(runs.entry(f"{name}-{engine}", engine, change=METHODS[name]) for name, engine in entries),
        *(
            runs.entry(f"{name}-{before}>{after}", after, source=f"{name}-{before}", step=2, change=METHODS[name])
            for name, before, after in RESUMED
        ),
    )
    runs.start(
        4,
        *(runs.entry(f"{name}-hsdp", "hsdp", shard_size=2, change=METHODS[name]) for name in ("lora", "full")),
        *(
            runs.entry(f"{name}-zero3>hsdp", "hsdp", shard_size=2, source=f"{name}-zero3", step=2, change=METHODS[name])
            for name in METHODS
        ),
    )
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, "zero3>hsdp"])
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_adapter_has_the_losses_of_one_process_when_sharded(runs, name, engine):
    torch.testing.assert_close(runs.losses(f"{name}-{engine}"), runs.losses(name), atol=CURVE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full"])
def test_drawn_parameters_are_sharded_and_replicated_alike(runs, name):
    torch.testing.assert_close(runs.losses(f"{name}-hsdp"), runs.losses(name), atol=CURVE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "before", "after"), RESUMED)
def test_every_kind_of_adapter_resumes_under_another_engine(runs, name, before, after):
    torch.testing.assert_close(runs.losses(f"{name}-{before}>{after}"), runs.losses(name), atol=CURVE, rtol=0)


@pytest.mark.slow
def test_a_sharded_lora_loads_in_plain_peft_with_the_same_logits(runs, stories):
    tokens = torch.arange(3, 40)[None]

    def logits(name):
        base = AutoModelForCausalLM.from_pretrained(stories)
        return PeftModel.from_pretrained(base, runs.folder / name / "adapter")(tokens).logits

    torch.testing.assert_close(logits("lora-fsdp2"), logits("lora"), atol=1e-4, rtol=0)  # Adam divides small sums


def test_a_skeleton_draws_the_adapter_that_one_process_draws(stories):
    base, config = ModelConfig(model=str(stories)), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    torch.manual_seed(5)
    whole = build(base, Path(stories), config, factors=lambda name: None, device=CPU, **HOW)
    torch.manual_seed(5)
    sharded = dict(skeleton(base, Path(stories), config, **HOW).named_parameters())

    drawn = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    assert any(bool(parameter.any()) for parameter in drawn.values())
    assert all(torch.equal(sharded[name], parameter) for name, parameter in drawn.items())
    assert all(p.is_meta for name, p in sharded.items() if name not in drawn)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_made_from_the_bases_weights_is_refused_with_the_reason(stories, start):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM")

    with pytest.raises(ValueError, match="--method lora initialises its parameters from the base's weights, but under"):
        skeleton(ModelConfig(model=str(stories)), Path(stories), config, **HOW)


def test_a_buffer_made_from_the_bases_weights_is_refused_likewise(stories):
    config = DeloraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")

    with pytest.raises(
        ValueError, match=r"--method delora initialises its parameters from the base's weights.*q_proj\.delora_w_norm"
    ):
        skeleton(ModelConfig(model=str(stories)), Path(stories), config, **HOW)
