"""Models that label texts: all linear layers but the new head, which starts alike however the base is loaded."""

from dataclasses import replace

import pytest
import torch
from test_checkpoints import SIZES
from transformers import AutoModel, DebertaV2Config, ElectraConfig, Gemma3Config, LlamaConfig, ModernBertConfig

from launcher.config import ModelConfig
from launcher.engines.fsdp2 import Rows, open_alone, shard, shard_mesh
from launcher.models.build import build
from launcher.models.fill import fill
from launcher.models.skeleton import skeleton
from launcher.models.suitable import unsuitable
from launcher.processes import Ranks

BERT = {"vocab_size": 356, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "modernbert": ModernBertConfig(**BERT, pad_token_id=2),
    "electra": ElectraConfig(**BERT, embedding_size=16),
    "deberta": DebertaV2Config(**BERT),
    "gemma3": Gemma3Config(text_config={**SIZES, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4),
}  # fmt: skip
HEAD = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "pad_token_id": 2}


@pytest.fixture
def folder(request, tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(MODELS[request.param]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_a_new_head_starts_with_the_same_numbers_in_every_way_of_loading(folder):
    device, config = torch.device("cpu"), ModelConfig(model=str(folder))
    how = {"dtype": "float32", "attention": "eager", "head": HEAD}

    def loaded(kind):
        torch.manual_seed(7)
        torch.randn(3)  # what was drawn before does not matter
        torch.manual_seed(7)
        if kind != "fsdp2":
            quantised = replace(config, quantize=kind)
            return build(quantised, folder, None, factors=lambda n: None, device=device, **how)
        model = skeleton(config, folder, None, **how)
        open_alone(device)
        shard(model, shard_mesh(Ranks(0, 1, 0, 1), device, 1))
        fill(model, folder, lambda *_: None, Rows(), device)
        return model

    plain = loaded("none")
    inside = f"{plain.base_model_prefix}."
    heads = {name: value for name, value in plain.named_parameters() if not name.startswith(inside)}
    assert heads
    assert all(torch.isfinite(value).all() for value in heads.values())
    for kind in ("int8", "fsdp2"):
        found = dict(loaded(kind).named_parameters())
        for name, value in heads.items():
            mine = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
            assert torch.equal(mine, value), (kind, name)


@pytest.mark.parametrize("folder", ["llama", "electra"], indirect=True)
def test_the_head_for_labels_is_no_target(folder):
    from launcher.models.skeleton import bare_skeleton

    model = bare_skeleton(ModelConfig(model=str(folder)), folder, None, dtype="float32", attention="sdpa", head=HEAD)

    left = unsuitable(model, labels=True)

    assert left
    assert all(not name.startswith(f"{model.base_model_prefix}.") for name in left)
