"""Tokenised data on disk: made once, found again, and never confused with other data."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from launcher.config import DataConfig
from launcher.data import encode, token_cache
from launcher.data.token_cache import encode_once
from launcher.factorization import cache

RECORDS = [{"instruction": f"Say {n}.", "input": "", "output": "yes " * n} for n in range(1, 9)]
SETTINGS = DataConfig(prompt_template="short", max_length=48)


@pytest.fixture
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture
def encoded(monkeypatch):
    """The data sets that were tokenised again."""
    made = []

    def counting(records, *rest, **how):
        made.append(records)
        return make(records, *rest, **how)

    make = token_cache._make
    monkeypatch.setattr(token_cache, "_make", counting)
    return made


def test_the_second_start_reads_what_the_first_one_tokenised(tokenizer, encoded, tmp_path):
    first = encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)
    second = encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)

    assert len(encoded) == 1
    assert second.digest() == first.digest() == encode.encode(RECORDS, tokenizer, SETTINGS).digest()
    assert torch.equal(second.targets, first.targets)
    assert second.report == first.report
    assert first.report.truncated > 0


@pytest.mark.parametrize(
    ("records", "settings"),
    [
        (RECORDS[:-1], SETTINGS),
        ([*RECORDS[:-1], RECORDS[-1] | {"output": "no"}], SETTINGS),
        (RECORDS, replace(SETTINGS, max_length=49)),
        (RECORDS, replace(SETTINGS, prompt_template="alpaca", max_length=400)),
        (RECORDS, replace(SETTINGS, loss_on="all")),
        (RECORDS, replace(SETTINGS, on_bad_record="skip")),
    ],
)
def test_whatever_changes_the_tokens_is_tokenised_again(tokenizer, encoded, tmp_path, records, settings):
    encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)

    found = encode_once(records, tokenizer, settings, tmp_path)

    assert len(encoded) == 2
    assert found.digest() == encode.encode(records, tokenizer, settings).digest()


def test_another_tokenizer_is_not_given_the_ids_of_the_first(tokenizer, babyllama, encoded, tmp_path):
    settings = replace(SETTINGS, max_length=200)
    encode_once(RECORDS, tokenizer, settings, tmp_path)

    encode_once(RECORDS, AutoTokenizer.from_pretrained(babyllama), settings, tmp_path)

    assert len(encoded) == 2


def test_what_was_logged_of_the_data_is_logged_again_when_they_are_read(tokenizer, tmp_path, caplog):
    """A chat template without an end of turn."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    settings = replace(SETTINGS, prompt_template="chat")
    first = encode_once(RECORDS, tokenizer, settings, tmp_path)
    caplog.clear()

    second = encode_once(RECORDS, tokenizer, settings, tmp_path)

    assert second.report == first.report
    assert "no answer ends in a token that stops generation" in caplog.text


@pytest.mark.parametrize("damage", [lambda whole: whole[:-9], lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])])
def test_a_damaged_file_is_named_and_made_again(tokenizer, encoded, tmp_path, damage, caplog):
    first = encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)
    [file] = (tmp_path / "tokenised").iterdir()
    file.write_bytes(damage(file.read_bytes()))

    again = encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)

    assert len(encoded) == 2
    assert again.digest() == first.digest()
    assert f"{file} is damaged" in caplog.text
    assert encode_once(RECORDS, tokenizer, SETTINGS, tmp_path).digest() == first.digest()
    assert len(encoded) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(tokenizer, tmp_path, caplog):
    (tmp_path / "a file").touch()

    made = encode_once(RECORDS, tokenizer, SETTINGS, tmp_path / "a file")

    assert len(made) == len(RECORDS)
    assert "cannot be kept for the next start" in caplog.text


def test_pruning_the_cache_takes_them_too(tokenizer, tmp_path):
    encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)

    pruned = cache.prune(tmp_path, max_bytes=0)

    assert (pruned.files, pruned.left_bytes) == (1, 0)
    assert not list((tmp_path / "tokenised").iterdir())
