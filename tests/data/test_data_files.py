"""Rows are read as they are taken, and equal those of reading everything at once."""

import gzip
import itertools
import json

import pytest

from launcher.data import files
from launcher.data.files import each_row, load_rows

ROWS = [
    {"a": "é\u2028 ]", "n": [1, {"b": '\\" [,'}]},
    12345,
    -0.5e10,
    "x" * 50,
    [],
    {},
    None,
    True,
    {"z": "\U0001f600"},
]


@pytest.fixture(params=[1, 2, 3, 7, 64, 2**22])
def piece(request, monkeypatch):
    """Bytes that are read at once."""
    monkeypatch.setattr(files, "UNPACK_AT_ONCE", request.param)


def write(folder, name, text) -> str:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


@pytest.mark.parametrize(
    "shape", [json.dumps, lambda rows: "\ufeff \n" + json.dumps(rows, indent=2, ensure_ascii=False)]
)
def test_a_json_list_is_the_same_in_pieces_as_at_once(tmp_path, piece, shape):
    assert load_rows(write(tmp_path, "a.json", shape(ROWS)), "--data") == ROWS


def test_json_lines_are_the_same_in_pieces_as_at_once(tmp_path, piece):
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)

    assert load_rows(write(tmp_path, "a.jsonl", text), "--data") == ROWS
    assert load_rows(write(tmp_path, "a.jsonl.gz", gzip.compress(text.encode() + b"\n")), "--data") == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"b": 2}\n {"c": 3}]', "line 3, is not JSON: Expecting ',' delimiter"),
        ('[{"a": 1},\n {"b": ]', "line 2, is not JSON: Expecting value"),
        ('[{"a": 1},\n {"b": "no end', "line 2, is not JSON: Unterminated string"),
        ('[{"a": 1}', "line 1, is not JSON: Expecting ',' delimiter"),
        ('[{"a": 1},]', "line 1, is not JSON: "),
        ('[{"a": 1}] x', "line 1, is not JSON: Extra data"),
        ("", "is empty"),
        (" \n", "is empty"),
        (b'[{"a": "\xff"}]', r"is not UTF-8 text \(byte 8\)"),
        ('[{"a": "é'.encode()[:-1], r"is not UTF-8 text \(byte 8\)"),
        ("[" + "[" * 100_000, "nested too deeply"),
        ("[1, " + "9" * 10_000 + "]", "is not JSON that can be read: "),
    ],
)  # fmt: skip
def test_a_mistake_is_told_as_if_the_file_were_read_at_once(tmp_path, piece, text, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path, "a.json", text), "--data")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_first_rows_come_before_the_end_is_read(tmp_path, name, monkeypatch):
    monkeypatch.setattr(files, "UNPACK_AT_ONCE", 64)
    rows = [json.dumps({"i": i}) for i in range(1000)]
    text = "[" + ", ".join(rows) if name == "a.json" else "\n".join(rows)
    source = write(tmp_path, name, text + ", {broken")

    first = list(itertools.islice(each_row(source, "--data"), 900))

    assert first[-1] == {"i": 899}
    with pytest.raises(ValueError, match="is not JSON"):
        load_rows(source, "--data")


def test_objects_one_after_the_other_and_a_named_list_are_read_as_before(tmp_path, piece):
    assert load_rows(write(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n'), "--data") == [{"a": 1}, {"a": 2}]
    assert load_rows(write(tmp_path, "b.json", '{"train": [{"a": 1}]}'), "--data") == [{"a": 1}]


def test_parquet_is_read_in_parts(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(files, "ROWS_AT_ONCE", 3)
    rows = [{"instruction": str(i), "turns": [{"a": i}]} for i in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    assert load_rows(str(tmp_path / "a.parquet"), "--data") == rows
