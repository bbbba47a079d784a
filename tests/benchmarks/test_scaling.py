"""The scaling model: its counts are those of real models, its bytes those of a real network."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import LoLDUConfig
from benchmarks import scaling, scaling_network

SMALL = scaling.Base("small", hidden=64, intermediate=176, layers=2, key_value=32, vocabulary=100)


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(("base", "published"), [(0, 6_738_415_616), (1, 13_015_864_320), (2, 68_976_648_192)])
def test_the_bases_have_the_published_number_of_parameters(base, published):
    assert scaling.BASES[base].linear + scaling.BASES[base].rest == published


def test_every_method_trains_and_holds_what_a_real_model_of_it_does():
    lora = get_peft_model(small_llama(), LoraConfig(r=8, target_modules="all-linear"))
    loldu = get_peft_model(small_llama(), LoLDUConfig(r=48, target_modules="all-linear"))
    factors = [(part.write.numel(), part.read.numel()) for part in loldu.modules() if hasattr(part, "core")]

    def trained(model):
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    assert scaling.Method("full", 0).trained(SMALL) == trained(small_llama())
    assert scaling.Method("LoRA r 8", 8).trained(SMALL) == trained(lora)
    assert scaling.Method("LoLDU r 48", 48).trained(SMALL) == trained(loldu)
    assert scaling.Method("LoLDU r 48", 48).factors(SMALL) == tuple(map(sum, zip(*factors, strict=True)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 1024])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(ranks):
    sent = scaling.all_reduce_bytes(1000.0, ranks)

    assert sent == pytest.approx(2 * scaling.gather_bytes(1000.0, ranks))  # rounding
    assert sent < 2000
    assert (sent == 0) == (ranks == 1)


def test_trees_are_taken_where_they_are_quicker():
    """For few bytes over many ranks only latency matters; for many bytes over few ranks a ring sends less."""
    few, many = (64, 1e9, 1e-5), (2, 1e9, 1e-5)

    assert scaling.all_reduce_s(8.0, *few, trees=True) == pytest.approx(12 * 1e-5, rel=0.01)  # 2 log2(64) messages
    assert scaling.all_reduce_s(8.0, *few) == pytest.approx(126 * 1e-5, rel=0.01)  # 2 (64 - 1)
    assert scaling.all_reduce_s(1e9, *many, trees=True) == scaling.all_reduce_s(1e9, *many)


def test_one_node_sends_nothing_and_a_slower_link_is_never_quicker():
    rows = scaling.table()

    assert all(row["sent_bytes_per_node"] == 0 for row in rows if row["gpus"] <= 8)
    by_link = {}
    for row in rows:
        by_link.setdefault((row["base"], row["method"], row["sharding"], row["gpus"]), []).append(row["step_s"])
    rounding = 1 + 1e-9
    assert all(a <= b * rounding and b <= c * rounding for a, b, c in by_link.values())  # 400, 10 and 1 Gb/s


@pytest.mark.slow
@pytest.mark.skipif(scaling_network.why_not() is not None, reason=str(scaling_network.why_not()))
def test_two_real_processes_send_the_predicted_bytes_and_wait_the_predicted_time():
    """12 s. To the byte; and within a quarter in time, where the network takes most of the step: LoRA at 40 Mb/s waits
    0.25 s and computes 0.03 s (measured: 4 to 7 % slower than predicted; a busy machine makes computing uneven)."""
    small, large = scaling_network.measure(2, ["loldu 64", "lora 16"], [40.0], steps=4)

    assert small["predicted_bytes"] == 2 * 4 * (4 * 7 * 64 + 2) + 24 * 48
    for case in (small, large):
        again = case["segments_sent_again"] * 1500 / 4  # bytes a step; TCP repeats what the limit drops
        assert case["predicted_bytes"] <= case["sent_bytes_a_step"] <= case["predicted_bytes"] + 2 * again
    assert abs(large["error"]) < 0.25
    assert large["step_s"] > 2 * large["computing_s"]
