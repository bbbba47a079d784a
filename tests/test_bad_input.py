"""What a user may give by mistake: each ends with exit code 2 and one line that says what to do."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from launcher import cli, start
from launcher.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from llama2_alpaca_loldu import llama2_alpaca, tiny

RECORD = {"instruction": "Say yes.", "input": "", "output": "yes"}


@pytest.fixture
def train(stories, tmp_path, capfd):
    """Runs the recipe as a shell would; returns exit code and what went to standard error."""
    data = tmp_path / "good.json"
    data.write_text(json.dumps([RECORD] * 8))

    def call(*options):
        given = {
            "--model": str(stories), "--data": str(data), "--output": str(tmp_path / "run"), "--rank": "4",
            "--cache": str(tmp_path / "cache"), "--batch-size": "2", "--max-steps": "1", "--eval-records": "0",
        }  # fmt: skip
        given |= dict(zip(options[::2], options[1::2], strict=True))
        words = [word for pair in given.items() for word in pair if word]
        code = start.run_recipe("llama2_alpaca_loldu", llama2_alpaca, tiny, words)
        said = capfd.readouterr().err
        if code:
            assert said.startswith("error: ")
            assert said.count("\n") == 1, "a mistake is one line"
        return code, said

    return call


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("[]", "no record"),
        ("{not json", "not JSON"),
        (json.dumps([RECORD, {"input": "x", "output": "y"}]), "record 1"),
        (json.dumps([{"instruction": 3, "output": "y"}]), "record 0"),
        (json.dumps([{**RECORD, "output": ""}]), "answer"),
    ],
)
def test_bad_data_is_named_with_the_place(train, tmp_path, text, message):
    code, error = train("--data", write(tmp_path / "bad.json", text))

    assert code == 2
    assert message in error
    assert "bad.json" in error


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data", "missing.json", "missing.json: there is no such file"),
        ("--model", "/no/such/model", "neither a folder here nor in the hub cache"),
        ("--rank", "0", "--rank (adapter.rank) must be at least 1, got 0"),
        ("--rank", "many", "--rank: expected a whole number, got 'many'"),
        ("--batch-size", "1e30", "--batch-size: expected a whole number, got '1e30'"),
        ("--batch-size", "9" * 30, "--batch-size (optimizer.batch_size) must be below 2^63"),
        ("--epochs", "1e300", "--epochs (optimizer.epochs) must be at most 1,000,000, got 1e+300"),
        ("--epochs", "inf", "--epochs (optimizer.epochs) must be a finite number, got inf"),
        ("--learning-rate", "1e38", "--learning-rate (optimizer.learning_rate) must be at most 1,000"),
        ("--seed", str(2**63), "--seed (optimizer.seed) must be below 2^63"),
        ("--rnak", "4", "unknown option --rnak; did you mean --rank"),
        ("--batch-size", "0", "--batch-size (optimizer.batch_size) must be at least 1"),
        ("--sharding", "half", "--sharding: expected one of none, ddp, "),
        ("--eval-every", "5", "give --eval-records N"),
        ("--resume", "/no/such/checkpoint", "not complete"),
        ("--sharding", "hsdp --shard-size 3", "1 processes / 3 that share one copy = 0.33 copies"),
        ("--sharding", "fsdp2 --cpu-offload ", "torch finds no GPU here: leave it out"),
        ("--sharding", "none --cpu-offload ", "--cpu-offload works with --sharding fsdp2, hsdp, zero2 or zero3"),
        ("--cache", "/dev/null/cache", "cannot write cache files to /dev/null/cache: "),
        ("--output", "/dev/null/run", "cannot make the run folder /dev/null/run: Not a directory"),
    ],
)
def test_an_error_about_an_option_lists_the_valid_ones(train, option, value, message):
    first, *more = value.split(" ")

    code, error = train(option, first, *more)

    assert code == 2
    assert message in error


def test_a_model_folder_without_weights(train, stories, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(stories, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    code, error = train("--model", str(folder))

    assert code == 2
    assert "holds no weights: expected model.safetensors" in error


def test_a_truncated_weight_file(train, stories, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(stories, folder)
    file = folder / "model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1000])

    code, error = train("--model", str(folder))

    assert code == 2
    assert "model.safetensors is damaged or cut short" in error


def test_weights_as_pickle_alone_name_the_conversion(train, stories, tmp_path):
    """The file is never opened: reading a pickle can run code."""
    folder = tmp_path / "model"
    shutil.copytree(stories, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, folder / "pytorch_model.bin")

    code, error = train("--model", str(folder))

    assert code == 2
    assert "only as pickle" in error
    assert "save_pretrained" in error


def test_the_output_folder_of_another_run(train):
    assert train()[0] == 0

    code, error = train("--rank", "8")

    assert code == 2
    assert "belongs to another run: adapter was" in error


def test_a_folder_that_is_no_run_is_not_written_to(train, tmp_path):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "thesis.tex", "years of work")

    code, error = train()

    assert code == 2
    assert "not a run folder and not empty" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_no_space_left_on_the_caches_disk(train, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)

    code, error = train()

    assert code == 2
    assert "--cache" in error
    assert not list((tmp_path / "cache" / "factors").iterdir())


def test_checkpoints_of_a_later_version_are_refused_and_stay(train, tmp_path):
    assert train()[0] == 0
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    text = json.dumps(json.loads((folder / "index.json").read_text()) | {"format": 2})
    write(folder / "index.json", text)
    write(folder / "COMPLETE", hashlib.sha256(text.encode()).hexdigest())

    code, error = train()

    assert code == 2
    assert "step-000001 has format 2, this version reads up to 1: a later version wrote it" in error
    assert (folder / "index.json").read_text() == text


def test_an_adapter_of_another_base(train, babyllama, tmp_path, capfd):
    assert train()[0] == 0

    code = cli.main(["generate", str(tmp_path / "run" / "adapter"), "--base", str(babyllama), "--prompt", "hello"])

    assert code == 2
    assert "does not fit" in capfd.readouterr().err


def test_the_recipes_default_is_a_config():
    assert isinstance(llama2_alpaca(), Config)
