"""Files and hub data sets are read as records, mistakes in them are named, and records are held out."""

import gzip
import json
import logging

import pytest
from byte_records import ALPACA, CHAT, jsonl, write

from launcher.data import records


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([ALPACA, ALPACA])),
        ("a.json", json.dumps({"version": 1, "data": [ALPACA, ALPACA]})),
        ("a.json", json.dumps({"test": [], "train": [ALPACA, ALPACA]})),
        ("a.json", jsonl(ALPACA, ALPACA)),
        ("a.jsonl", "\ufeff" + jsonl(ALPACA, {**ALPACA, "id": [1, "x"]}) + "\n\n"),
        ("a.jsonl.gz", gzip.compress(jsonl(ALPACA, ALPACA).encode(), mtime=0)),
    ],
)
def test_json_in_its_usual_shapes_gives_the_same_records(tmp_path, name, content):
    source = write(tmp_path, name, content)

    loaded = records.load_records(source)

    assert loaded == [ALPACA, ALPACA]


def test_parquet_is_read_and_a_missing_input_is_empty(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["Say a."], "input": [None], "output": ["a"]}), path)

    loaded = records.load_records(str(path))

    assert loaded == [{"instruction": "Say a.", "input": "", "output": "a"}]


def test_a_unicode_line_separator_inside_a_json_line_is_text(tmp_path):
    source = write(tmp_path, "a.jsonl", json.dumps({**ALPACA, "output": "a\u2028b"}, ensure_ascii=False))

    loaded = records.load_records(source)

    assert loaded[0]["output"] == "a\u2028b"


def test_sharegpt_and_messages_become_the_same_conversation(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in CHAT]}

    from_sharegpt = records.load_records(write(tmp_path, "a.json", json.dumps([sharegpt])))
    from_messages = records.load_records(write(tmp_path, "b.json", json.dumps([{"messages": CHAT}])))

    assert from_sharegpt == from_messages == [{"messages": CHAT}]


def test_seed_tasks_give_a_record_per_instance(tmp_path):
    task = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}]}

    loaded = records.load_records(write(tmp_path, "tasks.jsonl", json.dumps(task)))

    assert loaded == [ALPACA, {"instruction": "Add.", "input": "", "output": "0"}]


def test_empty_answers_are_left_out_and_named(tmp_path, caplog):
    source = write(tmp_path, "a.json", json.dumps([ALPACA, {**ALPACA, "output": " \n"}]))

    with caplog.at_level(logging.WARNING):
        loaded = records.load_records(source)

    assert loaded == [ALPACA]
    assert "1 of 2 records have an empty answer and are left out: 1" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "[{]", r"a\.json, line 1, is not JSON"),
        ("a.json", "hello", r"a\.json, line 1, is not JSON"),
        ("a.jsonl", jsonl(ALPACA) + "\n{oops\n", r"a\.jsonl, line 2, is not JSON"),
        ("a.json", "", r"a\.json is empty; expected \{instruction"),
        ("a.json", "[]", r"a\.json holds no records"),
        ("a.json", json.dumps({"a": [], "b": []}), r"is an object with 'a', 'b': expected a list of records"),
        ("a.json", b"\xff\xfe\x00", r"is not UTF-8 text \(byte 0\)"),
        ("a.json.gz", gzip.compress(b"[]" * 999, mtime=0)[:20], r"a\.json\.gz cannot be read"),
        ("a.parquet", "PAR0", r"a\.parquet is not a parquet file"),
        ("a.xlsx", "instruction,output", r"data is read from \.json, .* not from \.xlsx"),
        ("a.csv", "instruction,output", r"a\.csv holds no records"),
        (
            "a.csv",
            "instruction;output\nAdd.;3",
            r"a\.csv separates its columns by .;. \(instruction;output\): save it with",
        ),
        ("a.csv", "instruction,output\nAdd.,3\nAdd,5,8", r"a\.csv, line 3, has 3 columns, and the first line names 2"),
        ("a.csv", "instruction,output\nAdd.", r"a\.csv, line 2, has 1 columns, and the first line names 2"),
        ("a.csv", 'instruction,output\nAdd.,"3', r"a\.csv is not CSV"),
        ("a.csv", "a,a\n1,2", r"names the columns, each once; it has a, a"),
        (
            "a.json",
            json.dumps([ALPACA, {"question": "?"}]),
            r"record 1 of .* has no 'instruction' \(its columns: quest",
        ),
        ("a.json", json.dumps([ALPACA, "text"]), r"record 1 of .* is a str, expected an object"),
        ("a.json", json.dumps([{"instruction": "Add."}]), r"record 0 of .* has no 'output'"),
        ("a.json", json.dumps([ALPACA, {**ALPACA, "output": 3}]), r"record 1 of .*'output' is a text, got the int 3"),
        ("a.json", '[{"instruction": "a", "output": "\\ud800"}]', r"record 0 of .*'output' holds half a character"),
        ("a.json", json.dumps([{**ALPACA, "output": ""}]), r"every record's answer is empty \(records 0\)"),
        ("a.json", json.dumps([{"instruction": "a", "instances": {}}]), r"record 0 of .*'instances' is a list"),
        (
            "a.json",
            json.dumps([ALPACA, {"messages": CHAT}]),
            r"record 1 of .* 'messages', but the records before it have 'instruction'",
        ),
        ("a.json", json.dumps([{"messages": "hi"}]), r"record 0 of .*'messages' is a list of \{role, content\}"),
        (
            "a.json",
            json.dumps([{"messages": [{"role": "bot", "content": ""}]}]),
            r"turn 0: unknown role 'bot', expected",
        ),
        ("a.json", json.dumps([{"messages": CHAT[:2]}]), r"record 0 of .* has no assistant turn"),
        ("a.json", json.dumps([{"messages": CHAT[:4]}]), r"record 0 of .* ends with a user turn"),
        ("a.json", json.dumps([{"messages": CHAT[2:]}]), r"record 0 of .* an assistant turn before any user turn"),
        ("a.json", json.dumps([{"conversations": [{"from": "human"}]}]), r"record 0 of .*, turn 0 has no 'value'"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_of_the_mistake(tmp_path, name, content, expected):
    source = write(tmp_path, name, content)

    with pytest.raises(ValueError, match=expected):
        records.load_records(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{folder}/alpca.json", r"alpca\.json: there is no such file; did you mean alpaca\.json\?"),
        ("./nowhere/data", r"there is no such file; give FILE\.json"),
        ("{folder}/empty", r"is a folder without a file that can be read"),
        ("not a name", r"--data 'not a name' is neither a file nor the name of a hub dataset"),
    ],
)
def test_a_missing_file_is_named_without_asking_the_network(tmp_path, monkeypatch, source, expected):
    write(tmp_path, "alpaca.json", "[]")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked the hub for a local file"))

    with pytest.raises(ValueError, match=expected):
        records.load_records(source.format(folder=tmp_path))


def test_a_hub_name_is_read_through_datasets_and_a_failure_says_both_ways(monkeypatch):
    import datasets

    other = {**ALPACA, "output": "4"}
    known = {"someone/set": {"train": [ALPACA], "validation": [other]}, "someone/other": {"train": [other]}}

    def load_dataset(name, configuration, split=None):
        if name not in known:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\nlong story")
        found = {each: datasets.Dataset.from_list(rows) for each, rows in known[name].items()}
        return found if split is None else found[split]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)

    loaded = records.load_records("someone/set")
    with pytest.raises(
        ValueError, match=r"--eval-data no/such: there is no such file.*DatasetNotFoundError.*doesn't exist\)"
    ):
        records.load_records("no/such", option="--eval-data")

    assert loaded == [ALPACA]
    for name in known:  # the held-out split, or the only one
        assert records.load_records(name, option="--eval-data") == [other]


def test_held_out_records_depend_on_the_counts_alone():
    rows = [{"instruction": str(i)} for i in range(50)]

    train, held_out = records.split(rows, 10)
    again = records.split([{"instruction": f"other {i}"} for i in range(50)], 10)

    assert sorted(train + held_out, key=lambda row: int(row["instruction"])) == rows
    assert len(held_out) == 10
    assert held_out != rows[:10]
    assert held_out != rows[-10:]
    assert [f"other {row['instruction']}" for row in held_out] == [row["instruction"] for row in again[1]]
    assert records.split(rows, 0) == (rows, [])


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match=r"--eval-records 3 of 3 records leaves none to train on: give at most 2"):
        records.split([ALPACA] * 3, 3)


def test_held_out_records_come_from_their_own_file_when_there_is_one(tmp_path):
    train = write(tmp_path, "a.json", json.dumps([ALPACA] * 3))
    other = write(tmp_path, "b.json", json.dumps([{**ALPACA, "output": str(i)} for i in range(5)]))

    kept, held_out = records.load_splits(train, other, 2)
    everything = records.load_splits(train, other, 0)[1]

    assert (len(kept), len(held_out), len(everything)) == (3, 2, 5)
