"""One adapted layer against the paper's dense formula: output, gradient, memory, merging, step 0."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    CONFIGS,
    adapted,
    config,
    dense_update,
    layers,
    lm_config,
    logits,
    one_layer,
    paper,
    randomise,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from adapters.layer import FactorLayer

pytestmark = pytest.mark.usefixtures("method")
each_method = pytest.mark.parametrize("method", CONFIGS, indirect=True)
not_lorasb = pytest.mark.not_lorasb
EVERY = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def conv1d(out, inside):
    layer = Conv1D(out, inside)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


KINDS = {
    "linear": (lambda: nn.Linear(12, 16, bias=False), (5, 12)),
    "linear with bias, three dimensions": (lambda: nn.Linear(16, 12), (2, 5, 16)),
    "Conv1D": (lambda: conv1d(12, 16), (2, 5, 16)),
    "Conv2d, kernel 1, no bias": (lambda: nn.Conv2d(16, 12, 1, bias=False), (2, 16, 5, 7)),
    "Conv2d, kernel 3, stride and padding": (lambda: nn.Conv2d(4, 12, 3, stride=2, padding=1), (2, 4, 9, 7)),
    "Conv2d, reflected edges": (lambda: nn.Conv2d(4, 12, 3, padding=1, padding_mode="reflect"), (1, 4, 6, 6)),
    "embedding": (lambda: nn.Embedding(40, 16), None),
    "narrow embedding": (lambda: nn.Embedding(12, 40), None),
    "Gemma's scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(40, 16, padding_idx=0, embed_scale=4.0), None),
}
LINEAR = ("linear", "linear with bias, three dimensions", "Conv1D")
each_kind = pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in LINEAR else not_lorasb) for k in KINDS])


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    layer = build().to(dtype)
    x = tokens(layer.num_embeddings, (3, 7)) if shape is None else torch.randn(shape, dtype=dtype)
    return layer, x


def with_matrix(layer, W):
    """The same layer with weight matrix W (out, in), as the paper's formulas write it."""
    other = copy.deepcopy(layer)
    other.weight.data = (W.T if isinstance(layer, Conv1D) else W).reshape(layer.weight.shape).clone()
    return other


def matrix_of(layer):
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight.flatten(1)).detach()


@each_method
@each_kind
@pytest.mark.parametrize(("r", "scale"), [(1, 1.0), (5, -0.7), (12, 3.0)])
def test_the_layer_is_the_papers_residual_form(method, kind, r, scale):
    """(W - scale left start right) + scale left (start + core) right for a random core."""
    layer, x = made(kind)
    W, embedding = matrix_of(layer), isinstance(layer, nn.Embedding)
    model = one_layer(copy.deepcopy(layer), r=r, scale=scale)
    core = model.base_model.model[0].maps["default"].core.detach().double()
    left, start, right = paper(W, r)

    residual = W - scale * left @ start @ right
    trained = scale * left @ start @ right + scale * dense_update(W, core, r, embedding)
    expected = with_matrix(layer, residual + trained)(x)

    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)  # float64 eps x growth, dimension 40
    assert (expected - layer(x)).norm() > 0.01 * layer(x).norm()  # and not the base


@not_lorasb
@each_method
@each_kind
def test_normalised_directions_have_norm_one(method, kind):
    layer, x = made(kind)
    W, embedding = matrix_of(layer), isinstance(layer, nn.Embedding)
    model = one_layer(copy.deepcopy(layer), r=5, normalize_directions=True)
    core = model.base_model.model[0].maps["default"].core.detach().double()

    expected = with_matrix(layer, W + dense_update(W, core, 5, embedding, normalize=True))(x)

    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@each_method
@each_kind
@pytest.mark.parametrize("options", [{}, pytest.param({"normalize_directions": True}, marks=not_lorasb)], ids=str)
def test_the_cores_gradient_is_autograds_through_the_dense_formula(method, kind, options):
    layer, x = made(kind)
    W, embedding = matrix_of(layer), isinstance(layer, nn.Embedding)
    model = one_layer(copy.deepcopy(layer), r=6, scale=0.5, **options)
    model.double()  # the core too: a float32 one rounds its gradient to 6e-8
    core = model.base_model.model[0].maps["default"].core
    dense = core.detach().clone().requires_grad_()

    W = W + 0.5 * dense_update(W, dense, 6, embedding, normalize=bool(options))
    weight = (W.T if isinstance(layer, Conv1D) else W).reshape(layer.weight.shape)
    expected = torch.func.functional_call(layer, {"weight": weight}, (x,))
    expected.square().sum().backward()
    model(x).square().sum().backward()

    assert core.dtype == torch.float64
    torch.testing.assert_close(core.grad, dense.grad, rtol=1e-10, atol=1e-10)


def test_the_gradient_reaches_the_input_through_the_adapted_weight():
    layer, x = made("linear with bias, three dimensions")
    model = one_layer(layer)
    x.requires_grad_()
    W = matrix_of(layer) + model.base_model.model[0].get_delta_weight("default").detach()

    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)

    expected = 2 * model(x).detach() @ W
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@each_method
def test_only_the_cores_train(method):
    model = get_peft_model(tiny_llama(), lm_config(r=8))

    model(tokens(), labels=tokens()).loss.backward()

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith("_map.default.core") for name in trained)
    assert sum(p.numel() for p in trained.values()) == 14 * {"svft": 34, "loldu": 8, "svfit": 8}.get(method, 64)
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in trained.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def saved_bytes(model, loss):
    """Bytes autograd keeps for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # the tensor is held, or its address would be used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = loss()
    del result
    return sum(nbytes for nbytes, _ in kept.values())


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_autograd_keeps_r_numbers_per_token_and_layer_and_no_layer_input(method, dtype, r):
    """Three layers, 60 tokens: beyond the frozen base's, the r read numbers (float32) and nothing else."""
    width, count, n_tokens = 24, 3, 60
    torch.manual_seed(0)
    blocks = [module for _ in range(count) for module in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*blocks).to(dtype)
    x = torch.randn(n_tokens, width, dtype=dtype, requires_grad=True)  # as behind an earlier adapted layer
    for p in model.parameters():
        p.requires_grad = False
    frozen = saved_bytes(model, lambda: model(x).sum())
    ours = get_peft_model(model, config(r=r, target_modules=["0", "2", "4"]))

    beyond = saved_bytes(ours, lambda: ours(x).sum()) - frozen

    assert beyond == count * 4 * r * n_tokens  # h for the core's gradient


def test_lora_keeps_more_for_the_backward_pass_than_we_do():
    """The count above means something: PEFT's LoRA at the same rank keeps the layer inputs as well."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    x = torch.randn(60, 24, requires_grad=True)
    ours = get_peft_model(copy.deepcopy(base), config(r=4, target_modules=["0", "1"]))
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["0", "1"]))

    ours_bytes, lora_bytes = (saved_bytes(m, lambda m=m: m(x).sum()) for m in (ours, lora))

    assert lora_bytes - ours_bytes >= 4 * 24 * 60  # one layer's input at least


@not_lorasb
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"r": 1000}, {"scale": 4.0}])
def test_step_0_is_the_base_bit_for_bit(dtype, options):
    base = tiny_llama().to(dtype)
    expected = logits(base)

    model = get_peft_model(base, lm_config(**options))

    assert torch.equal(logits(model), expected)


@not_lorasb
@each_kind
def test_step_0_of_every_kind_of_layer_is_the_base_bit_for_bit(kind):
    layer, x = made(kind, torch.float32)
    expected = layer(x)

    model = get_peft_model(nn.Sequential(layer), config(r=5, target_modules=["0"]))

    assert torch.equal(model(x), expected)


def test_switched_off_is_the_base_bit_for_bit():
    base = tiny_llama()
    expected = logits(base)
    model = adapted(base)
    on = logits(model)

    with model.disable_adapter():
        off = logits(model)

    assert torch.equal(off, expected)
    assert not torch.allclose(on, expected, atol=1e-3)
    assert torch.equal(logits(model), on)


def test_switching_off_while_merged_restores_the_base():
    base = tiny_llama()
    expected = logits(base)
    model = adapted(base)
    model.merge_adapter()

    with model.disable_adapter():
        off = logits(model)

    assert torch.equal(off, expected)


def two_adapters(base, **changes):
    """Adapters A (rank 8) and B (rank 5, other scale) with random cores on one base."""
    model = get_peft_model(base, lm_config(**changes), adapter_name="A")
    model.add_adapter("B", lm_config(r=5, scale=0.5, target_modules=["q_proj", "down_proj"]))
    return randomise(randomise(model, "A", seed=1), "B", seed=2).eval()


def dense_logits(base, model, names):
    """The base with the named adapters' updates added to its weights by the dense formula."""
    dense = copy.deepcopy(base)
    for layer in layers(model):
        W = dense.get_submodule(layer.name).weight.data
        for name in names:
            if name in layer.maps:
                core, r = layer.maps[name].core.detach().double(), len(layer.maps[name].values)
                W += layer.maps[name].scale * dense_update(layer.matrix().double(), core, r)
    return logits(dense)


def test_two_adapters_are_switched_added_and_deleted():
    base = tiny_llama().double()
    model = two_adapters(copy.deepcopy(base))

    seen = {}
    for names in (["A"], ["B"], ["A", "B"], ["B", "A"]):
        model.base_model.set_adapter(names)
        seen[tuple(names)] = logits(model)
        torch.testing.assert_close(seen[tuple(names)], dense_logits(base, model, names), rtol=1e-9, atol=1e-9)
    model.set_adapter("B")
    model.delete_adapter("A")

    assert torch.equal(logits(model), seen["B",])
    assert all("A" not in layer.maps for layer in layers(model))


def test_only_the_active_adapter_trains():
    model = two_adapters(tiny_llama())

    for name in ("B", "A", "B"):
        model.set_adapter(name)

        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {name}
        assert all(n.endswith("core") for n, p in model.named_parameters() if p.requires_grad)


def test_deleting_the_active_adapter_leaves_the_other_one():
    model = two_adapters(tiny_llama())
    model.set_adapter("B")
    expected = logits(model)
    model.set_adapter("A")

    with pytest.warns(UserWarning, match="Setting active adapter to B"):
        model.delete_adapter("A")

    assert torch.equal(logits(model), expected)


MERGES = [[["A"]], [["A"], ["B"]], [["B"], ["A"]], [["A", "B"]], [["B", "A"]]]


@pytest.mark.parametrize("order", MERGES, ids=str)
def test_merging_in_any_order_is_the_dense_formula_and_unmerging_is_exact(order):
    """Every update comes from the unmerged weight: one recomputed from a merged weight would be 6 % off."""
    base = tiny_llama().double()
    before = logits(base)
    model = two_adapters(copy.deepcopy(base))
    names = [name for names in order for name in names]
    expected = dense_logits(base, model, names)

    for step in order:
        model.merge_adapter(step)
    merged = logits(model)
    model.unmerge_adapter()

    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)
    for layer in layers(model):
        assert torch.equal(layer.base.weight, base.get_submodule(layer.name).weight)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@each_method
@each_kind
def test_merged_equals_unmerged_for_every_kind_of_layer(method, kind):
    layer, x = made(kind)
    model = one_layer(layer)
    expected = model(x).detach()

    model.merge_adapter()
    merged = model(x)
    plain = model.merge_and_unload()

    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain(x), merged)
    assert not any(isinstance(module, FactorLayer) for module in plain.modules())


def test_merge_and_unload_gives_a_plain_model():
    base = tiny_llama()
    names = set(base.state_dict())
    model = adapted(base)
    expected = logits(model)

    plain = model.merge_and_unload(safe_merge=True)

    assert set(plain.state_dict()) == names
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)  # float32, two layers


def test_unload_gives_the_base_back():
    base = tiny_llama()
    expected = logits(base)

    plain = adapted(base).unload()

    assert torch.equal(logits(plain), expected)


def test_merging_onto_bfloat16_loses_no_more_than_rounding_the_merged_weight():
    base = tiny_llama().bfloat16()
    model = adapted(base)
    sums = {}
    for layer in layers(model):
        core = layer.maps["default"].core.detach().double()
        sums[layer.name] = layer.matrix().double() + dense_update(layer.matrix().double(), core, 8)

    plain = model.merge_and_unload()

    for name, W in sums.items():
        merged = plain.get_submodule(name).weight
        assert merged.dtype == torch.bfloat16
        # half a bf16 step (2^-9) of rounding, and the bf16 of the write map within the update's tenth of W
        assert (merged.double() - W).norm() / W.norm() < 2**-9 + 0.1 * 2**-8


def test_safe_merge_refuses_nan_and_changes_nothing():
    base = tiny_llama()
    model = adapted(base)
    bad = layers(model)[3]
    bad.maps["default"].core.data[2] = float("nan")
    before = bad.base.weight.clone()

    with pytest.raises(ValueError, match=rf"{bad.name}: merging default gives NaN or infinite weights"):
        bad.merge(safe_merge=True)

    assert torch.equal(bad.base.weight, before)
    assert not bad.merged


def test_no_adapter_is_made_from_merged_weights():
    model = adapted(tiny_llama(), target_modules=["q_proj"])
    model.merge_adapter()

    with pytest.raises(ValueError, match="default is merged: unmerge before adding second"):
        model.add_adapter("second", lm_config(target_modules=["k_proj"]))

    assert list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    model.add_adapter("second", lm_config(target_modules=["k_proj"]))


def test_merged_weights_that_change_dtype_unmerge_in_it():
    model = adapted(tiny_llama())
    model.merge_adapter()

    model.double()
    model.unmerge_adapter()

    assert {layer.base.weight.dtype for layer in layers(model)} == {torch.float64}
    assert logits(model).dtype == torch.float64


@not_lorasb
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_of_dtype_rounds_neither_the_core_nor_the_saved_tensors(dtype):
    model = adapted(tiny_llama())
    kept = {n: t.clone() for n, t in model.state_dict().items() if "_map." in n}
    expected = logits(model)

    model.to(dtype)

    for name, tensor in model.state_dict().items():
        if "_map." in name:
            assert torch.equal(tensor, kept[name]), name
    assert {m.maps["default"].write.dtype for m in layers(model)} == {dtype}
    assert {m.maps["default"].read.dtype for m in layers(model)} == {torch.float32}
    distance = (logits(model).float() - expected).norm() / expected.norm()
    assert distance < 8 * torch.finfo(dtype).eps  # as the base itself moves: some ten roundings in a row


def test_a_deep_copy_is_the_same_function_and_shares_nothing():
    model = adapted(tiny_llama())
    expected = logits(model)

    other = copy.deepcopy(model)
    randomise(other, seed=9)

    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(other), expected)


def test_a_trip_through_another_device_keeps_the_function():
    """Only meta is available everywhere; what comes back is a state dict, as for any offloaded model."""
    model = adapted(tiny_llama())
    expected, state = logits(model), copy.deepcopy(model.state_dict())

    other = adapted(tiny_llama(), seed=7).to("meta").to_empty(device="cpu")
    other.model.model.rotary_emb = tiny_llama().model.rotary_emb  # in no state dict
    other.load_state_dict(state)

    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, triangles):
    model = adapted(tiny_llama()).train()

    def gradients():
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()

    assert plain.keys() == checkpointed.keys()
    assert len(plain) == 14
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("changes", [{}, pytest.param({"r": 32, "target_modules": EVERY}, marks=not_lorasb)], ids=str)
def test_autocast_stays_near_float32(changes, triangles):
    """At full rank too, and if a layer's output stays float32, as an embedding's does."""
    model = adapted(tiny_llama(), **changes)
    expected = logits(model)

    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(), labels=tokens()).loss.backward()
        rounded = logits(model)

    assert (rounded.float() - expected).norm() / expected.norm() < 0.03  # ten bf16 roundings (0.004) in a row
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_gpt2_is_adapted_on_its_conv1d_layers():
    base = tiny_gpt2().double()
    model = adapted(copy.deepcopy(base), r=6, target_modules=["c_attn", "c_proj", "c_fc"])

    plain = copy.deepcopy(base)
    for layer in layers(model):
        core = layer.maps["default"].core.detach().double()
        plain.get_submodule(layer.name).weight.data += dense_update(layer.matrix(), core, 6).T

    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-9, atol=1e-9)


def test_the_compiled_model_is_the_same(triangles):
    """aot_eager traces forward and backward as inductor does and needs no compiler; one graph, no breaks."""
    base = tiny_llama(num_hidden_layers=1)
    model = adapted(base, target_modules=["q_proj", "down_proj"])
    x = tokens()
    model(x, labels=x).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(x, labels=x).loss
    loss.backward()

    torch.testing.assert_close(loss, model(x, labels=x).loss, rtol=1e-6, atol=1e-6)  # float32 in another order
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)
