"""Rows of labelled texts: which labels are classes and which numbers, and mistakes in them."""

import json
from pathlib import Path

import pytest
from labelled_rows import config, csv_of, write
from transformers import AutoTokenizer

from launcher.config import DataConfig
from launcher.tasks import label

ROW = {"sentence": "good", "label": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([ROW, {"text": "good", "label": 0}], "record 1.*no 'sentence'.*text, label"),
        ([ROW, {"sentence": 3, "label": 0}], "record 1.*'sentence' is a text"),
        ([ROW, {"sentence": "bad"}], "record 1.*'label'.*its columns: sentence"),
        ([ROW, {"sentence": "bad", "label": None}], "record 1.*'label'.*NoneType"),
        ([ROW, {"sentence": "bad", "label": -1}], "record 1.*unlabelled.*another split"),
        ([ROW, {"sentence": "bad", "label": "no"}], "record 1.*'no'.*record 0 has 1"),
        ([ROW, ROW], "all 2 training rows have the label 1"),
        ([ROW, {"sentence": "bad", "label": 3}], r"from 0 without gaps.*\[1, 3\]"),
        (["good"], "record 0.*is a str"),
    ],
)
def test_a_mistake_in_the_rows_is_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        label.load_splits(config(write(tmp_path, rows)))


@pytest.mark.parametrize("name", ["rows.csv", "folder/train.csv"])
def test_whole_numbers_in_a_csv_file_are_classes_in_the_order_of_numbers(name, tmp_path):
    """As text they would be ordered 0, 1, 10, 2: a base that has a head already would learn other classes."""
    (tmp_path / "folder").mkdir()
    source = csv_of(tmp_path, *range(11), name=name)

    rows, _, classes = label.load_splits(config(str(Path(source).parent) if "/" in name else source))

    assert classes == tuple(map(str, range(11)))
    assert [row["label"] for row in rows] == list(range(11))


def test_numbers_with_a_fraction_in_a_csv_file_are_predicted_as_numbers(tmp_path, tiny_roberta):
    """As text each of them would be a class of its own."""
    settings = config(csv_of(tmp_path, "0.5", "-2", "3e1"), eval_data=csv_of(tmp_path, 1, 2, name="held.csv"))

    rows, held_out, classes = label.load_splits(settings)
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)

    assert classes == ()
    assert label.encode(rows, classes, tokenizer, settings).labels.tolist() == [0.5, -2.0, 30.0]
    assert label.encode(held_out, classes, tokenizer, settings).labels.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("labels", [[0.5, -2, 3], [-2, 0.5, 3], [-1.0, 1, 2]])
def test_whole_and_negative_numbers_beside_fractions_are_numbers(labels, tmp_path):
    rows = [{"sentence": "a", "label": value} for value in labels]

    train, held_out, classes = label.load_splits(
        config(write(tmp_path, rows), eval_data=write(tmp_path, [{"sentence": "a", "label": -3}], "held.json"))
    )

    assert classes == ()
    assert [row["label"] for row in train] == labels
    assert [row["label"] for row in held_out] == [-3]


@pytest.mark.parametrize("train", [[0, 1], [0.5, 1.5]])
@pytest.mark.parametrize("unlabelled", [-1, -1.0])
def test_held_out_rows_without_labels_are_refused(train, unlabelled, tmp_path):
    data = write(tmp_path, [{"sentence": "a", "label": value} for value in train])
    held = write(tmp_path, [{"sentence": "a", "label": unlabelled}] * 2, "held.json")

    with pytest.raises(ValueError, match=r"held\.json has the label -1.* unlabelled"):
        label.load_splits(config(data, eval_data=held))


def test_names_in_a_csv_file_stay_names(tmp_path):
    _, _, classes = label.load_splits(config(csv_of(tmp_path, "good", "bad", "7")))

    assert classes == ("7", "bad", "good")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0.5, 1.5, "n/a"), r"numbers for labels \(0\.5, \.\.\.\), but record 2 has 'n/a': give it a number"),
        ((0, 1, -1), "record 2 of .* has the label -1: it is unlabelled"),
        ((0, 2), r"from 0 without gaps.*\[0, 2\]: number them so, or give them names"),
        ((0, 1, ""), "record 2 of .* has an empty 'label'"),
    ],
)
def test_labels_of_a_csv_file_that_cannot_be_meant_are_refused(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        label.load_splits(config(csv_of(tmp_path, *labels)))


def test_numbers_with_a_fraction_in_quotes_are_refused(tmp_path):
    rows = write(tmp_path, [{"sentence": "good", "label": "0.5"}, {"sentence": "bad", "label": "0.25"}])

    with pytest.raises(ValueError, match=r"numbers as text \('0\.5'\) for labels: write them unquoted"):
        label.load_splits(config(rows))


def test_a_held_out_label_that_training_does_not_know_is_named(tmp_path):
    train = write(tmp_path, [ROW, {"sentence": "bad", "label": 0}])
    held_out = write(tmp_path, [ROW, {"sentence": "so", "label": 2}], "held.json")

    with pytest.raises(ValueError, match=r"record 1 of .*held\.json has the label 2.*0, 1"):
        label.load_splits(config(train, eval_data=held_out))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"sentence": "a", "label": float("nan")}, {"sentence": "b", "label": 1.5}],
            "record 0 .* label nan, no number",
        ),
        ([{"sentence": "a", "label": 1.5}, {"sentence": "b", "label": 10**400}], "record 1 .* no number to learn"),
        ([{"sentence": " ", "label": 0}, {"sentence": "b", "label": 1}], "record 0 .* no text in 'sentence'"),
        ([{"sentence": "a", "label": " x"}, {"sentence": "b", "label": "x"}], "labels ' x' and 'x', .* two classes"),
    ],
)
def test_labels_and_texts_that_teach_nothing_are_refused(rows, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    with pytest.raises(ValueError, match=message):
        label.load_splits(DataConfig(data=str(file), text_columns=("sentence",)))


@pytest.mark.parametrize(("labels", "warned"), [([0.0, 1.0], True), ([0.5, 1.0], False), ([0, 1], False)])
def test_classes_that_became_fractions_are_a_warning(labels, warned, tmp_path, caplog):
    """pandas does so to whole numbers if one of them was missing."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"sentence": "a", "label": each}) for each in labels))

    label.load_splits(DataConfig(data=str(file), text_columns=("sentence",)))

    assert ("written with a fraction (0.0, ...), so numbers are predicted" in caplog.text) == warned


GOOD = [{"a": f"good {n}", "b": f"film {n}", "label": ("no", "yes")[n % 2]} for n in range(6)]
BAD = [
    "text", {"b": "x", "label": "no"}, {"a": 3, "b": "x", "label": "no"}, {"a": "x", "b": "y"},
    {"a": " ", "b": "", "label": "no"},
    {"a": "x", "b": "y", "label": None}, {"a": "x", "b": "y", "label": " "}, {"a": "x", "b": "y", "label": 1},
    {"a": "x", "b": "y", "label": True}, {"a": "x\ud800", "b": "y", "label": "no"},
]  # fmt: skip


@pytest.mark.parametrize("columns", [("a",), ("a", "b")], ids=["texts", "pairs"])
def test_bad_rows_are_left_out_and_counted_if_asked(columns, tmp_path, caplog):
    rows = [*BAD[:5], *GOOD, *BAD[5:]]
    settings = config(write(tmp_path, rows), text_columns=columns, on_bad_record="skip", eval_records=2)

    train, held_out, classes = label.load_splits(settings)

    assert classes == ("no", "yes")
    assert [row["texts"] for row in (*train, *held_out)] != []
    assert sorted(row["texts"][0] for row in (*train, *held_out)) == [row["a"] for row in GOOD]
    [said] = [each.getMessage() for each in caplog.records if "cannot be used" in each.getMessage()]
    assert f"{len(BAD)} of {len(rows)} records cannot be used" in said
    assert f"{len(BAD)} left out (--on-bad-record skip)" in said


def test_all_bad_rows_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 8 records cannot be used .*no 'a'.*\n.*record 6 of .*\n.*record 7 of"):
        label.load_splits(config(write(tmp_path, [*GOOD, {"label": "no"}, {"a": "x"}]), text_columns=("a",)))


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        ([0.5, 1.5, "n/a", "", -1], [0.5, 1.5, -1.0]),  # numbers to predict may be negative
        ([*range(11), "", -1], list(range(11))),  # as text they would be ordered 0, 1, 10, 2
    ],
)
def test_a_csv_file_with_bad_labels_keeps_its_numbers(labels, kept, tmp_path, caplog):
    train, _, classes = label.load_splits(config(csv_of(tmp_path, *labels), on_bad_record="skip"))

    assert [row["label"] for row in train] == kept
    assert classes == (() if 0.5 in kept else tuple(map(str, kept)))
    assert "left out (--on-bad-record skip)" in caplog.text


def test_unlabelled_rows_and_held_out_labels_that_are_not_known_are_left_out_if_asked(tmp_path, caplog):
    train = write(tmp_path, [ROW, {"sentence": "bad", "label": 0}, {"sentence": "so", "label": -1}])
    held = write(tmp_path, [ROW, {"sentence": "a", "label": 2}, {"sentence": "b", "label": -1}], "held.json")

    rows, held_out, classes = label.load_splits(config(train, eval_data=held, on_bad_record="skip"))

    assert (len(rows), len(held_out), classes) == (2, 1, ("0", "1"))
    assert caplog.text.count("1 left out (--on-bad-record skip)") == 3


def test_a_source_without_a_row_that_can_be_used_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 2 records can be used, all for one reason.* unlabelled"):
        label.load_splits(config(write(tmp_path, [{"sentence": "a", "label": -1}] * 2), on_bad_record="skip"))
