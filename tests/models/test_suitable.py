"""Where adapters go and what is quantised: layers whose forward pass counts, and the share that is printed."""

import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_checkpoints import LATENT, ROUTED, SIZES, TINY, train
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    LagunaConfig,
    LagunaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MixtralConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from adapters import BasePrecisionWarning
from launcher.config import AdapterConfig
from launcher.inference.export import export_lora
from launcher.methods import peft_config
from launcher.models.quantize import check_share, linear_layers
from launcher.models.suitable import is_plain, leave_out, raw_reads, read_by_parents, unsuitable


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a random model with the embedded tokenizer."""

    def save(model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
        model.save_pretrained(tmp_path / "model")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "model" / file).write_bytes((TINY / "model" / file).read_bytes())
        return tmp_path / "model"

    torch.manual_seed(0)
    return save


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize(("kind", "plain"), [(nn.Linear, True), (Spelled, True), (Doubled, False)])
def test_a_linear_layer_of_another_class_is_suitable_if_it_computes_the_same(kind, plain):
    assert is_plain(kind(7, 2)) is plain
    assert is_plain(kind(7, 2, bias=False)) is plain


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read, self.looked_at = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def _init_weights(self):
        self.called.weight.data.zero_()

    def forward(self, x):
        return self.looked_at(self.called(x).to(self.looked_at.weight.dtype)) @ self.read.weight


def test_weights_that_a_parent_reads_are_found_in_its_source():
    assert raw_reads(Parent) == {"read": "numbers", "looked_at": "dtype"}
    assert read_by_parents(nn.Sequential(Parent())) == {
        "0.read": ("Parent", "numbers"), "0.looked_at": ("Parent", "dtype")
    }  # fmt: skip


def test_a_layer_that_fused_kernels_read_carries_no_adapter(caplog):
    model = on_meta(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=356, state_size=4))

    assert set(leave_out(model, AdapterConfig(targets=("all-linear",)))) == {"dt_proj", "out_proj", "x_proj"}
    assert (
        "no adapter on dt_proj, out_proj, x_proj: MambaMixer multiplies by its weight without calling it" in caplog.text
    )
    with pytest.raises(ValueError, match=r"--targets out_proj: backbone.layers.0.mixer.out_proj cannot carry an adap"):
        leave_out(model, AdapterConfig(targets=("in_proj", "out_proj")))
    assert leave_out(model, AdapterConfig(targets=("in_proj",))) == []


def test_a_router_that_returns_a_tuple_carries_no_adapter():
    model = on_meta(Llama4TextConfig(**SIZES, head_dim=8, num_local_experts=2, intermediate_size_mlp=32))

    assert {name.rpartition(".")[2] for name in unsuitable(model)} == {"router"}
    assert isinstance(model, Llama4ForCausalLM)


def test_falcons_own_linear_class_is_quantised(saved, tmp_path, capsys):
    folder = saved(FalconForCausalLM(FalconConfig(vocab_size=356, hidden_size=32, num_hidden_layers=2,
                                                  num_attention_heads=4)))  # fmt: skip

    assert train(folder, tmp_path / "out", quantize="nf4", targets=("query_key_value",)) == 0

    share = re.search(r"(\d+)% of them stored in nf4", capsys.readouterr().out)
    assert share
    assert int(share[1]) > 50


def test_a_model_with_nothing_to_quantise_is_refused():
    model = on_meta(GPTNeoXConfig(**{name: value for name, value in SIZES.items() if "value" not in name}))
    for name in linear_layers(model):
        model.set_submodule(name, Doubled(2, 2))

    with pytest.raises(ValueError, match=r"--quantize nf4 finds no linear layer in a GPTNeoXForCausalLM"):
        check_share(model, "nf4")


def test_the_screen_tells_what_share_the_targets_reach(saved, tmp_path, capsys):
    folder = saved(AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=8)))

    assert train(folder, tmp_path / "out") == 0

    said = " ".join(capsys.readouterr().out.split())
    assert "adapters on 8 weights (q_proj 2, k_proj 2, v_proj 2, o_proj 2), " in said
    assert re.search(r"; the experts \(down_proj, gate_up_proj, \d+\.\d%\) stay as they are", said)


def test_dense_layers_beside_experts_export_as_lora(saved, tmp_path):
    """PEFT takes `gate_proj` in such a model for the fused experts, unless it is named as a parameter."""
    config = DeepseekV3Config(**SIZES | {"num_key_value_heads": 4}, **LATENT, **ROUTED, moe_intermediate_size=16)
    folder = saved(DeepseekV3ForCausalLM(config))
    assert train(folder, tmp_path / "out") == 0

    export_lora(str(tmp_path / "out"), out=str(tmp_path / "lora"))

    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "lora")
    adapted = {name.partition(".lora_A")[0] for name, _ in lora.named_modules() if ".lora_A.default" in name}
    assert "base_model.model.model.layers.0.mlp.gate_proj" in adapted
    assert not any("experts" in name and "shared" not in name for name in adapted)


def test_a_layer_whose_name_a_renaming_matches_again_exports_as_lora(saved, tmp_path):
    """transformers renames `shared_expert.` to `shared_experts.`; as a regular expression, it matches the new name."""
    config = LagunaConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                          shared_expert_intermediate_size=16, head_dim=8)  # fmt: skip
    folder = saved(LagunaForCausalLM(config))
    assert train(folder, tmp_path / "out", targets=("gate_proj",)) == 0

    export_lora(str(tmp_path / "out"), out=str(tmp_path / "lora"))

    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "lora")
    pairs = [p for name, p in lora.named_parameters() if "shared_experts.gate_proj.lora_B" in name]
    assert pairs
    assert all(pair.any() for pair in pairs)


@pytest.mark.parametrize("target", ["experts", "gate_up_proj", "w1", "model.layers.1.mlp.experts.down_proj"])
def test_targets_that_name_fused_experts_are_refused_with_a_remedy_that_works(target, saved, tmp_path, capsys):
    folder = saved(AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=8)))

    assert train(folder, tmp_path / "out", targets=("q_proj", target)) == 2

    said = capsys.readouterr().err
    parameters = '["mlp.experts.gate_up_proj","mlp.experts.down_proj"]'
    assert f"error: --targets {target} names experts, which a mixtral model holds in 3-dimensional parameters" in said
    assert f"--method lora --options 'target_parameters={parameters}'" in said
    assert not (tmp_path / "out").exists()

    remedy = peft_config(AdapterConfig(method="lora", rank=2, options=(f"target_parameters={parameters}",)))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), remedy)
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_an_adapter_beside_fused_experts_loads_on_its_base_without_a_warning_of_another(sharding, saved, tmp_path):
    """The files hold each expert by itself, so their fingerprint is not that of the model in memory."""
    folder = saved(AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=8)))
    assert train(folder, tmp_path / "out", sharding=sharding) == 0

    with warnings.catch_warnings():
        warnings.simplefilter("error", BasePrecisionWarning)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out" / "adapter")
