"""A tokenizer beside an adapter is the base's if texts and token ids become each other in the same way."""

import json
import re
import shutil

import pytest
from tokenizers import AddedToken

from launcher.models.files import load_tokenizer
from launcher.models.same_tokenizer import BaseTokenizer, difference, own_tokenizer


def saved(base, folder, change):
    """The base's tokenizer after a change, saved as an adapter's."""
    tokenizer = load_tokenizer(base)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def padded(tokenizer):
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template = tokenizer.eos_token, "left", "{{ messages }}"
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")


def test_other_formatting_padding_truncation_and_templates_make_no_other_tokenizer(babyllama, tmp_path, monkeypatch):
    known = BaseTokenizer(load_tokenizer(babyllama))
    folder = saved(babyllama, tmp_path / "saved", padded)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7, sort_keys=True))
    (tmp_path / "none").mkdir()

    assert known.difference(folder) is None
    assert known.difference(tmp_path / "none") is None
    monkeypatch.setattr("launcher.models.same_tokenizer.load_tokenizer", lambda folder: pytest.fail("loaded again"))
    assert [known.difference(each) for each in (folder, babyllama)] == [None, None]


def without(tokenizer):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "Lowercase"}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.add_tokens(["<call>"]), "token '<call>' is .* is not in the base's"),
        (lambda t: t.add_tokens(["<a>", "<b>"]), "and so on for 2 tokens"),
        (lambda t: setattr(t, "eos_token", "<s>"), "its eos_token is '<s>', the base's '</s>'"),
        (lambda t: setattr(t, "bos_token", None), "its bos_token is None, the base's '<s>'"),
        (lambda t: t.add_tokens([AddedToken("the", special=True)]), "its added tokens have other properties"),
        (without, "its normalizer is another"),
    ],
    ids=["more tokens", "two more", "end of turn", "no start", "special", "normalizer"],
)
def test_what_changes_prompts_or_answers_is_named(change, said, babyllama, tmp_path):
    base = load_tokenizer(babyllama)
    base.add_tokens(["the"])
    folder = saved(babyllama, tmp_path, lambda tokenizer: (tokenizer.add_tokens(["the"]), change(tokenizer)))

    found = BaseTokenizer(base).difference(folder)

    assert found is not None
    assert re.search(said, found), found


def test_a_tokenizer_that_lacks_tokens_is_another(babyllama, tmp_path):
    base = load_tokenizer(babyllama)
    base.add_tokens(["<call>"])

    found = BaseTokenizer(base).difference(saved(babyllama, tmp_path, lambda tokenizer: None))

    assert found == "it lacks 1 tokens of the base's, as '<call>'"


def test_a_tokenizer_that_does_not_load_is_refused(babyllama, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")

    with pytest.raises(ValueError, match="no tokenizer that loads"):
        BaseTokenizer(load_tokenizer(babyllama)).difference(tmp_path)


def test_a_llama_tokenizer_that_transformers_5_saved_is_the_bases(babyllama, tmp_path):
    """It leaves `legacy` out of the settings; a new value there makes another tokenizer."""
    base = tmp_path / "base"
    shutil.copytree(babyllama, base)
    write_settings(base, tokenizer_class="LlamaTokenizer", legacy=True)
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "other")
    write_settings(tmp_path / "other", legacy=False)

    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()).get("legacy") is None
    assert difference(load_tokenizer(tmp_path / "saved"), tokenizer) == "its pre_tokenizer is another"
    assert BaseTokenizer(tokenizer).difference(tmp_path / "saved") is None
    assert difference(own_tokenizer(tmp_path / "saved", base), tokenizer) is None
    assert BaseTokenizer(tokenizer).difference(tmp_path / "other") == "its pre_tokenizer is another"


def write_settings(folder, **settings):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
