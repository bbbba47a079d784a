"""The content of the prompt template is saved with the trained model."""

import json

import pytest
from byte_records import ALPACA, CHAT, CHATML, byte_tokenizer, encode, prompt, write

from launcher.data import templates
from launcher.data.saved_template import (
    CHAT_TEMPLATE,
    PROMPT_TEMPLATE,
    adapter_template,
    adds_bos,
    as_jinja,
    read_template,
    save_template,
)


@pytest.mark.parametrize("setting", ["alpaca", "short", "none", "chat", "text file", "jinja file"])
def test_a_template_is_read_as_it_was_saved_without_the_file_it_came_from(tmp_path, setting):
    tokenizer = byte_tokenizer(CHATML)
    if setting.endswith("file"):
        text, name = ('Q: {instruction} 😀 "x" {{ y }}\nA:', "a.txt") if "text" in setting else (CHATML, "a.jinja")
        setting = write(tmp_path, name, text)
    template = templates.load_template(setting, tokenizer, conversations=False)
    (tmp_path / "adapter").mkdir()

    save_template(template, tokenizer, tmp_path / "adapter")
    (tmp_path / "a.txt").unlink(missing_ok=True)
    (tmp_path / "a.jinja").unlink(missing_ok=True)

    assert read_template(tmp_path / "adapter") == template
    assert read_template(tmp_path) is None
    jinja = (tmp_path / "adapter" / CHAT_TEMPLATE).read_text()
    assert jinja == as_jinja(template, has_bos=True)


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize(
    "text", [None, "Q: {instruction} 😀 \"x\" \\n {{ y }} {# #}\n'A':\n", "<s>[INST] {instruction} [/INST]"]
)
def test_servers_send_the_tokens_of_training_with_the_template_that_is_saved_for_them(tmp_path, text, has_bos):
    """Of a template without turns: bos, the prompt, the answer and eos, by apply_chat_template."""
    tokenizer = byte_tokenizer(**({} if has_bos else {"bos_token": None}))
    setting = "alpaca" if text is None else write(tmp_path, "a.txt", text.replace("{{ y }}", "[[ y ]]"))
    record = {**ALPACA, "input": ""}
    template = templates.load_template(setting, tokenizer, conversations=False)
    tokenizer.chat_template = as_jinja(template, has_bos=adds_bos(template, tokenizer))
    asked = [{"role": "user", "content": record["instruction"]}]
    answered = [*asked, {"role": "assistant", "content": record["output"]}]

    trained = encode([record], tokenizer, prompt_template=setting).ids.tolist()

    assert tokenizer.apply_chat_template(answered, return_dict=False) == trained
    sent = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert sent == templates.prompt_ids(record, template, tokenizer) == trained[: len(sent)]


def test_a_server_is_told_that_there_is_no_place_for_a_system_prompt():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = as_jinja(templates.load_template("short", tokenizer, conversations=False), has_bos=True)

    with pytest.raises(Exception, match="trained on questions and answers alone, not on system"):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 99999,
        *map(json.dumps, [{"name": 1}, {"name": "a", "code": ""}, {"name": "a", "jinja": [1]}]),
        json.dumps({"name": "a", "jinja": "", "date": "x' }}{{ y"}),
    ],
)
def test_a_damaged_template_file_is_named(tmp_path, content):
    write(tmp_path, PROMPT_TEMPLATE, content)

    with pytest.raises(ValueError, match="prompt_template"):
        read_template(tmp_path)


def test_an_adapter_of_another_program_brings_its_chat_template(tmp_path):
    """A bare adapter's chat_template.jinja counts, not the base's template or alpaca; ours is read first."""
    assert adapter_template(tmp_path) is None
    jinja = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    write(tmp_path, CHAT_TEMPLATE, jinja)

    assert adapter_template(tmp_path).jinja == jinja

    write(tmp_path, PROMPT_TEMPLATE, json.dumps({"name": "ours", "jinja": "{{ messages }}"}))
    assert adapter_template(tmp_path).name == "ours"
    (tmp_path / PROMPT_TEMPLATE).unlink()
    (tmp_path / CHAT_TEMPLATE).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read"):
        adapter_template(tmp_path)


def test_the_bare_prompt_is_a_template_too():
    assert prompt("none") == "Add.\n\n1 2"
    assert prompt("none", input="") == "Add."
