"""docs/add-a-task.md: its code, copied into the project as the page says, trains, evaluates and resumes."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from launcher import tasks
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.processes import Ranks
from launcher.tasks import task_of
from launcher.training.resolve import resolve
from launcher.training.run import run

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs" / "add-a-task.md"
TINY = REPO / "recipes" / "tiny"
BLOCKS = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The page's file beside the tasks that are there, and its line in their list."""
    (tmp_path / "text.py").write_text(BLOCKS["launcher/tasks/text.py"])
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    listed: dict = {}
    exec(BLOCKS["launcher/tasks/__init__.py"], listed)
    assert sorted({*tasks.REGISTERED, "text"}) == sorted(listed["REGISTERED"])  # one line more
    monkeypatch.setattr(tasks, "REGISTERED", listed["REGISTERED"])
    monkeypatch.delitem(sys.modules, "launcher.tasks.text", raising=False)


@pytest.fixture
def config(tmp_path):
    records = json.loads((TINY / "instructions" / "train.json").read_text())[:60]
    rows = [{"text": f"{record['instruction']}\n{record['output']}"} for record in records]
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    return Config(
        model=ModelConfig(model=str(TINY / "model"), dtype="float32"),
        data=DataConfig(
            data=str(tmp_path / "texts.json"), text_columns=("text",), label_column="", eval_records=8, max_length=48
        ),
        adapter=AdapterConfig(rank=15, targets=("all-linear",)),
        optimizer=OptimizerConfig(learning_rate=1e-2, batch_size=4, max_steps=6),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )


def events(config):
    return [json.loads(line) for line in (Path(config.run.output) / "events.jsonl").read_text().splitlines()]


def test_the_task_of_the_page_trains_evaluates_and_resumes_exactly(registered, config, tmp_path, capsys):
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


def test_a_long_text_becomes_several_samples_and_loses_no_token(registered, config):
    from launcher.tasks import text  # type: ignore[attr-defined]

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    story = "once upon a time there was a model " * 20

    found = text.encode([{"text": story}], tokenizer=tokenizer, max_length=48)

    ids = tokenizer(story, add_special_tokens=False)["input_ids"]
    assert found.ids.tolist() == [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    assert max(found.lengths) == 48
    assert torch.equal(found.targets, torch.tensor(found.lengths) - 1)
    assert int(found.loss.sum()) == int(found.targets.sum())


def test_settings_that_the_task_of_the_page_does_not_support_are_refused(registered, config):
    asked = replace(config, data=replace(config.data, exact_match=True))

    with pytest.raises(ValueError, match="plain text has no questions"):
        resolve(asked, Ranks())


def test_a_config_gets_the_first_task_that_wants_it(registered, config):
    labels = DataConfig(text_columns=("text",))

    found = [type(task_of(each)).__name__ for each in (config, Config(data=labels), Config())]

    assert found == ["Text", "Label", "Instruct"]
