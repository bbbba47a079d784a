"""What is found and loaded; of bad folders each is a ValueError of one line that names it and what to do."""

import importlib.metadata
import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launcher.inference.load import load
from launcher.inference.sources import find
from launcher.models.quantize import Quantised


def copy(folder, to):
    shutil.copytree(folder, to)
    return to


def no_folder(babyllama, adapter, tmp_path):
    return {"model": str(tmp_path / "nowhere")}, "neither a folder here nor in the hub cache"


def empty_folder(babyllama, adapter, tmp_path):
    return {"model": str(tmp_path)}, "holds no model"


def no_weights(babyllama, adapter, tmp_path):
    (copy(babyllama, tmp_path / "m") / "model.safetensors").unlink()
    return {"model": str(tmp_path / "m")}, "holds no weights"


def cut_weights(babyllama, adapter, tmp_path):
    weights = copy(babyllama, tmp_path / "m") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"model": str(tmp_path / "m")}, "damaged or cut short"


def pickled_weights(babyllama, adapter, tmp_path):
    weights = copy(babyllama, tmp_path / "m") / "model.safetensors"
    weights.rename(tmp_path / "m" / "pytorch_model.bin")
    return {"model": str(tmp_path / "m")}, "only as pickle"


def no_tokenizer(babyllama, adapter, tmp_path):
    (copy(babyllama, tmp_path / "m") / "tokenizer.json").unlink()
    return {"model": str(tmp_path / "m")}, "has no tokenizer"


def a_missing_tensor(babyllama, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = copy(babyllama, tmp_path / "m") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    return {"model": str(tmp_path / "m")}, "lacks 1 of its weights .model.norm.weight."


def no_adapter_folder(babyllama, adapter, tmp_path):
    return {"model": str(babyllama), "adapter": str(tmp_path)}, "is not one: give a folder with adapter_config.json"


def adapter_without_weights(babyllama, adapter, tmp_path):
    (copy(adapter, tmp_path / "a") / "adapter_model.safetensors").unlink()
    return {"model": str(tmp_path / "a")}, "has no adapter_model.safetensors"


def pickled_adapter(babyllama, adapter, tmp_path):
    (copy(adapter, tmp_path / "a") / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    return {"model": str(tmp_path / "a")}, "only as a pickle"


def cut_adapter(babyllama, adapter, tmp_path):
    weights = copy(adapter, tmp_path / "a") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return {"model": str(tmp_path / "a")}, "damaged or cut short"


def unknown_method(babyllama, adapter, tmp_path):
    config = copy(adapter, tmp_path / "a") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "NEWEST"}))
    return {"model": str(tmp_path / "a")}, "is not the config of a known PEFT method"


def base_gone(babyllama, adapter, tmp_path):
    config = copy(adapter, tmp_path / "a") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "gone/base"}))
    return {"model": str(tmp_path / "a")}, "needs its base model, gone/base, which is not here: give --base"


def base_of_no_adapter(babyllama, adapter, tmp_path):
    return {"model": str(babyllama), "base": str(babyllama)}, "needs an adapter"


def two_bases(babyllama, adapter, tmp_path):
    return {"model": str(babyllama), "adapter": str(adapter), "base": "x"}, "leave --base x out"


def adapter_as_base(babyllama, adapter, tmp_path):
    return {"model": str(adapter), "base": str(adapter)}, "is an adapter, not a base model"


def unfinished_run(babyllama, adapter, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {"model": {"model": str(babyllama)}, "data": {}}}))
    return {"model": str(tmp_path)}, "has not saved an adapter yet"


@pytest.mark.parametrize(
    "case",
    [
        no_folder, empty_folder, no_weights, cut_weights, pickled_weights, no_tokenizer, a_missing_tensor,
        no_adapter_folder, adapter_without_weights, pickled_adapter, cut_adapter, unknown_method, base_gone,
        base_of_no_adapter, two_bases, adapter_as_base, unfinished_run,
    ],
)  # fmt: skip
def test_a_bad_folder_is_one_line_with_a_remedy(case, babyllama, adapter, tmp_path):
    given, said = case(babyllama, adapter, tmp_path)

    with pytest.raises(ValueError, match=said) as caught:
        load(find(**given))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", ["stories", "stranger"])
def test_an_adapter_of_another_base_is_refused_whether_shapes_differ_or_not(adapter, other, request):
    base = request.getfixturevalue(other)

    with pytest.raises(ValueError, match="does not fit this base") as caught:
        load(find(str(adapter), base=str(base)))

    assert "\n" not in str(caught.value)


def test_a_lora_of_another_shape_is_refused_in_one_line(babyllama, stories, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(stories), lora).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"does not fit this base .*size mismatch") as caught:
        load(find(str(tmp_path), base=str(babyllama)))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["trained whole", "as drawn", "two rows trained", "adapted"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_with_added_tokens_is_refused_with_a_way_that_works(how, stories, tmp_path):
    rows = AutoConfig.from_pretrained(stories).vocab_size + 2
    options = {
        "trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "as drawn": {},
        "two rows trained": {"trainable_token_indices": [rows - 2, rows - 1]},
        "adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    }[how]
    trained = AutoModelForCausalLM.from_pretrained(stories)
    trained.resize_token_embeddings(rows)
    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    get_peft_model(trained, lora).save_pretrained(tmp_path / "adapter")

    with pytest.raises(ValueError, match=rf"with {rows} tokens .*resize_token_embeddings\({rows}\)") as caught:
        load(find(str(tmp_path / "adapter"), base=str(stories)))
    assert "\n" not in str(caught.value)

    wide = AutoModelForCausalLM.from_pretrained(stories)
    wide.resize_token_embeddings(rows)
    PeftModel.from_pretrained(wide, str(tmp_path / "adapter")).merge_and_unload().save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "whole")
    merged, _ = load(find(str(tmp_path / "whole")))
    ids = torch.tensor([[1, 5, rows - 2, rows - 1]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained.eval()(ids).logits)


def test_an_adapter_file_that_lacks_a_tensor_is_refused(adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    copy(adapter, tmp_path / "a")
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("core"))]
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")

    with pytest.raises(ValueError, match="does not fit"):
        load(find(str(tmp_path / "a")))


def test_a_fully_tuned_run_is_its_model_with_the_tokenizer_of_its_base(babyllama, tmp_path):
    run = tmp_path / "run"
    copy(babyllama, run / "model")
    for file in (run / "model").glob("tokenizer*"):
        file.unlink()
    config = {"config": {"model": {"model": str(babyllama)}, "data": {"prompt_template": "short"}}}
    (run / "config.json").write_text(json.dumps(config))

    source = find(str(run))

    assert (source.base, source.tokenizer, source.template) == (run / "model", babyllama, "short")
    assert source.adapter is None


def test_a_runs_dtype_is_the_default_and_another_may_be_asked_for(run_folder):
    source = find(str(run_folder))

    as_recorded = load(source)[0].dtype
    asked = load(source, dtype="bfloat16")[0].dtype

    assert (as_recorded, asked) == (torch.float32, torch.bfloat16)


def test_a_run_that_chose_its_dtype_by_the_machine_is_loaded_in_it_on_another(run_folder):
    recorded = json.loads((run_folder / "config.json").read_text())
    recorded["config"]["model"]["dtype"] = "auto"
    (run_folder / "config.json").write_text(json.dumps(recorded | {"resolved": {"dtype": "bfloat16"}}))

    assert load(find(str(run_folder)))[0].dtype == torch.bfloat16  # the files have float32


@pytest.mark.parametrize("name", [".", "link"])
def test_a_runs_adapter_folder_by_another_name_keeps_the_runs_settings(name, run_folder, monkeypatch):
    monkeypatch.chdir(run_folder / "adapter")
    (run_folder / "link").symlink_to(run_folder / "adapter")
    by_run = find(str(run_folder))

    found = find(str(run_folder / "link") if name == "link" else ".")

    assert by_run.dtype is not None
    assert (found.dtype, found.quantize, found.template, found.data) == (
        by_run.dtype, by_run.quantize, by_run.template, by_run.data,
    )  # fmt: skip


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dtype": "float8"}, "--dtype float8 is unknown: give auto, float32"),
        ({"device": "cuda:99"}, r"--device cuda:99 does not work here \(.+\): give auto, cpu, or a GPU"),
        ({"device": "gpu"}, r"--device gpu does not work here \(.+\): give auto, cpu"),
    ],
)
def test_a_precision_or_a_device_that_is_not_there_is_refused(babyllama, quantize, asked, message):
    with pytest.raises(ValueError, match=message):
        load(find(str(babyllama)), quantize=quantize, **asked)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@torch.no_grad()
def test_a_run_on_a_quantised_base_answers_on_one_unless_asked_otherwise(kind, run_folder, adapter, babyllama):
    recorded = json.loads((run_folder / "config.json").read_text())
    recorded["config"]["model"]["quantize"] = kind
    (run_folder / "config.json").write_text(json.dumps(recorded))
    source, ids = find(str(run_folder)), torch.arange(3, 35)[None]

    as_trained = load(source)[0]
    whole = load(source, quantize="none")[0]

    layers = [layer for layer in as_trained.modules() if isinstance(layer, Quantised)]
    full = load(find(str(adapter)))[0]
    assert len(layers) == 35  # seven in each of five
    assert not any(isinstance(layer, Quantised) for layer in whole.modules())
    assert torch.equal(whole(ids).logits, full(ids).logits)
    by_hand = load(find(str(adapter)), quantize=kind)[0]
    assert torch.equal(as_trained(ids).logits, by_hand(ids).logits)
    assert 1e-4 < float((as_trained(ids).logits - full(ids).logits).norm() / full(ids).logits.norm()) < 0.5


def test_an_unsupported_run_on_a_quantised_base_is_refused_with_an_alternative(run_folder, monkeypatch):
    recorded = json.loads((run_folder / "config.json").read_text())
    recorded["config"]["model"]["quantize"] = "nf4"
    (run_folder / "config.json").write_text(json.dumps(recorded))

    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("importlib.metadata.version", version)

    with pytest.raises(ValueError, match=r"in nf4\. .*pip install 'bitsandbytes>=.*; or give --quantize none"):
        load(find(str(run_folder)))


def test_a_model_of_several_stop_tokens_keeps_them_when_it_is_quantised(babyllama, tmp_path):
    shutil.copytree(babyllama, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))

    model, _ = load(find(str(tmp_path / "model")), quantize="nf4")

    assert model.generation_config.eos_token_id == [2, 7]


def test_a_base_that_is_quantised_already_is_not_quantised_again(babyllama, tmp_path):
    shutil.copytree(babyllama, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}})
    )

    with pytest.raises(ValueError, match=r"is quantised already \(gptq, by its config\.json\)"):
        load(find(str(tmp_path / "model")), quantize="nf4")


def small(kind, folder, babyllama, **settings):
    """A random model of this type with babyllama's tokenizer, in a folder."""
    config = AutoConfig.for_model(kind, vocab_size=361, **settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(babyllama / name, folder / name)
    return folder


@torch.no_grad()
def test_a_model_without_sdpa_loads_quantised(babyllama, tmp_path):
    folder = small("gptj", tmp_path / "model", babyllama, n_embd=64, n_layer=1, n_head=4, rotary_dim=8)
    ids = torch.arange(3, 35)[None]

    quantised, full = load(find(str(folder)), quantize="nf4")[0], load(find(str(folder)))[0]

    assert any(isinstance(layer, Quantised) for layer in quantised.modules())
    assert 1e-4 < float((quantised(ids).logits - full(ids).logits).norm() / full(ids).logits.norm()) < 0.5


@torch.no_grad()
def test_a_lora_on_all_experts_of_a_module_loads_as_it_was_saved(babyllama, tmp_path):
    """PEFT nests the two adapters of a module's experts, so one has base_layer in its name, as a base's weight has."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    folder = small("mixtral", tmp_path / "model", babyllama, num_attention_heads=4, num_key_value_heads=2, **sizes)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, task_type="CAUSAL_LM")
    lora.init_lora_weights = False  # random instead of zero
    trained, ids = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).eval(), torch.arange(3, 35)[None]
    trained.save_pretrained(tmp_path / "adapter")

    loaded = load(find(str(tmp_path / "adapter")))[0]

    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, trained(ids).logits, atol=1e-3)


def test_loading_an_adapter_reports_each_layer_whose_factors_are_rebuilt(adapter, monkeypatch):
    shown = []

    class Shown:
        def __init__(self, console):
            pass

        @contextmanager
        def bar(self, what, total=0, **how):
            yield lambda done, of=None: shown.append((what, done, of or total))

    monkeypatch.setattr("launcher.inference.adapter_folder.Bars", Shown)
    load(find(str(adapter)))

    rebuilt = [(done, total) for what, done, total in shown if what == "rebuilding factors"]
    assert rebuilt == [(number, 35) for number in range(1, 36)]  # seven linear layers in each of five blocks
