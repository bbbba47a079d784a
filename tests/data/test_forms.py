"""Public forms of records are read with their meaning, or refused by name."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forms_of_records import ADD, ANSWER, RECORD, TALK, USER, load

from launcher.data import records


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi?", "completion": "Ho."}, RECORD),
        ({"prompt": "Hi?", "response": "Ho."}, RECORD),
        ({"instruction": "Hi?", "context": "", "response": "Ho.", "category": "open_qa"}, RECORD),
        ({"instruction": "Hi?", "context": "Here.", "response": "Ho."}, {**RECORD, "input": "Here."}),
        ({"instruction": "Hi?", "input": "", "context": "Here.", "output": "Ho."}, {**RECORD, "input": "Here."}),
        ({"conversations": TALK}, {"messages": TALK}),
        ({"conversation": TALK}, {"messages": TALK}),
        ({"messages": [{"from": "human", "value": "Hi?"}, {"from": "GPT", "value": "Ho."}]}, None),
        ({"conversations": [{"from": "Human", "value": "Hi?"}, {"from": "bing", "value": "Ho."}]}, {"messages": TALK}),
        ({"conversations": [{"from": "user", "value": "Hi?"}, {"from": "chatgpt", "value": "Ho."}]}, None),
        (
            {"messages": [{"role": "USER", "content": [{"type": "text", "text": "H"}, {"text": "i?"}]}, ANSWER]},
            {"messages": TALK},
        ),
        (
            {"instruction": "Hi?", "output": "Ho.", "system": "Be brief.", "history": [["a", "b"]]},
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    *TALK,
                ]
            },
        ),
        ({"instruction": "Hi?", "output": "Ho.", "system": "", "history": []}, RECORD),
        (
            {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}], "system": "S"},
            {"messages": [{"role": "system", "content": "S"}, *TALK]},
        ),
        (
            {"messages": [{"role": "system", "content": "T"}, *TALK], "system": "S"},
            {"messages": [{"role": "system", "content": "S\n\nT"}, *TALK]},
        ),
        (
            {"messages": [{"role": "developer", "content": "S"}, *TALK]},
            {"messages": [{"role": "developer", "content": "S"}, *TALK]},
        ),
        (
            {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
            {"messages": [USER, {**ANSWER, "weight": 0}, *TALK]},
        ),
        ({"messages": [USER, {**ANSWER, "train": False}, *TALK]}, {"messages": [USER, {**ANSWER, "weight": 0}, *TALK]}),
        (
            {"messages": [USER, {**ANSWER, "reasoning": "Hm"}]},
            {"messages": [USER, {**ANSWER, "reasoning_content": "Hm"}]},
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}, ANSWER, USER], "completion": [ANSWER]},
            {
                "messages": [
                    {"role": "user", "content": "a", "weight": 0},
                    {**ANSWER, "weight": 0},
                    {**USER, "weight": 0},
                    ANSWER,
                ]
            },
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "1?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "Two."},
                ],
                "tools": '[{"name": "add", "parameters": {}}]',
            },
            {
                "messages": [
                    {"role": "user", "content": "1?"},
                    {"role": "assistant", "content": "", "tool_calls": [ADD]},
                    {"role": "tool", "content": "2"},
                    {"role": "assistant", "content": "Two."},
                ],
                "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
            },
        ),
        (
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [ADD]}]},
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "refusal": "No."}]},
            {"messages": [USER, {"role": "assistant", "content": "No."}]},
        ),
    ],
)  # fmt: skip
def test_a_public_form_is_read_with_its_meaning(tmp_path, row, expected):
    assert load(tmp_path, row) == [expected or {"messages": TALK}]


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (("prompt=question", "answer=solution"), {"question": "Hi?", "solution": "Ho."}, RECORD),
        (("question=q", "output=a", "input=c"), {"q": "Hi?", "a": "Ho.", "c": "Here."}, {**RECORD, "input": "Here."}),
        (
            ("prompt=question", "answer=response", "system=system_prompt"),
            {"system_prompt": "S", "question": "Hi?", "response": "Ho."},
            {"messages": [{"role": "system", "content": "S"}, *TALK]},
        ),
        (("messages=chat",), {"chat": TALK}, {"messages": TALK}),
    ],
)
def test_columns_of_other_names_are_mapped(tmp_path, columns, row, expected):
    assert load(tmp_path, row, columns=columns) == [expected]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("reply=a",), r"--columns takes name=COLUMN, the name one of prompt, .*; got 'reply=a'"),
        (("prompt",), r"got 'prompt'"),
        (("prompt=question",), r"--columns names prompt and answer, or messages"),
        (("prompt=question", "answer=answer", "input=a", "context=b"), r"names one column for input or context"),
        (("messages=question", "history=answer"), r"messages=COLUMN has question and answer in it: .* names history"),
        (
            ("prompt=question", "answer=reply"),
            r"record 0 of .* has no 'reply', which --columns names .*: question, answer",
        ),
    ],
)
def test_a_wrong_mapping_is_refused(tmp_path, columns, expected):
    with pytest.raises(ValueError, match=expected):
        load(tmp_path, {"question": "Hi?", "answer": "Ho."}, columns=columns)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Hi?", "answer": "Ho."}, r"give --columns prompt=question answer=answer"),
        ({"text": "Once upon a time."}, r"is plain text .*give --task text"),
        ({"prompt": "?", "chosen": "a", "rejected": "b"}, r"is a preference pair"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            r"turn 0: 'content' has a part of",
        ),
        ({"messages": [{**USER, "images": ["a.png"]}, ANSWER]}, r"turn 0 has 'images': only text is supported"),
        ({"messages": TALK, "images": ["a.png"]}, r"record 0 of .* has 'images': only text"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"'weight' is 0 or 1, got 0\.5"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, r"every answer has weight 0"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, r"'history' is a list of \[question, answer\]"),
        ({"messages": TALK, "tools": "{"}, r"tools is JSON, got '\{'"),
        ({"messages": TALK, "tools": "3"}, r"'tools' is a list of objects, got 3"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": "x"}]}]}, r"a tool call has a name and arguments"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"turn 1 has no 'content'"),
        ({"conversations": [{"from": "function_call", "value": "no"}]}, r"a function call is JSON, got 'no'"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]}]},
            r"turn 1: a tool call with half a character in it \('.ud83d'\)",
        ),
        ({"messages": TALK, "tools": [{"name": "\ud83d"}]}, r"tools with half a character"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_place(tmp_path, row, expected):
    with pytest.raises(ValueError, match=expected):
        load(tmp_path, row)


def test_tools_and_calls_of_arrow_tables_have_no_fields_of_other_tools(tmp_path):
    """Arrow gives all objects of a list the same fields, and fills them with null."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {key: kind}}}}
        for name, key, kind in (("look", "city", {"type": "string"}), ("add", "n", {"type": "integer", "minimum": 1}))
    ]
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{**ADD, "function": call}]}], **more}
        for call, more in (
            ({"name": "look", "arguments": {"city": "Rome"}}, {"tools": tools, "chat_template_kwargs": {"a": True}}),
            ({"name": "add", "arguments": {"n": 2}}, {"tools": tools, "chat_template_kwargs": {"b": True}}),
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))

    expected = load(tmp_path, *rows)

    assert records.load_records(str(tmp_path / "a.parquet")) == expected
    assert records.load_records(str(tmp_path / "saved")) == expected


def test_fields_with_a_meaning_that_is_not_used_are_named_once_with_their_count(tmp_path, caplog):
    rows = [{"messages": TALK, "parallel_tool_calls": True}] * 3 + [{"messages": [USER, {**ANSWER, "prefix": True}]}]

    load(tmp_path, *rows)

    assert [record.getMessage().split("a.jsonl: ")[1] for record in caplog.records] == [
        "'parallel_tool_calls' carries meaning in some formats and is not used here: 3 times",
        "'prefix' carries meaning in some formats and is not used here: 1 times",
    ]


@pytest.mark.parametrize(
    ("row", "columns", "named"),
    [
        ({"q": "Hi?", "a": "Ho.", "context": "Here.", "system_prompt": "S"}, ("prompt=q", "answer=a"),
         ["context", "system_prompt"]),
        ({"q": "Hi?", "a": "Ho.", "context": "Here.", "system_prompt": "S"},
         ("prompt=q", "answer=a", "input=context", "system=system_prompt"), []),
        ({"instruction": "Hi?", "output": "Ho.", "reasoning": "Hm."}, (), ["reasoning"]),
        ({"question": "Hi?", "answer": "Ho.", "cot": "Hm."}, ("prompt=question", "answer=answer"), ["cot"]),
        ({"prompt": "Hi?", "completion": "Ho.", "weight": 0.5}, (), ["weight"]),
        ({"prompt": "Hi?", "completion": "Ho.", "weight": 1, "label": True}, (), []),
        ({"messages": TALK, "context": "Here.", "history": [["a", "b"]], "reasoning": "Hm.", "input": ""}, (),
         ["context", "history", "reasoning"]),
        ({"prompt": [USER], "completion": [ANSWER], "input": "Here."}, (), ["input"]),
        ({"instruction": "Add.", "question": "1 + 1?", "output": "2"}, (), ["question"]),
        ({"instruction": "Add.", "input": "1 + 1", "context": "Sums.", "output": "2"}, (), ["context"]),
    ],
)  # fmt: skip
def test_columns_with_a_meaning_beside_a_question_are_named(row, columns, named, tmp_path, caplog):
    load(tmp_path, row, columns=columns)

    assert [record.getMessage().split("'")[1] for record in caplog.records] == named


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("row", [{"instruction": "Hi?", "output": "Ho."}, {"messages": TALK}])
def test_a_system_prompt_beside_the_record_is_used_under_each_of_its_names(row, column, tmp_path):
    assert load(tmp_path, {**row, column: "S"}) == [{"messages": [{"role": "system", "content": "S"}, *TALK]}]


def test_the_columns_that_an_error_offers_keep_the_system_prompt(tmp_path):
    row = {"system_prompt": "S", "question": "Hi?", "response": "Ho."}

    with pytest.raises(ValueError, match="--columns prompt=question answer=response system=system_prompt") as caught:
        load(tmp_path, row)

    offered = tuple(str(caught.value).rpartition("--columns ")[2].split())
    assert load(tmp_path, row, columns=offered)[0]["messages"][0] == {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "completion": "Ho.", "label": False},
        {"prompt": "Hi?", "completion": "Ho.", "label": "False"},
        {"messages": TALK, "kto_tag": False},
    ],
)
def test_an_answer_that_is_marked_as_one_to_avoid_is_not_trained_on(row, tmp_path):
    """KTO's form has answers of both kinds in one file; in a CSV file the label is a text."""
    with pytest.raises(ValueError, match="false, so its answer is one to avoid"):
        load(tmp_path, row)

    good = {name: True if value in (False, "False") else value for name, value in row.items()}
    assert len(load(tmp_path, row, good, on_bad_record="skip")) == 1
