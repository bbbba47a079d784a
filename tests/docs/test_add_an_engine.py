"""docs/add-an-engine.md: its code, copied into a copy of the project as the page says, trains as ddp does."""

import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from launching import REPO, Runs, finish, start

from launcher.config import AdapterConfig, OptimizerConfig
from launcher.engines.registry import ENGINES, EngineInfo

PAGE = REPO / "docs" / "add-an-engine.md"
TINY = REPO / "recipes" / "tiny"
BLOCKS = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
CURVE = 5e-6  # float32: the same sums in another order


def with_parts(config):
    return replace(config, optimizer=replace(config.optimizer, micro_batch_size=1))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project with the page's file, and its line in the table."""
    copy = tmp_path_factory.mktemp("project")
    for part in ("adapters", "launcher", "recipes"):
        shutil.copytree(REPO / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "loldu.py", copy)
    (copy / "launcher" / "engines" / "buckets.py").write_text(BLOCKS["launcher/engines/buckets.py"])
    table = copy / "launcher" / "engines" / "registry.py"
    before, after = table.read_text().split('        EngineInfo("fsdp2"')
    line = BLOCKS["launcher/engines/registry.py"].strip()
    table.write_text(f'{before}        {line},\n        EngineInfo("fsdp2"{after}')
    return copy


def start_in(project, command):
    return finish(start([sys.executable, *command], PYTHONPATH=f"{project}{os.pathsep}{REPO / 'tests'}"))


def under_buckets(entry):
    """The entry under the engine that this process, which imports the project itself, does not know."""
    entry["config"]["run"]["sharding"] = "buckets"
    return entry


@pytest.fixture(scope="module")
def runs(project, tmp_path_factory):
    """Two processes under ddp and buckets, whole and in micro-batches, and each resumed from the other's checkpoint."""
    runs = Runs(tmp_path_factory.mktemp("runs"), TINY / "model", TINY / "instructions" / "train.json")
    runs.base = replace(
        runs.base,
        data=replace(runs.base.data, max_length=128),
        adapter=AdapterConfig(method="lora", rank=4, targets=("all-linear",)),
        optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=4, max_steps=4),
    )
    entries = [
        runs.entry("ddp", "ddp"),
        under_buckets(runs.entry("buckets", "ddp")),
        under_buckets(runs.entry("buckets-parts", "ddp", change=with_parts)),
        under_buckets(runs.entry("ddp>buckets", "ddp", source="ddp", step=2)),
        runs.entry("buckets>ddp", "ddp", source="buckets", step=2),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launching.REPO", f"{project}{os.pathsep}{REPO / 'tests'}")  # where the processes import from
        runs.start(2, *entries)
    return runs


@pytest.mark.parametrize("name", ["buckets", "buckets-parts", "ddp>buckets", "buckets>ddp"])
def test_the_engine_of_the_page_gives_the_losses_of_ddp(runs, name):
    assert len(runs.losses(name)) == 4
    torch.testing.assert_close(runs.losses(name), runs.losses("ddp"), atol=CURVE, rtol=0)


@pytest.mark.slow
def test_the_engine_of_the_page_trains_one_process_from_the_command_line(project, tmp_path):
    options = ["--tiny", "--sharding", "buckets", "--targets", "q_proj", "--max-steps", "1", "--eval-records", "0"]
    recipe = project / "recipes" / "llama2_alpaca_loldu.py"

    code, out = start_in(project, [str(recipe), *options, "--show-samples", "0", "--output", str(tmp_path / "run")])

    assert code == 0, out
    assert '"sharding": "buckets"' in (tmp_path / "run" / "config.json").read_text()


def test_a_misspelled_engine_lists_the_new_one(project):
    recipe = project / "recipes" / "llama2_alpaca_loldu.py"

    code, out = start_in(project, [str(recipe), "--tiny", "--sharding", "bucket"])

    assert code == 2
    assert "buckets" in out


def test_the_page_lists_every_flag_and_every_engine():
    text, flags = PAGE.read_text(), [name for name in EngineInfo.__dataclass_fields__ if name not in ("name", "where")]

    assert re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE) == [*flags]
    assert all(f"`{name}`" in text for name in ENGINES)
