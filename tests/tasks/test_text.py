"""Plain text: every token is predicted once, and a run on it trains, evaluates and resumes."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from launching import REPO
from transformers import AutoTokenizer

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.data import token_cache
from launcher.data.crew import Crew
from launcher.processes import Ranks
from launcher.tasks import text
from launcher.training.resolve import resolve
from launcher.training.run import run
from tests.communicators import together

TINY = REPO / "recipes" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture
def config(tmp_path):
    records = json.loads((TINY / "instructions" / "train.json").read_text())[:60]
    rows = [{"text": f"{record['instruction']}\n{record['output']}"} for record in records]
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    return Config(
        model=ModelConfig(model=str(TINY / "model"), dtype="float32"),
        data=DataConfig(task="text", data=str(tmp_path / "texts.json"), eval_records=8, max_length=48),
        adapter=AdapterConfig(rank=15, targets=("all-linear",)),
        optimizer=OptimizerConfig(learning_rate=1e-2, batch_size=4, max_steps=6),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )


def events(config):
    return [json.loads(line) for line in open(f"{config.run.output}/events.jsonl")]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("ab\ncd ef", ["ab\n", "cd ", "ef"]),
        ("abcdefgh", ["abcd", "efgh"]),
        ("a\nb c d", ["a\n", "b c ", "d"]),
        ("", [""]),
    ],
)
def test_the_parts_of_a_long_text_end_at_a_line_break_or_a_blank_if_there_is_one(given, parts):
    assert list(text.parts_of(given, 4)) == parts


def test_a_very_long_text_is_tokenised_in_parts_with_a_warning(tokenizer, monkeypatch):
    lines = "".join(f"once upon a time there were {number} models\n" for number in range(40))
    other = [{"text": "a short text"}]
    whole = text.TASK.encode([{"text": lines}, *other], tokenizer, DataConfig(max_length=48))
    calls = []

    class Listening:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        def __call__(self, texts, **how):
            calls.append(texts)
            return tokenizer(texts, **how)

    monkeypatch.setattr(text, "CHARACTERS_AT_ONCE", 500)
    monkeypatch.setattr(text.groups, "__defaults__", (500,))
    monkeypatch.setattr(text.parts_of, "__defaults__", (500,))
    found = text.TASK.encode([{"text": lines}, *other], Listening(), DataConfig(max_length=48))

    assert max(len(given) if isinstance(given, str) else sum(map(len, given)) for given in calls) <= 500
    assert "1 of 2 texts are longer than 500 characters and tokenised in parts" in found.report.notes[0]
    assert not whole.report.notes
    assert tokenizer.decode(found.ids[found.loss]).split() == tokenizer.decode(whole.ids[whole.loss]).split()


def test_every_token_of_a_long_text_is_predicted_exactly_once(tokenizer):
    story = "once upon a time there was a model " * 20

    found = text.TASK.encode([{"text": story}], tokenizer, DataConfig(max_length=48))

    whole = [tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    parts = [(ids.tolist(), loss) for ids, loss in zip(
        found.ids.split(found.lengths), found.loss.split(found.lengths), strict=True)]  # fmt: skip
    predicted = [token for ids, loss in parts for token, carries in zip(ids, loss, strict=True) if carries]
    assert predicted == whole[1:]
    assert max(found.lengths) == 48
    assert torch.equal(found.targets, torch.tensor(found.lengths) - 1)
    assert all(ids[0] == before[-1] for (before, _), (ids, _) in itertools.pairwise(parts))


def test_processes_share_the_work_and_the_next_start_finds_it(config, tokenizer, tmp_path, monkeypatch):
    """The tokens are those that are made in memory, and so is the digest that a resume compares."""
    monkeypatch.setattr(token_cache, "CHUNK", 5)
    rows = [{"text": f"{number} stories " * (number % 7 + 1)} for number in range(48)]
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    parts, own = [], text.TextEncoder.part
    monkeypatch.setattr(text.TextEncoder, "part", lambda self, some: parts.append(len(some)) or own(self, some))
    train, held_out = text.TASK.splits(config.data)
    wanted = [text.TASK.encode(some, tokenizer, config.data) for some in (train, held_out)]
    parts.clear()

    found = together(3, lambda comm: text.TASK.read_together(config, tokenizer, tmp_path / "cache", Crew(comm)))
    once = sum(parts)
    again = text.TASK.read(config, tokenizer, tmp_path / "cache")

    assert once == sum(parts) == 48
    for samples in (*found, again):
        for mine, alone in zip((samples.train, samples.held_out), wanted, strict=True):
            assert mine.digest() == alone.digest()
            assert torch.equal(mine.targets, alone.targets)
            assert str(mine.report) == str(alone.report)


def test_a_run_on_text_trains_evaluates_and_resumes_exactly(config, tmp_path, capsys):
    def stop_at_three(training, event):
        if event["step"] == 3:
            training.stop.request("the test")

    uninterrupted = replace(config, run=replace(config.run, output=str(tmp_path / "all")))

    assert run(config, "test", on_step=stop_at_three) == 75
    assert run(config, "test") == 0
    assert run(uninterrupted, "test") == 0

    assert events(config) == events(uninterrupted)
    first, last = (event for event in events(config) if "eval_loss" in event)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    assert "60 texts" not in (out := capsys.readouterr().out)  # 8 are held out
    assert "52 texts" in out


def test_a_txt_file_is_one_text(tmp_path):
    (tmp_path / "book.txt").write_text("Call me Ishmael.\n\nSome years ago")

    assert text.load_texts(str(tmp_path / "book.txt")) == [{"text": "Call me Ishmael.\n\nSome years ago"}]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"body": "a"}], (), r"has no 'text' \(its columns: body\): give --columns text=COLUMN"),
        ([{"body": 1}], ("text=body",), "'body'"),
        (["a"], (), "is a str, expected an object with 'text'"),
        ([{"text": " "}], (), "'text' is empty"),
        ([], (), "holds no rows"),
    ],
)
def test_rows_without_a_text_are_refused_by_name(config, rows, columns, message, tmp_path, tokenizer):
    (tmp_path / "odd.json").write_text(json.dumps(rows))
    data = replace(config.data, data=str(tmp_path / "odd.json"), columns=columns, eval_records=0)

    with pytest.raises(ValueError, match=message):
        text.TASK.read(replace(config, data=data), tokenizer, tmp_path)


def test_rows_without_a_text_can_be_left_out(tmp_path, caplog):
    (tmp_path / "odd.json").write_text(json.dumps([{"text": "a"}, {"text": ""}, {"text": "b"}]))

    found = text.load_texts(str(tmp_path / "odd.json"), on_bad_record="skip")

    assert [row["text"] for row in found] == ["a", "b"]
    assert "record 1" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exact_match": True}, "leave --exact-match and --show-samples out"),
        ({"columns": ("prompt=a", "answer=b")}, "--columns text=COLUMN; got --columns prompt=a answer=b"),
    ],
)
def test_settings_that_mean_nothing_for_text_are_refused(config, values, message):
    with pytest.raises(ValueError, match=message):
        resolve(replace(config, data=replace(config.data, **values)), Ranks())


def test_packed_text_trains(config):
    packed = replace(config, data=replace(config.data, packing=True))

    assert run(packed, "test") == 0


@pytest.mark.parametrize(("begin", "end"), [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>")])
def test_a_text_that_has_its_start_or_end_token_gets_no_second_one(begin, end, tokenizer):
    encoded = text.TASK.encode([{"text": f"{begin}Once upon a time{end}"}], tokenizer, DataConfig(task="text"))

    ids = encoded.ids.tolist()
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert [ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)] == [1, 1]
