"""Records that cannot be used are named, counted, and left out if asked."""

import pytest
from byte_records import CHAT, CHATML, byte_tokenizer, encode
from forms_of_records import RECORD, TALK, load, numbered

from launcher.config import DataConfig
from launcher.data import records

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
