"""What an adapted layer adds to a training step, counted exactly: a change that makes it more expensive fails here,
without timing.

T tokens, a Linear of m outputs and n inputs, rank r; the base stands behind an earlier adapted layer, so the gradient
goes through its input too. "Beyond" is against the frozen Linear alone.
"""

from collections import Counter
from functools import partial

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import one_layer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

T, M, N, R = 60, 48, 40, 8
PRODUCTS = {"mm", "addmm"}


class Recorder(TorchDispatchMode):
    """Every operation that computes: its name, and the new memory it returns as (elements, dtype)."""

    def __init__(self):
        super().__init__()
        self.names, self.made = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(result) if t.untyped_storage().data_ptr() not in given]
        name = func.overloadpacket.__name__
        if made or name.endswith("_"):  # views do neither
            self.names[name] += 1
            self.made.update((t.numel(), t.dtype) for t in made)
        return result


def step_of(model, dtype):
    """The operations of one forward and backward pass, with a given gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, T // 2, N, generator=generator).to(dtype).requires_grad_()
    g = torch.randn(2, T // 2, M, generator=generator).to(dtype)
    model(x).backward(g)  # the cores' gradients exist from here on
    x.grad = None
    with Recorder() as recorder:
        model(x).backward(g)
    return recorder


def beyond(dtype, **options):
    torch.manual_seed(0)
    linear = nn.Linear(N, M, bias=False).to(dtype).requires_grad_(False)
    floor = step_of(linear, dtype)
    ours = step_of(one_layer(linear, r=R, **options), dtype)
    assert not (floor.names - ours.names) | (floor.made - ours.made)
    return ours.names - floor.names, ours.made - floor.made


@pytest.mark.parametrize("normalize", [False, True])
def test_a_float32_layer_adds_four_products_and_two_tensors_of_its_outputs_size(normalize):
    names, made = beyond(torch.float32, normalize_directions=normalize)

    assert names == {
        "index_select": 1,  # y0[rows]
        "mm": 3,  # Read; backward: through Write, through Read
        "mul": 3,  # the core; backward: the gradients of the core and of h
        "addmm": 1,  # Write, onto y0
        "sum": 1,  # the core's gradient over tokens
        "index_add": 1,  # the gradients of y0 and of y0[rows], into one new tensor
        "add_": 1,  # into the core's gradient
    }
    assert made == {
        (T * M, torch.float32): 2,  # the output, and the gradient of the base's
        (T * R, torch.float32): 3 + 4,  # y0[rows], h, core * h; backward: four of theirs, one for the core's gradient
        (R, torch.float32): 1,
    }


def test_a_bfloat16_layer_casts_r_numbers_per_token_and_nothing_of_the_outputs_size():
    names, made = beyond(torch.bfloat16)

    assert names == {
        "index_select": 1,
        "_to_copy": 4,  # of r numbers per token: into Read, out of the core, and both ways back
        "mm": 3,
        "mul": 3,
        "addmm": 1,
        "sum": 1,
        "index_add": 1,
        "add_": 1,
    }
    assert made == {
        (T * M, torch.bfloat16): 2,
        (T * R, torch.bfloat16): 4,
        (T * R, torch.float32): 7,
        (R, torch.float32): 1,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_costs_two_products_of_r_numbers(dtype):
    """scale * core once forward, scale times its gradient backward."""
    names, made = beyond(dtype)
    scaled_names, scaled_made = beyond(dtype, scale=2.0)

    assert scaled_names - names == {"mul": 2}
    assert scaled_made - made == {(R, torch.float32): 2}


def test_lora_does_more_of_everything():
    """The counts above mean something: PEFT's LoRA at the same rank."""
    torch.manual_seed(0)
    linear = nn.Linear(N, M, bias=False).requires_grad_(False)
    floor = step_of(linear, torch.float32)
    lora = step_of(get_peft_model(nn.Sequential(linear), LoraConfig(r=R, target_modules=["0"])), torch.float32)
    ours, made = beyond(torch.float32)

    lora_names, lora_made = lora.names - floor.names, lora.made - floor.made

    assert products(lora_names) == 6 > products(ours)
    assert bytes_of(lora_made) > 1.9 * bytes_of(made)


def test_function_transforms_and_forward_gradients_agree_with_backward(triangles):
    """float64, one product in another order: 1e-12."""
    model = one_layer(nn.Linear(N, M).double(), r=R)
    x, v = torch.randn(2, 3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    jacobian = torch.func.vmap(torch.func.jacrev(model))(x)
    _, along = torch.func.jvp(model, (x,), (v,))

    assert torch.allclose(torch.einsum("tmn,tn->tm", jacobian, v), along, rtol=0, atol=1e-12)


def products(names):
    return sum(count for name, count in names.items() if name in PRODUCTS)


def bytes_of(made):
    return sum(count * numel * dtype.itemsize for (numel, dtype), count in made.items())


@pytest.mark.parametrize("kind", ["loldu", "svfit"])
@pytest.mark.parametrize("bias", [False, True])
def test_selective_checkpointing_that_keeps_products_changes_no_gradient(kind, bias, triangles, monkeypatch):
    """It passes the base layer's own output to the second forward pass, so nothing may have overwritten it.

    Equal bit for bit: the same operations on the same numbers.
    """
    monkeypatch.setattr(tiny_models, "METHOD", kind)
    model = one_layer(nn.Linear(N, M, bias=bias), r=R)
    core = next(p for p in model.parameters() if p.requires_grad)
    x = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(1), requires_grad=True)
    keep_products = partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    )

    plain = torch.autograd.grad(model(x).square().sum(), [x, core])
    kept = torch.autograd.grad(
        checkpoint(model, x, use_reentrant=False, context_fn=keep_products).square().sum(), [x, core]
    )

    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiler_takes_the_adapted_model_in_one_graph(bias, dtype, triangles):
    model = one_layer(nn.Linear(N, M, bias=bias).to(dtype), r=R)

    found = torch._dynamo.explain(model)(torch.randn(2, 3, N, dtype=dtype))

    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
