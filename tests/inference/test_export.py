"""The exported LoRA: stock PEFT loads it and gives the adapter's outputs."""

import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trained_adapter import save_adapter
from transformers import AutoModelForCausalLM

from adapters import METHODS
from adapters.trained import TrainedConfig
from launcher import cli
from launcher.inference import export as module
from launcher.inference.checks import probe_logits
from launcher.inference.export import export_lora
from launcher.inference.load import load_model
from launcher.inference.merge import merge
from launcher.inference.sources import find


def test_stock_peft_without_our_packages_gives_the_adapters_logits(adapter, babyllama, tmp_path):
    """A fresh process that never imports ours; 1e-4 is what the command promises in float32."""
    out = export_lora(str(adapter), out=str(tmp_path / "lora"))

    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(babyllama)!r}), {str(out)!r}).eval()
tokens = torch.randint(361, (4, 32), generator=torch.Generator().manual_seed(0))
assert not any(name == "adapters" or name.startswith("adapters.") for name in sys.modules)
from safetensors.torch import save_file
save_file({{"logits": model(tokens).logits.detach()}}, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)

    found = load_file(tmp_path / "logits")["logits"]
    torch.testing.assert_close(found, probe_logits(load_model(find(str(adapter)))), rtol=0, atol=1e-4)
    assert {file.name for file in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_wrong_export_is_detected_and_removed(adapter, tmp_path, monkeypatch):
    real = module.write_lora

    def halved(model, out, **rest):
        for name, parameter in model.named_parameters():
            if name.endswith("core"):
                parameter.data *= 0.5
        real(model, out, **rest)

    monkeypatch.setattr(module, "write_lora", halved)

    with pytest.raises(RuntimeError, match=r"deleted again: its logits differ by .* raise --tolerance"):
        export_lora(str(adapter), out=str(tmp_path / "lora"))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if issubclass(config, TrainedConfig)])
def test_methods_that_train_the_whole_update_are_exported_exactly_or_refused_and_merge(method, babyllama, tmp_path):
    """Stock PEFT's logits of the LoRA, and those of the merged model, are the adapter's."""
    config = METHODS[method](r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "a")
    wanted, start = probe_logits(model), probe_logits(AutoModelForCausalLM.from_pretrained(babyllama))

    merged = merge(str(tmp_path / "a"), out=str(tmp_path / "merged"), check=False)
    if config.low_rank:
        lora = export_lora(str(tmp_path / "a"), out=str(tmp_path / "lora"))
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(babyllama), lora)
        assert type(loaded.peft_config["default"]) is LoraConfig
        torch.testing.assert_close(probe_logits(loaded.eval()), wanted, rtol=0, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=f"a is a {method.upper()} adapter: .*no LoRA equals it.*loldu merge"):
            export_lora(str(tmp_path / "a"), out=str(tmp_path / "lora"))
        assert not (tmp_path / "lora").exists()

    torch.testing.assert_close(probe_logits(AutoModelForCausalLM.from_pretrained(merged)), wanted, rtol=0, atol=1e-4)
    assert float((wanted - start).abs().max()) > 0.1


def test_a_lora_is_not_exported_again(babyllama, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), lora).save_pretrained(tmp_path / "a")

    with pytest.raises(ValueError, match="is a LORA adapter: PEFT loads it already"):
        export_lora(str(tmp_path / "a"), out=str(tmp_path / "out"))


def test_the_rank_is_lowered_and_the_error_of_each_layer_printed(adapter, babyllama, tmp_path, capfd):
    assert cli.main(["export-lora", str(adapter), "--out", str(tmp_path / "lora"), "--rank", "3"]) == 0

    said = capfd.readouterr().err
    errors = [float(number) for number in re.findall(r"rank 8 to 3, relative error ([\d.e-]+)", said)]
    assert len(errors) == 5 * 7  # layers of the model times linear layers in each
    worst = float(re.search(r"lowered to rank 3: largest relative error ([\d.e-]+)", said)[1])
    assert worst == max(errors)
    assert 0.05 < worst < 1
    assert PeftConfig.from_pretrained(tmp_path / "lora").r == 3
    assert "--max-lora-rank 8" in said


def test_what_servers_refuse_is_named(babyllama, tmp_path, capfd):
    whole = save_adapter(babyllama, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"])

    export_lora(str(whole), out=str(tmp_path / "lora"))

    said = " ".join(capfd.readouterr().err.split())
    assert "has lm_head whole (modules_to_save), and LoRA servers such as vLLM refuse that" in said
    [line] = module._servers({"r": 513}, False)
    assert line.startswith("warning: vLLM refuses a rank above 512: give --rank 512 or less")


@pytest.mark.parametrize("rank", ["0", "-1"])
def test_a_rank_below_one_is_refused_before_anything_is_loaded(adapter, rank, tmp_path, capfd):
    assert cli.main(["export-lora", str(adapter), "--out", str(tmp_path / "lora"), "--rank", rank]) == 2

    assert capfd.readouterr().err == f"error: --rank is at least 1, got {rank}\n"
    assert list(tmp_path.iterdir()) == []
