"""Optimizers beside AdamW: what they do, how they resume, and where they are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import Runs
from safetensors.torch import load_file

from launcher.config import AdapterConfig, Config, OptimizerConfig, RunConfig
from launcher.gradnormlorp import GradNormLoRP
from launcher.optimizers import OPTIMIZERS, make
from launcher.processes import Ranks
from launcher.training.resolve import resolve
from launcher.training.run import run

BESIDE = [name for name in OPTIMIZERS if name != "adamw"]


@pytest.fixture
def runs(stories, alpaca_file, tmp_path):
    """Four steps of LoRA, or of the whole model if the optimizer is for that."""
    runs = Runs(tmp_path, stories, alpaca_file)

    def base(name):
        dense = OPTIMIZERS[name].dense_only
        return replace(
            runs.base,
            adapter=AdapterConfig(method="full" if dense else "lora", rank=64, targets=("q_proj", "down_proj")),
            optimizer=replace(runs.base.optimizer, optimizer=name, max_steps=4, projection_every=3),
        )

    return runs, base


@pytest.mark.parametrize("name", BESIDE)
def test_an_optimizer_trains_and_resumes_bit_for_bit(name, runs):
    runs, base = runs
    runs.base = base(name)
    runs.alone("whole")
    runs.alone_from("again", "whole", 2)

    assert runs.events("again") == runs.events("whole")
    file = "checkpoints/step-000004/rank-00000.safetensors"
    once, twice = (load_file(runs.folder / each / file) for each in ("whole", "again"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    kept = {key.rpartition("/")[2] for key in once if key.startswith("optimizer/")}
    assert kept  # the state is in the checkpoint
    if name.endswith("8bit"):
        assert {tensor.dtype for key, tensor in once.items() if key.endswith("/state1")} >= {torch.uint8}


def test_lion_is_the_formula_of_its_paper():
    """arXiv 2302.06675, algorithm 2."""
    weight, grads = torch.randn(50), torch.randn(3, 50)
    parameter = torch.nn.Parameter(weight.clone())
    config = OptimizerConfig(optimizer="lion", learning_rate=1e-2, adam_beta2=0.99, weight_decay=0.1)
    lion = make(config, [parameter])

    momentum = torch.zeros(50)
    for grad in grads:
        parameter.grad = grad.clone()
        lion.step()
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * (0.9 * momentum + 0.1 * grad).sign()
        momentum = 0.99 * momentum + 0.01 * grad

    torch.testing.assert_close(parameter.detach(), weight)


def test_gradnormlorp_at_full_rank_is_adam_on_magnitudes_and_directions():
    """Against torch's own AdamW on g and V of W = g V / |V|, for one step, in the basis of the gradient."""
    torch.manual_seed(0)
    weight, grad = torch.randn(6, 9), torch.randn(6, 9)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad.clone()

    GradNormLoRP([parameter], lr=1e-2, rank=5).step()

    g, v = weight.norm(dim=1, keepdim=True).requires_grad_(), weight.clone().requires_grad_()
    ((g * v / v.norm(dim=1, keepdim=True)) * grad).sum().backward()
    left = torch.linalg.svd(v.grad, full_matrices=False)[0][:, :5]
    low = (left.T @ v.grad).requires_grad_()
    low.grad = low.detach().clone()
    start = low.detach().clone()
    torch.optim.AdamW([{"params": [g]}, {"params": [low]}], lr=1e-2, weight_decay=0.0).step()
    with torch.no_grad():
        v += left @ (low - start)
        wanted = g * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(parameter.detach(), wanted)


def test_gradnormlorp_keeps_less_state_than_adam():
    parameter = torch.nn.Parameter(torch.randn(64, 256))
    parameter.grad = torch.randn(64, 256)
    optimizer = GradNormLoRP([parameter], rank=4)

    optimizer.step()

    kept = sum(value.numel() for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))
    assert kept == 64 * 4 + 2 * 4 * 256 + 2 * 64 + 1  # projection, moments in it, those of the magnitudes, step


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"optimizer": "lion", "sharding": "fsdp2"}, "steps whole parameters, .* give --sharding ddp, or --optimizer"),
        (
            {"optimizer": "adamw8bit", "sharding": "zero2"},
            "--optimizer adamw8bit is not supported under --sharding zero2",
        ),
        ({"optimizer": "gradnormlorp"}, "an adapter is small already: give --method full, or --optimizer adamw"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(asked, said):
    config = Config(
        optimizer=OptimizerConfig(optimizer=asked["optimizer"]), run=RunConfig(sharding=asked.get("sharding"))
    )

    with pytest.raises(ValueError, match=said):
        resolve(config, Ranks(world_size=2))


def test_a_run_is_not_resumed_with_another_optimizer(runs, capfd):
    runs, base = runs
    runs.base = base("lion")
    runs.alone("run")
    other = replace(base("adamw"), run=replace(base("adamw").run, output=str(runs.folder / "run")))
    longer = replace(other, optimizer=replace(other.optimizer, max_steps=6))

    assert run(longer, "test") == 2

    assert "--optimizer adamw (was lion)" in capfd.readouterr().err
    assert json.loads(Path(runs.folder, "run", "config.json").read_text())["config"]["optimizer"]["optimizer"] == "lion"


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(runs):
    runs, base = runs
    runs.base = base("lion")
    runs.alone("one")
    runs.start(2, runs.entry("two", "ddp"))

    torch.testing.assert_close(runs.losses("two"), runs.losses("one"), atol=1e-4, rtol=0)  # a sign may flip near zero
