"""bfloat16 products in float32 are those that torch computes, forwards and backwards."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # whose scripts import each other by name

import float32_products
from float32_products import Float32Products, products


def test_outputs_and_gradients_are_the_exact_products_rounded_once():
    torch.manual_seed(0)
    layer = nn.Linear(70, 50, dtype=torch.bfloat16)
    exact = nn.Linear(70, 50, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    given = torch.randn(3, 40, 70, dtype=torch.bfloat16, requires_grad=True)

    with Float32Products():
        out = layer(given)
        out.backward(torch.ones_like(out))
    wide = given.detach().double().requires_grad_()
    exact(wide).backward(torch.ones(3, 40, 50, dtype=torch.float64))

    rounded_once = {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(out.double(), exact(wide.detach()), **rounded_once)
    torch.testing.assert_close(given.grad.double(), wide.grad, **rounded_once)
    torch.testing.assert_close(layer.weight.grad.double(), exact.weight.grad, **rounded_once)


def test_only_a_cpu_without_instructions_for_bfloat16_gets_them(monkeypatch):
    for reason, kind in (("no instructions", True), (None, False)):
        monkeypatch.setattr(float32_products, "emulated_bfloat16", lambda reason=reason: reason)

        assert isinstance(products(), Float32Products) == kind
