"""Merging: the written folder is base plus adapter, weight for weight, and no incomplete folder stays."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from trained_adapter import save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from adapters.checkpoint_files import list_tensors, open_tensor
from launcher.inference import merge as module
from launcher.inference import merge_plan, write_model
from launcher.inference.export import export_lora
from launcher.inference.heldout import held_out
from launcher.inference.load import load, load_model, load_quantised
from launcher.inference.merge import merge
from launcher.inference.sources import find
from launcher.models.quantize import keep_packing


def logits(model):
    tokens = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(tokens).logits


def in_memory(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    return logits(model), model.merge_and_unload().state_dict()


@pytest.mark.parametrize("save", [None, ["lm_head"], ["embed_tokens"], ["norm"]])
def test_the_merged_folder_is_base_plus_adapter_also_with_modules_to_save(babyllama, tmp_path, save):
    """In float32 to 1e-4 of logits around 10: rounding of one sum per weight; the adapter moves them by about 10."""
    adapter = save_adapter(babyllama, tmp_path / "adapter", modules_to_save=save)
    wanted, _ = in_memory(babyllama, adapter)

    out = merge(str(adapter), out=str(tmp_path / "out"), check=False)

    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4)
    assert merged.config.tie_word_embeddings == (save not in (["lm_head"], ["embed_tokens"]))


def test_a_merge_stays_in_main_memory_where_peft_would_load_to_a_gpu(babyllama, tmp_path, monkeypatch):
    """Meta stands for the GPU: what is loaded there is lost."""
    adapter = save_adapter(babyllama, tmp_path / "adapter", modules_to_save=["lm_head"])
    wanted, _ = in_memory(babyllama, adapter)
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "meta")

    out = merge(str(adapter), out=str(tmp_path / "out"), check=False)

    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), wanted, rtol=0, atol=1e-4)


def test_an_adapter_whose_file_repeats_the_weights_of_the_head_merges_too(tmp_path):
    """PEFT saves a copy of embeddings and heads that are adapted."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, initializer_range=0.2, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).save_pretrained(base := tmp_path / "base")
    folder = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "embed_tokens", "q_proj"])
    assert any("base_layer" in name for name in load_file(folder / "adapter_model.safetensors"))
    wanted, _ = in_memory(base, folder)

    out = merge(str(folder), out=str(tmp_path / "out"), base=str(base))

    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), wanted, rtol=1e-4, atol=1e-3)
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - wanted).abs().max() > 0.01


def test_transposed_weights_and_bases_without_tokenizer_merge_too(gpt2, tmp_path):
    adapter = save_adapter(gpt2, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "c_fc"])
    wanted, weights = in_memory(gpt2, adapter)

    out = merge(str(adapter), out=str(tmp_path / "out"))

    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), wanted, rtol=0, atol=1e-5)
    written = load_file(out / "model.safetensors")
    torch.testing.assert_close(
        written["transformer.h.0.attn.c_attn.weight"], weights["transformer.h.0.attn.c_attn.weight"]
    )


def test_only_adapted_tensors_change_and_the_rest_is_the_bases_bit_for_bit(babyllama, tmp_path):
    adapter = save_adapter(babyllama, tmp_path / "adapter", target_modules=["v_proj"])

    out = merge(str(adapter), out=str(tmp_path / "out"), check=False)

    before, after = load_file(babyllama / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if "v_proj" in name}
    assert (out / "tokenizer.json").read_bytes() == (babyllama / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").exists()


def test_shards_are_bounded_indexed_and_hold_what_one_file_holds(adapter, tmp_path):
    one = merge(str(adapter), out=str(tmp_path / "one"), check=False)

    many = merge(str(adapter), out=str(tmp_path / "many"), shard_gb=0.001, check=False)

    shards = sorted(many.glob("*.safetensors"))
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert len(shards) == 5
    assert all(shard.stat().st_size < 1.01e6 for shard in shards)  # header included
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    whole = load_file(one / "model.safetensors")
    assert whole.keys() == list_tensors(many).keys()
    assert all(torch.equal(open_tensor(info)[:], whole[name]) for name, info in list_tensors(many).items())


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_another_dtype_rounds_each_merged_weight_once(adapter, tmp_path, dtype, step):
    wide = merge(str(adapter), out=str(tmp_path / "wide"), check=False)

    out = merge(str(adapter), out=str(tmp_path / "out"), dtype=dtype)

    exact = load_file(wide / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert tensor.dtype == getattr(torch, dtype)
        torch.testing.assert_close(tensor.float(), exact[name], rtol=step, atol=1e-7)  # half a unit, subnormals aside
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_a_run_folder_merges_and_answers_like_the_run(run_folder, tmp_path):
    out = merge(str(run_folder), out=str(tmp_path / "out"))

    torch.testing.assert_close(
        logits(load(find(str(out)))[0]), logits(load(find(str(run_folder)))[0]), rtol=0, atol=1e-4
    )


def test_the_tokenizer_of_a_merged_model_is_the_adapters_alone(babyllama, adapter, tmp_path):
    """Files that only the base has would change what the adapter's name: tokens, the end of a turn, the template."""
    base, own = shutil.copytree(babyllama, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "own")
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    (base / "added_tokens.json").write_text(json.dumps({"<base>": 400}))
    (base / "chat_template.jinja").write_text("{{ 'the base' }}")
    tokenizer = AutoTokenizer.from_pretrained(babyllama)
    tokenizer.eos_token, tokenizer.chat_template = ".", "{{ 'the adapter' }}"
    tokenizer.save_pretrained(own, save_jinja_files=False)

    out = merge(str(own), base=str(base), out=str(tmp_path / "out"), check=False)

    merged = AutoTokenizer.from_pretrained(out)
    assert (merged.eos_token, merged.chat_template) == (".", "{{ 'the adapter' }}")
    assert "<base>" not in merged.get_vocab()
    assert merged.backend_tokenizer.to_str() == AutoTokenizer.from_pretrained(own).backend_tokenizer.to_str()


def test_a_template_in_an_adapters_settings_stays_without_a_tokenizer(babyllama, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    (own / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'the adapter' }}", "eos_token": "."}))

    out = merge(str(own), out=str(tmp_path / "out"), check=False)

    merged = AutoTokenizer.from_pretrained(out)
    assert (merged.eos_token, merged.chat_template) == ("</s>", "{{ 'the adapter' }}")


def test_other_methods_of_peft_are_merged_in_memory_and_that_is_said(babyllama, tmp_path, capsys):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), lora).save_pretrained(tmp_path / "lora")
    wanted, _ = in_memory(babyllama, tmp_path / "lora")

    out = merge(str(tmp_path / "lora"), out=str(tmp_path / "out"))

    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), wanted, rtol=1e-4, atol=1e-3)
    said = capsys.readouterr().err
    assert "in memory" in said
    assert "checked" in said
    assert (out / "tokenizer.json").exists()


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_a_lora_on_one_of_two_tied_embeddings_leaves_the_other_as_it_was(end, tmp_path):
    """PEFT adds the update to the weight that both share."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, initializer_range=0.2, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(base := tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=[end], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "lora")
    ids = torch.arange(12)[None]
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").eval()(ids).logits

    out = merge(str(tmp_path / "lora"), out=str(tmp_path / "out"), base=str(base))

    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_method_that_has_no_weights_to_merge_is_refused(babyllama, tmp_path):
    tuning = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), tuning).save_pretrained(tmp_path / "prompt")

    with pytest.raises(ValueError, match="PEFT cannot merge PROMPT_TUNING adapters"):
        merge(str(tmp_path / "prompt"), out=str(tmp_path / "out"))

    assert not (tmp_path / "out").exists()


def test_a_wrong_merge_is_detected_and_removed(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_plan, "merged_weight", lambda layer, weight: weight)  # the update is forgotten

    with pytest.raises(RuntimeError, match="logits differ from base and adapter"):
        merge(str(adapter), out=str(tmp_path / "out"))

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_no_file_is_left(adapter, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_model, "write_safetensors", full)

    with pytest.raises(ValueError, match=r"cannot write the result to .*: no space is left; .* --out"):
        merge(str(adapter), out=str(tmp_path / "out"))

    assert list(tmp_path.iterdir()) == []


def test_too_large_a_model_is_refused_before_anything_is_written(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(write_model.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))

    with pytest.raises(ValueError, match=r"takes 0\.0 GB and .* has 0\.0 GB free"):
        merge(str(adapter), out=str(tmp_path / "out"))


def test_of_two_starts_on_one_folder_the_first_that_ends_has_it_whole_and_the_other_is_refused(tmp_path):
    out = tmp_path / "out"
    slow, fast = (write_model.new_folder(out, "--out") for _ in range(2))
    for each, name in ((slow, "slow"), (fast, "fast")):
        (each.__enter__() / name).touch()

    fast.__exit__(None, None, None)
    with pytest.raises(ValueError, match="exists and is not empty: give another folder"):
        slow.__exit__(None, None, None)

    assert list(tmp_path.rglob("*")) == [out, out / "fast"]


@pytest.mark.parametrize("command", [merge, export_lora])
def test_a_folder_with_something_in_it_is_left_alone(command, adapter, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")

    with pytest.raises(ValueError, match="not empty: give another folder"):
        command(str(adapter), out=str(tmp_path))

    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("command", [merge, export_lora])
def test_a_model_without_adapter_has_nothing_to_merge_or_export(command, babyllama, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        command(str(babyllama), out=str(tmp_path / "out"))


@pytest.mark.parametrize("other", ["stories", "stranger"])
def test_an_adapter_of_another_base_is_not_merged(adapter, other, request, tmp_path):
    base = request.getfixturevalue(other)

    with pytest.raises(ValueError, match="does not fit this base"):
        merge(str(adapter), base=str(base), out=str(tmp_path / "out"))

    assert list(tmp_path.iterdir()) == []


def test_a_quantised_base_is_refused_with_the_remedy(adapter, babyllama, tmp_path):
    shutil.copytree(babyllama, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))

    with pytest.raises(ValueError, match=r"stored quantised.*--base"):
        merge(str(adapter), base=str(tmp_path / "base"), out=str(tmp_path / "out"))


@pytest.fixture(scope="session")
def records(alpaca_file, tmp_path_factory):
    """Twelve short records, to measure a loss on."""
    file = tmp_path_factory.mktemp("records") / "records.json"
    short = [record for record in json.loads(alpaca_file.read_text()) if len(record["output"]) in range(1, 60)]
    file.write_text(json.dumps(short[:12]))
    return file


def by_transformers(folder, settings):
    """The folder's weights quantised by transformers as it loads them; bitsandbytes is kept from packing them again."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    keep_packing(model)
    return model


@pytest.mark.parametrize(
    ("kind", "save"),
    [
        ("nf4", None),
        ("fp4", None),
        ("int8", None),
        ("nf4", ["o_proj"]),
        ("int8", ["lm_head"]),
        ("nf4", ["embed_tokens"]),
    ],
)
def test_a_merge_into_8_or_4_bits_is_what_transformers_makes_of_the_merged_model(
    kind, save, babyllama, records, tmp_path
):
    """Tensor for tensor as transformers saves it, rounded once, and it loads with nothing said about quantisation."""
    adapter = save_adapter(babyllama, tmp_path / "adapter", modules_to_save=save)
    full = merge(str(adapter), out=str(tmp_path / "full"), check=False)

    out = merge(str(adapter), out=str(tmp_path / "out"), quantize=kind, data=str(records))

    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs = by_transformers(full, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted, found = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(out / "model.safetensors")
    assert wanted.keys() == found.keys()
    for name, tensor in found.items():
        if "quant_state" in name:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(wanted[name].tolist()))
        else:
            assert torch.equal(tensor, wanted[name]), name
    packed = {name for name, tensor in found.items() if name.endswith("weight") and not tensor.is_floating_point()}
    assert len(packed) == (30 if save == ["o_proj"] else 35)
    torch.testing.assert_close(logits(load(find(str(out)))[0]), logits(theirs), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_transposed_weights_are_merged_into_8_or_4_bits_as_transformers_does(gpt2, kind, tmp_path, monkeypatch):
    """This model has no tokenizer, so no loss is measured."""
    adapter = save_adapter(gpt2, tmp_path / "adapter", target_modules=["c_attn", "c_fc"])
    full = merge(str(adapter), out=str(tmp_path / "full"), check=False)
    monkeypatch.setattr(module, "held_out", lambda *_: ())
    monkeypatch.setattr(module, "loss_change", lambda *_: "")

    out = merge(str(adapter), out=str(tmp_path / "out"), quantize=kind)

    theirs = by_transformers(full, json.loads((out / "config.json").read_text())["quantization_config"])
    assert sum(isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for layer in theirs.modules()) == 8
    assert torch.equal(logits(load_model(find(str(out)))), logits(theirs))


def test_the_loss_that_quantising_costs_is_measured_and_printed(babyllama, records, adapter, tmp_path, capsys):
    """Against a loss computed here token by token, of the adapter beside the base and of the merged folder."""
    out = merge(str(adapter), out=str(tmp_path / "out"), quantize="nf4", data=str(records))

    said = capsys.readouterr().err
    encoded, _ = held_out(find(str(adapter)), str(records))
    after, beside, change, full, change_full = map(float, re.findall(r"[+-]?\d+\.\d{4}", said))
    assert "on 12 held-out records" in said
    assert after == pytest.approx(loss_by_hand(load(find(str(out)))[0], encoded), abs=1e-4)  # as printed
    assert beside == pytest.approx(
        loss_by_hand(load_quantised(find(str(adapter)), "nf4", dtype="float32", device="cpu"), encoded), abs=1e-4
    )
    assert full == pytest.approx(loss_by_hand(load(find(str(adapter)))[0], encoded), abs=1e-4)
    assert change == pytest.approx(after - beside, abs=2e-4)
    assert change_full == pytest.approx(after - full, abs=2e-4)
    assert abs(change_full) > 1e-3  # something was rounded


@torch.no_grad()
def loss_by_hand(model, encoded):
    total = 0.0
    for i in range(len(encoded)):
        span = slice(*encoded.offsets[i : i + 2].tolist())
        ids, counted = encoded.ids[span].long(), encoded.loss[span]
        likely = model.eval()(ids[None]).logits[0, :-1].float().log_softmax(-1)
        total -= float(likely[torch.arange(len(ids) - 1), ids[1:]][counted[1:]].sum())
    return total / int(encoded.targets.sum())


def test_a_run_is_measured_on_the_records_it_held_out(run_folder, records, tmp_path, capsys):
    settings = json.loads((run_folder / "config.json").read_text())
    settings["config"]["data"] |= {"data": str(records), "eval_records": 5}
    (run_folder / "config.json").write_text(json.dumps(settings))

    merge(str(run_folder), out=str(tmp_path / "out"), quantize="int8")

    assert "loss on 5 held-out records" in capsys.readouterr().err


def test_records_given_replace_those_of_a_run_that_asked_for_exact_match(run_folder, records):
    settings = json.loads((run_folder / "config.json").read_text())
    settings["config"]["data"] |= {"eval_data": "gone.json", "exact_match": True}
    (run_folder / "config.json").write_text(json.dumps(settings))

    encoded, _ = held_out(find(str(run_folder)), str(records))

    assert len(encoded) == 12


def test_a_lora_is_merged_into_4_bits_too(babyllama, records, tmp_path, capsys):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), lora).save_pretrained(tmp_path / "lora")

    out = merge(str(tmp_path / "lora"), out=str(tmp_path / "out"), quantize="nf4", data=str(records))

    assert "merged into nf4" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(out).is_loaded_in_4bit
    assert sorted(file.name for file in out.iterdir() if file.is_dir()) == []


def test_a_merged_4_bit_model_answers_in_bfloat16_on_every_cpu(adapter, records, tmp_path):
    """Rows of 352 numbers crash in the other packing that bitsandbytes chooses on an AVX512-BF16 CPU."""
    out = merge(str(adapter), out=str(tmp_path / "out"), quantize="nf4", dtype="bfloat16", data=str(records))

    model = load(find(str(out)))[0]

    assert torch.equal(logits(model), logits(model))


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(adapter, tmp_path):
    with pytest.raises(ValueError, match="--device cuda:99 does not work here"):
        merge(str(adapter), out=str(tmp_path / "parent" / "out"), device="cuda:99")

    assert not (tmp_path / "parent").exists()  # which writing would have made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "nf4", "check": False}, "always measures the accuracy that it costs: leave --no-check out"),
        ({"data": "records.json"}, "only used by --quantize"),
        ({"quantize": "nf4"}, "is not in a run folder.+ give --data FILE"),
        ({"quantize": "nf4", "data": "missing.json"}, "missing.json: there is no such file"),
    ],
)
def test_what_cannot_be_measured_is_not_quantised(options, message, adapter, tmp_path):
    with pytest.raises(ValueError, match=message):
        merge(str(adapter), out=str(tmp_path / "out"), **options)

    assert list(tmp_path.iterdir()) == []


def test_a_run_without_held_out_records_asks_for_some(run_folder, tmp_path):
    with pytest.raises(ValueError, match=r"the run has no held-out records\): give --data FILE"):
        merge(str(run_folder), out=str(tmp_path / "out"), quantize="nf4")


@pytest.mark.slow
def test_merging_needs_memory_for_a_weight_and_not_for_the_model(tmp_path):
    """A 325 MB model of weights of at most 12 MB; 200 MB hold a weight, its update, bitsandbytes' working memory (14
    bytes for each of 2^20 numbers) and what imports load late. Measured: 129 to 165, into nf4 100, into int8 118."""
    script = """
import resource, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
sys.path.insert(0, sys.argv[2])
from trained_adapter import save_adapter
from launcher.inference import merge as module
folder, kind = Path(sys.argv[1]), sys.argv[3]
module.held_out = module.loss_change = lambda *_: ""  # that loads models
if kind == "make":
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16, vocab_size=2000)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "base", max_shard_size="20MB")
    save_adapter(folder / "base", folder / "adapter", r=64)
else:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    before = peak()
    module.merge(str(folder / "adapter"), out=str(folder / kind), quantize=kind, check=kind != "none")
    print(peak() - before)
"""
    here = str(Path(__file__).parent)

    def step(name):
        command = [sys.executable, "-c", script, str(tmp_path), here, name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    step("make")
    grown = {kind: int(step(kind).split()[-1]) for kind in ("none", "nf4", "int8")}

    sizes = {kind: sum(file.stat().st_size for file in (tmp_path / kind).glob("*.safetensors")) / 1e6 for kind in grown}
    assert sizes["none"] > 300
    assert sizes["nf4"] < sizes["int8"] < 100
    assert max(grown.values()) < 200
