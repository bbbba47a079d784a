"""The forward pass's own functions against their plain formulas, and what they save."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from tiny_models import layers, one_layer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adapters.functions import add_rows, lower_linear, take_rows


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("r", [1, 3, 4, 7, 12, 40])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_triangle_in_blocks_is_the_whole_product(small_blocks, r, shuffled):
    """Also backward and along a direction; in float64, sums in another order: 1e-12."""
    L, x = random(r, r).tril(), random(2, 5, r, seed=1).requires_grad_()
    rows = torch.randperm(r, generator=torch.Generator().manual_seed(2)) if shuffled else None
    given = L if rows is None else torch.empty_like(L).index_copy_(0, rows, L)

    y = lower_linear(x, given, rows)

    torch.testing.assert_close(y, F.linear(x, L), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: lower_linear(x, given, rows), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: lower_linear(x, given, rows), x)


def test_rows_are_taken_and_added_to_as_by_indexing():
    y0, added, rows = (
        random(2, 5, 7).requires_grad_(),
        random(2, 5, 3, seed=1).requires_grad_(),
        torch.tensor([5, 0, 2]),
    )
    expected = y0.clone()
    expected[..., rows] += added

    taken = take_rows(y0, rows)
    sum_ = add_rows(y0, added, rows)

    assert torch.equal(taken[0], y0)
    assert torch.equal(taken[1], y0[..., rows])
    assert torch.equal(sum_, expected)
    assert torch.autograd.gradcheck(lambda y0: take_rows(y0, rows), y0, check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda y0, added: add_rows(y0, added, rows), (y0, added), check_forward_ad=True)


def test_torch_binds_a_signature_in_transforms_alone(monkeypatch, small_blocks):
    """It takes the host longer than the rest of the call. Gradients are equal bit for bit."""
    bound, own = [], inspect.signature
    monkeypatch.setattr(torch.autograd.function.inspect, "signature", lambda f, **how: bound.append(f) or own(f, **how))
    y0, added, rows, L = (
        random(2, 5, 7),
        random(2, 5, 4, seed=1),
        torch.tensor([5, 0, 2, 3]),
        random(4, 4, seed=2).tril(),
    )

    def loss(y0, added):
        y, taken = take_rows(y0, rows)
        return add_rows(y, lower_linear(taken * added, L), rows).square().sum()

    given = [y0.clone().requires_grad_(), added.clone().requires_grad_()]
    plain = torch.autograd.grad(loss(*given), given)
    outside = len(bound)
    transformed = torch.func.grad(loss, argnums=(0, 1))(y0, added)

    assert outside == 0
    assert len(bound) >= 3
    assert all(torch.equal(a, b) for a, b in zip(plain, transformed, strict=True))


@pytest.mark.parametrize(
    ("tokens", "r", "share"), [(256, 511, 1), (256, 512, 5 / 8), (256, 1024, 9 / 16), (255, 1024, 1)]
)
def test_the_share_of_multiplications_that_is_left(tokens, r, share):
    x, L = torch.zeros(tokens, r, requires_grad=True), torch.eye(r)

    for rows in (None, torch.arange(r)):
        with FlopCounterMode(display=False) as counted:
            lower_linear(x, L, rows).sum().backward()

        assert counted.get_total_flops() == 2 * 2 * tokens * r * r * share


KINDS = {
    "square": lambda: nn.Linear(12, 12, bias=False),
    "wide, with bias": lambda: nn.Linear(16, 12),
    "tall": lambda: nn.Linear(12, 16),
    "embedding": lambda: nn.Embedding(40, 12),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [9, 12])
def test_a_layer_with_its_triangles_in_blocks_is_the_same_layer_for_less(kind, r, request):
    """Output, and the gradients of core and input; float64, sums in another order: 1e-12."""
    torch.manual_seed(0)
    model = one_layer(KINDS[kind]().double(), r=r).double()
    (layer,) = layers(model)
    x = torch.arange(35).view(5, 7) if kind == "embedding" else random(5, 7, layer.base.in_features).requires_grad_()

    def step():
        model.zero_grad()
        x.grad = None
        with FlopCounterMode(display=False) as counted:
            y = model(x)
            y.square().sum().backward()
        return [y, layer.maps["default"].core.grad, *([x.grad] if x.requires_grad else [])], counted.get_total_flops()

    whole, flops = step()
    request.getfixturevalue("small_blocks")
    blocks, fewer = step()

    for a, b in zip(blocks, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    left_out = {9: 3 * (6 + 3), 12: 3 * (9 + 6 + 3)}[r]  # right of each block of three rows
    reads = 1 if kind == "embedding" else 2  # forward, and backward where something below is trained
    writes = 2 if r == 12 and kind != "tall" else 0  # at full rank Write is a triangle too
    assert flops - fewer == 2 * 35 * left_out * (reads + writes)


@pytest.mark.parametrize("rank", [8, 12])
def test_nothing_more_is_kept_for_blocks(rank, request):
    """One number a token and direction, for the core's gradient; no map in another order."""
    model = one_layer(nn.Linear(16, 12, bias=False), r=rank)

    def kept():
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        sizes = []
        pack = lambda t: sizes.append(t.numel() * (t.untyped_storage().data_ptr() not in own)) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.ones(5, 16, requires_grad=True))
        return sum(sizes)

    whole = kept()
    request.getfixturevalue("small_blocks")

    assert kept() == whole == 5 * rank
