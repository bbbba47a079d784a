"""A NaN gradient stops a run before it reaches a parameter; a parameter without a gradient is named."""

import os
import sys

import pytest
import torch
from launching import REPO, Runs, finish, start
from several_runs import poisoned
from torch import nn
from torch.distributed.fsdp import fully_shard

from launcher.config import OptimizerConfig
from launcher.data.batches import batch_indices
from launcher.engines.engine import NonFinite, engine_class
from launcher.engines.fsdp2 import shard_mesh
from launcher.engines.registry import ENGINES
from launcher.engines.replicated import Replicated
from launcher.processes import Ranks, open_alone
from launcher.training import loop
from launcher.training.checkpoint import newest
from launcher.training.run import run

SHARDED = ["ddp", "fsdp2", "zero2", "zero3"]
STEP = 5


def sample_of_step(step, samples=63, batch=4, seed=42):
    """A sample of that step of `Runs`' training, by the same plan."""
    return batch_indices(seed, step - 1, batch, samples)[2]


class Half(nn.Module):
    """Calls one of its layers and reads the weight of the other only to detach it."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.called(x) + self.read.weight.detach().sum()


def assert_stopped_soundly(runs, name, error, sample, together=1):
    """The run ended before step 5, which names the sample, and its newest checkpoint is that of step 4, all finite."""
    assert f"at step {STEP} and the gradient of" in error
    assert "is NaN or infinite; samples" in error
    named = error.partition("; samples ")[2].partition(" (from 0")[0].split(", ")
    assert str(sample) in named
    assert len(named) == together
    assert [event["step"] for event in runs.events(name) if "loss" in event] == [1, 2, 3, 4]
    found = newest(runs.folder / name / "checkpoints")
    assert found.step == STEP - 1
    assert all(found.read(name, each.shape).isfinite().all() for name, each in found.tensors.items())
    assert (runs.folder / name / "state").read_text() == "failed\n"


def test_a_nan_gradient_stops_the_run_before_the_update_and_names_the_sample(
    stories, alpaca_file, tmp_path, monkeypatch, capsys
):
    runs, sample = Runs(tmp_path, stories, alpaca_file), sample_of_step(STEP)
    monkeypatch.setattr(loop, "batch_loss", poisoned(sample))

    assert run(runs.config("poisoned"), "test") == 2

    assert_stopped_soundly(runs, "poisoned", " ".join(capsys.readouterr().err.split()), sample)


@pytest.mark.slow
def test_under_every_engine_nothing_is_updated_by_a_nan_gradient(stories, alpaca_file, tmp_path):
    runs, sample = Runs(tmp_path, stories, alpaca_file), sample_of_step(STEP)
    how = {"poison": sample, "code": 2}

    said = runs.start(2, *(runs.entry(name, name, how=how) for name in SHARDED))

    errors = [line for line in said.splitlines() if "error: the loss is" in line]
    assert len(errors) == len(SHARDED)
    for name, error in zip(SHARDED, errors, strict=True):
        assert_stopped_soundly(runs, name, error, sample, together=2)  # both ranks' samples of that pass


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_update_raises_with_the_names_and_changes_nothing(value):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    engine, before = Replicated(model, OptimizerConfig(), Ranks()), [p.clone() for p in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    model[1].weight.grad[0, 1] = value

    with pytest.raises(NonFinite, match=r"^the gradient of 1\.weight is NaN or infinite$"):
        engine.update(0.1)

    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not engine.optimizer.state
    model(torch.ones(1, 2)).sum().backward()
    norm, loss = engine.update(0.1, [torch.tensor(2.5)])
    assert norm > 0  # the bad gradients are gone
    assert loss == 2.5
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(NonFinite) as raised:  # a loss may be infinite although its gradients are not
        engine.update(0.1, [torch.tensor(float("inf"))])
    assert raised.value.numbers == [float("inf")]


def two_steps(name):
    """Two steps of `Half` in this process alone."""
    open_alone(torch.device("cpu"))
    model = Half()
    if name == "fsdp2":
        fully_shard(model, mesh=shard_mesh(Ranks(), torch.device("cpu"), 1))
        model.set_reduce_scatter_unused_params(True)  # as `shard` does: zeros arrive there
    engine = engine_class(name)(model, OptimizerConfig(batch_size=1), Ranks(), ENGINES[name])
    for _ in range(2):
        engine.backward(engine.forward(torch.ones(1, 4)).square().sum())
        (extra,) = engine.reduce([torch.tensor(3.0)])
        assert float(extra) == 3
        engine.update(1e-3)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["none", "fsdp2", *(pytest.param(z, marks=pytest.mark.slow) for z in SHARDED[2:])])
def test_a_parameter_that_no_gradient_reaches_in_the_first_step_is_named(name):
    """In a separate process, since DeepSpeed keeps its groups for good."""
    code, out = finish(start([sys.executable, __file__, name], PYTHONPATH=f"{REPO}{os.pathsep}{REPO / 'tests'}"))

    assert code == 0, out
    assert out.count("no gradient reached") == 1
    assert "no gradient reached read.weight in the first step" in out


if __name__ == "__main__":
    two_steps(sys.argv[1])
