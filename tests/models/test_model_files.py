"""A base's files: what a tokenizer without a tokenizer.json needs."""

import importlib.util

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
