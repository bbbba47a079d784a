"""What an adapted layer adds to a training step, counted exactly: a change that makes it dearer fails here, untimed.

T tokens, a Linear of m outputs and n inputs, rank r; the base stands behind an earlier adapted layer, so the gradient
goes through its input too. "Beyond" is against the frozen Linear alone.
"""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import one_layer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T, M, N, R = 60, 48, 40, 8
PRODUCTS = {"mm", "addmm", "addmm_"}


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
    """The operations of one forward and backward pass, with a gradient that is at hand."""
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
def test_a_float32_layer_adds_four_products_and_one_pass_over_its_output(normalize):
    names, made = beyond(torch.float32, normalize_directions=normalize)

    assert names == {
        "index_select": 1,  # y0[rows]
        "mm": 3,  # Read; backward: through Write, through Read
        "mul": 3,  # the core; backward: the gradients of the core and of h
        "addmm_": 1,  # Write, onto y0 itself
        "sum": 1,  # the core's gradient over tokens
        "index_add": 1,  # the gradients of y0 and of y0[rows], into one new tensor
        "add_": 1,  # into the core's gradient
    }
    assert made == {
        (T * M, torch.float32): 1,  # the only one of the output's size
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
        "addmm_": 1,
        "sum": 1,
        "index_add": 1,
        "add_": 1,
    }
    assert made == {
        (T * M, torch.bfloat16): 1,
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
    assert bytes_of(lora_made) > 2 * bytes_of(made)


def products(names):
    return sum(count for name, count in names.items() if name in PRODUCTS)


def bytes_of(made):
    return sum(count * numel * dtype.itemsize for (numel, dtype), count in made.items())


def test_what_a_hook_has_kept_is_not_written_over():
    """A hook on the base layer may hold its output; the result is the same bit for bit."""
    model = one_layer(nn.Linear(N, M, bias=False), r=R)
    x, kept = torch.randn(3, N), []
    expected = model(x)
    base = model.base_model.model[0].base_layer

    base.register_forward_hook(lambda layer, inputs, output: kept.append(output))
    found = model(x)

    assert torch.equal(kept[0], nn.functional.linear(x, base.weight))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiler_takes_the_adapted_model_in_one_graph(bias, dtype):
    model = one_layer(nn.Linear(N, M, bias=bias).to(dtype), r=R)

    found = torch._dynamo.explain(model)(torch.randn(2, 3, N, dtype=dtype))

    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
