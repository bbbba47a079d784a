"""Samples in one row behind the beginning they share: the same losses and gradients as padded rows, or not used."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from launcher.data.batches import collate
from launcher.data.encoded import Encoded
from launcher.data.joined import join, shared_beginning
from launcher.models import joined
from launcher.tasks.joining import check_joined

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(3, 60)


@pytest.fixture(autouse=True)
def registered():
    joined.register()


def made(kind, **sizes):
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **SIZES, max_position_embeddings=64, **sizes)
    return AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").eval()


def samples(shared, *lengths, prompt=2):
    """So many tokens that all share, then random ones; the loss begins `prompt` tokens after the shared ones."""
    beginning = torch.arange(3, 3 + shared)
    drawn = torch.Generator().manual_seed(0)
    rests = [torch.randint(3, 60, (length,), generator=drawn) for length in lengths]
    tokens = [torch.cat([beginning, rest]) for rest in rests]
    offsets = torch.tensor([0, *(len(part) for part in tokens)]).cumsum(0)
    loss = torch.cat([torch.arange(len(part)) >= max(1, shared + prompt) for part in tokens])
    targets = torch.tensor([int(part.sum()) for part in loss.split(offsets.diff().tolist())])
    return Encoded(torch.cat(tokens).int(), loss, offsets, targets, None)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "phi", "qwen3", "gpt_neox", "mixtral"])
@pytest.mark.parametrize(("shared", "lengths"), [(7, (17, 5, 11)), (0, (9, 4)), (12, (3, 3, 3)), (5, (8,))])
def test_a_joined_batch_has_the_loss_and_gradients_of_a_padded_one(kind, shared, lengths):
    grouped = {"num_key_value_heads": 2} if kind in ("llama", "qwen3", "mixtral") else {}
    model, data = made(kind, **grouped), samples(shared, *lengths)
    rows, found = list(range(len(lengths))), []

    for batch in (collate(data, rows, pad_id=0, padding_mask=False), join(data, rows)):
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))

    once = shared if len(lengths) > 1 else 0
    assert batch["input_ids"].shape == (1, int(data.offsets[-1]) - once * (len(lengths) - 1))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
    for padded, one_row in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one_row, padded, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral"])
def test_models_that_keep_samples_apart_are_found(kind):
    without_dropout = {
        "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        "opt": {"dropout": 0.0},
        "mixtral": {"num_key_value_heads": 2},
    }
    model = made(kind, **without_dropout.get(kind, {}))

    assert check_joined(model, model, IDS, 64) == ""
    assert not model.training


def test_models_that_do_not_are_named_with_the_reason(monkeypatch):
    windowed, dropped, plain = made("mistral", sliding_window=6), made("llama"), made("llama")
    dropped.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
    balanced = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, output_router_logits=True))

    def takes_no_samples(input_ids, position_ids):
        return plain(input_ids, position_ids=position_ids)

    assert check_joined(windowed, windowed, IDS, 64) == "this model looks 6 tokens back"
    assert check_joined(dropped, dropped, IDS, 64) == "dropout is drawn for each sample"
    assert check_joined(dropped, dropped, IDS, 64, training=False) == ""  # nothing is dropped in evaluation
    assert check_joined(balanced, balanced, IDS, 64) == "the loss that balances experts counts each token"
    assert "TypeError" in check_joined(plain, takes_no_samples, IDS, 64)

    def apart(*args, samples=None, **rest):
        return sdpa_attention_forward(*args, **rest)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", apart)

    assert "with another's tokens" in check_joined(plain, plain, IDS, 64)


def test_a_model_that_keeps_samples_apart_in_training_alone_is_refused():
    model = made("llama")

    def forward(**batch):
        output = model(**batch)
        if not model.training:  # a token sees the one before it, of another sample too
            output.logits = output.logits + output.logits.roll(1, dims=1)
        return output

    assert "differ by" in check_joined(model, forward, IDS, 64)


@pytest.mark.parametrize(("longest", "ours"), [(40, True), (joined.SHORT, False)])
def test_short_rows_in_bfloat16_have_the_gradients_of_float32(longest, ours, monkeypatch):
    """Two keys for four queries; padding and a shared beginning. Torch's own backward pass is 0.5 % off."""
    data, used, own = samples(6, longest - 6, 9, 20), [], joined.FLASH_BACKWARD
    batch = join(data, [0, 1, 2])
    drawn, count = torch.Generator().manual_seed(0), batch["input_ids"].shape[1]
    given = [torch.randn(1, heads, count, 16, generator=drawn).bfloat16() for heads in (4, 2, 2)]
    d_out = torch.randn(1, count, 4, 16, generator=drawn).bfloat16()
    monkeypatch.setattr(joined, "FLASH_BACKWARD", lambda *args, **rest: used.append(1) or own(*args, **rest))
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    found = []

    for dtype in (torch.bfloat16, torch.float32):
        parts = [part.to(dtype).requires_grad_() for part in given]
        out, _ = joined.joined_attention(module, *parts, None, scaling=0.2, samples=batch["samples"])
        found.append((out.float(), *torch.autograd.grad(out, parts, d_out.to(dtype))))

    assert len(used) == ours
    for narrow, wanted in zip(*found, strict=True):
        assert (narrow.float() - wanted).norm() < (4e-3 if ours else 8e-3) * wanted.norm()


def test_a_batch_of_rows_is_computed_as_before():
    model, ids, mask = made("llama"), torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0

    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        wanted = model(ids, attention_mask=mask).logits

    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


def test_the_shared_beginning_ends_before_the_token_that_predicts_what_differs():
    def shared(*rows):
        ids = [torch.tensor([token for token, _ in row]) for row in rows]
        return shared_beginning(ids, [torch.tensor([loss for _, loss in row]) for row in rows])

    words = [(token, False) for token in (5, 6, 7, 8)]
    assert shared([*words, (9, True)]) == 0  # a sample alone shares nothing
    assert shared([*words, (9, True)], [*words, (10, True)]) == 3  # 8 predicts 9 and 10: it is computed in each
    assert shared([*words, (1, False), (9, True)], [*words, (2, False), (9, True)]) == 4
    assert shared([*words, (9, True)], [*words[:2], (1, False), (2, False), (9, True)]) == 2
    assert shared([*words, (9, True)], [(5, False), (6, True), (7, True)]) == 0
    assert shared([*words], [*words]) == 3  # one token of each sample stays
