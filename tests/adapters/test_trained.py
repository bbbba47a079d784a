"""The methods whose whole update is trained: what holds for all of them, and each against its paper's formula."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import logits, tiny_gpt2, tiny_llama

from adapters import METHODS
from adapters.dsee import sparse_places
from adapters.lora_export import export_lora
from adapters.sara import dense
from adapters.schedule import for_steps, schedule_of
from adapters.trained import TrainedConfig, UpdateLayer

NAMES = [name for name, config in METHODS.items() if issubclass(config, TrainedConfig)]
EXPORTED = [name for name in NAMES if name != "sara"]


def adapted(name, model=None, **options):
    torch.manual_seed(1)
    common = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model or tiny_llama(), METHODS[name](**{**common, **options})).eval()


def randomised(name, model=None, **options):
    """With random trained numbers, so that it differs from its base."""
    made = adapted(name, model, **options)
    generator = torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def layers(model):
    return {layer.name: layer for layer in model.modules() if isinstance(layer, UpdateLayer)}


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("name", NAMES)
def test_it_starts_at_the_base_model(name, base):
    targets = "all-linear" if base is tiny_llama else ["c_attn", "c_fc"]

    assert torch.equal(logits(adapted(name, base(), target_modules=targets)), logits(base()))
    assert not torch.equal(logits(adapted(name, base(), target_modules=targets, init_weights=False)), logits(base()))


@pytest.mark.parametrize("name", NAMES)
def test_only_its_own_float32_numbers_train(name):
    model = adapted(name, tiny_llama().bfloat16())

    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(f".{name}_update.default." in key and p.dtype == torch.float32 for key, p in trained.items())
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("name", NAMES)
def test_merged_equals_unmerged_and_unmerging_restores_the_base(name, base):
    targets = "all-linear" if base is tiny_llama else ["c_attn", "c_fc"]
    model = randomised(name, base(), target_modules=targets)
    expected = logits(model)

    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()

    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)  # float32
    assert not torch.allclose(expected, logits(base()), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_gives_the_same_logits(name, tmp_path):
    model = randomised(name)
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    lean = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True).eval()

    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(lean), logits(model))


@pytest.mark.parametrize("name", EXPORTED)
def test_it_is_exported_as_a_lora(name, tmp_path):
    model = randomised(name)
    export_lora(model, tmp_path)

    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()

    assert isinstance(lora.active_peft_config, LoraConfig)
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_dense_update(name):
    """Of every trained number, against autograd through W + delta."""
    model = randomised(name, target_modules=["q_proj"])
    layer = next(iter(layers(model).values()))
    update, W = layer.maps["default"], layer.base.weight.detach()
    x, g = torch.randn(2, 5, W.shape[1], requires_grad=True), torch.randn(2, 5, W.shape[0])

    found = torch.autograd.grad((layer(x) * g).sum(), [x, *update.parameters()])

    expected = torch.autograd.grad((x @ (W + update.delta()).T * g).sum(), [x, *update.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_tied_head_and_an_embedding_are_refused(name):
    with pytest.raises(ValueError, match="shares its weight with another module"):
        adapted(name, tiny_gpt2(), target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"is a Embedding; .* supports Linear, Conv1D"):
        adapted(name, target_modules=["embed_tokens"])


def test_dsee_is_a_low_rank_product_and_a_few_entries():
    model = randomised("dsee", target_modules=["down_proj"], entries=5, alpha=8.0)
    update = next(iter(layers(model).values())).maps["default"]

    S = torch.zeros(32, 48)
    for row, column, value in zip(update.rows, update.columns, update.values, strict=True):
        S[row, column] = value
    torch.testing.assert_close(update.delta(), 2.0 * (update.U @ update.V + S))
    assert (S != 0).sum() == 5


def test_dsees_places_are_those_of_the_sparse_part_of_the_weight():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    W += 0.01 * torch.randn(40, 30, generator=generator)
    hidden = torch.randperm(W.numel(), generator=generator)[:20].sort().values
    W.view(-1)[hidden] += 8.0  # not the largest entries of W

    assert torch.equal(sparse_places(W, 3, 20), hidden)
    assert not torch.equal(W.flatten().abs().topk(20).indices.sort().values, hidden)


def test_sara_trains_the_entries_below_one_threshold_for_all_weights():
    model = adapted("sara", share=0.1)
    config = model.active_peft_config

    total = sum(layer.base.weight.numel() for layer in layers(model).values())
    counts = {}
    for name, layer in layers(model).items():
        small = (layer.base.weight.flatten().abs() < config.threshold).nonzero().flatten()
        assert torch.equal(layer.maps["default"].places, small)
        counts[name] = len(small)
    assert counts == config.sizes
    assert sum(counts.values()) == pytest.approx(0.1 * total, abs=2)


def train(model, optimizer, schedule, steps):
    for step in steps:
        ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        schedule.before_update()
        optimizer.step()
        schedule.after_update(step)
        optimizer.zero_grad()


def start(name, steps=8, **options):
    torch.manual_seed(1)
    config = METHODS[name](target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_llama(), for_steps(config, steps)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.1), schedule_of(model)


def test_sara_freezes_what_grew_above_the_threshold_at_half_of_the_run():
    model, optimizer, schedule = start("sara", nuclear=1e-3)
    train(model, optimizer, schedule, range(1, 5))
    half = {name: update.values.detach().clone() for name, update in schedule.updates.items()}

    train(model, optimizer, schedule, range(5, 9))

    for name, update in schedule.updates.items():
        W = layers(model)[name].base.weight.flatten()[update.places]
        small = (W + half[name]).abs() < model.active_peft_config.threshold
        assert 0 < small.sum() < len(small)
        assert torch.equal(half[name][~small], update.values[~small])
        assert (half[name][small] != update.values[small]).all()


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 9])
@pytest.mark.parametrize(("name", "options"), [("sara", {"nuclear": 1e-3}), ("increlora", {"r": 4, "restart": 3})])
def test_a_schedule_is_restored_bit_for_bit(name, options, stop):
    """In each of its phases."""
    model, optimizer, schedule = start(name, 12, **options)
    train(model, optimizer, schedule, range(1, stop + 1))
    again, other, restored = start(name, 12, **options)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    restored.restore(stop, {key: each.clone() for key, each in schedule.state().items()})

    train(model, optimizer, schedule, range(stop + 1, 13))
    train(again, other, restored, range(stop + 1, 13))

    one, two = model.state_dict(), again.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert schedule.summary() == restored.summary()


def test_saras_nuclear_norm_has_the_gradient_that_autograd_finds():
    model, _, schedule = start("sara", nuclear=1e-3)
    update = next(iter(schedule.updates.values()))
    W = next(iter(layers(model).values())).base.weight.detach().flatten()[update.places]
    for each in schedule.updates.values():
        each.values.grad = torch.zeros_like(each.values)

    schedule.before_update()

    M = dense(W + update.values, update.places, update.shape)
    expected = torch.autograd.grad(1e-3 * torch.linalg.matrix_norm(M, "nuc"), update.values)[0]
    torch.testing.assert_close(update.values.grad, expected, rtol=1e-3, atol=1e-6)


def test_increlora_grows_the_most_important_weights_to_the_mean_rank():
    """The scores against gradients of the whole weights, which autograd makes."""
    model, optimizer, schedule = start("increlora", 12, r=3, add=1, top_h=1, warmup=2, interval=2)
    smoothed, ranks = {name: [0.0, 0.0] for name in layers(model)}, []
    for step in range(1, 13):
        ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(step))
        found = whole_gradients(model, ids)
        for name, layer in layers(model).items():
            score = float((layer.get_delta_weight("default") * found[name]).abs().mean())
            mean, spread = smoothed[name]
            mean = 0.85 * mean + 0.15 * score
            smoothed[name] = [mean, 0.85 * spread + 0.15 * abs(score - mean)]
        before = {name: update.rank for name, update in schedule.updates.items()}
        train(model, optimizer, schedule, [step])
        grown = [name for name, update in schedule.updates.items() if update.rank > before[name]]
        best = max(smoothed, key=lambda name: smoothed[name][0] * smoothed[name][1])
        assert grown == ([best] if step > 2 and step % 2 == 0 else [])
        ranks.append(schedule.total)

    assert ranks == [4, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]
    assert model.active_peft_config.sizes == {name: update.rank for name, update in schedule.updates.items()}


def whole_gradients(model, ids):
    """dL / dW of each adapted layer's weight, of the merged model."""
    merged = copy.deepcopy(model).merge_and_unload()
    weights = {name: merged.get_submodule(name).weight.requires_grad_() for name in layers(model)}
    loss = merged(input_ids=ids, labels=ids).loss
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def test_increloras_reserve_learns_but_is_not_in_the_output():
    model, optimizer, schedule = start("increlora", 12, r=4, add=2, warmup=6)
    name, update = next(iter(schedule.updates.items()))
    reserve, unborn = update.A[1:3].detach().clone(), update.A[3:].detach().clone()

    train(model, optimizer, schedule, range(1, 4))

    assert (update.rank, update.reserve) == (1, 2)
    assert (update.A[1:3] != reserve).any(1).all()
    assert torch.equal(update.A[3:], unborn)
    assert not update.values[1:].any()
    expected = update.alpha * update.values[0] * update.B[:, :1] @ update.A[:1]
    torch.testing.assert_close(layers(model)[name].get_delta_weight("default"), expected.detach())


def test_increlora_saves_the_directions_that_it_uses(tmp_path):
    model, optimizer, schedule = start("increlora", 12, r=3)
    train(model, optimizer, schedule, range(1, 13))
    model.eval().save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()

    ranks = {name: update.rank for name, update in schedule.updates.items()}
    assert {name: len(layer.maps["default"].A) for name, layer in layers(loaded).items()} == ranks
    assert sum(ranks.values()) == 3 * len(ranks)
    assert torch.equal(logits(loaded), logits(model))


def test_flora_is_a_tucker_product():
    update = next(iter(layers(randomised("flora", target_modules=["down_proj"], scale=3.0)).values())).maps["default"]

    A, B = update.factors
    torch.testing.assert_close(update.delta(), 3 * A @ update.core @ B.T)
    assert sum(p.numel() for p in update.parameters()) == 4 * 4 + 4 * (32 + 48)


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_flora_adapts_convolutions_by_a_core_of_four_dimensions(padding, tmp_path):
    def convolution():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(6, 8, (3, 2), padding=padding, dilation=2), torch.nn.ReLU())

    torch.manual_seed(1)
    model = get_peft_model(convolution(), METHODS["flora"](r=4, target_modules=["0"]))
    x = torch.randn(2, 6, 9, 10)
    assert torch.equal(model(x), convolution()(x))
    layer = model.base_model.model[0]
    update = layer.maps["default"]
    update.core.data = torch.randn(update.core.shape)
    expected = model(x)

    A1, A2, A3, A4 = update.factors
    delta = 4 * torch.einsum("abcd,ma,nb,hc,wd->mnhw", update.core, A1, A2, A3, A4)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta.detach(), rtol=1e-4, atol=1e-5)
    assert tuple(update.core.shape) == (4, 4, 2, 2)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(convolution(), tmp_path)(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)
