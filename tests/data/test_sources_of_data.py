"""Files, folders, splits and several sources with weights; and files that are hostile."""

import gzip
import json
import logging
import os
from random import Random

import pyarrow
import pyarrow.parquet
import pytest
from byte_records import jsonl, write
from forms_of_records import RECORD, TALK, USER, load, numbered

from launcher.config import DataConfig
from launcher.data import records
from launcher.data.limits import Limits
from launcher.data.stored import store_splits, stored_splits

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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('label\tt\n0\t"Opened\n1\tplain\n0\tclosed"\n', ['"Opened', "plain", 'closed"']),
        ('t\tlabel\n"He" said\t0\nplain\t1\n', ['"He" said', "plain"]),
        ('t\tlabel\n"He said ""yes""."\t0\n"two\nlines"\t1\n', ['He said "yes".', "two\nlines"]),
        ('t\n"two\nlines"\nplain\n', ["two\nlines", "plain"]),
    ],
)
def test_quotes_in_tsv_files_swallow_no_rows(text, expected, tmp_path):
    """The files of GLUE have quotes as text, those of pandas enclose texts in them."""
    path = write(tmp_path, "a.tsv", text)

    assert [row["t"] for row in records.load_rows(path, "--data")] == expected


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
    one, other = {**RECORD, "output": "x"}, {**RECORD, "output": "y"}
    source = write(tmp_path, "a.json", json.dumps({"train": [RECORD], "test": [other], "validation": [one]}))

    assert records.load_records(source) == [RECORD]
    assert records.load_records(source, option="--eval-data") == [one]  # the test split is for later


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


@pytest.mark.parametrize("how", ["a file twice", "one file for both", "copies", "apart"])
def test_held_out_records_that_are_trained_too_are_a_warning(how, tmp_path, caplog):
    rows = [{**RECORD, "output": f"{i}"} for i in range(8)]
    file = write(tmp_path, "a.jsonl", jsonl(*rows * (2 if how == "copies" else 1)))
    other = write(tmp_path, "b.jsonl", jsonl({**RECORD, "output": "x"}))
    config = {
        "a file twice": DataConfig(data=(file, file), eval_records=4),
        "one file for both": DataConfig(data=file, eval_data=file, eval_records=4),
        "copies": DataConfig(data=file, eval_records=4),
        "apart": DataConfig(data=file, eval_data=other),
    }[how]
    (tmp_path / "work").mkdir()

    store_splits(config, tmp_path / "work")

    warned = [record.getMessage() for record in caplog.records if "training records, too" in record.getMessage()]
    train, held_out = (list(records) for records in stored_splits(tmp_path / "work"))
    both = sum(record in train for record in held_out)
    assert [text.startswith(f"{both} of {len(held_out)} held-out") for text in warned] == [True] * (how != "apart")


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
