"""A pass over shapes keeps as many bytes as a pass over numbers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launcher.config import AdapterConfig, Config, ModelConfig
from launcher.main_memory import OWN_MAPPING
from launcher.methods import peft_config
from launcher.models.head_loss import HeadLoss
from launcher.training import trace as tracing
from launcher.training.footprint import held, recast, sketch
from launcher.training.trace import equal_layers, trace

SHAPES = Path(__file__).parent / "shapes"


def model_folder(folder: Path, layers: int = 5, vocabulary: int = 301, **more: object) -> Path:
    """A random Llama of 0.8 million parameters."""
    config = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=128, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def batch(rows: int = 4, length: int = 48) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * length).reshape(rows, length) % 300
    mask = (torch.arange(length) < torch.linspace(length // 2, length, rows).long()[:, None]).long()
    labels = torch.where((mask > 0) & (torch.arange(length) > length // 3), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(model: nn.Module):
    forward = HeadLoss(model)
    forward.usable = True
    return lambda: forward(**batch(), num_items_in_batch=50, use_cache=False).loss


@pytest.mark.parametrize("method", ["loldu", "svfit", "lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_on_shapes_keeps_the_bytes_of_one_on_numbers(method, dtype, checkpointing, tmp_path):
    folder = model_folder(tmp_path)
    config = ModelConfig(model=str(folder), dtype=dtype, gradient_checkpointing=checkpointing)
    asked = Config(model=config, adapter=AdapterConfig(method=method, rank=8, targets=("all-linear",)))
    adapter = peft_config(asked.adapter)
    real = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if checkpointing:
        real.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapter is not None:
        from peft import get_peft_model

        real = get_peft_model(real, adapter, autocast_adapter_dtype=True)
    real.train()

    made = sketch(config, folder, asked, adapter, dtype=dtype, attention="sdpa")
    predicted = trace(made.model, loss_of(made.model), None)

    measured = trace(real, loss_of(real), None)  # the same count, of real tensors
    assert predicted.peak == pytest.approx(measured.peak, rel=0.01)
    assert predicted.operations == pytest.approx(measured.operations, rel=0.01)
    assert predicted.peak > 100_000


@pytest.mark.parametrize(("method", "vocabulary"), [("loldu", 301), ("full", 301), ("full", 9001)])
def test_a_few_equal_layers_stand_for_all(method, vocabulary, tmp_path):
    """Also where a trained embedding's gradient is larger than all that a few layers keep."""
    folder = model_folder(tmp_path, layers=9, vocabulary=vocabulary)
    config = ModelConfig(model=str(folder))
    asked = Config(model=config, adapter=AdapterConfig(method=method, rank=8))
    made = sketch(config, folder, asked, peft_config(asked.adapter), dtype="float32", attention="sdpa")
    assert made.layers is not None

    few, all_of_them = (trace(made.model, loss_of(made.model), layers) for layers in (made.layers, None))

    assert few.peak == pytest.approx(all_of_them.peak, rel=1e-3)
    assert few.operations == pytest.approx(all_of_them.operations, rel=1e-3)
    assert len(made.layers) == 9


def test_holes_add_to_what_the_heap_holds_and_not_to_what_is_mapped(tmp_path):
    folder = model_folder(tmp_path)
    config = ModelConfig(model=str(folder))
    asked = Config(model=config, adapter=AdapterConfig(method="lora", rank=8))
    made = sketch(config, folder, asked, peft_config(asked.adapter), dtype="float32", attention="sdpa")

    plain, holed = (trace(made.model, loss_of(made.model), None, holes) for holes in (0.0, 0.5))
    large, middle = (squared(size) for size in (tracing.MAPPED, 2 * OWN_MAPPING))

    assert holed.peak == holed.mapped_peak == pytest.approx(1.5 * plain.peak)
    assert large.peak == large.mapped_peak == pytest.approx(3 * tracing.MAPPED, rel=1e-3)
    assert (middle.peak, middle.mapped_peak) == pytest.approx((9 * OWN_MAPPING, 6 * OWN_MAPPING), rel=1e-3)


def squared(size: int) -> tracing.Traced:
    """The sum of squares of a tensor of so many bytes, which keeps three of its size, with holes of half of each."""
    numbers = nn.Parameter(torch.empty(size // 4, device="meta"))
    return trace(nn.ParameterList([numbers]), lambda: (numbers * numbers).sum(), None, 0.5)


def test_layers_that_differ_are_all_run():
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)])

    assert equal_layers(nn.Sequential(layers), list(layers)) is None
    assert equal_layers(nn.Sequential(layers), list(layers)[:2]) is None  # the list holds another one
    assert equal_layers(nn.Sequential(same := nn.ModuleList(layers[:2])), list(same)) is same


def test_the_parts_of_a_sketch_are_those_of_the_model():
    """Llama-2-7B: 6,738,415,616 numbers, LoLDU r 64 on q_proj and v_proj of 32 layers."""
    config = ModelConfig(model=str(SHAPES / "llama-2-7b"))
    asked = Config(model=config)
    made = sketch(config, SHAPES / "llama-2-7b", asked, peft_config(asked.adapter), dtype="bfloat16", attention="sdpa")

    parts = held(made, "none")

    assert parts.numbers == 6_738_415_616
    assert parts.weights == 2 * 6_738_415_616
    assert parts.trained_numbers == 64 * 64
    assert parts.trained == 4 * 64 * 64
    assert parts.factors == 64 * (2 * 4096 * 64 + 4 * 64 * 64)  # write in bfloat16, read in float32
    assert sum(unit.frozen for unit in parts.units) == parts.weights + parts.factors
    recast(made, "float32")
    assert held(made, "none").weights == 4 * 6_738_415_616
    assert held(made, "none").trained == parts.trained
    packed = held(made, "nf4")
    assert packed.weights == pytest.approx(0.516 * 6_476_005_376 + 4 * 262_410_240, rel=1e-3)
    assert packed.largest_packed == 4096 * 11008


def test_operations_follow_from_the_shapes(tmp_path):
    """A frozen linear layer multiplies twice its numbers by each position forward, and as often backward."""
    folder = model_folder(tmp_path)
    config = ModelConfig(model=str(folder))
    made = sketch(
        config, folder, Config(model=config), peft_config(AdapterConfig(rank=1)), dtype="float32", attention="sdpa"
    )
    linear = sum(
        m.weight.numel() for n, m in made.model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n
    )

    found = trace(made.model, loss_of(made.model), None).operations

    positions = 4 * 48
    assert 0.9 * 4 * linear * positions < found < 1.4 * 4 * linear * positions


def test_a_model_is_left_as_it_was(tmp_path):
    folder = model_folder(tmp_path)
    config = ModelConfig(model=str(folder))
    asked = Config(model=config, adapter=AdapterConfig(method="full"))
    made = sketch(config, folder, asked, None, dtype="float32", attention="sdpa")
    kernel = torch.nn.functional.scaled_dot_product_attention

    with pytest.raises(RuntimeError, match="by the model"):
        trace(made.model, lambda: (_ for _ in ()).throw(RuntimeError("by the model")), made.layers)

    assert torch.nn.functional.scaled_dot_product_attention is kernel
    assert dataclasses.is_dataclass(made)
    assert len(made.layers) == 5
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert tracing.FEW_LAYERS == 2
