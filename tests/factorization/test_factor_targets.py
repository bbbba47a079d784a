"""Which weights are factored: the modules PEFT adapts, found without loading one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from adapters import LoLDUConfig, SVFitConfig
from adapters.factors import probe_digest
from launcher.factorization.make import factors_of
from launcher.factorization.targets import skeleton, targets_of

LU, SVD = LoLDUConfig().factorization(), SVFitConfig().factorization()


@pytest.fixture
def copy(babyllama, tmp_path) -> Path:
    return Path(shutil.copytree(babyllama, tmp_path / "copy"))


@pytest.fixture
def gpt2(tmp_path) -> Path:
    """Conv1D layers, and a tied head that the checkpoint does not hold."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32))
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        (["q_proj", "v_proj"], []),
        (["all-linear"], []),
        (["all-linear"], ["down_proj", "layers.1.self_attn.q_proj"]),
        (["model.layers.0.mlp.up_proj", "o_proj"], ["model.layers.3.self_attn.o_proj"]),
        (["lm_head"], []),
    ],
)
def test_the_modules_are_those_peft_adapts(babyllama, targets, exclude):
    wanted = "all-linear" if targets == ["all-linear"] else targets
    model = AutoModelForCausalLM.from_pretrained(babyllama)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=wanted, exclude_modules=exclude or None))

    requests = targets_of(babyllama, targets, exclude, 8, LU)

    assert sorted(request.module for request in requests) == sorted(peft.targeted_module_names)


def test_nothing_is_loaded_and_ranks_are_clamped(babyllama):
    model = skeleton(babyllama)

    requests = targets_of(babyllama, ["k_proj", "up_proj"], [], 100, SVD, model=model, dtype="bfloat16")

    assert all(parameter.is_meta for parameter in model.parameters())
    assert {(request.shape, request.rank) for request in requests} == {((64, 128), 64), ((352, 128), 100)}
    assert all(request.method is SVD and request.dtype == "bfloat16" for request in requests)


def test_conv1d_is_transposed_and_the_prefix_of_the_base_may_be_missing(gpt2):
    weights = {name.removeprefix("transformer."): w for name, w in load_file(gpt2 / "model.safetensors").items()}
    save_file(weights, gpt2 / "model.safetensors", {"format": "pt"})

    requests = targets_of(gpt2, ["c_attn"], [], 8, LU)

    assert [request.module for request in requests] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert [request.tensor.name for request in requests] == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"]
    assert requests[0].transposed
    assert requests[0].shape == (48, 16)


def test_a_tied_head_and_the_embedding_come_from_the_one_tensor_there_is(gpt2, tmp_path):
    head, embedding = targets_of(gpt2, ["lm_head"], [], 4, LU) + targets_of(gpt2, ["wte"], [], 4, LU)
    stored = load_file(gpt2 / "model.safetensors")["transformer.wte.weight"]

    factors = factors_of(head, tmp_path / "cache")

    assert head.tensor == embedding.tensor
    assert (head.embedding, embedding.embedding) == (False, True)
    assert torch.equal(factors.probe, probe_digest(stored, stored.shape))


def test_a_model_without_a_causal_head_is_built_by_its_architecture(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=40, **shape)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    requests = targets_of(tmp_path, ["query"], [], 4, LU)

    assert config["architectures"] == ["BertModel"]
    assert [request.tensor.name for request in requests] == ["encoder.layer.0.attention.self.query.weight"]


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        (
            ["q_prj"],
            [],
            r"--targets q_prj matches no module of this llama model; did you mean .*q_proj.*it has: .*down_proj.*; "
            r"give some of these, or --targets all-linear",
        ),
        (
            ["q_proj", "query_key_value"],
            [],
            r"--targets query_key_value matches no module of .*; it has: .*q_proj",
        ),
        (["q_proj"], ["layer.0"], r"--exclude layer.0 matches no module of this llama model; it has: .*v_proj$"),
        (["q_proj"], ["q_proj"], r"--targets q_proj with --exclude q_proj leaves no module"),
        (["mlp"], [], r"model.layers.0.mlp is a LlamaMLP, .* give linear layers in it: down_proj, gate_proj, up_proj"),
        (["norm"], [], r"model.norm is a LlamaRMSNorm"),
    ],
)
def test_an_error_about_targets_lists_the_available_modules(babyllama, targets, exclude, message):
    with pytest.raises(ValueError, match=message):
        targets_of(babyllama, targets, exclude, 4, LU)


def test_missing_default_targets_are_an_error_that_lists_the_modules_of_the_architecture(gpt2):
    said = "--targets q_proj v_proj match no module of this gpt2 model; .*it has: c_attn, c_fc, c_proj, .*all-linear"

    with pytest.raises(ValueError, match=said):
        targets_of(gpt2, ("q_proj", "v_proj"), [], 4, LU)


def test_a_folder_without_a_configuration_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json: give the folder of a Hugging Face model"):
        targets_of(tmp_path, ["q_proj"], [], 4, LU)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-model"}', "{}"])
def test_a_configuration_that_is_none_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ValueError, match=str(tmp_path)):
        targets_of(tmp_path, ["q_proj"], [], 4, LU)


def test_a_quantised_a_missing_and_a_misshapen_tensor_are_named(copy):
    file, name = copy / "model.safetensors", "model.layers.2.self_attn.q_proj.weight"
    whole = load_file(file)
    cases = {
        "stored as U8 in .*full-precision checkpoint": whole | {name: whole[name].to(torch.uint8)},
        "has no tensor for model.layers.2.self_attn.q_proj.weight": {k: v for k, v in whole.items() if k != name},
        r"is \(128, 128\) by .*config.json but \(4, 128\) in": whole | {name: whole[name][:4].clone()},
    }

    for message, weights in cases.items():
        save_file(weights, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            targets_of(copy, ["q_proj"], [], 4, LU)
