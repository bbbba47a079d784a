"""A base that cannot fit is refused before the model is loaded, with remedies that work."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, RunConfig
from launcher.main_memory import main_memory
from launcher.methods import peft_config
from launcher.processes import Ranks
from launcher.tasks.choose import task_of
from launcher.training import memory
from launcher.training import run as running
from launcher.training.memory import check_memory, check_size
from launcher.training.resolve import Resolved

NUMBERS = 260_032  # of stories260K


def resolved(config, dtype, sharding, ranks):
    """A run with this engine and dtype, even if `resolve` would refuse it."""
    on_gpu = torch.cuda.is_available()
    return Resolved(
        config=config, ranks=ranks, task=task_of(config), adapter=peft_config(config.adapter), sharding=sharding,
        dtype=dtype, attention="sdpa", attention_reason="as asked", cache=Path("cache"),
        device=torch.device("cuda" if on_gpu else "cpu"), on_gpu=on_gpu,
    )  # fmt: skip


def test_a_base_that_cannot_fit_is_refused_before_the_data_is_read(stories, monkeypatch, tmp_path, capfd):
    counts, asked = {"SC_PHYS_PAGES": 200, "SC_PAGE_SIZE": 4096}, os.sysconf
    monkeypatch.setattr("os.sysconf", lambda name: counts.get(name) or asked(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = Config(
        model=ModelConfig(model=str(stories)),
        data=DataConfig(data=str(tmp_path / "none.json")),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )

    code = running.run(config, "huge")

    assert code == running.MISTAKE
    said = " ".join(capfd.readouterr().err.split())
    assert f"the weights of {stories} take 0.00104 GB in float32 on {socket.gethostname()}, which has 0.000819" in said
    assert "give --dtype bfloat16 (0.00052 GB), or --quantize int8" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("memory", "given"),
    [
        (
            3 * NUMBERS,
            ["--dtype bfloat16 (0.00052 GB)", "--quantize int8 (0.00026 GB)", "--quantize nf4 (0.000134 GB)"],
        ),
        (NUMBERS, ["--quantize int8", "--quantize nf4"]),
        (NUMBERS * 52 // 100, ["--quantize nf4"]),
        (NUMBERS * 51 // 100, []),
    ],
)
def test_a_suggested_precision_fits(stories, memory, given):
    with pytest.raises(ValueError, match=r"take 0\.00104 GB in float32 on here, which has") as refused:
        check_size(stories, "float32", share=1, memory=memory, where="here")

    suggested = str(refused.value).partition(": give ")[2].split(", or ")
    assert len(suggested) == len(given) + 2
    assert all(text.startswith(option) for text, option in zip(suggested, given, strict=False))
    assert suggested[-2:] == ["--sharding fsdp2 on enough GPUs or machines", "a machine that has more"]


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "5000"}, 5000),
        ("0::/job\n", {"memory.max": "5000", "job/memory.max/is a folder": ""}, 5000),
        ("0::/\n", {"memory.max": "max"}, 1000 * 4096),
        ("0::/job_1/step_0\n", {"job_1/memory.max": "6000", "job_1/step_0/memory.max": "max"}, 6000),
        ("0::/seen/outside/alone\n", {"memory.max": "7000"}, 7000),
        ("2:cpu:/\n1:memory:/job_1\n0::/\n", {"memory/job_1/memory.limit_in_bytes": "8000"}, 8000),
        ("1:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 1000 * 4096),
        (None, {}, 1000 * 4096),
    ],
)
def test_memory_is_limited_by_a_container_or_job(groups, files, limit, monkeypatch, tmp_path):
    counts, asked = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}, os.sysconf
    monkeypatch.setattr("os.sysconf", lambda name: counts.get(name) or asked(name))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "own").write_text(groups)

    assert main_memory(tmp_path / "own", tmp_path) == (limit, limit < 1000 * 4096)


@pytest.mark.parametrize(
    ("sharding", "method", "offload", "remedies"),
    [
        ("ddp", "loldu", False, ["int8", "nf4", "fsdp2"]),
        ("zero3", "loldu", False, ["fsdp2"]),
        ("fsdp2", "loldu", True, ["fsdp2"]),
        ("ddp", "full", False, ["fsdp2"]),
        ("ddp", "loha", False, ["int8", "fsdp2"]),
        ("ddp", "lorasb", False, ["int8", "nf4"]),
    ],
)
def test_no_option_is_suggested_that_would_be_refused_next(stories, monkeypatch, sharding, method, offload, remedies):
    seen = {}
    monkeypatch.setattr(memory, "check_size", lambda base, kind, **given: seen.update(given))
    config = Config(adapter=AdapterConfig(method=method), run=RunConfig(sharding=sharding, cpu_offload=offload))

    check_memory(resolved(config, "float32", sharding, Ranks(0, 2, 0, 2)), stories)

    options = ["--quantize int8", "--quantize nf4", "--sharding fsdp2"]
    assert [option.split()[1] for option in options if seen["allowed"](option)] == remedies


def test_the_error_says_that_the_memory_limit_is_the_jobs(stories):
    with pytest.raises(ValueError, match=r"on node7, where this job or container may use 1e-06 GB: give .*--mem"):
        check_size(stories, "float32", share=1, memory=1000, where="node7", limited=True)


@pytest.mark.parametrize(
    ("sharding", "shard_size", "copies_here"),
    [
        ("none", 0, 4),
        ("ddp", 0, 4),
        ("zero2", 0, 4),
        ("fsdp2", 0, 0.5),
        ("zero3", 0, 0.5),
        ("hsdp", 0, 1),
        ("hsdp", 2, 2),
    ],
)
def test_the_parts_of_a_base_on_one_machine_are_added_up(stories, monkeypatch, sharding, shard_size, copies_here):
    seen = {}
    monkeypatch.setattr(memory, "check_size", lambda base, kind, **given: seen.update(given, kind=kind))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = Config(model=ModelConfig(quantize="nf4"), run=RunConfig(shard_size=shard_size))

    check_memory(resolved(config, "bfloat16", sharding, Ranks(1, 8, 1, 4)), stories)

    assert (seen["share"], seen["kind"]) == (copies_here, "nf4")


@pytest.mark.parametrize(
    ("sharding", "dtype", "method", "copies_here"),
    [
        ("ddp", "float32", "loldu", 1),
        ("ddp", "float32", "full", 4),
        ("ddp", "bfloat16", "loldu", 4),
        ("zero2", "float32", "loldu", 4),
    ],
)
def test_processes_of_one_machine_share_the_pages_of_a_frozen_base_in_its_files_dtype(
    stories, monkeypatch, sharding, dtype, method, copies_here
):
    seen = {}
    monkeypatch.setattr(memory, "check_size", lambda base, kind, **given: seen.update(given))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    config = Config(adapter=AdapterConfig(method=method))
    check_memory(resolved(config, dtype, sharding, Ranks(1, 4, 1, 4)), stories)

    assert seen["share"] == copies_here


@pytest.mark.parametrize(("sharding", "where"), [("zero2", "the GPU"), ("zero3", socket.gethostname())])
def test_zero2_does_not_offload_the_base(stories, monkeypatch, sharding, where):
    seen = {}
    monkeypatch.setattr(memory, "check_size", lambda base, kind, **given: seen.update(given))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gpu = SimpleNamespace(name="the GPU", total_memory=1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: gpu)

    config = Config(run=RunConfig(sharding=sharding, cpu_offload=True))
    check_memory(resolved(config, "bfloat16", sharding, Ranks(1, 2, 1, 2)), stories)

    assert seen["where"] == where
