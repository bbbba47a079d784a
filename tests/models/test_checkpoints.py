"""The model that is trained is the checkpoint's: nothing starts random, and every way of loading reads the same."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    YoutuConfig,
    YoutuForCausalLM,
)

from adapters.checkpoint_files import list_tensors, open_tensor, read_tensor
from adapters.checkpoint_names import model_tensors, skeleton_of
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.engines.fsdp2 import Rows, open_alone, shard, shard_mesh
from launcher.inference.load import load_model
from launcher.inference.sources import Source
from launcher.models.build import build, settle_base
from launcher.models.files import check_ids
from launcher.models.fill import fill
from launcher.models.skeleton import prepare_base, skeleton
from launcher.processes import Ranks
from launcher.training.run import run

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
DATA = str(TINY / "instructions" / "train.json")
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copy(tmp_path) -> Path:
    """The embedded model, to be damaged."""
    return Path(shutil.copytree(TINY / "model", tmp_path / "model"))


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})


def train(folder, out, *, sharding="none", quantize="none", targets=("all-linear",), data=None):
    return run(
        Config(
            model=ModelConfig(model=str(folder), dtype="float32", quantize=quantize),
            data=data or DataConfig(data=DATA, prompt_template="short", max_length=96),
            adapter=AdapterConfig(rank=4, targets=targets),
            optimizer=OptimizerConfig(batch_size=2, max_steps=1),
            run=RunConfig(output=str(out), cache=str(out.parent / "cache"), sharding=sharding, report=False),
        ),
        "test",
    )


def headless(folder):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(folder)


DAMAGES = {
    "wrapped": (
        lambda folder: rewrite(folder, lambda tensors: {f"module.{name}": t for name, t in tensors.items()}),
        r"lacks 39 of the 39 weights .*named module.lm_head.weight.*wrapper added 'module.'",
    ),
    "headless": (
        headless,
        r"lacks 1 of the 39 weights of a LlamaForCausalLM \(lm_head.weight\): .*no language modelling head",
    ),
    "one missing": (
        lambda folder: rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != UP}),
        rf"lacks 1 of the 39 weights of a LlamaForCausalLM \({UP}\), which would be initialised at random",
    ),
    "one renamed": (
        lambda folder: rewrite(folder, lambda tensors: {n.replace(UP, "other"): t for n, t in tensors.items()}),
        r"the checkpoint has other, ..., which this model does not use",
    ),
    "another width": (
        lambda folder: rewrite(folder, lambda tensors: tensors | {UP: torch.zeros(8, 128)}),
        rf"has {UP} with shape \(8, 128\), but its config.json describes \(352, 128\)",
    ),
    "tied and apart": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True})
        ),
        r"ties lm_head.weight to model.embed_tokens.weight .* two different tensors: set tie_word_embeddings to false",
    ),
}


@pytest.mark.parametrize(("sharding", "quantize"), [("none", "none"), ("fsdp2", "none"), ("none", "nf4")])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_the_whole_model_is_refused_before_factors_are_made(
    copy, tmp_path, damage, sharding, quantize, capsys
):
    spoil, message = DAMAGES[damage]
    spoil(copy)

    assert train(copy, tmp_path / "out", sharding=sharding, quantize=quantize) == 2

    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_ends_that_are_tied_and_stored_twice_alike_are_one(copy):
    rewrite(copy, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    model = everywhere(copy)["plain"]

    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


SIZES = {"vocab_size": 356, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "deepseek": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **LATENT, **ROUTED, moe_intermediate_size=16)),
    "pythia": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{n: v for n, v in SIZES.items() if "value" not in n})),
}


@pytest.fixture
def folder(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for _, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.ndim == 1 and len(buffer) == 4:
            buffer.data.normal_()  # the routers' score corrections, which start at zero
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def everywhere(folder, dtype="float32"):
    """The base loaded in each of the ways that a run loads it."""
    config, device = ModelConfig(model=str(folder)), torch.device("cpu")
    how = {"dtype": dtype, "attention": "eager"}
    plain = build(config, folder, None, factors=lambda name: None, device=device, **how)
    sharded = skeleton(config, folder, None, **how)
    open_alone(device)
    shard(sharded, shard_mesh(Ranks(0, 1, 0, 1), device, 1))
    fill(sharded, folder, lambda *_: None, Rows(), device)
    quantised = build(replace(config, quantize="int8"), folder, None, factors=lambda n: None, device=device, **how)
    return {"plain": plain, "fsdp2": sharded, "int8": quantised}


@pytest.mark.parametrize("folder", MODELS, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharded_and_quantised_loading_give_the_numbers_of_transformers(folder, dtype):
    """Fused experts, the routers' saved corrections, what stays in float32, and a head under another name."""
    models = everywhere(folder, dtype)

    wanted = {name: value.detach() for name, value in models["plain"].state_dict().items()}

    for way, model in models.items():
        packed = {f"{name}.weight" for name, layer in model.named_modules() if hasattr(layer, "pack")}
        found = model.state_dict()
        for name, value in wanted.items():
            if name not in packed:
                mine = getattr(found[name], "full_tensor", lambda name=name, found=found: found[name])()
                assert mine.dtype == value.dtype, (way, name)
                assert torch.equal(mine, value), (way, name)


@pytest.mark.parametrize("folder", ["mixtral"], indirect=True)
def test_only_the_experts_that_are_asked_for_are_read(folder, monkeypatch):
    opened = []
    tensors = model_tensors(skeleton_of(folder), list_tensors(folder))
    experts = open_tensor(tensors["model.layers.0.mlp.experts.gate_up_proj"])
    read = read_tensor
    monkeypatch.setattr("adapters.checkpoint_names.read_tensor", lambda info: opened.append(info.name) or read(info))

    second = experts[1:2]

    assert all("experts.1." in name for name in opened)
    assert len(opened) == 2
    assert torch.equal(second, experts[:][1:2])


def test_the_attention_that_a_model_lacks_is_found_before_anything_is_made(tmp_path):
    from transformers import GPTJConfig, GPTJForCausalLM

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "vocab_size": 356, "n_positions": 64}
    GPTJForCausalLM(GPTJConfig(**sizes)).save_pretrained(tmp_path)
    how = {"dtype": "float32", "attention": "sdpa"}

    found = settle_base(ModelConfig(model=str(tmp_path)), tmp_path, reason="flash-attn is not installed", **how)

    assert found[1:] == ("eager", "this model has no sdpa")
    with pytest.raises(ValueError, match=r"--attention sdpa: .* has no sdpa attention .*: give --attention auto"):
        settle_base(ModelConfig(model=str(tmp_path), attention="sdpa"), tmp_path, reason="as asked", **how)


class Words:
    """A tokenizer, as far as `check_ids` asks."""

    def __init__(self, pad):
        self.pad_token_id = pad

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


def test_tokens_beyond_the_embedding_are_refused_by_name_and_padding_there_is_replaced():
    with pytest.raises(
        ValueError, match=r"produces token 400 \('<400>'\), but the embedding of the model has 356 rows"
    ):
        check_ids(Words(2), 400, 356)
    with pytest.raises(ValueError, match=r"produces token 356"):
        check_ids(Words(356), 10, 356, labels=True)

    padded = Words(356)
    check_ids(padded, 355, 356)

    assert padded.pad_token_id == 0


def test_a_package_that_a_type_of_model_needs_is_named(monkeypatch, tmp_path):
    """As timm for the vision tower of Gemma 3n: config.json is not the fault."""

    class NeedsTimm:
        @staticmethod
        def from_config(*_, **__):
            raise ImportError(
                "\nTimmWrapperModel requires the timm library. Install it: `pip install timm`. Please restart"
            )

    MixtralConfig(**SIZES, num_local_experts=2).save_pretrained(tmp_path)
    monkeypatch.setattr("launcher.models.skeleton.language_model_class", lambda settings: NeedsTimm)

    with pytest.raises(ValueError, match=r"needs a package that is not installed: pip install timm$"):
        skeleton(ModelConfig(model=str(tmp_path)), tmp_path, None, dtype="float32", attention="sdpa")


def test_what_transformers_cannot_checkpoint_is_refused_with_the_remedy():
    model = AutoModel.from_config(MixtralConfig(**SIZES, num_local_experts=2))
    model.supports_gradient_checkpointing = False

    with pytest.raises(ValueError, match=r"--gradient-checkpointing: .* does not support it for a MixtralModel: leave"):
        prepare_base(model, ModelConfig(gradient_checkpointing=True), TINY)


def test_the_row_of_the_padding_token_is_that_of_the_checkpoint(tmp_path):
    """transformers sets Youtu's to zero after loading, so one process trained another model than a sharded one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = YoutuForCausalLM(
        YoutuConfig(**sizes, **latent, vocab_size=64, num_key_value_heads=4, head_dim=8, pad_token_id=2)
    )
    model.model.embed_tokens.weight.data.normal_()
    model.save_pretrained(tmp_path)
    how = {"dtype": "float32", "attention": "sdpa", "device": torch.device("cpu"), "factors": lambda name: None}

    trained = build(ModelConfig(model=str(tmp_path)), tmp_path, None, **how)
    served = load_model(Source(base=tmp_path, base_name="", tokenizer=tmp_path))

    for loaded in (trained, served):
        assert torch.equal(loaded.get_input_embeddings().weight, model.model.embed_tokens.weight)
