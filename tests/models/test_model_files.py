"""A base's files: damaged ones, and what a tokenizer without a tokenizer.json needs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import tokenizers

from launcher.models import files
from launcher.processes import Communicator, Ranks
from launcher.start import guarded

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


COUNT_THREADS = """
import os, sys
from pathlib import Path
from launcher.models import files

def threads():
    return len(list(Path("/proc/self/task").iterdir()))

before = threads()
tokenizer = files.load_tokenizer(Path(sys.argv[1]))
tokenizer(["a text"] * 100)
print(threads() - before)
"""


@pytest.mark.parametrize(("given", "started"), [({"OMP_NUM_THREADS": "1"}, 1), ({"RAYON_NUM_THREADS": "3"}, 3)])
def test_a_tokenizer_starts_as_many_threads_as_torch_uses(given, started, stories):
    """By default the library starts one for each core, also in each of several processes."""
    others = {name: value for name, value in os.environ.items() if name != "RAYON_NUM_THREADS"}
    environment = others | {"TOKENIZERS_PARALLELISM": "true"} | given

    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS, str(stories)], env=environment, capture_output=True, text=True, check=True
    )

    assert int(done.stdout) == started


def with_a_panic(stories, folder):
    """A copy of the tokenizer, at which the tokenizers library panics: it is told to add a token that it lacks."""
    known = json.loads((stories / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "Q", "type_id": 0}}]
    known["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    shutil.copy(stories / "tokenizer_config.json", folder)
    (folder / "tokenizer.json").write_text(json.dumps(known))
    return folder


def test_a_tokenizer_at_which_its_library_panics_is_refused(stories, tmp_path):
    """A panic of a library in Rust is no Exception of Python's."""
    with pytest.raises(ValueError, match=r"has no tokenizer that loads \(pyo3_runtime failed on this input"):
        files.load_tokenizer(with_a_panic(stories, tmp_path))


def test_a_panic_anywhere_else_is_one_line_too(stories, tmp_path, capsys):
    tokenizer = tokenizers.Tokenizer.from_file(str(with_a_panic(stories, tmp_path) / "tokenizer.json"))

    assert guarded(lambda: tokenizer.encode("once")) == 2
    assert capsys.readouterr().err.startswith("error: pyo3_runtime failed on this input (")

    with pytest.raises(ValueError, match="failed on this input"):
        Communicator(Ranks()).each("data", lambda: tokenizer.encode("once"))


def test_a_wrong_value_in_the_config_is_not_blamed_on_the_tokenizer(stories, tmp_path):
    for file in stories.glob("*.json"):
        shutil.copy(file, tmp_path)
    config = json.loads((stories / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": [1]}))

    with pytest.raises(ValueError, match=r"config\.json is damaged .*num_hidden_layers.*: fetch it again"):
        files.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "[" * 100_000, "is damaged .*nested too deeply"),
        ("config.json", "[]", "is damaged .*it holds no object"),
        ("config.json", '{"num_hidden_layers": 1000000000}', "says num_hidden_layers 1000000000, supported"),
        ("config.json", '{"num_hidden_layers": -1}', "says num_hidden_layers -1, supported"),
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
