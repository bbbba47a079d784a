"""The public forms of records: each is read with all its meaningful fields, or refused by name."""

import gzip
import json
import logging
import os
from random import Random

import pyarrow
import pyarrow.parquet
import pytest
from test_encode import CHAT, CHATML, CHATML_WITH_BLOCKS, byte_tokenizer, encode, jsonl, shown, write

from launcher.config import DataConfig
from launcher.data import records, templates
from launcher.data.limits import Limits

USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}
TALK = [USER, ANSWER]
RECORD = {"instruction": "Hi?", "input": "", "output": "Ho."}
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def load(folder, *rows, **settings):
    return records.load_records(write(folder, "a.jsonl", jsonl(*rows)), **settings)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi?", "completion": "Ho."}, RECORD),
        ({"prompt": "Hi?", "response": "Ho."}, RECORD),
        ({"instruction": "Hi?", "context": "", "response": "Ho.", "category": "open_qa"}, RECORD),
        ({"instruction": "Hi?", "context": "Here.", "response": "Ho."}, {**RECORD, "input": "Here."}),
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
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_place(tmp_path, row, expected):
    with pytest.raises(ValueError, match=expected):
        load(tmp_path, row)


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
    "row", [{"prompt": "Hi?", "completion": "Ho.", "label": False}, {"messages": TALK, "kto_tag": False}]
)
def test_an_answer_that_is_marked_as_one_to_avoid_is_not_trained_on(row, tmp_path):
    """KTO's form has answers of both kinds in one file."""
    with pytest.raises(ValueError, match="false, so its answer is one to avoid"):
        load(tmp_path, row)

    good = {name: True if value is False else value for name, value in row.items()}
    assert len(load(tmp_path, row, good, on_bad_record="skip")) == 1


@pytest.mark.parametrize("mark", [{"train": False}, {"training": False}, {"train_on_turn": False}, {"masked": True}])
def test_a_turn_without_loss_is_known_under_the_names_of_other_tools(mark, tmp_path):
    found = load(tmp_path, {"messages": [USER, ANSWER | mark, *TALK]})

    assert found[0]["messages"][1] == {**ANSWER, "weight": 0}


# --- what reaches the tokens ---


def test_an_answer_of_weight_0_is_context_alone():
    messages = [USER, {**ANSWER, "weight": 0}, *TALK]
    tokenizer = byte_tokenizer(CHATML)

    encoded = encode([{"messages": messages}], tokenizer, prompt_template="chat")

    whole = "<|user|>Hi?</s><|assistant|>Ho.</s>" * 2
    assert shown(encoded, tokenizer) == (whole, "Ho.</s>")
    assert encoded.loss.tolist().index(True) > len(encoded.loss) // 2


def test_weights_are_honoured_with_generation_blocks_or_refused():
    messages = [USER, {**ANSWER, "weight": 0}, *TALK]
    everywhere = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")

    tokenizer = byte_tokenizer(CHATML_WITH_BLOCKS)
    encoded = encode([{"messages": messages}], tokenizer, prompt_template="chat")

    assert shown(encoded, tokenizer)[1] == "Ho.</s>"
    with pytest.raises(ValueError, match=r"marks 4 \{% generation %\} blocks for 2 answers"):
        encode([{"messages": messages}], byte_tokenizer(everywhere), prompt_template="chat")


def test_tools_and_calls_reach_a_template_that_writes_them():
    template = (
        "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %}</s>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = byte_tokenizer(template)
    record = {"messages": [USER, {"role": "assistant", "content": "Let me look.", "tool_calls": [ADD]}], "tools": [ADD]}

    encoded = encode([record], tokenizer, prompt_template="chat")

    assert shown(encoded, tokenizer) == (
        '[add]<|user|>Hi?</s><|assistant|>Let me look.(add {"a": 1})</s>', 'Let me look.(add {"a": 1})</s>',
    )  # fmt: skip


def test_a_template_that_joins_arguments_as_text_is_given_text():
    """DeepSeek V3's way."""
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name + '!' + c.function.arguments }}{% endfor %}",
    )
    tokenizer = byte_tokenizer(template)

    encoded = encode(
        [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [ADD]}]}],
        tokenizer,
        prompt_template="chat",
    )

    assert shown(encoded, tokenizer)[1] == 'add!{"a": 1}</s>'


def test_calls_that_the_template_does_not_write_are_refused():
    """The model would learn to stop instead of calling."""
    record = {"messages": [USER, {"role": "assistant", "content": "Let me look.", "tool_calls": [ADD]}]}

    with pytest.raises(ValueError, match=r"calls the tool 'add', and the chat template does not write tool_calls: "):
        encode([record], byte_tokenizer(CHATML), prompt_template="chat")


EITHER = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is none %}{% for c in m.tool_calls %}({{ c.function.name }}){% endfor %}"
    "{% else %}{{ m.content }}{% endif %}",
)  # DeepSeek V3's way: a call, or a text


@pytest.mark.parametrize("content", [None, ""])
def test_calls_without_text_reach_a_template_that_wants_no_content_beside_them(content, tmp_path):
    tokenizer = byte_tokenizer(EITHER)
    called = {"role": "assistant", "content": content, "tool_calls": [ADD]}

    encoded = encode(
        load(tmp_path, {"messages": [USER, called, {"role": "tool", "content": "2"}, ANSWER]}), tokenizer,
        prompt_template="chat",
    )  # fmt: skip

    assert shown(encoded, tokenizer)[1].startswith("(add)</s>")


def test_calls_that_the_template_leaves_out_beside_a_text_are_refused():
    record = {"messages": [USER, {"role": "assistant", "content": "Let me add.", "tool_calls": [ADD]}], "tools": [ADD]}

    with pytest.raises(ValueError, match=r"'add', and .* does not write tool_calls beside an answer's text: the model"):
        encode([record], byte_tokenizer(EITHER), prompt_template="chat")


def test_what_the_template_leaves_out_is_counted(caplog):
    template = CHATML.replace("in messages", "in messages if m.role != 'system'")
    record = {"messages": [CHAT[0], USER, {**ANSWER, "reasoning_content": "Hmm."}], "tools": [ADD]}

    encode([record, record], byte_tokenizer(template), prompt_template="chat")

    assert "the chat template leaves out content of system messages: 2 times" in caplog.text
    assert "the chat template leaves out reasoning_content: 2 times" in caplog.text
    assert "the chat template leaves out tools: 2 times" in caplog.text


def test_a_developer_is_the_system_where_the_template_knows_no_developer():
    messages = [{"role": "developer", "content": "S"}, *TALK]

    plain = shown(encode([{"messages": messages}], byte_tokenizer(CHATML), prompt_template="chat"), byte_tokenizer())[0]

    assert plain.startswith("<|system|>S</s>")


def test_an_alpaca_system_prompt_is_kept_by_the_chat_template(tmp_path):
    loaded = load(tmp_path, {**RECORD, "system": "Be brief."}, {**RECORD, "system": ""})
    tokenizer = byte_tokenizer(CHATML)

    encoded = encode(loaded, tokenizer, prompt_template="auto")

    assert shown(encoded, tokenizer)[0] == "<|system|>Be brief.</s><|user|>Hi?</s><|assistant|>Ho.</s>"
    assert shown(encoded, tokenizer, 1)[0] == "<|user|>Hi?</s><|assistant|>Ho.</s>"
    with pytest.raises(ValueError, match="short has no turns"):
        encode(loaded, tokenizer, prompt_template="short")


# --- bad records ---

ODD = [{"instruction": "a"}, {"instruction": "a", "output": 3}, {"instruction": "b", "output": 4}, "text"]


def test_one_odd_record_is_an_error_with_every_reason_and_count(tmp_path):
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load(tmp_path, RECORD, *ODD * 4, option="--eval-data")

    text = str(caught.value)
    assert text.startswith("--eval-data ")
    assert "16 of 17 records cannot be used (8 x 'output' is no text, 4 x no 'output', 4 x no object)" in text
    assert text.count("\n") == 11
    assert text.endswith("... and 6 more")
    assert "record 1 of" in text


def test_bad_records_are_left_out_and_logged_when_asked(tmp_path, caplog):
    loaded = load(tmp_path, RECORD, *ODD, RECORD, on_bad_record="skip")

    assert loaded == [RECORD, RECORD]
    assert "4 of 6 records cannot be used" in caplog.text
    assert "'output' is a text, got the int 4" in caplog.text
    assert "4 left out (--on-bad-record skip)" in caplog.text


def test_skipping_everything_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="4 of 4 records cannot be used"):
        load(tmp_path, *ODD, on_bad_record="skip")


def test_a_file_whose_records_all_have_the_same_fault_is_one_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"none of the 30 records can be used, all for one reason; the first: record 0"
    ) as caught:
        load(tmp_path, *[{"question": "Hi?", "answer": "Ho."}] * 30)

    assert "\n" not in str(caught.value)
    assert "give --columns prompt=question answer=answer" in str(caught.value)


def test_a_recipes_own_number_of_held_out_records_is_no_error_on_a_small_file(tmp_path, caplog):
    source = numbered(tmp_path, "a.jsonl", 40)

    train, held_out = records.splits_of(DataConfig(data=source, eval_records=500, fewer_eval_records=True))

    assert (len(train), len(held_out)) == (36, 4)
    assert "held out are 4 of the 40 records, since the recipe's 500 would leave none" in caplog.text
    assert len(records.splits_of(DataConfig(data=source, eval_records=5, fewer_eval_records=True))[1]) == 5
    with pytest.raises(ValueError, match="--eval-records 500 of 40 records leaves none"):
        records.splits_of(DataConfig(data=source, eval_records=500))


def test_conversations_that_the_template_refuses_are_bad_records_too(caplog):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    rows = [{"messages": CHAT}, {"messages": TALK}]

    with pytest.raises(ValueError, match=r"refuses the conversation that begins 'Be brief\.': no system"):
        encode(rows, byte_tokenizer(template), prompt_template="chat")
    encoded = encode(rows, byte_tokenizer(template), prompt_template="chat", on_bad_record="skip")

    assert len(encoded) == 1
    assert "1 left out (--on-bad-record skip)" in caplog.text


# --- files and sources ---


def test_csv_tsv_and_zstandard_are_read(tmp_path):
    rows = 'instruction,input,output\n"Hi, there?\nYou",,"Ho ""."""\n'
    packed = pyarrow.compress(jsonl(RECORD).encode(), codec="zstd", asbytes=True)

    assert records.load_records(write(tmp_path, "a.csv", rows)) == [
        {"instruction": "Hi, there?\nYou", "input": "", "output": 'Ho "."'}
    ]
    assert records.load_records(write(tmp_path, "a.tsv", "instruction\toutput\nHi?\tHo.")) == [RECORD]
    assert records.load_records(write(tmp_path, "a.csv.gz", gzip.compress(rows.encode())))
    assert records.load_records(write(tmp_path, "a.jsonl.zst", packed)) == [RECORD]


def test_a_folder_gives_the_files_of_the_split_that_the_option_means(tmp_path):
    (tmp_path / "data").mkdir()
    for name, output in [("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000", "c")]:
        table = pyarrow.Table.from_pylist([{**RECORD, "output": output}])
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{name}.parquet")

    train, held_out = records.load_splits(str(tmp_path), str(tmp_path), 0)

    assert [record["output"] for record in train] == ["a", "b"]
    assert [record["output"] for record in held_out] == ["c"]


def test_a_folder_of_files_without_splits_is_read_in_their_order(tmp_path):
    write(tmp_path, "2.jsonl", jsonl({**RECORD, "output": "b"}))
    write(tmp_path, "1.jsonl", jsonl({**RECORD, "output": "a"}))
    write(tmp_path, "README.md", "not data")

    assert [record["output"] for record in records.load_records(str(tmp_path))] == ["a", "b"]


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([RECORD])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "splits"))

    assert records.load_records(str(tmp_path / "one")) == [RECORD]
    assert records.load_records(str(tmp_path / "splits"), option="--eval-data") == [RECORD]


def test_a_dictionary_of_splits_gives_the_one_that_the_option_means(tmp_path):
    source = write(tmp_path, "a.json", json.dumps({"train": [RECORD], "validation": [{**RECORD, "output": "x"}]}))

    assert records.load_records(source) == [RECORD]
    assert records.load_records(source, option="--eval-data")[0]["output"] == "x"


def numbered(folder, name, count):
    return write(folder, name, jsonl(*({**RECORD, "output": f"{name} {i}"} for i in range(count))))


def test_several_sources_are_counted_with_their_weights(tmp_path, caplog):
    one, other, third = (numbered(tmp_path, name, 10) for name in ("a.jsonl", "b.jsonl", "c.jsonl"))

    with caplog.at_level(logging.INFO):
        train, _ = records.load_splits((one, f"{other}:0.3", f"{third}:2.5"), None, 0)

    counts = [sum(record["output"].startswith(name) for record in train) for name in "abc"]
    assert counts == [10, 3, 25]
    assert "b.jsonl: 3 of 10 records, weight 0.3" in caplog.text
    assert train == records.load_splits((one, f"{other}:0.3", f"{third}:2.5"), None, 0)[0]


def test_held_out_records_are_never_trained_on_whatever_the_weights(tmp_path):
    sources = (numbered(tmp_path, "a.jsonl", 10), numbered(tmp_path, "b.jsonl", 10) + ":3")

    train, held_out = records.load_splits(sources, None, 6)

    assert len(held_out) == 6
    assert not {record["output"] for record in train} & {record["output"] for record in held_out}
    assert len(train) > 14


def test_sources_of_different_kinds_become_conversations(tmp_path):
    chat = write(tmp_path, "chat.json", json.dumps([{"messages": TALK}]))
    config = DataConfig(data=(numbered(tmp_path, "a.jsonl", 1), chat))

    train, _ = records.splits_of(config)

    assert train == [{"messages": [USER, {"role": "assistant", "content": "a.jsonl 0"}]}, {"messages": TALK}]


def test_a_weight_that_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the weight of .*a\.jsonl:0 lies above 0"):
        records.load_splits(numbered(tmp_path, "a.jsonl", 1) + ":0", None, 0)


def test_one_source_stays_a_plain_string_in_the_config():
    assert DataConfig(data=("a.json",)).data == "a.json"
    with pytest.raises(ValueError, match=r"--data .* is empty"):
        DataConfig(data=())


# --- hostile files ---


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "[" * 100_000, r"a\.json is not JSON that can be read: it is nested too deeply"),
        ("a.jsonl", '{"a":' * 100_000, r"a\.jsonl, line 1, is not JSON: it is nested too deeply"),
        ("a.jsonl", '{"instruction": ' + "9" * 5000 + "}", r"line 1, is not JSON: .*digits"),
        (
            "a.json.gz",
            gzip.compress(b"[" + b" " * 2**27, mtime=0),
            r"unpacks to more than read_ratio times its size, from byte 0 on: .*LOLDU_READ_RATIO",
        ),
        (  # the noise before it does not make up for the bomb's ratio
            "a.json.gz",
            gzip.compress(
                b'[{"a": "' + Random(0).randbytes(2**23).hex().encode() + b" " * 2**28, compresslevel=1, mtime=0
            ),
            r"unpacks to more than read_ratio times its size, from byte [1-9].* on: .*LOLDU_READ_RATIO",
        ),
        (
            "a.json.zst",
            bytes(pyarrow.compress(b" " * 2**28, "zstd")),
            r"unpacks to more than read_ratio times its size, from byte 0 on: .*LOLDU_READ_RATIO",
        ),
        ("a.json.gz", gzip.compress(Random(0).randbytes(9999), mtime=0)[:-8], r"a\.json\.gz cannot be read"),
        (
            "a.jsonl.zst",
            pyarrow.compress(Random(0).randbytes(9999), codec="zstd", asbytes=True)[:-5000],
            r"cannot be read|not UTF-8",
        ),
        ("a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", r"a\.parquet is not a parquet file"),
    ],
)
def test_a_hostile_file_is_one_error(tmp_path, name, content, expected):
    source = write(tmp_path, name, content)

    with pytest.raises(ValueError, match=expected):
        records.load_records(source)


def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")

    with pytest.raises(ValueError, match="is a named pipe: the data are read again"):
        records.load_records(str(tmp_path / "a.jsonl"))


def test_a_file_over_the_limit_names_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.data.files.limits", lambda: Limits(read_bytes=10))

    with pytest.raises(ValueError, match=r"has 52 bytes: the limit is 10; raise it with LOLDU_READ_BYTES"):
        load(tmp_path, RECORD)


CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}({{ c.function.name }}){% endfor %}"
)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"role": "assistant", "content": "", "tool_calls": [ADD]}, "(add)"),
        ({"role": "assistant", "content": "Let me add. ", "tool_calls": [ADD]}, "Let me add. (add)"),
        ({"role": "assistant", "content": " Ho. "}, "Ho."),
        ({"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHo."}, "Ho."),
    ],
)
def test_the_expected_answer_has_the_calls_as_the_template_writes_them_and_no_thinking(last, expected):
    tokenizer = byte_tokenizer(CALLS)
    template = templates.load_template("chat", tokenizer, conversations=True)

    assert templates.expected_text({"messages": [USER, last]}, template, tokenizer) == expected


def test_an_answer_is_compared_without_the_thinking_before_it():
    """Qwen 3's template begins every answer with an empty block of it."""
    assert templates.answer_text("<think>\n\n</think>\n\n6\n") == "6"
    assert templates.answer_text("Hm.\n</think>\n\n6") == "6"  # a template that opens the thinking in the prompt
    assert templates.answer_text(" 6 ") == "6"
