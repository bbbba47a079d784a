"""Many adapters in one batch: every row equals that of its adapter alone."""

import copy
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from many_folders import CLOSE, CONFIGS, alone, written
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import adapted, layers, tiny_gpt2, tiny_llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters import (
    BasePrecisionWarning,
    LoLDUConfig,
    ManyAdapters,
)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_each_row_of_a_batch_is_its_adapter_alone(config, tmp_path):
    models, base, ids = written(tmp_path, config), tiny_llama(), tokens(shape=(5, 12))
    many = ManyAdapters(model := tiny_llama())
    for name in models:
        many.add(name, tmp_path / name)
    names = ["a2", None, "a0", "a2", "a1"]

    with torch.no_grad(), many.rows(names):
        mixed = model(ids).logits

    for row, name in enumerate(names):
        expected = alone(models, base, name, ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected, **CLOSE)
        assert name is None or (expected - alone(models, base, None, ids[row : row + 1])).abs().max() > 0.01
    assert len(many._groups) == 1  # their maps are in memory once


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_each_token_of_a_packed_batch_has_its_adapter(config, tmp_path):
    """One layer, because attention across packed samples is up to the caller."""
    models = written(tmp_path, config, count=2)
    many = ManyAdapters(model := tiny_llama())
    for name in models:
        many.add(name, tmp_path / name)
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    path = "model.layers.1.self_attn.q_proj"

    with torch.no_grad(), many.packed([("a1", 4), (None, 2), ("a0", 3)]):
        y = model.get_submodule(path)(x)

    with torch.no_grad():
        parts = [
            models["a1"].base_model.model.get_submodule(path)(x[:, :4]),
            tiny_llama().get_submodule(path)(x[:, 4:6]),
            models["a0"].base_model.model.get_submodule(path)(x[:, 6:]),
        ]
    torch.testing.assert_close(y, torch.cat(parts, 1), **CLOSE)


def test_the_base_is_a_choice_and_equals_the_base_bit_for_bit(tmp_path):
    written(tmp_path, CONFIGS["loldu"], count=1)
    many, ids = ManyAdapters(model := tiny_llama()), tokens(shape=(3, 12))
    expected = tiny_llama()(ids).logits
    many.add("a0", tmp_path / "a0")

    with many.rows([None, "a0", None]):
        mixed = model(ids).logits
    with many.rows([None] * 3):
        all_base = model(ids).logits

    assert torch.equal(mixed[[0, 2]], expected[[0, 2]])
    assert not torch.allclose(mixed[1], expected[1], atol=1e-2)
    assert torch.equal(all_base, expected)
    assert torch.equal(model(ids).logits, expected)  # outside


def test_ranks_methods_and_lora_share_a_batch(tmp_path):
    kinds = [CONFIGS["loldu"], LoLDUConfig(r=4, target_modules=["q_proj"]), CONFIGS["loraxs"], CONFIGS["svft"]]
    models = {}
    for i, config in enumerate(kinds):
        models[f"k{i}"] = written(tmp_path / str(i), config, count=1, seed=20 + i)["a0"]
    torch.manual_seed(5)
    plain = [
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        LoraConfig(
            r=2, use_rslora=True, target_modules="all-linear", init_lora_weights=False, alpha_pattern={"q_proj": 3}
        ),
    ]
    for i, config in enumerate(plain):
        models[f"lora{i}"] = get_peft_model(tiny_llama(), config).eval()
        models[f"lora{i}"].save_pretrained(tmp_path / f"lora{i}")
    many, ids = ManyAdapters(model := tiny_llama()), tokens(shape=(8, 12))
    for i in range(len(kinds)):
        many.add(f"k{i}", tmp_path / str(i) / "a0")
    for i in range(len(plain)):
        many.add(f"lora{i}", tmp_path / f"lora{i}")
    names = ["lora1", "k0", "k2", None, "lora0", "k1", "k3", "lora1"]

    with torch.no_grad(), many.rows(names):
        mixed = model(ids).logits

    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row : row + 1], alone(models, tiny_llama(), name, ids[row : row + 1]), **CLOSE)


def test_adapters_with_maps_of_their_own_share_a_batch_too(method, tmp_path):
    """Adapters of every kind, including LoRA-SB, whose maps do not follow from the base."""
    models = {}
    for i in range(2):
        models[f"a{i}"] = adapted(tiny_llama(), seed=30 + i)
        models[f"a{i}"].save_pretrained(tmp_path / f"a{i}")
    many, ids = ManyAdapters(model := tiny_llama()), tokens(shape=(3, 12))
    for name in models:
        many.add(name, tmp_path / name)

    with torch.no_grad(), many.rows(names := ["a1", "a0", None]):
        mixed = model(ids).logits

    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row : row + 1], alone(models, tiny_llama(), name, ids[row : row + 1]), **CLOSE)


@pytest.mark.parametrize("config", [CONFIGS["loldu"], CONFIGS["loraxs"]], ids=["loldu", "loraxs"])
def test_padded_prefill_and_decode_generate_what_each_adapter_alone_generates(config, tmp_path):
    models = written(tmp_path, config)
    many, ids = ManyAdapters(model := tiny_llama()), tokens(shape=(4, 9))
    for name in models:
        many.add(name, tmp_path / name)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 2, 0)):
        mask[row, :padding] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}

    with many.rows(names := ["a0", "a1", None, "a2"]):
        made = model.generate(ids, attention_mask=mask, **settings)

    for row, name in enumerate(names):
        own = ids[row : row + 1, mask[row].bool()]
        each = tiny_llama() if name is None else models[name]
        expected = each.generate(input_ids=own, attention_mask=torch.ones_like(own), **settings)[0, own.shape[1] :]
        assert made[row, 9 : 9 + len(expected)].tolist() == expected.tolist()


def test_bfloat16_stays_within_its_rounding(tmp_path):
    """Measured: equal at these sizes. A matrix product of another size may round differently, by one step of
    bfloat16."""
    written(tmp_path, CONFIGS["loldu"], count=2)
    many, ids = ManyAdapters(model := tiny_llama().bfloat16()), tokens(shape=(2, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BasePrecisionWarning)
        for name in ("a0", "a1"):
            many.add(name, tmp_path / name)
        single = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path / "a1").eval()

    with torch.no_grad(), many.rows(["a0", "a1"]):
        mixed = model(ids).logits[1:]

    with torch.no_grad():
        torch.testing.assert_close(mixed, single(ids[1:]).logits, rtol=0.016, atol=0.016)


def test_conv1d_and_embeddings_are_adapted_per_row(tmp_path):
    config = LoLDUConfig(r=8, target_modules=["c_attn", "c_fc"])
    models = written(tmp_path, config, count=2, base=tiny_gpt2)
    many, ids = ManyAdapters(model := tiny_gpt2()), tokens(shape=(3, 12))
    for name in models:
        many.add(name, tmp_path / name)

    with torch.no_grad(), many.rows(names := ["a1", None, "a0"]):
        mixed = model(ids).logits

    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row : row + 1], alone(models, tiny_gpt2(), name, ids[row : row + 1]), **CLOSE)

    config = LoLDUConfig(r=8, target_modules=["embed_tokens", "q_proj"])
    models = written(tmp_path / "embedding", config, count=2)
    many = ManyAdapters(model := tiny_llama())
    for name in models:
        many.add(name, tmp_path / "embedding" / name)

    with torch.no_grad(), many.rows(names):
        mixed = model(ids).logits

    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row : row + 1], alone(models, tiny_llama(), name, ids[row : row + 1]), **CLOSE)


def test_the_table_grows_shrinks_and_reuses_rows(tmp_path):
    models = written(tmp_path, CONFIGS["loldu"], count=2)
    many, ids = ManyAdapters(model := tiny_llama()), tokens(shape=(2, 12))
    for i in range(100):
        many.add(f"m{i}", tmp_path / f"a{i % 2}")
    (group,) = many._groups.values()
    numbers = group.table.shape[1]
    assert many.memory()["tables"] <= 1.2 * 101 * numbers * 4

    with torch.no_grad(), many.rows(["m99", "m0"]):
        for i in range(98):  # even while a batch is in progress
            many.remove(f"m{i}")
        mixed = model(ids).logits
    many.remove("m98")

    torch.testing.assert_close(mixed[:1], alone(models, None, "a1", ids[:1]), **CLOSE)
    assert len(many) == 1
    many.add("again", tmp_path / "a0")
    with torch.no_grad(), many.rows(["again", "m99"]):
        mixed = model(ids).logits
    torch.testing.assert_close(mixed[:1], alone(models, None, "a0", ids[:1]), **CLOSE)
    torch.testing.assert_close(mixed[1:], alone(models, None, "a1", ids[1:]), **CLOSE)
    many.remove("m99")
    many.add("low", tmp_path / "a1")
    many.remove("again")
    many.add("lowest", tmp_path / "a0")
    assert len(group.table) <= 101
    many.remove("low")
    many.remove("lowest")
    assert not many._groups
    assert not many._hooks
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


def test_files_laid_out_alike_are_read_quickly_and_give_the_same(tmp_path):
    models, ids = written(tmp_path, CONFIGS["loldu normalised, scaled"], count=2), tokens(shape=(2, 12))
    many = ManyAdapters(model := tiny_llama())

    assert many.add_known("a0", tmp_path / "a0") is None  # the first of its kind
    many.add("a0", tmp_path / "a0")
    assert many.add_known("a1", tmp_path / "a1") is not None

    with torch.no_grad(), many.rows(["a1", "a0"]):
        mixed = model(ids).logits
    for row, name in enumerate(["a1", "a0"]):
        torch.testing.assert_close(mixed[row : row + 1], alone(models, None, name, ids[row : row + 1]), **CLOSE)
    with pytest.raises(ValueError, match="there is an adapter a1 already"):
        many.add_known("a1", tmp_path / "a1")


def test_a_file_laid_out_alike_of_another_base_or_with_nan_is_refused(tmp_path):
    written(tmp_path, CONFIGS["loldu"], count=2)
    written(tmp_path / "other", CONFIGS["loldu"], count=1, base=lambda: tiny_llama(seed=9))
    many = ManyAdapters(tiny_llama())
    many.add("a0", tmp_path / "a0")
    shutil.copy(tmp_path / "a0" / "adapter_config.json", tmp_path / "other" / "a0")
    tensors = load_file(tmp_path / "a1" / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("core"))[3] = torch.nan
    save_file(tensors, tmp_path / "a1" / "adapter_model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match="does not fit this base"):
        many.add("other", tmp_path / "other" / "a0")
    with pytest.raises(ValueError, match="holds NaN or infinite numbers"):
        many.add("nan", tmp_path / "a1")
    assert list(many.adapters) == ["a0"]


def test_a_table_whose_end_is_free_shrinks(tmp_path):
    written(tmp_path, CONFIGS["loldu"], count=1)
    many = ManyAdapters(tiny_llama())
    for i in range(100):
        many.add(f"m{i}", tmp_path / "a0")
    (group,) = many._groups.values()
    grown = len(group.table)

    for i in reversed(range(10, 100)):
        many.remove(f"m{i}")

    assert grown > 100
    assert len(group.table) < 25
    assert group.table[1:11].abs().sum(1).min() > 0


def test_what_was_saved_is_the_adapter(tmp_path):
    models = written(tmp_path, CONFIGS["loldu normalised, scaled"], count=1)
    many, ids = ManyAdapters(tiny_llama()), tokens()
    many.add("a0", tmp_path / "a0")

    many.save("a0", tmp_path / "again")

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, models["a0"](ids).logits, **CLOSE)


def test_gradients_of_a_table_are_those_of_each_adapter_alone(tmp_path):
    """Adapter i's row gets the gradient of its own samples, and no other's."""
    models = written(tmp_path, CONFIGS["loldu"])
    many, ids = ManyAdapters(model := tiny_llama().requires_grad_(False)), tokens(shape=(3, 12))
    for name in models:
        many.add(name, tmp_path / name)
    (group,) = many._groups.values()
    group.table.requires_grad_(True)

    with many.rows(names := ["a2", "a0", "a1"]):
        logits = model(ids).logits
    sum(nn.functional.cross_entropy(logits[i, :-1], ids[i, 1:]) for i in range(3)).backward()

    for row, name in enumerate(names):
        own = models[name](ids[row : row + 1]).logits
        nn.functional.cross_entropy(own[0, :-1], ids[row, 1:]).backward()
        alone_grad = {layer.name: layer.maps["default"].core.grad for layer in layers(models[name])}
        found = group.table.grad[many.adapters[name].row]
        for module, columns in group.columns.items():
            torch.testing.assert_close(found[columns], alone_grad[module].flatten(), **CLOSE)


def test_adapters_trained_in_one_run_are_those_trained_alone(tmp_path):
    """One optimizer over the table; AdamW updates each number independently."""
    config, ids = CONFIGS["loldu normalised, scaled"], tokens(shape=(3, 2, 12))
    many = ManyAdapters(model := tiny_llama())
    table = many.create(names := ["x", "y", "z"], config).table
    optimizer = torch.optim.AdamW([table], lr=0.03, weight_decay=0)
    for _ in range(4):
        with many.rows([name for name in names for _ in range(2)]):
            logits = model(ids.flatten(0, 1)).logits.unflatten(0, (3, 2))
        sum(nn.functional.cross_entropy(logits[i].flatten(0, 1), ids[i].flatten()) for i in range(3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    many.save("y", tmp_path / "y")

    alone = get_peft_model(tiny_llama(), copy.deepcopy(config))
    optimizer = torch.optim.AdamW(
        [p for p in alone.parameters() if p.requires_grad], lr=0.06, weight_decay=0
    )  # the table has the scale in it: 0.5
    for _ in range(4):
        nn.functional.cross_entropy(alone(ids[1]).logits.flatten(0, 1), ids[1].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "y").eval()
    found, expected, base = (each(ids[1]).logits for each in (loaded, alone.eval(), tiny_llama()))
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


TINY = Path(__file__).parents[2] / "recipes" / "tiny" / "model"


def quantised(kind):
    """The embedded model in 8 or 4 bits, computing in float32."""
    # with a threshold, which numbers int8 keeps as outliers depends on all rows of a batch, even without adapters
    how = (
        {"load_in_8bit": True, "llm_int8_threshold": 0.0}
        if kind == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    config = BitsAndBytesConfig(**how, **({} if kind == "int8" else {"bnb_4bit_compute_dtype": torch.float32}))
    model = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=config, device_map="cpu")
    for module in model.modules():  # else bitsandbytes repacks the weight in place at the first forward without grad
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@pytest.mark.parametrize("config", [CONFIGS["loldu"], CONFIGS["loraxs"]], ids=["loldu", "loraxs"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases_take_many_adapters_too(kind, config, tmp_path):
    """As PEFT loads each on the same quantised base."""
    written(tmp_path, config, count=2, base=lambda: AutoModelForCausalLM.from_pretrained(TINY))
    many, ids = ManyAdapters(model := quantised(kind)), tokens(vocabulary=300, shape=(3, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BasePrecisionWarning)
        for name in ("a0", "a1"):
            many.add(name, tmp_path / name)
        single = PeftModel.from_pretrained(quantised(kind), tmp_path / "a0", adapter_name="a0").eval()
        single.load_adapter(tmp_path / "a1", adapter_name="a1")

    with torch.no_grad(), many.rows(names := ["a1", None, "a0"]):
        mixed = model(ids).logits

    for row, name in enumerate(names):
        with torch.no_grad(), single.disable_adapter() if name is None else nullcontext():
            if name is not None:
                single.set_adapter(name)
            torch.testing.assert_close(mixed[row : row + 1], single(ids[row : row + 1]).logits, rtol=1e-4, atol=1e-4)
