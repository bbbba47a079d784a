"""Public forms of preference pairs: all that belongs to the prompt is in it, or is named."""

import re

import pytest
from byte_records import jsonl, write

from launcher.data.pairs import load_pairs

ASKED = {"role": "user", "content": "Hi?"}
GOOD, BAD = {"role": "assistant", "content": "Ho."}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "S"}
LISTS = {"chosen": [GOOD], "rejected": [BAD]}
TEXTS = {"chosen": "Ho.", "rejected": "No."}
WHOLE = {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}


def load(folder, *rows, **settings):
    return load_pairs(write(folder, "a.jsonl", jsonl(*rows)), **settings)


def said(record):
    return [(turn["role"], turn["content"]) for turn in record["messages"]]


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": "Hi?", **TEXTS, "system_prompt": "S"}, [("system", "S"), ("user", "Hi?")]),
        (
            {"instruction": "Hi?", **TEXTS, "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), ("user", "Hi?")],
        ),
        ({"prompt": "Hi?", **LISTS, "input": "Here."}, [("user", "Hi?\n\nHere.")]),
        ({"prompt": "Hi?", **LISTS, "context": "Here."}, [("user", "Hi?\n\nHere.")]),
        ({"prompt": [SYSTEM, ASKED], **WHOLE}, [("system", "S"), ("user", "Hi?")]),
        ({"prompt": [SYSTEM], **WHOLE}, [("system", "S"), ("user", "Hi?")]),
        ({"prompt": [ASKED], **WHOLE}, [("user", "Hi?")]),
        ({"prompt": "Hi?", **WHOLE}, [("user", "Hi?")]),
        (
            {
                "conversations": [{"from": "human", "value": "Hi?"}],
                "chosen": {"from": "gpt", "value": "Ho."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            [("user", "Hi?")],
        ),
        (
            {
                name: [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": answer}]
                for name, answer in TEXTS.items()
            },
            [("user", "Hi?")],
        ),
    ],
)
def test_all_that_belongs_to_the_prompt_is_in_it_and_the_answers_alone_carry_loss(row, before, tmp_path, caplog):
    [pair] = load(tmp_path, row)

    assert said(pair["chosen"]) == [*before, ("assistant", "Ho.")]
    assert said(pair["rejected"]) == [*before, ("assistant", "No.")]
    assert all(
        turn.get("weight") == 0 for one in pair.values() for turn in one["messages"][1:-1] if turn["role"] != "user"
    )
    assert not caplog.records


def test_a_context_beside_texts_is_the_input(tmp_path):
    [pair] = load(tmp_path, {"prompt": "Hi?", **TEXTS, "context": "Here."})

    assert pair["chosen"] == {"instruction": "Hi?", "input": "Here.", "output": "Ho."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi?", **TEXTS, "images": ["a.png"]}, "has 'images': only text is supported"),
        ({"prompt": [{"role": "user", "content": "Other?"}], **WHOLE}, "begin with another question than 'prompt'"),
        ({"question": "Hi?", **TEXTS}, r"its columns: question, .*--columns prompt=COLUMN"),
    ],
)
def test_pairs_that_would_lose_a_part_are_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi?", **TEXTS, "documents": ["a"]}, "'documents' carries meaning in some formats .* 1 times"),
        ({"prompt": "Read this.", **WHOLE}, "'prompt' carries meaning in some formats .* 1 times"),
        ({"prompt": "Hi?", "chosen": "Hi? Ho.", "rejected": "Hi? No."}, "in 1 of 1 pairs both answers begin with the"),
    ],
)
def test_what_is_not_used_or_stands_twice_is_a_warning(row, message, tmp_path, caplog):
    load(tmp_path, row)

    [record] = caplog.records
    assert re.search(message, record.getMessage())


def test_a_field_of_which_two_columns_are_named_is_refused(tmp_path):
    with pytest.raises(ValueError, match="each =COLUMN and once; got prompt=a prompt=b"):
        load(tmp_path, {"a": "Hi?", "b": "Ha?", **TEXTS}, columns=("prompt=a", "prompt=b"))
