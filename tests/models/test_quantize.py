"""8- and 4-bit bases: the bytes are bitsandbytes' own, training leaves them alone, adapters fit every precision."""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.modules import has_avx512bf16
from launching import REPO, Runs
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from adapters import BasePrecisionWarning, LoLDUConfig, LoLDUXSConfig, LoRAXSConfig, SVFitConfig, SVFTConfig
from adapters.layer import FactorLayer
from launcher.config import Config, ModelConfig
from launcher.engines.fsdp2 import Rows, shard, shard_mesh
from launcher.inference.export import export_lora
from launcher.inference.merge import merge
from launcher.models import layers
from launcher.models.build import build
from launcher.models.fill import fill
from launcher.models.quantize import Quantised, base_size, bytes_per_number, check_base, check_quantize, keep_packing
from launcher.models.skeleton import skeleton
from launcher.processes import Ranks, open_alone
from launcher.training.resolve import resolve
from launcher.training.run import run

KINDS = ["int8", "nf4", "fp4"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CURVE = 5e-6  # float32: the same sums in another order (measured 1e-6)


def quantised(folder, kind, adapter=None, dtype="float32", device="cpu"):
    """The base as a run loads it; new adapters make their factors from its checkpoint."""
    config = ModelConfig(model=str(folder), quantize=kind)
    how = {"dtype": dtype, "attention": "sdpa", "factors": lambda module: None, "device": torch.device(device)}
    return build(config, Path(folder), adapter, **how)


def test_an_8_bit_layer_does_not_warn_of_each_forward_pass(stories, caplog):
    base = quantised(stories, "int8", dtype="bfloat16")

    base(input_ids=torch.tensor([[1, 2, 3]]))

    assert "cast" not in caplog.text
    logger = layers.logging.getLogger("bitsandbytes.autograd._functions")
    other = logger.makeRecord(logger.name, layers.logging.WARNING, "", 0, "something else", (), None)
    assert logger.filter(other)


def by_transformers(folder, kind, dtype=torch.float32, device="cpu"):
    """The same base through transformers' own loading."""
    four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True}
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **four)
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device, dtype=dtype)
    keep_packing(model)
    return model


def packed_bytes(model):
    """A hash per quantised weight."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    found = {name: layer.weight.data for name, layer in model.named_modules() if isinstance(layer, kinds)}
    return {name: digest(weight) for name, weight in found.items()}


def digest(weight):
    return hashlib.sha256(weight.detach().clone().cpu().numpy().tobytes()).hexdigest()  # numpy pins what it sees


def tokens(vocabulary=361, length=24, device="cpu"):
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def logits(model, vocabulary=361):
    return model.eval()(tokens(vocabulary, device=model.device)).logits.float()


@torch.no_grad()
def logits_of_training(model):
    """For 8 bits on a CPU, where bitsandbytes' own layer chooses outliers in evaluation alone."""
    for layer in model.modules():
        layer.training = isinstance(layer, bnb.nn.Linear8bitLt)
    return model(tokens(device=model.device)).logits.float()


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2, whose layers are transposed and have biases."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=361, n_positions=64, initializer_range=0.2)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(stories, alpaca_file, tmp_path_factory):
    """Eight steps on stories260K in every precision, rank 15."""
    runs = Runs(tmp_path_factory.mktemp("runs"), stories, alpaca_file)
    for kind in ("none", *KINDS):
        runs.alone(kind, change=precision(kind))
    return runs


def precision(kind, dtype="float32"):
    return lambda config: replace(config, model=replace(config.model, quantize=kind, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1 << 19, 64 * 64])
@pytest.mark.parametrize("device", DEVICES)
def test_the_bytes_are_those_of_transformers_own_loading(babyllama, kind, dtype, piece, device, monkeypatch):
    """Also when a weight is quantised in several pieces; and nothing else of the model differs.

    int8 is made from the file's own numbers, where transformers rounds them to the compute dtype first.
    """
    monkeypatch.setattr(layers, "PIECE", piece)

    ours = quantised(babyllama, kind, dtype=str(dtype).removeprefix("torch."), device=device)

    theirs = by_transformers(babyllama, kind, torch.float32 if kind == "int8" else dtype, device)
    assert packed_bytes(ours) == packed_bytes(theirs)
    assert len(packed_bytes(ours)) == 35
    if kind != "int8":
        assert torch.equal(logits(ours), logits(theirs))
    elif dtype == torch.float32:
        assert torch.equal(logits(ours), logits_of_training(theirs))


def test_a_checkpoint_in_several_files_gives_the_same_bytes(babyllama, tmp_path):
    AutoModelForCausalLM.from_pretrained(babyllama).save_pretrained(tmp_path, max_shard_size="1MB")

    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert packed_bytes(quantised(tmp_path, "nf4")) == packed_bytes(quantised(babyllama, "nf4"))


@pytest.mark.parametrize("kind", KINDS)
def test_transposed_layers_with_biases_are_quantised_as_transformers_does(gpt2, kind):
    ours, theirs = quantised(gpt2, kind), by_transformers(gpt2, kind)

    assert packed_bytes(ours) == packed_bytes(theirs)
    assert packed_bytes(ours)
    assert torch.equal(logits(ours), logits_of_training(theirs) if kind == "int8" else logits(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_norms_and_head_keep_the_compute_dtype(babyllama, kind):
    model = quantised(babyllama, kind, dtype="bfloat16")

    whole = {name: p.dtype for name, p in model.named_parameters() if not name.endswith("proj.weight")}
    assert set(whole.values()) == {torch.bfloat16}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(whole)
    assert sum(isinstance(module, Quantised) for module in model.modules()) == 35


def test_modules_that_are_trained_whole_keep_their_precision(babyllama):
    adapter = LoLDUConfig(r=4, target_modules=["q_proj"], modules_to_save=["o_proj"], task_type="CAUSAL_LM")

    model = quantised(babyllama, "nf4", adapter)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in trained if "o_proj" in name} == {"o_proj"}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert not any("o_proj" in name for name in packed_bytes(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_training_and_evaluation_leave_the_base_alone_and_move_only_float32_cores(babyllama, kind, device):
    """An evaluation comes first: that is where bitsandbytes would pack a 4-bit weight anew on an AVX512-BF16 CPU."""
    adapter = LoLDUConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = quantised(babyllama, kind, adapter, dtype="bfloat16", device=device)
    before, first = packed_bytes(model), logits(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)

    for _ in range(3):
        model.train()
        model(tokens(device=device), labels=tokens(device=device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logits(model)

    assert packed_bytes(model) == before
    assert all(name.endswith(".core") and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.abs().sum() > 0 for p in trained.values())
    assert not torch.equal(logits(model), first)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs 4-bit weights anew only on AVX512-BF16 CPUs")
def test_without_the_guard_an_evaluation_changes_the_bytes(babyllama):
    """So the guard is needed, and the test above can fail. (Rows of 352 numbers, as in down_proj, would crash.)"""
    model = quantised(babyllama, "nf4", dtype="bfloat16")
    before = packed_bytes(model)

    for layer in model.modules():
        if isinstance(layer, layers.FourBit) and layer.in_features % 64 == 0:
            layer.support_avx512bf16_for_cpu = True
    logits(model)

    assert packed_bytes(model) != before


@pytest.mark.parametrize("device", DEVICES)
def test_the_bytes_that_fully_shard_gathers_are_those_that_were_packed(babyllama, device):
    """In every forward pass, even after a step. Seen as bfloat16, some of these bytes are NaN: a float format's copies
    may change those (bitsandbytes#1945, on CUDA)."""
    adapter = LoLDUConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    whole = quantised(babyllama, "nf4", adapter, dtype="bfloat16", device=device)
    config, how = ModelConfig(model=str(babyllama), quantize="nf4"), {"dtype": "bfloat16", "attention": "sdpa"}
    place = torch.device(device)
    maps = {layer.name: layer.maps["default"].factors for layer in whole.modules() if isinstance(layer, FactorLayer)}

    open_alone(place)
    try:
        model = skeleton(config, babyllama, adapter, **how)
        shard(model, shard_mesh(Ranks(), place, 1))
        fill(model, babyllama, lambda name, rows: maps[name], Rows(), place)
        packed = [layer for layer in model.modules() if isinstance(layer, layers.FourBit)]
        gathered = {layer: [] for layer in packed}
        for layer in packed:
            layer.register_forward_pre_hook(lambda layer, _: gathered[layer].append(digest(layer.weight)))
        for _ in range(2):
            logits(model)
            model.train()
            model(tokens(device=device), labels=tokens(device=device)).loss.backward()
    finally:
        torch.distributed.destroy_process_group()

    packed = [layer.weight for layer in whole.modules() if isinstance(layer, layers.FourBit)]
    assert [set(found) for found in gathered.values()] == [{digest(weight)} for weight in packed]
    assert {len(found) for found in gathered.values()} == {4}
    assert sum(int(weight.data.flatten().view(torch.bfloat16).isnan().sum()) for weight in packed) > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_what_was_predicted(babyllama, kind, dtype, device):
    """Parameters and scales of every layer; the two small tables of a 4-bit format are left out (1.1 KB a layer)."""
    model = quantised(babyllama, kind, dtype=dtype, device=device)

    for layer in (module for module in model.modules() if isinstance(module, Quantised)):
        held = layer.weight.numel() * layer.weight.element_size()
        state = layer.state if kind == "int8" else layer.quant_state
        scales = [state.SCB] if kind == "int8" else [state.absmax, state.state2.absmax]
        held += sum(scale.numel() * scale.element_size() for scale in scales)
        numbers = layer.in_features * layer.out_features
        predicted = bytes_per_number(kind, getattr(torch, dtype), layer.in_features) * numbers
        assert held == pytest.approx(predicted, abs=8)  # the last block of scales may be cut
    plain = AutoModelForCausalLM.from_pretrained(babyllama)
    assert base_size(model) == base_size(plain) == 969_216


@pytest.mark.slow  # 8 s: bitsandbytes compiles something for such shapes
def test_a_layer_with_an_odd_count_of_numbers_is_quantised_too(tmp_path):
    """27 x 9 numbers: the last byte of a 4-bit weight is half empty, the last block of scales cut."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=9, n_layer=1, n_head=3, n_inner=5, vocab_size=361, n_positions=32, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)

    ours, theirs = quantised(tmp_path, "nf4"), by_transformers(tmp_path, "nf4")

    assert packed_bytes(ours) == packed_bytes(theirs)
    assert len(packed_bytes(ours)) == 4
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_of_a_quantised_run_follows_from_the_full_precision_checkpoint(runs, kind):
    """Pivots, factors' values and probes of a run on the full-precision base; no factor is made twice."""
    ours, plain = runs.adapter(kind), runs.adapter("none")

    for name, value in plain.items():
        assert torch.equal(ours[name], value) != name.endswith(".core"), name
    configs = [json.loads((runs.folder / k / "adapter" / "adapter_config.json").read_text()) for k in (kind, "none")]
    assert configs[0]["base_fingerprint"] == configs[1]["base_fingerprint"]
    assert len(list((runs.folder / "cache" / "factors").rglob("*.safetensors"))) == 35


def test_the_adapter_of_an_nf4_run_loads_on_the_full_precision_base_and_on_nf4(runs, stories):
    folder = runs.folder / "nf4" / "adapter"

    with warnings.catch_warnings():
        warnings.simplefilter("error", BasePrecisionWarning)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), folder)
    four = PeftModel.from_pretrained(by_transformers(stories, "nf4"), folder)

    for model in (plain, four):
        on = logits(model, 512)
        with model.disable_adapter():
            assert distance(on, logits(model, 512)) > 1e-3
    for (name, a), (_, b) in zip(plain.named_parameters(), four.named_parameters(), strict=True):
        if "loldu_map" in name:
            assert torch.equal(a, b), name


def test_losses_on_a_quantised_base_stay_near_those_of_the_full_precision_base(runs):
    """Measured 0.015, 0.42 and 0.72, of about 30 answer tokens a step. Zero would mean that nothing was quantised."""
    for kind, far in (("int8", 0.1), ("nf4", 0.8), ("fp4", 1.0)):
        moved = max(abs(a - b) for a, b in zip(runs.losses(kind), runs.losses("none"), strict=True))
        assert 1e-4 < moved < far


@pytest.mark.parametrize(("kind", "far"), [("int8", 0.0), ("nf4", 0.01), ("fp4", 0.01)])
def test_a_quantised_run_merges_and_exports_onto_the_full_precision_base(runs, kind, far, tmp_path, capsys):
    """Both commands check their result against base and adapter themselves: merge within rounding, LoRA to 1e-4."""
    merge(str(runs.folder / kind), out=str(tmp_path / "merged"))
    export_lora(str(runs.folder / kind), out=str(tmp_path / "lora"))

    said = capsys.readouterr().err
    assert "checked: logits differ from base and adapter by" in said
    (gap,) = re.findall(
        r"stock PEFT reads it back on .*, largest difference between logits (\S+), allowed 0.0001", said
    )
    assert float(gap) < 1e-4
    others = re.findall(rf"with the {kind} base of the training, the logits differ from these by (\S+) ", said)
    assert len(others) == 2
    assert all(far < float(gap) < 0.5 for gap in others)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("method", [SVFitConfig, SVFTConfig, LoRAXSConfig, LoLDUXSConfig])
def test_every_method_of_the_family_trains_on_a_quantised_base(babyllama, method, kind):
    """It starts as the base, its factors are those of the full-precision weight, and only its cores move."""
    adapter = method(r=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    base = logits(quantised(babyllama, kind))

    model = quantised(babyllama, kind, adapter)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), adapter)

    layers = [[layer for layer in each.modules() if isinstance(layer, FactorLayer)] for each in (model, plain)]
    for ours, theirs in zip(*layers, strict=True):
        assert torch.equal(ours.maps["default"].write, theirs.maps["default"].write)
        assert torch.equal(ours.maps["default"].values, theirs.maps["default"].values)
    assert torch.equal(logits(model), base)
    before = packed_bytes(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert packed_bytes(model) == before
    assert all(p.abs().sum() > 0 and p.dtype == torch.float32 for p in trained)
    assert not torch.equal(logits(model), base)


def test_an_svfit_run_on_nf4_is_merged_and_exported(runs, tmp_path, capsys):
    change = {"method": "svfit", "rank": 8, "targets": ("q_proj", "v_proj")}
    runs.alone("svfit", change=lambda c: replace(precision("nf4")(c), adapter=replace(c.adapter, **change)))

    merge(str(runs.folder / "svfit"), out=str(tmp_path / "merged"), quantize="nf4")
    export_lora(str(runs.folder / "svfit"), out=str(tmp_path / "lora"))

    said = capsys.readouterr().err
    assert "held-out records: " in said
    assert "largest difference between logits" in said


def test_going_on_in_another_precision_is_refused(runs, capsys):
    config = runs.config("nf4", change=precision("none"))

    assert run(config, "test") == 2

    assert 'quantize was "nf4", now "none"' in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "lorasb"])
def test_other_methods_train_on_a_quantised_base(runs, method):
    """LoRA on NF4 (QLoRA), which starts as the base; LoRA-SB, whose gradients come from the quantised base and which
    starts a step further."""
    other = {"method": method, "rank": 4}

    runs.alone(method, change=lambda c: replace(precision("nf4")(c), adapter=replace(c.adapter, **other)))

    losses, ours = runs.losses(method), runs.losses("nf4")
    assert (losses[0] == pytest.approx(ours[0], abs=1e-6)) == (method == "lora")
    assert losses[-1] != ours[-1]
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "needs bitsandbytes, which is not installed: pip install 'bitsandbytes>=0.50'"),
        ("0.46.1", r"needs bitsandbytes 0.50 or newer, this is 0.46.1: pip install -U bitsandbytes"),
    ],
)
def test_a_missing_or_old_bitsandbytes_is_named(found, message, monkeypatch):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)

    with pytest.raises(ValueError, match=message):
        check_quantize("nf4")


@pytest.mark.parametrize(
    ("kind", "sharding", "offload", "message"),
    [
        ("nf4", "zero3", False, "--quantize nf4 is not supported under --sharding zero3.*--sharding fsdp2"),
        ("int8", "zero3", False, "--quantize int8 is not supported under --sharding zero3.*--sharding fsdp2"),
        ("nf4", "fsdp2", True, "--cpu-offload moves weights.*leave one of the two out"),
    ],
)
def test_an_engine_refuses_unsupported_settings_before_anything_is_loaded(kind, sharding, offload, message):
    config = Config(model=ModelConfig(model="/nowhere", quantize=kind))
    config = replace(config, run=replace(config.run, sharding=sharding, cpu_offload=offload))

    with pytest.raises(ValueError, match=message):
        resolve(config, Ranks())


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_checkpoint_that_is_quantised_already_is_refused(runs, stories, kind, tmp_path, capsys):
    """Also as it is, where transformers would load it and bitsandbytes pack it anew (see above)."""
    shutil.copytree(stories, tmp_path / "base")
    settings = json.loads((stories / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}})
    )
    config = runs.config(
        "twice", change=lambda c: replace(c, model=ModelConfig(model=str(tmp_path / "base"), quantize=kind))
    )

    assert run(config, "test") == 2

    assert "is quantised already (gptq, by its config.json)" in capsys.readouterr().err
    assert not (runs.folder / "twice").exists()


def test_a_tensor_in_a_format_that_bitsandbytes_cannot_read_is_named(stories, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(stories, tmp_path / "base")
    tensors = load_file(stories / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "base" / "model.safetensors")

    with pytest.raises(ValueError, match=r"up_proj.weight in .* is stored as F8_E4M3; bitsandbytes quantises F64"):
        check_base(tmp_path / "base", "nf4")


SHARDED = ["int8-ddp", "int8-fsdp2", "int8-zero2", "int8-hsdp", "nf4-ddp", "nf4-fsdp2", "nf4-zero2", "nf4-hsdp"]
SHARDED += ["fp4-ddp", "fp4-fsdp2"]
IN_BFLOAT16 = ["int8-bf16-fsdp2", "nf4-bf16-fsdp2"]


@pytest.fixture(scope="module")
def many(stories, alpaca_file, tmp_path_factory):
    """Four steps on one process and on several."""
    if 0 < torch.cuda.device_count() < 4:
        pytest.skip("four processes need four GPUs, or none at all")
    many = Runs(tmp_path_factory.mktemp("many"), stories, alpaca_file)
    many.base = replace(many.base, optimizer=replace(many.base.optimizer, max_steps=4))
    many.base = replace(many.base, run=replace(many.base.run, save_every=0))
    for kind in KINDS:
        many.alone(kind, change=precision(kind))
    two = [name.split("-") for name in [*SHARDED, *IN_BFLOAT16, "int8-bf16-ddp", "nf4-bf16-ddp"] if "hsdp" not in name]
    dtypes = {2: "float32", 3: "bfloat16"}  # by the parts of a name
    many.start(2, *(many.entry("-".join(n), n[-1], change=precision(n[0], dtypes[len(n)])) for n in two))
    many.start(4, *(many.entry(f"{k}-hsdp", "hsdp", shard_size=2, change=precision(k)) for k in ("int8", "nf4")))
    return many


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHARDED, *IN_BFLOAT16])
def test_several_processes_give_the_curve_of_one(many, name):
    """Evaluations too. In bfloat16 sharded against replicated: one process has other batch shapes, rounded elsewhere
    (0.004 apart)."""
    one = name.replace("fsdp2", "ddp") if "bf16" in name else name.partition("-")[0]

    torch.testing.assert_close(many.losses(name), many.losses(one), atol=CURVE, rtol=0)
    mine, theirs = ([e["eval_loss"] for e in many.events(run) if "eval_loss" in e] for run in (name, one))
    torch.testing.assert_close(mine, theirs, atol=CURVE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "per_number"), [("int8", 1.0), ("nf4", 0.52), ("fp4", 0.52)])
def test_loading_needs_little_more_memory_than_the_quantised_model(tmp_path, stories, kind, per_number):
    """67 million numbers (134 MB in bf16): the packed model, its embeddings and at most one full weight (34 MB).

    The C library is told to hand freed blocks back, else it keeps some of them (27 to 42 MB here) for later use.
    """
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, "vocab_size": 512}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    numbers = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    rest = 2 * sum(p.numel() for name, p in model.named_parameters() if "proj" not in name)

    script = Path(__file__).with_name("load_quantised.py")
    command = [sys.executable, str(script), str(tmp_path), kind, str(stories)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment)

    assert done.returncode == 0, done.stderr[-3000:]
    peak = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    assert peak < per_number * numbers + rest + 34e6
