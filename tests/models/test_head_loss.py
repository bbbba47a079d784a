"""The loss computed in the head is the model's own, loss and gradients, without logits of tokens that carry none."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import LoLDUConfig
from launcher.models import head_loss
from launcher.models.head_loss import HeadLoss, summed_loss

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "eos_token_id": 1, "bos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
MHA = SMALL | {"num_key_value_heads": 4}
# plain, scaled and bent logits; tied heads; a head with a bias; state-space layers
KINDS = {
    "llama": SMALL,
    "llama tied": SMALL | {"tie_word_embeddings": True},
    "gemma2": SMALL | {"sliding_window": 16},
    "gemma3_text": SMALL,
    "cohere": SMALL | {"logit_scale": 0.0625},
    "granite": SMALL | {"logits_scaling": 8.0},
    "phi": MHA,  # its head has a bias
    "gpt_neox": MHA,
    "mixtral": SMALL,
}


def tiny(kind, dtype=torch.float32):
    config = AutoConfig.for_model(kind.split()[0], **KINDS[kind])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").train()
    with torch.no_grad():  # losses far from those of a uniform guess
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def batch():
    ids = torch.randint(3, 99, (3, 20), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :7] = -100
    labels[1, 12:], mask[1, 12:] = -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "loss_off", "gradient_off"), [("float32", 1e-6, 2e-6), ("bfloat16", 1e-4, 3e-2)])
def test_loss_and_gradients_are_those_of_the_model(kind, dtype, loss_off, gradient_off):
    """bfloat16: gradients of logits are rounded before the product with the head, as autograd rounds them after it."""
    model = tiny(kind, getattr(torch, dtype))
    own = model(**batch(), num_items_in_batch=17, use_cache=False).loss
    wanted = gradients(model, own)

    ours = HeadLoss(model)
    loss = ours(**batch(), num_items_in_batch=17, use_cache=False).loss
    found = gradients(model, loss)

    assert ours.usable
    assert float(loss) == pytest.approx(float(own), rel=loss_off)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= gradient_off * gradient.norm() + 1e-9, name


@pytest.mark.parametrize(
    "adapter", [LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), LoLDUConfig(r=4, target_modules=["lm_head"])]
)
def test_an_adapter_on_the_head_keeps_its_gradients(adapter):
    model = get_peft_model(tiny("llama"), adapter)
    own = model(**batch(), num_items_in_batch=17, use_cache=False).loss
    wanted = gradients(model, own)

    ours = HeadLoss(model)
    found = gradients(model, ours(**batch(), num_items_in_batch=17, use_cache=False).loss)

    assert ours.usable
    assert any("lm_head" in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_only_tokens_with_loss_have_logits(monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK", 5)
    model = tiny("llama")
    ours = HeadLoss(model)
    ours(**batch(), num_items_in_batch=17, use_cache=False)
    before, largest, plain = ours.logits_rows, [], torch.nn.functional.linear

    def linear(inputs, weight, bias=None):
        if weight.shape[0] == 99:
            largest.append(inputs.shape[0])
        return plain(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    ours(**batch(), num_items_in_batch=17, use_cache=False)

    assert ours.logits_rows - before == int((batch()["labels"][:, 1:] != -100).sum())
    assert max(largest) == 5


def test_the_model_answers_as_before_in_between():
    model = tiny("gemma2")
    inputs = {name: part for name, part in batch().items() if name != "labels"}
    wanted = model(**inputs).logits

    ours = HeadLoss(model)
    ours(**batch(), num_items_in_batch=17, use_cache=False)

    assert torch.equal(model(**inputs).logits, wanted)


def test_a_model_that_changes_its_logits_computes_its_own_loss_and_this_is_logged(caplog):
    model = tiny("llama")
    plain = model.lm_head.forward
    own_forward = model.forward

    def squared(*args, labels=None, **kwargs):
        output = own_forward(*args, **kwargs)
        output.logits = output.logits**2 / 10
        if labels is not None:
            output.loss = model.loss_function(output.logits, labels, 99, **kwargs)
        return output

    model.forward = squared
    wanted = float(model(**batch(), num_items_in_batch=17, use_cache=False).loss)
    with caplog.at_level(logging.WARNING):
        ours = HeadLoss(model)
        loss = ours(**batch(), num_items_in_batch=17, use_cache=False).loss

    assert ours.usable is False
    assert float(loss) == pytest.approx(wanted)
    assert "more than a factor" in caplog.text
    assert plain is not None


def test_dropout_does_not_count_as_a_difference():
    model = tiny("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ours = HeadLoss(model)

    ours(**batch(), num_items_in_batch=17, use_cache=False)

    assert ours.usable
    assert model.training


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 0.0), (1.0, 3.0), (2.0, 5.0)])
def test_the_summed_loss_has_the_gradients_of_autograd(scale, cap, monkeypatch):
    """In float64, against cross_entropy, in chunks that do not divide the number of tokens."""
    monkeypatch.setattr(head_loss, "CHUNK", 4)
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    bias, targets = torch.randn(9, dtype=torch.float64, requires_grad=True), torch.randint(0, 9, (11,))
    logits = scale * (hidden @ weight.T + bias)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 7
    expected = torch.autograd.grad(wanted, (hidden, weight, bias))

    loss = summed_loss(hidden, weight, bias, targets, scale=scale, cap=cap, divisor=7)
    found = torch.autograd.grad(3 * loss, (hidden, weight, bias))

    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    for ours, autograd in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, 3 * autograd, rtol=1e-5, atol=1e-5)
