"""Other libraries train our adapters: transformers and TRL."""

import pytest
import torch
from datasets import Dataset
from peft import (
    PeftModel,
    get_peft_model,
)
from peft_folders import nf4, not_lorasb, opened
from tiny_models import layers, lm_config, logits, randomise, tiny_llama, tokens


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
