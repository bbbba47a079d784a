"""A tokenizer that multiplies texts, or has huge ids, is refused before it sees a text."""

import json

import pytest
from tokenizers import Tokenizer, normalizers

from launcher.models.files import load_tokenizer
from launcher.models.tokenizer_limits import growth


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*parts):
    return {"type": "Sequence", "normalizers": list(parts)}


LLAMA = sequence({"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581"))


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        ({"type": "NFC"}, (1, 0)),
        (LLAMA, (1, 1)),
        (replace(" {2,}", " ", "Regex"), (1, 0)),
        (replace("ab", "xyzw"), (2, 0)),
        (replace("", "xx"), (3, 2)),
        (replace("x*", "yy", "Regex"), (3, 2)),
        (replace("[", "yy", "Regex"), (2, 0)),
        (sequence({"type": "Prepend", "prepend": "abc"}, replace(".", "xx", "Regex")), (2, 6)),
        (sequence(*[replace(".", "x" * 10, "Regex")] * 9), (10**9, 0)),
    ],
)
def test_the_growth_of_a_text_follows_from_the_normalizers_parts(normalizer, expected):
    assert growth(normalizer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (LLAMA, "a b"),
        (replace("", "xx"), "abcd"),
        (sequence(replace("a", "bb"), replace("bb", "cccc")), "aaaa"),
        (sequence({"type": "Prepend", "prepend": "abc"}, replace(".", "xx", "Regex")), "a b c"),
    ],
)
def test_no_text_grows_more_than_predicted(normalizer, text, stories, tmp_path):
    backend = json.loads((stories / "tokenizer.json").read_text()) | {"normalizer": normalizer}
    made = Tokenizer.from_str(json.dumps(backend)).normalizer
    assert isinstance(made, normalizers.Normalizer)

    times, before = growth(normalizer)

    assert len(made.normalize_str(text)) <= times * len(text) + before


@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        ({"type": "Prepend", "prepend": "x" * 10**7}, "can make 10,000,000 characters before each text, .* most 256"),
        (sequence(*[replace("", "x" * 1000)] * 3), "can make .* before each text"),
        (sequence(*[replace(".", "x" * 10, "Regex")] * 9), "can make 1,000,000,000 of a character, .* at most 16"),
    ],
)
def test_a_tokenizer_that_multiplies_texts_is_refused_by_name(normalizer, message, stories, tmp_path):
    for file in stories.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    backend = json.loads((stories / "tokenizer.json").read_text()) | {"normalizer": normalizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))

    with pytest.raises(ValueError, match=rf"^{tmp_path}/tokenizer.json: its normalizer {message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("largest", [1000, 10**9])
def test_ids_with_holes_may_not_be_huge(largest, stories, tmp_path):
    for file in stories.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = {"type": "WordLevel", "vocab": {"a": largest, "[UNK]": 0}, "unk_token": "[UNK]"}
    backend = json.loads((stories / "tokenizer.json").read_text()) | {"model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))

    if largest < 10**6:
        assert load_tokenizer(tmp_path)
    else:
        with pytest.raises(ValueError, match=r"tokenizer\.json: a token has the id 1,000,000,000, although there are"):
            load_tokenizer(tmp_path)


def test_known_normalizers_load(stories):
    assert load_tokenizer(stories)("a b")["input_ids"]
