"""Samples in one row see only themselves, or the run is refused: the model's behaviour is tested, not assumed."""

import pytest
import torch
from test_checkpoints import SIZES, TINY, train
from test_suitable import saved  # noqa: F401 (a fixture)
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from launcher.config import DataConfig
from launcher.data.batches import collate
from launcher.data.encoded import Encoded
from launcher.tasks.joining import limits
from launcher.training.packing import Way, candidates, check_packing

WINDOW = {"sliding_window": 16}
TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
TEXT = {**SIZES, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
OSS = GptOssConfig(**TEXT, **WINDOW, **TYPES, num_local_experts=2, num_experts_per_tok=1)
HEADS = {"vocab_size": 356, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MODELS = {
    "a mask": (LlamaConfig(**SIZES), "sdpa", "sdpa"),
    "a mask to add": (LlamaConfig(**SIZES), "eager", "eager"),
    "a window": (MistralConfig(**SIZES, **WINDOW), "sdpa", "positions"),
    "a window in a sub-config": (
        Gemma3Config(text_config={**TEXT, **WINDOW, **TYPES}, vision_config=VISION, mm_tokens_per_image=4),
        "sdpa",
        "positions",
    ),
    "a mask for each type of layer": (OSS, "eager", "eager by layer type"),
    "biases in place of positions": (FalconConfig(**HEADS, alibi=True, new_decoder_architecture=False), "eager", None),
    "biases of a mask": (BloomConfig(**HEADS), "eager", None),
    "a state that runs on": (MambaConfig(**{k: v for k, v in HEADS.items() if "heads" not in k}), "eager", None),
    "a state beside attention": (
        Qwen3NextConfig(**TEXT, **LINEAR, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
                        layer_types=["linear_attention", "full_attention"]),
        "sdpa",
        None,
    ),
}  # fmt: skip


def of_samples(samples):
    lengths = torch.tensor([len(sample) for sample in samples])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Encoded(
        torch.cat(list(samples)).int(), torch.ones(int(offsets[-1]), dtype=torch.bool), offsets, lengths, None
    )


def layout(samples, way):
    rows = [list(range(len(samples)))] if way else [0]
    batch = collate(of_samples(samples), rows, pad_id=0, packing=way is not None, **(way or Way())._asdict())
    del batch["labels"]
    return batch


def made(config, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_keeps_packed_samples_apart_or_is_refused(kind):
    config, attention, wanted = MODELS[kind]
    model = made(config, attention)
    ways, ids = candidates(model.config, attention, 96), torch.arange(3, 300)

    if wanted is None:
        with pytest.raises(ValueError, match=r"lets one sample of a row see another .*: leave --packing out"):
            check_packing(model, model, ways, layout, ids, 96)
        return
    way = check_packing(model, model, ways, layout, ids, 96)

    assert way.attention + (" by layer type" if way.windows else "") == wanted
    assert model.training
    samples = [torch.arange(10, 50), torch.arange(60, 75), torch.arange(80, 120)]
    model.eval()
    packed = model(**layout(samples, way), use_cache=False).logits[0]
    alone = [model(input_ids=sample[None], use_cache=False).logits[0] for sample in samples]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_windows_are_found_where_configs_hide_them():
    assert limits(MODELS["a window in a sub-config"][0], 96)[-1] == 16
    assert limits(MistralConfig(**SIZES, sliding_window=4096), 96) == []
    assert limits(LlamaConfig(**SIZES), 96) == []


def test_outputs_that_are_not_finite_are_refused():
    model = made(LlamaConfig(**SIZES), "sdpa")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")

    with pytest.raises(ValueError, match=r"outputs differ by nan"):
        check_packing(model, model, [Way("sdpa")], layout, torch.arange(3, 300), 96)


def test_a_run_says_so_before_it_trains(saved, tmp_path, capsys):  # noqa: F811
    folder = saved(AutoModelForCausalLM.from_config(MODELS["a state beside attention"][0]))

    assert train(folder, tmp_path / "out", data=DataConfig(data=str(TINY / "instructions" / "train.json"), packing=True,
                                                           prompt_template="short", max_length=96)) == 2  # fmt: skip

    assert "--packing: a Qwen3NextForCausalLM lets one sample of a row see another" in capsys.readouterr().err
    assert not (tmp_path / "out" / "events.jsonl").exists()
