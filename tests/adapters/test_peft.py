"""LoLDU as a PEFT method: saving, loading on the same, a rounded and another base, and what refuses to be adapted."""

import copy
import json
import logging
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny_models import adapted, layers, lm_config, logits, randomise, tiny_llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters import BasePrecisionWarning, LoLDUConfig, SVFitConfig, SVFTConfig, factors_from

not_lorasb = pytest.mark.not_lorasb


@pytest.fixture
def base(tmp_path):
    """A tiny Llama's folder on disk."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Saving and loading


NEW_PROCESS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import adapters
base, adapter, out = sys.argv[1:]
torch.set_num_threads(1)
tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3))
seen = []
for low in (False, True):
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=low).eval()
    with torch.no_grad():
        seen.append(model(tokens).logits)
torch.save(seen, out)
"""


@pytest.mark.parametrize("method", ["loldu", "svfit", "lorasb"], indirect=True)
def test_a_new_process_gives_the_same_logits_bit_for_bit(method, base, tmp_path):
    model = adapted(opened(base))
    saved(model, tmp_path / "adapter")

    command = [sys.executable, "-c", NEW_PROCESS, base, tmp_path / "adapter", tmp_path / "logits"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)

    for seen in torch.load(tmp_path / "logits", weights_only=True):
        assert torch.equal(seen, logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_way_of_loading_gives_the_same_bits_and_no_warning(method, base, tmp_path, low_cpu_mem_usage):
    model = adapted(opened(base))
    folder = saved(model, tmp_path / "adapter")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        through_peft = PeftModel.from_pretrained(opened(base), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        through_transformers = opened(base)
        report = through_transformers.load_adapter(str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
        both_in_one = opened(folder)
        auto = AutoPeftModelForCausalLM.from_pretrained(folder)

    assert not report.missing_keys
    assert not report.unexpected_keys
    for loaded in (through_peft, through_transformers, both_in_one, auto):
        assert torch.equal(logits(loaded.eval()), logits(model))
        assert {m.maps[n].core.dtype for m in layers(loaded) for n in m.maps} == {torch.float32}
        assert not [n for n, p in loaded.named_parameters() if p.requires_grad]


def test_nothing_is_said_on_the_screen_while_transformers_loads_an_adapter(method, base, tmp_path, capfd):
    """Its report of missing or newly initialised keys would alarm users; our maps are made from the base, not
    missing."""
    folder = saved(adapted(opened(base)), tmp_path / "adapter")
    model = opened(base)
    capfd.readouterr()

    model.load_adapter(str(folder))

    out, err = capfd.readouterr()
    assert not [line for line in (out + err).splitlines() if line.strip() and "Loading weights" not in line]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_half_precision_base_keeps_float32_cores(method, base, tmp_path, dtype, low_cpu_mem_usage):
    model = adapted(opened(base, dtype=dtype))
    folder = saved(model, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(opened(base, dtype=dtype), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()

    for mine, theirs in zip(layers(model), layers(loaded), strict=True):
        assert theirs.maps["default"].core.dtype == torch.float32
        assert torch.equal(mine.maps["default"].core, theirs.maps["default"].core)
    assert torch.equal(logits(loaded), logits(model))


def test_training_continues_from_a_loaded_adapter(method, base, tmp_path):
    model = adapted(opened(base))
    folder = saved(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(opened(base), folder, is_trainable=True)

    for m in (model, loaded):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        m(tokens(), labels=tokens()).loss.backward()
        optimizer.step()

    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_the_state_dict_goes_through_pefts_own_functions(method, base):
    model = adapted(opened(base))
    other = get_peft_model(opened(base), lm_config())

    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))

    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "loldu" in key]
    assert torch.equal(logits(other.eval()), logits(model))


def test_the_file_holds_core_pivots_values_and_probe_alone(base, tmp_path):
    model = adapted(opened(base), r=5)
    folder = saved(model, tmp_path / "adapter")

    tensors = load_file(folder / "adapter_model.safetensors")
    config = PeftConfig.from_pretrained(folder)

    assert isinstance(config, LoLDUConfig)
    assert config.peft_type == "LOLDU"
    assert len(config.base_fingerprint) == 64
    assert len(tensors) == 4 * 14
    q = {n.rpartition(".")[2]: t for n, t in tensors.items() if "layers.0.self_attn.q_proj" in n}
    W = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj").base.weight
    P, _, U = torch.linalg.lu(W.double())
    assert q["pivots"].tolist() == P.argmax(dim=0)[:5].tolist()
    torch.testing.assert_close(q["values"], U.diagonal()[:5].float(), rtol=1e-5, atol=0)  # float32 elimination
    assert (q["core"].dtype, q["pivots"].dtype, q["probe"].dtype) == (torch.float32, torch.int32, torch.uint8)


@pytest.mark.parametrize(
    ("r", "targets", "limit"), [(64, "all-linear", 2_000_000), (1024, ["q_proj", "v_proj"], 2_000_000)]
)
def test_a_7b_adapter_is_under_2_megabytes(tmp_path, r, targets, limit):
    """Llama-2-7B's shapes, on meta: no weight is made, the factors' shapes decide the file."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    with torch.device("meta"):
        model = tiny_llama(**sizes, num_attention_heads=32, num_key_value_heads=32)
        model = get_peft_model(model, lm_config(r=r, target_modules=targets))

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({n: torch.zeros(t.shape, dtype=t.dtype) for n, t in state.items()}, tmp_path / "adapter.safetensors")

    assert len(state) == 4 * 32 * (7 if targets == "all-linear" else 2)
    assert (tmp_path / "adapter.safetensors").stat().st_size < limit


def test_saving_never_asks_the_network(base, tmp_path, monkeypatch):
    model = adapted(opened(base))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    asked = []

    def refuse(*where):
        asked.append(where)  # raising alone is not enough: PEFT catches it and warns
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(opened(base), tmp_path / "adapter")

    assert not asked


def test_two_adapters_are_saved_and_loaded_side_by_side(method, base, tmp_path):
    model = get_peft_model(opened(base), lm_config(), adapter_name="A")
    model.add_adapter("B", lm_config(r=3, target_modules=["q_proj"]))
    randomise(randomise(model, "A"), "B", seed=2).eval()
    expected = {}
    for name in "AB":
        model.set_adapter(name)
        expected[name] = logits(model)
    folder = saved(model, tmp_path / "adapters")

    loaded = PeftModel.from_pretrained(opened(base), folder / "A", adapter_name="A")
    loaded.load_adapter(folder / "B", adapter_name="B")

    for name in "ABA":
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval()), expected[name])


def test_modules_to_save_are_trained_and_saved_whole(method, base, tmp_path):
    model = get_peft_model(opened(base), lm_config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    randomise(model)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.1
    folder = saved(model.eval(), tmp_path / "adapter")

    with warnings.catch_warnings():
        warnings.simplefilter("error", BasePrecisionWarning)
        loaded = PeftModel.from_pretrained(opened(base), folder).eval()
        loaded.add_adapter("second", lm_config(base_fingerprint=PeftConfig.from_pretrained(folder).base_fingerprint))

    assert len([layer for layer in layers(loaded) if "second" in layer.maps]) == 14  # and not the head's copies

    assert {name for name in trained if "core" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }
    assert torch.equal(logits(loaded), logits(model))


@not_lorasb
def test_an_adapted_embedding_is_saved_and_loaded(method, base, tmp_path):
    model = adapted(opened(base), target_modules=["embed_tokens", "q_proj"])
    folder = saved(model, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(opened(base), folder).eval()

    assert torch.equal(logits(loaded), logits(model))


# The same base in another precision, and another base


@not_lorasb
def test_the_same_base_in_bfloat16_works_from_the_saved_pivots(method, babyllama, tmp_path):
    """babyllama's own rounding moves its logits by 1 %; the adapter's part may add that much again."""
    model = adapted(opened(babyllama), r=64)
    folder = saved(model, tmp_path / "adapter")
    base_moves = distance(logits(opened(babyllama, dtype=torch.bfloat16), 361), logits(opened(babyllama), 361))

    with pytest.warns(BasePrecisionWarning):
        loaded = PeftModel.from_pretrained(opened(babyllama, dtype=torch.bfloat16), folder).eval()

    assert distance(logits(loaded, 361), logits(model, 361)) < 2 * base_moves < 0.04
    for mine, theirs in zip(layers(model), layers(loaded), strict=True):  # the float32 checkpoint is available
        assert torch.equal(mine.maps["default"].read, theirs.maps["default"].read)


@not_lorasb
def test_rounded_weights_without_a_checkpoint_give_nearly_the_same_factors(method, babyllama, tmp_path):
    """bf16 rounding; LoLDU rebuilds with the saved pivots: with new pivots the update would be a different one."""
    model = adapted(opened(babyllama), r=64)
    folder = saved(model, tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    rounded = opened(babyllama).bfloat16().float()
    rounded.config._name_or_path = ""

    with pytest.warns(BasePrecisionWarning, match="rebuilt from its weights"):
        loaded = PeftModel.from_pretrained(rounded, folder).eval()

    for mine, theirs in zip(layers(model), layers(loaded), strict=True):
        moved = distance(theirs.get_delta_weight("default"), mine.get_delta_weight("default"))
        assert moved < {"loldu": 0.2, "svfit": 0.1, "loraxs": 0.1}[method]  # measured 0.13, 0.07, 0.06
    assert distance(logits(loaded, 361), logits(model, 361)) < 0.02


def distance(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def nf4(folder):
    """The base in NF4 through transformers, computing in float32."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = opened(folder, quantization_config=config, device_map="cpu")
    for module in model.modules():  # else bitsandbytes repacks the weight in place at the first forward without grad
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(
    ("method", "r"), [("loldu", 8), ("loldu", 1000), ("svfit", 8), ("svfit", 64)], indirect=["method"]
)
def test_an_nf4_base_takes_its_factors_from_the_full_precision_checkpoint(method, babyllama, tmp_path, r):
    """The update acts on the NF4 base's output, with the true L and read: NF4's own error (0.1), not LU's (24)."""
    model = adapted(opened(babyllama), r=r)
    folder = saved(model, tmp_path / "adapter")
    quantised = nf4(babyllama)
    base_moves = distance(logits(quantised, 361), logits(opened(babyllama), 361))

    loaded = PeftModel.from_pretrained(quantised, folder).eval()

    for mine, theirs in zip(layers(model), layers(loaded), strict=True):
        assert torch.equal(mine.maps["default"].write, theirs.maps["default"].write)
        assert torch.equal(mine.maps["default"].read, theirs.maps["default"].read)
    # reads amplify the base's error by 1 / d_r or 1 / s_r: SVFit's at full rank by so much that nothing is left
    assert distance(logits(loaded, 361), logits(model, 361)) < 3 * base_moves


def test_the_adapters_config_names_the_checkpoint_where_the_model_does_not(babyllama, tmp_path):
    model = adapted(opened(babyllama), target_modules=["q_proj"])
    folder = saved(model, tmp_path / "adapter")
    quantised = nf4(babyllama)
    quantised.config._name_or_path = ""

    loaded = PeftModel.from_pretrained(quantised, folder)

    assert torch.equal(layers(loaded)[0].maps["default"].write, layers(model)[0].maps["default"].write)


@not_lorasb
def test_an_nf4_base_without_its_checkpoint_is_refused_with_the_remedy(method, babyllama, tmp_path):
    """Rebuilt from NF4 weights the adapter would be another one: loss 5.1 instead of 3.2 at full rank."""
    folder = saved(adapted(opened(babyllama), r=64), tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/gone")
    quantised = nf4(babyllama)
    quantised.config._name_or_path = ""

    with pytest.raises(ValueError, match=r"rebuilt from its weight are off by .*\(looked for: /gone\)"):
        PeftModel.from_pretrained(quantised, folder)


@not_lorasb
def test_an_adapter_made_on_an_nf4_base_without_a_checkpoint_comes_back_on_it(method, babyllama, tmp_path):
    first, second = nf4(babyllama), nf4(babyllama)
    for model in (first, second):
        model.config._name_or_path = model.name_or_path = ""

    with pytest.warns(BasePrecisionWarning, match="no full-precision checkpoint of this quantised base"):
        model = adapted(first, r=16)
    folder = saved(model, tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    loaded = PeftModel.from_pretrained(second, folder).eval()

    assert torch.equal(logits(loaded, 361), logits(model, 361))


def test_an_nf4_base_trains_the_cores_with_right_gradients(method, babyllama):
    """Against the same numbers dequantised; float32 sums in another order through five layers."""
    quantised = adapted(nf4(babyllama), r=16)
    plain = opened(babyllama)
    for layer in layers(quantised):
        plain.get_submodule(layer.name).weight.data = layer.matrix().clone()
    with factors_from(lambda name, _: factors_by_name(quantised)[name]):
        plain = adapted(plain, r=16)
    for mine, theirs in zip(layers(plain), layers(quantised), strict=True):
        mine.maps["default"].core.data = theirs.maps["default"].core.data.clone()

    for model in (quantised, plain):
        model(tokens(361), labels=tokens(361)).loss.backward()

    for mine, theirs in zip(layers(plain), layers(quantised), strict=True):
        gradient = mine.maps["default"].core.grad
        assert distance(theirs.maps["default"].core.grad, gradient) < 1e-4, mine.name


def factors_by_name(model):
    return {layer.name: layer._update_parts("default")[1] for layer in layers(model)}


def test_merging_into_a_quantised_base_is_refused(babyllama):
    model = adapted(nf4(babyllama), target_modules=["q_proj"])

    with pytest.raises(ValueError, match=r"q_proj is quantised, .* load the base in full precision and merge there"):
        model.merge_and_unload()


@not_lorasb
def test_another_base_of_the_same_shapes_is_refused(method, base, tmp_path):
    folder = saved(adapted(opened(base)), tmp_path / "adapter")

    with (
        pytest.raises(ValueError, match=r"adapter default does not fit this base: .* Load it on the base it was"),
        pytest.warns(BasePrecisionWarning, match="another precision or another model"),
    ):
        PeftModel.from_pretrained(tiny_llama(seed=5), folder)


@not_lorasb
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_another_base_is_refused_by_transformers_load_adapter_before_its_first_output(
    method, base, tmp_path, low_cpu_mem_usage
):
    """It sets tensors one by one and calls no hook: the check is then made at the first forward pass."""
    folder = saved(adapted(opened(base)), tmp_path / "adapter")
    other = tiny_llama(seed=5)

    def load_and_run():
        other.load_adapter(str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
        logits(other)

    with pytest.raises(ValueError, match="does not fit this base"), pytest.warns(BasePrecisionWarning):
        load_and_run()
    with pytest.raises(ValueError, match="does not fit this base"):  # and at every other one
        logits(other)


def test_a_compiled_model_checks_and_rebuilds_what_transformers_loaded(babyllama, tmp_path):
    """Its loader calls no hook, and the rounded weights would choose other pivots; so would a compiled forward."""
    options = {"r": 64, "target_modules": ["o_proj"], "layers_to_transform": [0]}
    one_layer = opened(babyllama, num_hidden_layers=1)
    folder = saved(adapted(copy.deepcopy(one_layer), **options), tmp_path / "adapter")
    rounded = one_layer.bfloat16().float()
    own = get_peft_model(copy.deepcopy(rounded), lm_config(**options))
    expected = PeftModel.from_pretrained(copy.deepcopy(rounded), folder).eval()
    rounded.load_adapter(str(folder))

    compiled = torch.compile(rounded, backend="eager")

    torch.testing.assert_close(logits(compiled, 361), logits(expected, 361), rtol=0, atol=1e-4)  # fused otherwise
    for mine, theirs in zip(layers(rounded), layers(expected), strict=True):
        assert torch.equal(mine.maps["default"].write, theirs.maps["default"].write)
    own_choice = [layer.maps["default"].pivots.tolist() for layer in layers(own)]
    assert own_choice != [layer.maps["default"].pivots.tolist() for layer in layers(expected)]


def test_another_rank_than_the_saved_one_is_named(method, base, tmp_path):
    folder = saved(adapted(opened(base), r=8), tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", r=4)

    with pytest.raises(ValueError, match=r"q_proj.* was saved at rank 8 but has rank 4 here"):
        PeftModel.from_pretrained(opened(base), folder)


@not_lorasb
def test_another_width_is_refused(method, base, tmp_path):
    folder = saved(adapted(opened(base)), tmp_path / "adapter")
    other = tiny_llama(hidden_size=48)

    with pytest.raises(ValueError, match="does not fit this base"), pytest.warns(BasePrecisionWarning):
        PeftModel.from_pretrained(other, folder)


# What is adapted, and what is refused


def names_of(model):
    return {layer.name for layer in layers(model)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, {"self_attn.q_proj", "mlp.down_proj"}),
        ({"target_modules": r".*\.(k|v)_proj"}, {"self_attn.k_proj", "self_attn.v_proj"}),
        (
            {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "up_proj", "down_proj"]},
            {f"self_attn.{x}_proj" for x in "qkvo"},
        ),
        ({"target_modules": None}, {"self_attn.q_proj", "self_attn.v_proj"}),  # PEFT's defaults for a Llama
    ],
    ids=["list", "regular expression", "all-linear but", "default"],
)
def test_target_modules_are_named_in_every_form(options, expected):
    model = get_peft_model(tiny_llama(), lm_config(**options))

    assert names_of(model) == {f"model.layers.{i}.{name}" for i in range(2) for name in expected}


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_head_out(tied):
    model = get_peft_model(tiny_llama(tie_word_embeddings=tied), lm_config())

    assert len(names_of(model)) == 14
    assert not any("lm_head" in name for name in names_of(model))


def test_layers_to_transform_chooses_layers():
    model = get_peft_model(tiny_llama(), lm_config(target_modules=["q_proj"], layers_to_transform=[1]))

    assert names_of(model) == {"model.layers.1.self_attn.q_proj"}


def test_a_second_adapter_with_all_linear_finds_the_same_layers():
    model = get_peft_model(tiny_llama(), lm_config(target_modules=["q_proj"]))

    model.add_adapter("second", lm_config())

    assert len([layer for layer in layers(model) if "second" in layer.maps]) == 14


def test_no_match_lists_the_modules_there_are():
    with pytest.raises(ValueError, match=r"target_modules=\['query'\].* has: .*down_proj, .*q_proj"):
        get_peft_model(tiny_llama(), lm_config(target_modules=["query"]))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_refused_by_name(target):
    with pytest.raises(ValueError, match=rf"{target} shares its weight with another module .*exclude_modules"):
        get_peft_model(tiny_llama(tie_word_embeddings=True), lm_config(target_modules=[target]))


def test_a_head_that_is_tied_whenever_it_is_loaded_is_refused_too():
    """The config ties it again when the saved adapter meets its base."""
    model = tiny_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

    with pytest.raises(ValueError, match="lm_head shares its weight"):
        get_peft_model(model, lm_config(target_modules=["lm_head"]))


def test_an_untied_head_is_adapted():
    model = adapted(tiny_llama(), target_modules=["lm_head"])

    assert names_of(model) == {"lm_head"}


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.GRU(4, 4), "0 is a GRU;"),
        (nn.Conv2d(4, 4, 1, groups=2), "0 is a Conv2d with groups 2;"),
        (nn.Conv1d(4, 4, 1), "0 is a Conv1d;"),
        (nn.MultiheadAttention(4, 2), "0 is a MultiheadAttention;"),
        (nn.LayerNorm(4), "0 is a LayerNorm;"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, nn.Module) else "",
)
def test_a_layer_of_another_kind_is_refused_by_name(layer, said):
    with pytest.raises(ValueError, match=said + r" supported are Linear"):
        get_peft_model(nn.Sequential(layer), LoLDUConfig(target_modules=["0"]))


def spoiled(value):
    """A tiny Llama whose last down_proj cannot be factored."""
    model = tiny_llama()
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight[:, 2] = value if value else weight[:, 1]
    return model


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "zero pivot in column 2"), (float("nan"), "are NaN or infinite"), (float("inf"), "are NaN or infinite")],
)
def test_a_weight_without_factors_is_named_and_the_model_left_as_it_was(value, said):
    model = spoiled(value)
    before = {name: type(module) for name, module in model.named_modules()}

    with pytest.raises(ValueError, match=rf"model.layers.1.mlp.down_proj: .*{said}.*exclude_modules"):
        get_peft_model(model, lm_config())

    assert {name: type(module) for name, module in model.named_modules()} == before


def test_after_a_refusal_the_remedy_it_names_works():
    model = spoiled(0)
    with pytest.raises(ValueError, match="zero pivot"):
        get_peft_model(model, lm_config())

    ours = get_peft_model(model, lm_config(exclude_modules=["down_proj"]))

    assert len(names_of(ours)) == 12


def test_a_second_adapter_that_cannot_be_made_leaves_the_first_one():
    model = spoiled(0)
    model = adapted(model, target_modules=["q_proj"])
    expected = logits(model)

    with pytest.raises(ValueError, match="zero pivot"):
        model.add_adapter("second", lm_config())

    assert list(model.peft_config) == ["default"]
    assert names_of(model) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert torch.equal(logits(model), expected)


def test_a_rank_beyond_a_weights_smaller_side_is_reduced_with_one_warning(method, caplog):
    model = get_peft_model(tiny_llama(), lm_config(r=30))

    said = [record.getMessage() for record in caplog.records if "reduced to" in record.getMessage()]
    assert said == ["rank 30 is reduced to the smaller dimension of some weights: 16 on 4 weights"]
    ranks = {layer.name.rpartition(".")[2]: len(layer.maps["default"].core) for layer in layers(model)}
    assert ranks == {n: 16 if n in ("k_proj", "v_proj") else 30 for n in ranks}


def test_clamped_ranks_are_saved_and_loaded(method, base, tmp_path):
    model = adapted(opened(base), r=1000)
    folder = saved(model, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(opened(base), folder).eval()

    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r is a whole number of at least 1, got 0"),
        ({"r": 2.5}, "r is a whole number"),
        ({"r": True}, "r is a whole number"),
        ({"scale": 0.0}, "scale is a finite number other than 0"),
        ({"scale": float("nan")}, "scale is a finite number"),
        ({"init_delta": "zeros"}, "'zeros' replaces the pretrained function at step 0; choose one of lu, uniform"),
        ({"init_delta": "lucky"}, "'lucky' is unknown; choose one of lu"),
        ({"layers_pattern": "layers"}, "layers_to_transform counts: give both"),
    ],
)
def test_a_wrong_setting_is_refused_on_construction(options, said):
    with pytest.raises(ValueError, match=said):
        LoLDUConfig(**options)


@pytest.mark.parametrize("init_delta", ["lu", "uniform", "normal", "constant"])
def test_the_papers_starts_that_keep_the_function_are_one_start(init_delta):
    base = tiny_llama()
    expected = logits(base)

    model = get_peft_model(base, lm_config(init_delta=init_delta))

    assert torch.equal(logits(model), expected)
    assert all(not layer.maps["default"].core.any() for layer in layers(model))


@pytest.mark.parametrize("call", ["add_weighted_adapter", "subtract_mutated_init"])
def test_unsupported_functions_of_lora_layers_raise_a_clear_error(call):
    model = get_peft_model(tiny_llama(), lm_config())

    with pytest.raises(AttributeError, match=call):
        getattr(model, call)


def test_factors_come_from_a_source_where_there_is_one(
    method,
):
    given = factors_by_name(adapted(tiny_llama()))
    asked = []

    def source(name, shape):
        asked.append((name, shape))
        return given[name] if "q_proj" in name else None

    with factors_from(source):
        model = get_peft_model(tiny_llama(), lm_config(target_modules=["q_proj", "up_proj"]))

    assert sorted(asked) == sorted((layer.name, layer.shape) for layer in layers(model))
    assert torch.equal(layers(model)[0].maps["default"].write, given[layers(model)[0].name].write)


# Other libraries


@not_lorasb
def test_transformers_add_adapter(method, base, tmp_path):
    model = opened(base)
    expected = logits(model)

    model.add_adapter(lm_config(target_modules=["q_proj"]), adapter_name="mine")
    at_step_0 = logits(model)
    randomise(model, "mine")
    on = logits(model)
    model.disable_adapters()
    off = logits(model)
    model.enable_adapters()
    model.save_pretrained(tmp_path / "adapter")

    assert torch.equal(at_step_0, expected)
    assert torch.equal(off, expected)
    assert torch.equal(logits(PeftModel.from_pretrained(opened(base), tmp_path / "adapter").eval()), on)


def test_trainable_parameters_are_counted(capsys):
    get_peft_model(tiny_llama(), lm_config(r=8)).print_trainable_parameters()

    assert capsys.readouterr().out.startswith("trainable params: 112 ||")


def trl_trainer(model, out, vocabulary=64, peft_config=None):
    trl = pytest.importorskip("trl")
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(vocabulary, shape=(4, 12))]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    arguments = trl.SFTConfig(str(out), learning_rate=0.1, save_strategy="no", disable_tqdm=True, **options)
    data = Dataset.from_list(rows)
    return trl.SFTTrainer(
        model, args=arguments, train_dataset=data, processing_class=word_tokenizer(), peft_config=peft_config
    )


@pytest.mark.parametrize("handed_over", ["as a config", "wrapped"])
def test_trl_trains_it(method, base, tmp_path, handed_over):
    wrapped = handed_over == "wrapped"
    model = get_peft_model(opened(base), lm_config()) if wrapped else opened(base)
    trainer = trl_trainer(model, tmp_path / "run", peft_config=None if wrapped else lm_config())

    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))

    assert all(layer.maps["default"].core.any() for layer in layers(trainer.model))
    assert all(not p.requires_grad for n, p in trainer.model.named_parameters() if not n.endswith("core"))
    loaded = PeftModel.from_pretrained(opened(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))


def test_trl_trains_float32_cores_on_an_nf4_base(babyllama, tmp_path):
    """It casts trained parameters on a 4-bit base to bfloat16; 3 digits are too few for steps with a decaying learning
    rate."""
    trainer = trl_trainer(nf4(babyllama), tmp_path / "run", 361, lm_config(target_modules=["q_proj"]))

    trainer.train()

    for layer in layers(trainer.model):
        core = layer.maps["default"].core
        assert core.dtype == torch.float32
        assert core.any()
        assert not torch.equal(core, core.bfloat16().float())


def word_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="w0", eos_token="w1", unk_token="w0"
    )


# The methods on singular vectors


@pytest.mark.parametrize("b", [-1, 1.5, True])
def test_a_wrong_number_of_diagonals_is_refused(b):
    with pytest.raises(ValueError, match="off_diagonals is a whole number of at least 0"):
        SVFTConfig(off_diagonals=b)


@pytest.mark.parametrize(("b", "expected"), [(0, 12), (1, 34), (3, 72), (20, 144)])
def test_svfts_core_has_the_papers_count(b, expected):
    """k (2 b + 1) - b (b + 1) for k = 12, and the whole matrix if b exceeds it."""
    model = get_peft_model(nn.Sequential(nn.Linear(12, 16)), SVFTConfig(r=12, off_diagonals=b, target_modules=["0"]))

    assert layers(model)[0].maps["default"].core.shape == (expected,)


def test_svfits_file_holds_the_singular_values(base, tmp_path):
    model = randomise(get_peft_model(opened(base), SVFitConfig(r=5, target_modules="all-linear")))
    folder = saved(model, tmp_path / "adapter")

    tensors = load_file(folder / "adapter_model.safetensors")

    assert PeftConfig.from_pretrained(folder).peft_type == "SVFIT"
    assert len(tensors) == 4 * 14
    q = {n.rpartition(".")[2]: t for n, t in tensors.items() if "layers.0.self_attn.q_proj" in n}
    W = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj").base.weight
    torch.testing.assert_close(q["values"], torch.linalg.svdvals(W.double())[:5].float())
    assert set(q) == {"core", "pivots", "values", "probe"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_ranks_that_energy_chose_are_logged_saved_and_loaded(base, tmp_path, caplog, low_cpu_mem_usage):
    caplog.set_level(logging.INFO)
    config = SVFitConfig(energy=0.9, target_modules="all-linear", task_type="CAUSAL_LM")
    model = randomise(get_peft_model(opened(base), config)).eval()
    folder = saved(model, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(opened(base), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    through_transformers = opened(base)
    through_transformers.load_adapter(str(folder))

    ranks = {layer.name: len(layer.maps["default"].core) for layer in layers(model)}
    assert len(set(ranks.values())) > 1
    assert PeftConfig.from_pretrained(folder).ranks == ranks
    assert "ranks chosen from the weights: 11 on 4 weights, " in caplog.text
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(through_transformers), logits(model))


def test_ranks_that_energy_chose_stay_on_a_rounded_base(base, tmp_path):
    """The rounded weights might choose other ranks, and the cores would not fit."""
    config = SVFitConfig(energy=0.9, target_modules="all-linear", task_type="CAUSAL_LM")
    folder = saved(randomise(get_peft_model(opened(base), config)), tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", ranks={name: r - 1 for name, r in config.ranks.items()})

    with pytest.raises(ValueError, match="was saved at rank"):  # so it is the saved ranks that count
        PeftModel.from_pretrained(opened(base), folder)


def test_energy_needs_the_weights_or_the_ranks():
    with torch.device("meta"):
        model = tiny_llama()

    with pytest.raises(ValueError, match=r"the rank of model\.layers\.0.* is on the meta device: set ranks"):
        get_peft_model(model, SVFitConfig(energy=0.9, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "SVFitConfig.r is a whole number of at least 1, got 0"),
        ({"energy": 1.0}, "energy is a share between 0 and 1, got 1.0"),
        ({"energy": 0}, "energy is a share between 0 and 1, got 0"),
        ({"svd": "lucky"}, "svd is one of auto, exact, block, got 'lucky'"),
        ({"normalize_directions": False}, "singular vectors already have norm one"),
    ],
)
def test_a_wrong_setting_of_svfit_is_refused_on_construction(options, said):
    with pytest.raises(ValueError, match=said):
        SVFitConfig(**options)
