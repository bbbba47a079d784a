"""A base's files: damaged ones, and what a tokenizer without a tokenizer.json needs."""

import importlib.util
import os

import pytest

from launcher.models import files

SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
TIKTOKEN = b"IQ== 0\nIg== 1\n"


@pytest.mark.parametrize(
    ("name", "content", "missing", "remedy"),
    [
        ("tokenizer.model", SENTENCEPIECE, {"sentencepiece"}, "takes sentencepiece: pip install sentencepiece"),
        ("spiece.model", SENTENCEPIECE, {"google.protobuf"}, "takes protobuf: pip install protobuf"),
        (
            "tokenizer.model",
            SENTENCEPIECE,
            {"sentencepiece", "google.protobuf"},
            "takes sentencepiece and protobuf: pip install sentencepiece protobuf",
        ),
        ("tokenizer.model", TIKTOKEN, {"tiktoken", "sentencepiece"}, "takes tiktoken: pip install tiktoken"),
    ],
)
def test_the_package_that_reads_a_tokenizer_is_named(name, content, missing, remedy, tmp_path, monkeypatch):
    """transformers takes a SentencePiece file for tiktoken's if sentencepiece is not installed."""
    (tmp_path / name).write_bytes(content)
    real = importlib.util.find_spec
    here = {"sentencepiece", "google.protobuf", "tiktoken"} - missing
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda m, *a: None if m in missing else real("json") if m in here else real(m, *a)
    )

    with pytest.raises(ValueError, match=rf"has no tokenizer\.json, and reading its other files {remedy}$"):
        files.load_tokenizer(tmp_path)


def test_a_tokenizer_json_needs_no_other_package(stories, monkeypatch):
    monkeypatch.setattr(files, "_is_installed", lambda module: False)

    assert files.load_tokenizer(stories)("once")["input_ids"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "[" * 100_000, "is damaged .*nested too deeply"),
        ("config.json", "[]", "is damaged .*it holds no object"),
        ("config.json", '{"num_hidden_layers": 1000000000}', "says num_hidden_layers 1000000000, at most"),
        ("generation_config.json", '"x"', "is damaged .*it holds no object"),
        ("tokenizer_config.json", "{", "is damaged"),
        ("tokenizer.json", None, "is not a regular file"),
        ("model.safetensors.index.json", None, "is not a regular file"),
    ],
)
def test_a_damaged_json_file_of_a_model_is_named(tmp_path, name, content, said):
    (tmp_path / "config.json").write_text("{}")
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=f"{name} {said}"):
        files.base_folder(str(tmp_path))
