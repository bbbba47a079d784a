"""Merging: the written folder is base plus adapter, weight for weight, and nothing half-done stays."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from trained_adapter import save_adapter
from transformers import AutoModelForCausalLM

from adapters.checkpoint_files import list_tensors, open_tensor
from launcher.inference import merge as module
from launcher.inference.export import export_lora
from launcher.inference.merge import merge
from launcher.inference.sources import find, load


def logits(model):
    tokens = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(tokens).logits


def in_memory(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    return logits(model), model.merge_and_unload().state_dict()


@pytest.mark.parametrize("save", [None, ["lm_head"], ["embed_tokens"], ["norm"]])
def test_the_merged_folder_is_base_plus_adapter_also_where_it_saves_modules_whole(babyllama, tmp_path, save):
    """In float32 to 1e-4 of logits around 10: rounding of one sum per weight; the adapter moves them by about 10."""
    adapter = save_adapter(babyllama, tmp_path / "adapter", modules_to_save=save)
    wanted, _ = in_memory(babyllama, adapter)

    out = merge(str(adapter), out=str(tmp_path / "out"), check=False)

    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4)
    assert merged.config.tie_word_embeddings == (save not in (["lm_head"], ["embed_tokens"]))


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


def test_a_method_that_has_no_weights_to_merge_is_refused(babyllama, tmp_path):
    tuning = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), tuning).save_pretrained(tmp_path / "prompt")

    with pytest.raises(ValueError, match="PROMPT_TUNING cannot be merged"):
        merge(str(tmp_path / "prompt"), out=str(tmp_path / "out"))

    assert not (tmp_path / "out").exists()


def test_a_merge_that_goes_wrong_is_noticed_and_leaves_nothing(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "merged_weight", lambda layer, weight: weight)  # the update is forgotten

    with pytest.raises(RuntimeError, match="logits differ from base with adapter"):
        merge(str(adapter), out=str(tmp_path / "out"))

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_safetensors", full)

    with pytest.raises(ValueError, match="no space left for --out"):
        merge(str(adapter), out=str(tmp_path / "out"))

    assert list(tmp_path.iterdir()) == []


def test_too_large_a_model_is_refused_before_anything_is_written(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))

    with pytest.raises(ValueError, match=r"takes 0\.0 GB and .* has 0\.0 GB free"):
        merge(str(adapter), out=str(tmp_path / "out"))


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


@pytest.mark.slow
def test_merging_needs_memory_for_a_weight_and_not_for_the_model(tmp_path):
    """A 300 MB model of weights of at most 12 MB: 120 MB hold a weight, its update and what imports load late."""
    script = """
import resource, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
sys.path.insert(0, sys.argv[2])
from trained_adapter import save_adapter
from launcher.inference.merge import merge
folder = Path(sys.argv[1])
if sys.argv[3] == "make":
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16, vocab_size=2000)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "base", max_shard_size="20MB")
    save_adapter(folder / "base", folder / "adapter", r=64)
else:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    before = peak()
    merge(str(folder / "adapter"), out=str(folder / "out"), check=False)
    print(peak() - before)
"""
    here = str(module.Path(__file__).parent)

    def step(name):
        command = [sys.executable, "-c", script, str(tmp_path), here, name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    step("make")
    grown = int(step("merge").split()[-1])

    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")) / 1e6
    assert size > 300
    assert grown < 120
