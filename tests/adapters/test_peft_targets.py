"""What our methods adapt, and what they refuse to adapt."""

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from peft_folders import factors_by_name, opened, saved
from tiny_models import adapted, layers, lm_config, logits, tiny_llama
from torch import nn

from adapters import LoLDUConfig, factors_from


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


def test_clamped_ranks_are_saved_and_loaded(method, base, tmp_path, caplog):
    model = adapted(opened(base), r=1000)
    folder = saved(model, tmp_path / "adapter")
    caplog.clear()

    loaded = PeftModel.from_pretrained(opened(base), folder).eval()

    assert "reduced to" not in caplog.text  # it was told when the adapter was made
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
