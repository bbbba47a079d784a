"""docs/add-a-task.md: its code, copied into the project as the page says, trains, evaluates and resumes."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launching import REPO
from transformers import AutoTokenizer

from launcher import tasks
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.tasks import registry
from launcher.tasks.choose import task_of
from launcher.training.run import run

PAGE = REPO / "docs" / "add-a-task.md"
TINY = REPO / "recipes" / "tiny"
BLOCKS = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The page's file beside the tasks that are there, and its line in their list."""
    (tmp_path / "complete.py").write_text(BLOCKS["launcher/tasks/complete.py"])
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    listed: dict = {}
    exec(BLOCKS["launcher/tasks/registry.py"], listed)
    assert (*registry.REGISTERED, "complete") == listed["REGISTERED"]  # one line more
    monkeypatch.setattr(registry, "REGISTERED", listed["REGISTERED"])
    monkeypatch.delitem(sys.modules, "launcher.tasks.complete", raising=False)


@pytest.fixture
def config(tmp_path, registered):
    records = json.loads((TINY / "instructions" / "train.json").read_text())[:60]
    rows = [{"text": f"{record['instruction']}\n{record['output']}"} for record in records]
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    data = DataConfig(data=str(tmp_path / "texts.json"), eval_records=8, max_length=48)
    object.__setattr__(data, "task", "complete")  # the names that the command line knows were read with the module
    return Config(
        model=ModelConfig(model=str(TINY / "model"), dtype="float32"),
        data=data,
        adapter=AdapterConfig(rank=15, targets=("all-linear",)),
        optimizer=OptimizerConfig(learning_rate=1e-2, batch_size=4, max_steps=6),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )


def events(config):
    return [json.loads(line) for line in (Path(config.run.output) / "events.jsonl").read_text().splitlines()]


def test_the_task_of_the_page_trains_evaluates_and_resumes_exactly(config, tmp_path, capsys):
    def stop_at_three(training, event):
        if event["step"] == 3:
            training.stop.request("the test")

    uninterrupted = replace(config, run=replace(config.run, output=str(tmp_path / "all")))

    assert run(config, "test", on_step=stop_at_three) == 75
    assert [event["step"] for event in events(config)] == [0, 1, 2, 3, 4]  # ranks agree on it in the next step
    assert run(config, "test") == 0
    assert run(uninterrupted, "test") == 0

    assert events(config) == events(uninterrupted)
    first, last = (event for event in events(config) if "eval_loss" in event)
    assert last["eval_loss"] < first["eval_loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert "loldu merge" in capsys.readouterr().out  # the next steps of every model that predicts tokens


def test_the_second_half_of_each_sample_carries_loss(config):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")

    found = task_of(config).encode([{"text": "a b"}, {"text": "once upon a time " * 20}], tokenizer, config.data)

    for loss in found.loss.split(found.lengths):
        half = len(loss) // 2
        assert not loss[:half].any()
        assert loss[max(half, 1) :].all()
    assert found.targets.tolist() == [int(loss.sum()) for loss in found.loss.split(found.lengths)]


def test_a_config_gets_the_task_it_names_or_the_first_that_wants_it(config):
    labels = Config(data=DataConfig(text_columns=("text",)))
    text = Config(data=DataConfig(task="text"))

    found = [type(task_of(each)).__name__ for each in (config, text, labels, Config())]

    assert found == ["Complete", "Text", "Label", "Instruct"]
