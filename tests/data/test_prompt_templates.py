"""The text around a record: published templates, and files of templates."""

import pytest
from byte_records import CHAT, CHATML, encode, prompt, write


def test_short_and_alpaca_templates_are_the_published_ones():
    assert prompt("short") == "### Instruction:\nAdd.\n### Input:\n1 2\n### Response:\n"
    assert prompt("short", input="") == "### Instruction:\nAdd.\n### Response:\n"
    assert prompt("auto").endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert prompt("alpaca", input="") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:"
    )


def test_braces_in_the_data_are_data():
    assert prompt("short", instruction="Use {input} and {0}") == (
        "### Instruction:\nUse {input} and {0}\n### Input:\n1 2\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("text", "with_input", "without_input"),
    [
        ("[INST] {instruction}[\nGiven: {input}] [/INST]", "[INST] Add.\nGiven: 1 2 [/INST]", "[INST] Add. [/INST]"),
        ("Q: {instruction}\nGiven: {input}\nA:", "Q: Add.\nGiven: 1 2\nA:", "Q: Add.\nA:"),
        ("{instruction} {input}\n", "Add. 1 2\n", "Add. \n"),
    ],
)
def test_a_template_file_leaves_its_input_part_out_when_there_is_none(tmp_path, text, with_input, without_input):
    path = write(tmp_path, "prompt.txt", text)

    assert prompt(path) == with_input
    assert prompt(path, input="") == without_input


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: ", r"expected the placeholders \{instruction\} and \{input\}, found none"),
        ("{instruction} {output}", r"found \{instruction\}, \{output\} \(the answer follows"),
        ("{instruction}", r"has no \{input\}, but a record has one: '1 2'"),
    ],
)
def test_a_template_file_that_cannot_carry_the_record_is_refused(tmp_path, text, expected):
    path = write(tmp_path, "prompt.txt", text)

    with pytest.raises(ValueError, match=expected):
        prompt(path)


def test_templates_that_do_not_fit_are_refused_with_the_choices():
    with pytest.raises(
        ValueError, match=r"--prompt-template shrt: no such file .* expected auto, short, alpaca, chat, none"
    ):
        prompt("shrt")
    with pytest.raises(ValueError, match=r"no chat template: take a model that has one, or .*\.jinja, short or alpaca"):
        prompt("chat")
    with pytest.raises(ValueError, match=r"no chat template, which conversations need"):
        encode([{"messages": CHAT}], prompt_template="auto")
    with pytest.raises(ValueError, match=r"--prompt-template short has no turns, and the records are conversations"):
        encode([{"messages": CHAT}])


def test_a_jinja_file_stands_in_for_a_missing_chat_template(tmp_path):
    path = write(tmp_path, "chat.jinja", CHATML)

    assert prompt(path) == "<|user|>Add.\n\n1 2</s><|assistant|>"
