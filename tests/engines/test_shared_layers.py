"""Layers that share their weights (Zamba 2) train on two processes as on one: each weight is averaged once."""

from dataclasses import replace

import pytest
import torch
from launching import Runs
from transformers import AutoTokenizer, Zamba2Config, Zamba2ForCausalLM

from launcher.config import AdapterConfig

CURVE = 5e-6  # float32: the same sums in another order
CHANGES = {
    "loldu": AdapterConfig(method="loldu", rank=4, targets=("all-linear",)),
    "full": AdapterConfig(method="full"),
}


@pytest.fixture(scope="module")
def runs(stories, alpaca_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    config = Zamba2Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, attention_head_dim=16, attention_hidden_size=64, mamba_d_state=8, mamba_d_conv=4,
        n_mamba_heads=4, mamba_headdim=16, mamba_ngroups=1, num_mem_blocks=1, adapter_rank=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    Zamba2ForCausalLM(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder / "base")
    runs = Runs(folder, folder / "base", alpaca_file)
    runs.base = replace(
        runs.base,
        data=replace(runs.base.data, eval_records=0),
        optimizer=replace(runs.base.optimizer, max_steps=3),
        run=replace(runs.base.run, save_every=0),
    )
    for name, adapter in CHANGES.items():
        runs.alone(name, change=lambda config, adapter=adapter: replace(config, adapter=adapter))
    runs.start(
        2,
        *(
            runs.entry(f"{name}-ddp", "ddp", change=lambda config, adapter=adapter: replace(config, adapter=adapter))
            for name, adapter in CHANGES.items()
        ),
    )
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_layers_that_share_weights_train_on_two_processes_as_on_one(runs, name):
    alone = runs.losses(name)

    assert len(set(alone)) == 3
    torch.testing.assert_close(runs.losses(f"{name}-ddp"), alone, atol=CURVE, rtol=0)
