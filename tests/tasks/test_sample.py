"""What a plan reads of the data: cached tokens, else the first records."""

import json

import pytest
from launching import REPO
from transformers import AutoTokenizer

from launcher.config import Config, DataConfig
from launcher.tasks import label, prefer, text

MODEL = REPO / "recipes" / "tiny" / "model"
ROWS = {
    "text": {"text": "One two three four."},
    "prefer": {"prompt": "Say yes.", "chosen": "Yes.", "rejected": "No, I do not want to."},
    "label": {"sentence": "A good film.", "label": 0},
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def config_of(kind, rows, folder):
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    columns = ("sentence",) if kind == "label" else ()
    return Config(data=DataConfig(task=kind, data=str(file), text_columns=columns))


@pytest.mark.parametrize("kind", ["text", "prefer"])
def test_tokens_of_a_run_are_used_and_otherwise_those_of_the_first_records(kind, tokenizer, tmp_path):
    task = {"text": text.TASK, "prefer": prefer.TASK}[kind]
    config = config_of(kind, [ROWS[kind]] * 30, tmp_path)

    first = task.sample(config, tokenizer, tmp_path / "cache", 10)
    whole = task.read(config, tokenizer, tmp_path / "cache").train
    after = task.sample(config, tokenizer, tmp_path / "cache", 10)

    assert (len(first.samples), first.of) == (10, 30)
    assert first.how == "the first 10 of 30 records, tokenised now"
    assert (len(after.samples), after.of, after.how) == (30, 30, "all records, tokenised before")
    assert after.samples.digest() == whole.digest()


def test_classes_are_those_of_all_rows_and_few_rows_are_tokenised(tokenizer, tmp_path):
    rows = [{**ROWS["label"], "label": place // 10} for place in range(30)]

    found = label.TASK.sample(config_of("label", rows, tmp_path), tokenizer, tmp_path, 10)

    assert (len(found.samples), found.of) == (10, 30)
    assert label.TASK.head(found.samples, tokenizer)["id2label"] == {0: "0", 1: "1", 2: "2"}
    assert found.how == "the first 10 of 30 records, tokenised now"


def test_of_a_long_text_the_beginning_is_tokenised(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHARACTERS", 4000)
    config = config_of("text", [{"text": "word " * 500}, {"text": "word " * 2000}, {"text": "word " * 1500}], tmp_path)
    whole = text.TASK.read(config, tokenizer, tmp_path / "cache").train

    found = text.TASK.sample(config, tokenizer, tmp_path / "other", 1000)

    assert found.how == "the first 4,000 of 20,000 characters, tokenised now"
    assert found.samples.report.tokens == pytest.approx(whole.report.tokens / 5, rel=0.01)
    assert found.of == pytest.approx(len(whole), rel=0.1)
