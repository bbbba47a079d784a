"""The text around a record: published templates, and files of templates."""

import pytest
from byte_records import ALPACA, CHAT, CHATML, byte_tokenizer, encode, prompt, shown, write

from launcher.data import templates


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
        ("Q {{instruction}}", "found {{instruction}}, expected single braces, {instruction}"),
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


def test_a_byte_order_mark_of_a_template_file_is_no_text(tmp_path):
    for name in ("a.txt", "a.jinja"):
        path = write(tmp_path, name, "\ufeffQ {instruction}".encode())

        template = templates.load_template(path, byte_tokenizer(), conversations=False)

        assert (template.jinja or template.with_input) == "Q {instruction}"


def test_marks_that_a_text_has_already_are_not_doubled(tmp_path):
    """Data for Llama 2 often have <s> before a prompt and </s> after an answer. Generation begins with one, too."""
    tokenizer = byte_tokenizer()
    rows = [
        {"instruction": f"{begin}Hi?", "input": "", "output": f"Ho.{end}"}
        for begin in ("", "<s>")
        for end in ("", "</s>")
    ]

    encoded = encode(rows, tokenizer, prompt_template="none")

    assert {shown(encoded, tokenizer, i) for i in range(4)} == {("<s>Hi?Ho.</s>", "Ho.</s>")}
    bare = templates.load_template("none", tokenizer, conversations=False)
    assert {tokenizer.decode(templates.prompt_ids(row, bare, tokenizer)) for row in rows} == {"<s>Hi?"}
    assert {templates.expected_text(row, bare, tokenizer) for row in rows} == {"Ho."}


@pytest.mark.parametrize(
    ("asked", "setting", "warned"),
    [
        ("[INST] Hi? [/INST]", "alpaca", True),
        ("### Human: Hi? ### Assistant:", "short", True),
        ("<|im_start|>user", "chat", True),
        ("[INST] Hi? [/INST]", "none", False),
        ("Hi?", "alpaca", False),
    ],
)
def test_prompts_that_have_a_template_already_are_a_warning(asked, setting, warned, caplog):
    rows = [{"instruction": asked, "input": "", "output": "Ho."}, ALPACA]

    encode(rows, byte_tokenizer(CHATML), prompt_template=setting)

    assert ("1 prompts have the marks of a prompt template already" in caplog.text) == warned
