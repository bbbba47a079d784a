"""`--compile`: the same curve, with checkpointing and under fsdp2, and a warning if layers run uncompiled."""

import functools
import logging
from dataclasses import replace

import pytest
import torch
from launching import Runs
from torch import nn

from launcher.engines.choose import Demands, refusal
from launcher.engines.registry import ENGINES
from launcher.training import compiled

CURVE = 5e-6  # float32: the same sums in another order


class Layer(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 2


class Small(nn.Module):
    """Two layers of one class, as a model names its decoder layers."""

    _no_split_modules = ("Layer",)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def compile_with(monkeypatch):
    """Exchange the code generator behind torch.compile, which takes a C++ compiler a minute."""
    own = torch.compile

    def choose(backend):
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(own, backend=backend))

    return choose


def test_layers_of_one_class_share_a_program_for_every_length(compile_with):
    graphs = []
    compile_with(lambda graph, inputs: graphs.append(graph) or graph.forward)
    model = Small().train()
    wanted = [model(torch.ones(rows, length)) for rows, length in ((2, 5), (3, 9), (4, 2))]

    compiled.compile_layers(model)
    found = [model(torch.ones(rows, length)) for rows, length in ((2, 5), (3, 9), (4, 2))]

    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert len(graphs) == 1


def test_evaluation_runs_the_plain_layers(compile_with):
    graphs = []
    compile_with(lambda graph, inputs: graphs.append(graph) or graph.forward)
    model = Small().eval()
    compiled.compile_layers(model)

    model(torch.ones(2, 5))

    assert not graphs


def test_what_torch_cannot_compile_runs_uncompiled_with_one_warning(compile_with, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler found:\nlooked in /usr/bin")

    compile_with(broken)
    model = Small().train()
    wanted = model(torch.ones(2, 5))
    found = compiled.compile_layers(model)

    with caplog.at_level(logging.WARNING, "launcher"):
        assert torch.equal(model(torch.ones(2, 5)), wanted)
        assert torch.equal(model(torch.ones(3, 5)), wanted[:1].expand(3, 5))

    assert "no C++ compiler found" in found.failed
    assert caplog.text.count("--compile: the layers run uncompiled") == 1


def test_an_error_of_the_layer_itself_is_raised(compile_with):
    compile_with("eager")
    model = Small().train()
    found = compiled.compile_layers(model)

    with pytest.raises(TypeError):
        model(None)
    assert found.failed is None


def test_python_between_compiled_parts_is_told(compile_with, caplog, monkeypatch):
    compile_with("eager")

    def broken_in_two(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    monkeypatch.setattr(Layer, "forward", broken_in_two)
    model = Small().train()
    compiled.compile_layers(model)

    with caplog.at_level(logging.WARNING, "launcher"):
        model(torch.ones(2, 5))

    assert "a decoder layer is compiled in parts" in caplog.text


def test_an_engine_that_gathers_inside_a_layer_is_refused():
    demands = Demands(method="lora", compiled=True)

    refused = {name for name, info in ENGINES.items() if refusal(info, demands)}

    assert refused == {"zero3"}


def compiling(config, **model):
    return replace(config, model=replace(config.model, compile=True, **model))


@pytest.mark.slow
def test_a_compiled_run_has_the_curve_of_a_plain_one(compile_with, stories, alpaca_file, tmp_path, caplog):
    """LoLDU on all linear layers, each recomputed in the backward pass."""
    compile_with("aot_eager")
    runs = Runs(tmp_path, stories, alpaca_file)
    runs.base = replace(runs.base, optimizer=replace(runs.base.optimizer, max_steps=4, micro_batch_size=2))
    runs.alone("plain")

    with caplog.at_level(logging.WARNING, "launcher"):
        runs.alone("compiled", change=lambda config: compiling(config, gradient_checkpointing=True))

    assert runs.losses("compiled") == pytest.approx(runs.losses("plain"), abs=CURVE)
    assert "uncompiled" not in caplog.text
    assert "in parts" not in caplog.text


@pytest.mark.slow
def test_compiled_code_works_on_sharded_layers(stories, alpaca_file, tmp_path):
    """Two processes under fsdp2, through torch's own code generator and a C++ compiler."""
    runs = Runs(tmp_path, stories, alpaca_file)
    runs.base = replace(runs.base, optimizer=replace(runs.base.optimizer, max_steps=3))
    change = functools.partial(compiling, gradient_checkpointing=True)

    said = runs.start(2, runs.entry("plain", "fsdp2"), runs.entry("compiled", "fsdp2", change=change))

    assert runs.losses("compiled") == pytest.approx(runs.losses("plain"), abs=CURVE)
    assert "--compile" not in said
