"""Experts that are modules in a list: each process calls those that its tokens reach, so its gradients are others."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from launcher.config import OptimizerConfig
from launcher.engines import fsdp2
from launcher.engines.engine import engine_class
from launcher.engines.experts import expert_lists
from launcher.engines.registry import ENGINES
from launcher.processes import Ranks


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])

    def forward(self, x, chosen):
        return self.experts[chosen](x)


class Model(nn.Module):
    _no_split_modules = ("Layer",)

    def __init__(self):
        super().__init__()
        self.layer = Layer()

    def forward(self, x, chosen):
        return self.layer(x, chosen)


def _one_rank(rank, name, address, sent):
    """A step in which rank 0 calls expert 0, with a gradient of 0.5, and rank 1 expert 1, with one of 1."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        name, _, torch_without = name.partition(" of a torch without ")
        if torch_without:
            delattr(FSDPModule, torch_without)
        ranks, info, config = Ranks(rank, 2, rank, 2), ENGINES[name], OptimizerConfig(batch_size=2)
        torch.manual_seed(0)
        model = Model()
        if not info.holds_base:
            fsdp2.shard(model, fsdp2.shard_mesh(ranks, torch.device("cpu"), 2))
        engine = engine_class(name)(model, config, ranks, info)
        engine.backward(engine.forward(torch.full((1, 4), rank + 1.0), rank).sum() / 2)
        engine.reduce([torch.zeros(())])
        grads = [parameter.grad for parameter in model.parameters()]
        sent.put([grad.full_tensor().mean().item() if info.averages else grad.mean().item() for grad in grads])
    except ValueError as error:
        sent.put(str(error))
    finally:
        dist.destroy_process_group()


def two_ranks(name, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    sent, address = spawn.Queue(), f"file://{tmp_path}/store"
    ranks = [spawn.Process(target=_one_rank, args=(rank, name, address, sent)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [sent.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_no_expert_gets_the_gradient_of_another(name, tmp_path):
    assert two_ranks(name, tmp_path) == [[0.5, 1.0, 0.0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "fsdp2 of a torch without set_reduce_scatter_unused_params"])
def test_an_engine_that_mixes_them_up_is_refused(name, tmp_path):
    pytest.importorskip("deepspeed")

    assert all("experts of layer.experts are separate modules" in said for said in two_ranks(name, tmp_path))


def test_zero3_which_would_gather_parts_of_different_experts_is_refused():
    pytest.importorskip("deepspeed")

    with pytest.raises(ValueError, match=r"experts of layer.experts .*Give --sharding ddp"):
        engine_class("zero3").check_base(Model())


def test_only_lists_of_several_experts_count():
    model = Model()
    model.layer.list = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.expert = nn.ModuleDict({"default": nn.Linear(2, 2)})
    assert expert_lists(model, trained=True) == ["layer.experts"]

    model.layer.experts.requires_grad_(False)

    assert expert_lists(model, trained=True) == []
    assert expert_lists(model, trained=False) == ["layer.experts"]
