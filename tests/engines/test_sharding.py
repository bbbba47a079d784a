"""Every sharding gives the losses of one process, and a checkpoint of any of them resumes under any other.

All runs with several processes happen in four starts, in the fixtures; the tests compare what they left.
"""

import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from launching import RECIPE, REPO, Runs, finish, flags, start
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import adapters  # noqa: F401 (registers LoLDU)
from launcher.config import AdapterConfig, OptimizerConfig
from launcher.engines.choose import check_sharding
from launcher.engines.fsdp2 import FullyShard, decoder_layers
from launcher.engines.registry import ENGINES
from launcher.engines.replicated import Replicated
from launcher.processes import Ranks

CURVE = 5e-6  # float32: the same sums in another order (measured 1e-6)
# bf16: engines add up gradients and their norm in other orders, and after some steps single roundings to bf16 fall the
# other way (measured up to 1.4e-2 on fsdp2, from step 7 on).
# Against one process each product has another shape, and losses of about 30 answer tokens round differently (1.4e-2).
BF16_CURVE = 3e-2  # measured 2.4e-2 on zero2, whose AdamW is DeepSpeed's, at step 6
BF16_START = {"fsdp2": CURVE, "zero2": CURVE, "zero3": 2e-3}  # of the first three losses
BF16_SHAPE = 5e-2
SHARDED = ["ddp", "fsdp2", "zero2", "zero3"]
OFFLOADED = ["fsdp2", "zero2", "zero3"]
DIRECTIONS = [f"{before}>{after}" for before, after in permutations(SHARDED, 2)]
LONG = ["fsdp2-4", "hsdp-4", "zero2-4", "zero3-4", *SHARDED]


def bf16(config):
    return replace(config, model=replace(config.model, dtype="bfloat16"))


def answers(config):
    """Also at the end of a run, once rank 0 has saved it."""
    data = replace(config.data, exact_match=True, answer_tokens=6)
    return replace(config, data=data, run=replace(config.run, show_samples=2))


def full_rank(config):
    return replace(config, adapter=replace(config.adapter, rank=64))


def in_parts(config):
    return replace(config, optimizer=replace(config.optimizer, micro_batch_size=1))


def long(config):
    return replace(config, optimizer=replace(config.optimizer, max_steps=20), run=replace(config.run, save_every=0))


def short(config):
    return replace(config, optimizer=replace(config.optimizer, max_steps=3))


def untied_model(folder, like):
    """A random Llama with a head of its own and biases, which are read outside their own layer."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=False, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    for file in like.glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def runs(stories, alpaca_file, tmp_path_factory):
    """stories260K, whose embeddings are tied, on 1, 2 and 4 processes, interrupted and continued elsewhere."""
    runs = Runs(tmp_path_factory.mktemp("runs"), stories, alpaca_file)
    runs.alone("one")
    runs.alone("one-long", change=long)
    runs.alone("one-bf16", change=bf16)
    runs.alone("one-answers", change=answers)
    runs.alone("one-full-rank", change=full_rank)
    counts = {"counts": True}
    runs.start(
        4,
        runs.entry("fsdp2-4", "fsdp2"),
        runs.entry("hsdp-4", "hsdp", shard_size=2, how=counts),
        runs.entry("one>fsdp2-4", "fsdp2", source="one", step=4),
        runs.entry("hsdp-4-answers", "hsdp", shard_size=2, change=answers),
        runs.entry("fsdp2-4-long", "fsdp2", change=long),
        runs.entry("hsdp-4-long", "hsdp", shard_size=2, change=long),
        runs.entry("zero2-4-long", "zero2", change=long),
        runs.entry("zero3-4-long", "zero3", change=long),
    )
    without_gpu, apart, in_blocks = {"offload": True}, {"nodes": True}, {"blocks": True}
    runs.said = runs.start(
        2,
        *(runs.entry(sharding, sharding, how=counts) for sharding in SHARDED),
        *(runs.entry(f"{sharding}-long", sharding, change=long) for sharding in SHARDED),
        *(runs.entry(f"{sharding}-parts", sharding, change=in_parts) for sharding in SHARDED[1:]),
        *(runs.entry(f"{sharding}-answers", sharding, change=answers) for sharding in SHARDED),
        *(runs.entry(f"{sharding}-bf16", sharding, change=bf16) for sharding in SHARDED),
        *(runs.entry(f"{sharding}-blocks", sharding, change=full_rank, how=in_blocks) for sharding in SHARDED),
        *(runs.entry(f"{sharding}>{sharding}", sharding, source=sharding, step=4) for sharding in SHARDED),
        *(runs.entry(f"one>{sharding}", sharding, source="one", step=2) for sharding in SHARDED),
        *(runs.entry(way, way.partition(">")[2], source=way.partition(">")[0], step=4) for way in DIRECTIONS),
        *(runs.entry(f"{sharding}-offload", sharding, cpu_offload=True, how=without_gpu) for sharding in OFFLOADED),
        *(
            runs.entry(f"offload>{sharding}", sharding, source="ddp", step=4, cpu_offload=True, how=without_gpu)
            for sharding in OFFLOADED
        ),
        runs.entry("apart", "fsdp2", cache=str(runs.folder / "node"), cache_per_node=True, how=apart),
        runs.entry("refused", "fsdp2", cache=str(runs.folder / "local"), how=apart | {"code": 2}),
        runs.entry("hsdp-4>zero2", "zero2", source="hsdp-4", step=4),
        runs.entry("4>2", "zero3", source="fsdp2-4", step=2),
    )
    for sharding in ("fsdp2", "zero3"):
        runs.alone_from(f"{sharding}>one", sharding, 4)
    runs.alone_from("4>2>1", "4>2", 4)
    runs.start(4, runs.entry("4>2>1>4", "hsdp", shard_size=2, source="4>2>1", step=6))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_every_sharding_gives_the_first_20_losses_of_one_process(runs, name):
    assert len(runs.losses(f"{name}-long")) == 20
    torch.testing.assert_close(runs.losses(f"{name}-long"), runs.losses("one-long"), atol=CURVE, rtol=0)
    first, last = (event["eval_loss"] for event in runs.events(f"{name}-long") if "eval_loss" in event)
    once = [event["eval_loss"] for event in runs.events("one-long") if "eval_loss" in event]
    torch.testing.assert_close([first, last], once, atol=CURVE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHARDED, "hsdp-4"])
def test_every_process_computes_logits_of_its_tokens_with_loss_alone(runs, name):
    files = sorted(runs.folder.glob(f"{name}-counts-*.json"))

    assert len(files) == (4 if name.endswith("-4") else 2)
    for counts in (json.loads(file.read_text()) for file in files):
        assert len(counts) == 8
        for (before, _), (after, targets) in pairwise(counts):  # the first step also checks the loss of the head
            assert after - before == targets


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDED[1:])
def test_micro_batches_give_the_same_losses(runs, sharding):
    torch.testing.assert_close(runs.losses(f"{sharding}-parts"), runs.losses("one"), atol=CURVE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDED)
def test_triangles_multiplied_in_blocks_give_the_same_losses(runs, sharding):
    torch.testing.assert_close(runs.losses(f"{sharding}-blocks"), runs.losses("one-full-rank"), atol=CURVE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", OFFLOADED)
def test_offloading_changes_nothing_also_after_a_resume(runs, sharding):
    """Without a GPU both sides are main memory: what is checked is each engine's offloading code and our restoring."""
    for name in (f"{sharding}-offload", f"offload>{sharding}"):
        torch.testing.assert_close(runs.losses(name), runs.losses("one"), atol=CURVE, rtol=0)


@pytest.mark.slow
def test_nodes_with_their_own_caches_have_the_same_losses(runs):
    torch.testing.assert_close(runs.losses("apart"), runs.losses("one"), atol=CURVE, rtol=0)
    assert [len(list((runs.folder / f"node-{rank}" / "factors").iterdir())) for rank in (0, 1)] == [35, 35]


@pytest.mark.slow
def test_a_cache_that_the_nodes_do_not_share_is_refused_in_one_line(runs):
    (line,) = [line for line in runs.said.splitlines() if "error: " in line]
    assert "(rank 1) does not see the factor cache" in line
    assert "--cache-per-node" in line
    assert not (runs.folder / "local-0" / "factors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "one>fsdp2-4", *(f"one>{sharding}" for sharding in SHARDED), *DIRECTIONS, "hsdp-4>zero2", "fsdp2>one",
        "zero3>one", "4>2", "4>2>1", "4>2>1>4",
    ],
)  # fmt: skip
def test_a_checkpoint_resumes_under_any_sharding_and_number_of_processes(runs, name):
    torch.testing.assert_close(runs.losses(name), runs.losses("one"), atol=CURVE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDED)
def test_the_same_sharding_resumes_bit_for_bit(runs, sharding):
    assert runs.events(f"{sharding}>{sharding}") == runs.events(sharding)
    again, once = runs.adapter(f"{sharding}>{sharding}"), runs.adapter(sharding)
    assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [*SHARDED, "hsdp-4"])
def test_all_ranks_generate_answers_together(runs, sharding):
    """In a sharded model, a rank with fewer forward passes than another would make that one wait forever."""
    found = [event["exact_match"] for event in runs.events(f"{sharding}-answers") if "exact_match" in event]

    assert found == [event["exact_match"] for event in runs.events("one-answers") if "exact_match" in event]
    assert len(found) == 2


@pytest.mark.slow
@pytest.mark.parametrize("sharding", BF16_START)
def test_a_bf16_base_trains_float32_cores_to_the_curve_of_ddp(runs, sharding):
    found, expected = runs.losses(f"{sharding}-bf16"), runs.losses("ddp-bf16")
    torch.testing.assert_close(found[:3], expected[:3], atol=BF16_START[sharding], rtol=0)
    torch.testing.assert_close(found, expected, atol=BF16_CURVE, rtol=0)
    torch.testing.assert_close(expected, runs.losses("one-bf16"), atol=BF16_SHAPE, rtol=0)
    cores = {tensor.dtype for name, tensor in runs.adapter(f"{sharding}-bf16").items() if name.endswith("core")}
    assert cores == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2-4", "hsdp-4", *SHARDED])
def test_the_adapter_of_every_sharding_loads_in_plain_peft_with_the_same_logits(runs, name, stories):
    """Cores differ by 4e-8 (measured), the logits of this model, up to 13, by 1e-5 and the rounding of some CPUs."""
    tokens = torch.arange(3, 40)[None]

    def logits(adapter):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), adapter)(tokens).logits

    torch.testing.assert_close(
        logits(runs.folder / name / "adapter"), logits(runs.folder / "one" / "adapter"), atol=1e-5, rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_launch_with_a_ready_file_gives_the_sharding_it_names(name, stories, alpaca_file, tmp_path):
    runs = Runs(tmp_path, stories, alpaca_file)
    runs.alone("one", change=short)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(REPO / "recipes" / "accelerate" / f"{name}.yaml"),
    ]
    options = flags(runs.config("many", change=short))

    code, out = finish(
        start(
            [*launch, "--num_processes", "2", "--main_process_port", "0", str(RECIPE), *options],
            ACCELERATE_USE_CPU="true",
        )
    )

    assert code == 0, out
    resolved = json.loads((tmp_path / "many" / "config.json").read_text())["resolved"]
    assert (resolved["sharding"], resolved["world_size"]) == (name, 2)
    torch.testing.assert_close(runs.losses("many"), runs.losses("one"), atol=CURVE, rtol=0)


@pytest.fixture(scope="module")
def untied(stories, alpaca_file, tmp_path_factory):
    """Untied embeddings, biases, and a head that is trained whole beside the cores."""
    folder = tmp_path_factory.mktemp("untied")
    runs = Runs(folder, untied_model(folder / "model", stories), alpaca_file)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    runs.base = replace(runs.base, adapter=AdapterConfig(rank=5, targets=targets, modules_to_save=("lm_head",)))
    runs.alone("one")
    runs.start(2, *(runs.entry(sharding, sharding) for sharding in SHARDED))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDED)
def test_untied_embeddings_biases_and_whole_trained_modules_are_sharded_too(untied, sharding):
    torch.testing.assert_close(untied.losses(sharding), untied.losses("one"), atol=CURVE, rtol=0)
    found, once = untied.adapter(sharding), untied.adapter("one")
    assert found.keys() == once.keys()
    head = next(name for name in once if "lm_head" in name)
    torch.testing.assert_close(found[head], once[head], atol=1e-5, rtol=0)  # Adam divides small sums: 1e-3 of a rate


@pytest.mark.parametrize(
    ("wanted", "environ", "expected"),
    [
        (None, {}, "ddp"),
        (None, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ("hsdp", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "hsdp"),
        (None, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "false"}, "fsdp2"),
    ],
)
def test_the_launchers_configuration_is_the_default_of_the_sharding(wanted, environ, expected):
    assert check_sharding(wanted, Ranks(0, 2, 0, 2), environ=environ) == expected


@pytest.mark.parametrize(
    ("wanted", "size", "environ", "message"),
    [
        ("none", 0, {}, "--sharding none is for one process, but WORLD_SIZE is 6: give --sharding ddp"),
        ("hsdp", 4, {}, "6 processes / 4 that share one copy = 1.50 copies"),
        ("fsdp2", 2, {}, "--shard-size 2 works with --sharding hsdp only, not with fsdp2"),
        ("ddp", 0, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "configured for fsdp2, but --sharding is ddp"),
        (None, 0, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "has fsdp_version: 1; only 2 is supported"),
        (None, 0, {"ACCELERATE_USE_DEEPSPEED": "true"}, "zero_stage none: set zero_stage to 2 or 3"),
        (
            "zero2",
            0,
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "configured for zero3, but --sharding is zero2: leave --sharding out",
        ),
    ],
)
def test_a_sharding_that_does_not_fit_is_refused_with_the_arithmetic(wanted, size, environ, message):
    with pytest.raises(ValueError, match=message):
        check_sharding(wanted, Ranks(0, 6, 0, 6), size, environ)


def test_without_a_decoder_layer_class_the_largest_list_of_layers_is_taken():
    model = torch.nn.Module()
    model.heads = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 9)
    model.mixed = torch.nn.ModuleList([torch.nn.Linear(9, 9), torch.nn.LayerNorm(9)])
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)])

    assert decoder_layers(model) == list(model.blocks)


def test_a_model_without_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"does not name its decoder-layer class .* no list of layers .*Give --sharding"
    ):
        decoder_layers(torch.nn.Linear(2, 2))


def test_layers_that_share_a_weight_are_refused_before_factors_are_made():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)])
            self.layers[1].weight = self.layers[0].weight

    with pytest.raises(ValueError, match=r": layers\.1 has its weight in common with layers\.0\. Give --sharding"):
        FullyShard.check_base(Model())
    Replicated.check_base(Model())


def test_averaging_engines_scale_the_loss_by_the_number_of_processes():
    """Their backward divides the sum over ranks by it."""
    config, model = OptimizerConfig(), torch.nn.Linear(2, 2)

    averaging = replace(ENGINES["ddp"], averages=True)

    assert Replicated(model, config, Ranks(0, 4, 0, 4)).loss_scale == 1
    assert Replicated(model, config, Ranks(0, 4, 0, 4), averaging).loss_scale == 4
