"""Padding after a sample needs no mask in a decoder, which is tested: without it, losses and gradients are the same."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from launcher.data.batches import collate
from launcher.data.encoded import Encoded
from launcher.training.packing import needs_padding_mask

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(3, 60)


def made(kind, **sizes):
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **SIZES, max_position_embeddings=64, **sizes)
    return AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").eval()  # two of them have dropout


def samples(*lengths):
    tokens = [torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    ends = torch.tensor(lengths).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    loss = torch.ones(int(ends[-1]), dtype=torch.bool)
    loss[offsets[:-1]] = False
    return Encoded(torch.cat(tokens).int(), loss, offsets, torch.tensor([length - 1 for length in lengths]), None)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "opt", "mixtral"])
def test_a_batch_without_a_mask_has_the_loss_and_gradients_of_one_with_it(kind):
    """mistral has a window of 6 tokens; two keys for four queries. float32, another kernel."""
    grouped = {} if kind in ("gpt2", "opt") else {"num_key_value_heads": 2}
    model = made(kind, **grouped, **({"sliding_window": 6} if kind == "mistral" else {}))

    assert not needs_padding_mask(model, model, IDS)

    found = []
    for padding_mask in (True, False):
        batch = collate(samples(17, 5, 11), [0, 1, 2], pad_id=0, padding_mask=padding_mask)
        assert ("attention_mask" in batch) == padding_mask
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for masked, plain in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-6)


def test_a_model_whose_outputs_depend_on_padding_keeps_its_mask():
    model = made("llama")
    own = model.forward

    def forward(input_ids, attention_mask=None, **rest):
        output = own(input_ids, attention_mask=attention_mask, **rest)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output.logits = output.logits / seen.sum(1)[:, None, None]
        return output

    assert needs_padding_mask(model, forward, IDS)


def test_a_model_whose_outputs_depend_on_padding_in_evaluation_alone_keeps_its_mask():
    model = made("llama")

    def forward(attention_mask=None, **batch):
        output = model(attention_mask=attention_mask, **batch)
        if not model.training and attention_mask is not None:
            output.logits = output.logits * 1.01
        return output

    assert needs_padding_mask(model, forward, IDS)


def test_a_model_that_takes_no_batch_without_a_mask_keeps_it():
    model = made("llama")

    def forward(input_ids, position_ids, attention_mask, **rest):
        return model(input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest)

    assert needs_padding_mask(model, forward, IDS)


def test_experts_that_are_balanced_keep_their_mask():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, output_router_logits=True)
    )

    assert needs_padding_mask(model, model, IDS)
