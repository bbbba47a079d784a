"""The GLUE recipe, whole, on a small random RoBERTa and real film phrases."""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from adapters.layer import BasePrecisionWarning
from launcher import start
from launcher.inference.sources import find
from launcher.models.quantize import keep_packing

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
from roberta_glue_loldu import TASKS, roberta_glue

ROWS = 32


@pytest.fixture
def train(tiny_roberta, sst2_rows, tmp_path):
    """Runs the recipe as a shell would, on a few rows; returns its exit code and the run folder."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in sst2_rows[:ROWS]))
    given = {
        "--model": tiny_roberta, "--data": data, "--eval-data": data, "--max-length": 48, "--batch-size": 8,
        "--max-steps": 100, "--learning-rate": 1e-2, "--cache": tmp_path / "cache",
    }  # fmt: skip

    def call(name, *more, task="sst2", **changes):
        words = [str(word) for pair in ({**given, **changes, "--output": tmp_path / name}).items() for word in pair]
        return start.run_recipe(
            "roberta_glue_loldu", partial(roberta_glue, task), None, [*words, *more]
        ), tmp_path / name

    return call


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow  # 7 s
def test_it_learns_rows_by_heart_and_its_adapter_and_head_score_the_same_in_plain_peft(train, tiny_roberta, sst2_rows):
    code, folder = train("run")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_roberta)  # with another random head
    with warnings.catch_warnings():
        warnings.simplefilter("error", BasePrecisionWarning)  # the new head is no part of the base
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)
    texts, labels = zip(*((row["sentence"], row["label"]) for row in sst2_rows[:ROWS]), strict=True)
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
    with torch.no_grad():
        said = model(**tokens).logits.argmax(-1)

    last = events(folder)[-1]
    assert code == 0
    assert last["accuracy"] == 1.0
    assert last["correlation"] == pytest.approx(1.0)
    assert said.tolist() == list(labels)
    trained = json.loads((folder / "config.json").read_text())["resolved"]["trained"]
    with pytest.raises(ValueError, match="is a text classifier"):
        find(str(folder))
    assert trained == 4 * 32 + (32 * 32 + 32) + (32 * 2 + 2), "4 cores at full rank and the head"


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_it_trains_on_a_quantised_base_and_its_adapter_and_head_score_the_same_on_one_of_transformers(
    train, kind, tiny_roberta, sst2_rows
):
    """The head's start is the same as on the full-precision base, so is the loss before training, nearly."""
    code, folder = train("run", "--quantize", kind, **{"--max-steps": 3})
    four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **four}
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_roberta, quantization_config=BitsAndBytesConfig(**how, llm_int8_skip_modules=["classifier"])
    )
    keep_packing(base)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)
    texts, labels = zip(*((row["sentence"], row["label"]) for row in sst2_rows[:ROWS]), strict=True)
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
    with torch.no_grad():
        loss = model(**tokens, labels=torch.tensor(labels)).loss

    assert code == 0
    assert float(loss) == pytest.approx(events(folder)[-1]["eval_loss"], abs=1e-2 if kind == "int8" else 1e-4)


@pytest.mark.slow  # 8 s
def test_stopped_and_resumed_it_is_the_uninterrupted_run_bit_for_bit(train):
    """With dropout, and a head that starts from the seed."""
    short = {"--max-steps": 6, "--save-every": 2}
    _, whole = train("whole", **short)
    _, folder = train("run", **short)
    (folder / "state").write_text("stopped\n")
    (folder / "checkpoints" / "step-000006" / "COMPLETE").unlink()
    (folder / "checkpoints" / "step-000004" / "COMPLETE").unlink()

    code, _ = train("run", **short)

    assert code == 0
    assert events(folder) == events(whole)
    again, once = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, whole))
    assert any("classifier" in name for name in once)
    assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-columns", "text"], "no 'text'"),
        (["--label-column", "stars"], "'stars'"),
        (["--sharding", "zero3", "--quantize", "nf4"], "--quantize nf4 is not supported under --sharding zero3"),
        (["--tiny"], "no embedded model"),
        (["--model", "FacebookAI/roberta-base"], "hf download"),
    ],
)
def test_a_mistake_is_one_line(train, options, message, capfd):
    code, _ = train("run", *options)

    said = capfd.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


def test_every_task_is_a_complete_run_with_a_head_that_is_saved():
    for task in TASKS:
        config = roberta_glue(task)

        assert config.data.data == f"nyu-mll/glue:{task}"
        assert config.adapter.modules_to_save == ("classifier",)
    with pytest.raises(ValueError, match="--glue must be one of mnli"):
        roberta_glue("snli")


def test_other_data_leave_out_the_recipes_own_held_out_split(monkeypatch, caplog, tmp_path):
    """A user who gives --data has said nothing about --eval-data, so no error speaks of it."""
    asked = []
    monkeypatch.setattr(start, "_start", lambda config, name, **_: asked.append(config.data) or 0)

    for words in ([], ["--data", "mine.json"], ["--data=mine.json", "--eval-data", "held.json"]):
        assert start.run_recipe("roberta_glue_loldu", partial(roberta_glue, "sst2"), None, words) == 0

    assert [data.eval_data for data in asked] == ["nyu-mll/glue:sst2:validation", None, "held.json"]
    assert caplog.text.count("so its --eval-data nyu-mll/glue:sst2:validation is left out") == 1
