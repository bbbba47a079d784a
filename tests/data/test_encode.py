"""The training data: what is read and refused, which tokens carry loss, in which order, and which samples see each
other when packed."""

import gzip
import itertools
import json
import logging
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, PreTrainedTokenizerFast
from transformers.modeling_utils import AttentionInterface

from launcher.config import DataConfig
from launcher.data import batches, records, templates
from launcher.data import encode as encoding
from launcher.data.limits import Clock, Limits, _interrupt, _TooSlow, bounded, limits

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATML_WITH_BLOCKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template=None, **special):
    """A tokenizer with one token a byte: any text can be told from its ids."""
    marks = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(marks + letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=marks[2:],
        **{"bos_token": "<s>", "eos_token": "</s>", **special},
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def encode(rows, tokenizer=None, **config):
    return encoding.encode(rows, tokenizer or byte_tokenizer(), DataConfig(**{"prompt_template": "short", **config}))


def shown(encoded, tokenizer, sample=0):
    """(whole text, text that carries loss) of a sample."""
    span = slice(*encoded.offsets[sample : sample + 2].tolist())
    ids = encoded.ids[span]
    return tokenizer.decode(ids), tokenizer.decode(ids[encoded.loss[span]])


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- reading ---


def jsonl(*rows):
    return "\n".join(json.dumps(row) for row in rows)


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

    known = {"someone/set": datasets.Dataset.from_list([ALPACA])}

    def load_dataset(name, configuration, split):
        assert split == "train"
        if name not in known:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\nlong story")
        return known[name]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)

    loaded = records.load_records("someone/set")
    with pytest.raises(
        ValueError, match=r"--eval-data no/such: there is no such file.*DatasetNotFoundError.*doesn't exist\)"
    ):
        records.load_records("no/such", option="--eval-data")

    assert loaded == [ALPACA]


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


# --- templates ---


def prompt(setting, tokenizer=None, **fields):
    tokenizer = tokenizer or byte_tokenizer()
    template = templates.load_template(setting, tokenizer, conversations=False)
    return templates.render_prompt({**ALPACA, **fields}, template, tokenizer)


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


# --- tokens and masks ---


def test_only_the_answer_and_its_end_token_carry_loss():
    tokenizer = byte_tokenizer()

    encoded = encode([ALPACA, {**ALPACA, "input": "", "output": "äö"}], tokenizer)

    assert shown(encoded, tokenizer) == (f"<s>{prompt('short')}3</s>", "3</s>")
    assert shown(encoded, tokenizer, 1) == (f"<s>{prompt('short', input='')}äö</s>", "äö</s>")
    assert encoded.targets.tolist() == [2, 5]  # one byte and eos; four bytes and eos


def test_loss_on_all_leaves_out_only_the_first_token():
    encoded = encode([ALPACA], loss_on="all")

    assert encoded.loss.tolist() == [False] + [True] * (len(encoded.loss) - 1)


def test_a_first_token_is_never_predicted_even_in_an_answer_without_a_prompt():
    tokenizer = byte_tokenizer("{% for m in messages if m.role == 'assistant' %}{{ m.content }}</s>{% endfor %}")

    encoded = encode([ALPACA], tokenizer, prompt_template="chat")

    assert shown(encoded, tokenizer) == ("3</s>", "</s>")


@pytest.mark.parametrize("chat_template", [CHATML, CHATML_WITH_BLOCKS], ids=["prefixes", "generation blocks"])
def test_every_assistant_turn_of_a_conversation_carries_loss(chat_template):
    tokenizer = byte_tokenizer(chat_template)

    encoded = encode([{"messages": CHAT}], tokenizer, prompt_template="auto")

    whole = "<|system|>Be brief.</s><|user|>Hi?</s><|assistant|>Ho.</s><|user|>And?</s><|assistant|>No.</s>"
    assert shown(encoded, tokenizer) == (whole, "Ho.</s>No.</s>")


def test_our_masks_of_generation_blocks_are_those_of_transformers():
    tokenizer = byte_tokenizer(CHATML_WITH_BLOCKS)
    expected = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)

    encoded = encode([{"messages": CHAT}], tokenizer, prompt_template="chat")

    assert encoded.ids.tolist() == expected["input_ids"]
    assert encoded.loss.int().tolist() == expected["assistant_masks"]


def test_an_alpaca_record_goes_through_a_chat_template():
    tokenizer = byte_tokenizer(CHATML)

    encoded = encode([ALPACA], tokenizer, prompt_template="chat")

    assert shown(encoded, tokenizer) == ("<|user|>Add.\n\n1 2</s><|assistant|>3</s>", "3</s>")


def test_chat_templates_that_hide_their_answers_are_refused():
    forgetful = "{% for m in messages[-2:] %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    unmarked = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    strict = "{{ raise_exception('no system role') }}"

    for chat_template, expected in [
        (forgetful, r"does not begin answer 2 of the conversation that begins 'Be brief\.' as it begins"),
        (unmarked, r"writes only 'Be brief\..*, in which no text is an answer to learn: .* {% generation %} blocks"),
        (strict, r"the chat template refuses the conversation that begins 'Be brief\.': no system role"),
    ]:
        with pytest.raises(ValueError, match=expected):
            encode([{"messages": CHAT}], byte_tokenizer(chat_template), prompt_template="chat")


@pytest.mark.parametrize(
    ("template", "writes"),
    [
        ("{% if false %}x{% endif %}", "nothing"),
        ("{% generation %}{% endgeneration %}", "nothing"),
        ("{{ messages[1].content }}", "only 'Hi\\?'"),
        ("{{ messages[1].content }}{% generation %} {% endgeneration %}", "only 'Hi\\? '"),
    ],
)
def test_a_chat_template_that_writes_no_answer_is_refused(template, writes):
    with pytest.raises(ValueError, match=f"begins 'Be brief.' the chat template writes {writes}, in which no text"):
        encode([{"messages": CHAT[:3]}], byte_tokenizer(template), prompt_template="chat")


def test_generation_starts_from_the_ids_that_stood_before_the_answer(babyllama):
    tokenizer = AutoTokenizer.from_pretrained(babyllama)
    template = templates.load_template("short", tokenizer, conversations=False)

    encoded = encode([ALPACA], tokenizer)
    ids = templates.prompt_ids(ALPACA, template, tokenizer)

    before_answer = encoded.loss.tolist().index(True)
    assert encoded.ids.tolist()[:before_answer] == ids
    assert ids[0] == tokenizer.bos_token_id
    assert encoded.ids[-1] == tokenizer.eos_token_id


def test_long_samples_lose_the_end_of_the_answer_and_long_prompts_are_dropped():
    tokenizer = byte_tokenizer()
    room = len(f"{prompt('short')}") + 1  # a byte a token, and bos
    rows = [{**ALPACA, "output": "abcdef"}, {**ALPACA, "input": "1 2345", "output": "x"}, {**ALPACA, "output": "ab"}]

    encoded = encode(rows, tokenizer, max_length=room + 3)

    assert [shown(encoded, tokenizer, i)[1] for i in range(len(encoded))] == ["abc", "ab</s>"]
    assert max(encoded.lengths) == room + 3
    report = encoded.report
    assert (report.records, report.kept, report.truncated, report.dropped) == (3, 2, 1, 1)
    assert (report.tokens, report.target_tokens) == (2 * (room + 3), 6)
    assert "1 lost the end of their answer" in str(report)
    assert "1 dropped" in str(report)


def test_when_nothing_is_left_the_needed_length_is_named():
    needed = len(prompt("short")) + 2

    with pytest.raises(
        ValueError, match=rf"alone of all 2 records fills --max-length 8; .* needs --max-length {needed} "
    ):
        encode([ALPACA, {**ALPACA, "input": "1 2 3 4"}], max_length=8)
    assert encode([ALPACA], max_length=needed).targets.tolist() == [1]


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"no eos token"):
        encode([ALPACA], byte_tokenizer(eos_token=None))


def test_a_tokenizer_without_a_beginning_starts_with_the_prompt():
    tokenizer = byte_tokenizer(bos_token=None)

    encoded = encode([ALPACA], tokenizer)

    assert shown(encoded, tokenizer)[0] == f"{prompt('short')}3</s>"


def test_chunks_do_not_show_in_the_result(monkeypatch):
    rows = [{**ALPACA, "output": "x" * i} for i in range(1, 8)]
    whole = encode(rows)

    monkeypatch.setattr(encoding, "CHUNK", 3)
    chunked = encode(rows)

    assert chunked.digest() == whole.digest()
    assert encode(rows[:-1]).digest() != whole.digest()


# --- whole texts ---


def sentencepiece_tokenizer(**special):
    """Like Llama 2's: a mark before every text, blanks as marks, and merges across the end of a prompt."""
    letters = [*"abcdefghijklmnopqrstuvwxyz:-\n\u2581", "ho", ":-", "\u2581ho"]
    marks = ["<unk>", "<s>", "</s>"]
    merges = [("h", "o"), (":", "-"), ("\u2581", "ho")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(marks + letters)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **special)


def pieces_of(encoded, tokenizer, sample=0):
    """The tokens of a sample and those that carry loss, as the vocabulary writes them."""
    span = slice(*encoded.offsets[sample : sample + 2].tolist())
    ids = encoded.ids[span]
    return tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(ids[encoded.loss[span]])


def test_an_answer_is_tokenised_with_its_prompt(tmp_path):
    """Alone it would begin with the mark that SentencePiece tokenizers put before a text."""
    tokenizer, path = sentencepiece_tokenizer(), write(tmp_path, "prompt.txt", "{instruction}:\n")

    encoded = encode([{"instruction": "a", "input": "", "output": "ho"}], tokenizer, prompt_template=path)

    assert pieces_of(encoded, tokenizer) == (["<s>", "\u2581", "a", ":", "\n", "ho", "</s>"], ["ho", "</s>"])


def test_an_answer_that_would_merge_with_its_prompt_is_kept_apart(tmp_path):
    """Generation starts from the tokens of the prompt alone, so training does too."""
    tokenizer, path = sentencepiece_tokenizer(), write(tmp_path, "prompt.txt", "{instruction}:")
    record = {"instruction": "a", "input": "", "output": "-ho"}
    template = templates.load_template(path, tokenizer, conversations=False)

    encoded = encode([record], tokenizer, prompt_template=path)

    assert pieces_of(encoded, tokenizer) == (["<s>", "\u2581", "a", ":", "-", "ho", "</s>"], ["-", "ho", "</s>"])
    assert encoded.ids.tolist()[:4] == templates.prompt_ids(record, template, tokenizer)
    assert not encoded.report.notes


def test_an_answer_that_merges_with_a_chat_prompt_is_logged(caplog):
    """A chat template's tokens are those of apply_chat_template, even if generation starts from others."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' else '</s>' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "-ho"}]

    encoded = encode([{"messages": messages}], tokenizer, prompt_template="chat")

    assert encoded.ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert pieces_of(encoded, tokenizer)[1] == [":-", "ho", "</s>"]
    assert "in 1 of 1 answers the tokenizer joins the end of the prompt" in caplog.text
    assert "(the first: 'a:' and '-ho</s>')" in caplog.text


def test_offsets_that_leave_out_blanks_do_not_move_the_border(tmp_path):
    """RoBERTa's tokenizers trim their offsets."""
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    path = write(tmp_path, "prompt.txt", "{instruction}")

    encoded = encode([{"instruction": "a ", "input": "", "output": "  b "}], tokenizer, prompt_template=path)

    assert shown(encoded, tokenizer) == ("<s>a   b </s>", "  b </s>")


class WithoutOffsets:
    """A tokenizer in pure Python, around another one."""

    is_fast = False

    def __init__(self, tokenizer):
        self.inner = tokenizer

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *texts, **settings):
        assert "return_offsets_mapping" not in settings
        return self.inner(*texts, **settings)


def test_a_tokenizer_without_offsets_gives_the_same_samples():
    tokenizer = byte_tokenizer(CHATML)

    for rows, setting in [([ALPACA], "short"), ([{"messages": CHAT}], "chat")]:
        expected = encode(rows, tokenizer, prompt_template=setting)
        assert encode(rows, WithoutOffsets(tokenizer), prompt_template=setting).digest() == expected.digest()


def test_a_tokenizer_without_offsets_is_refused_where_a_border_cannot_be_proven():
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ ':' if m.role == 'user' else '' }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "-ho"}]

    with pytest.raises(ValueError, match=r"gives no offsets .* joins the end of a prompt .* at 'a:-ho'"):
        encode([{"messages": messages}], WithoutOffsets(tokenizer), prompt_template="chat")


# --- the end of an answer ---


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("</s>", "</s>\n"),
        CHATML.replace("</s>", "</s>\n \n"),
        "{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content }}</s>{% endfor %}{{ '<|assistant|>\n\n' }}",
    ],
    ids=["a line break follows", "blank lines follow", "the header of another answer follows"],
)
def test_the_loss_ends_with_the_token_that_ends_the_turn(template):
    """Qwen, ChatML and Gemma write a line break after it, Llama 3 a new header after the whole conversation."""
    tokenizer = byte_tokenizer(template)

    encoded = encode([{"messages": CHAT}], tokenizer, prompt_template="chat")

    assert encoded.ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert shown(encoded, tokenizer)[1] == "Ho.</s>No.</s>"
    assert not encoded.report.notes


def test_a_generation_block_that_includes_the_line_break_after_the_end_does_not_teach_it():
    tokenizer = byte_tokenizer(CHATML_WITH_BLOCKS.replace("</s>{% endgeneration", "</s>\n{% endgeneration"))

    encoded = encode([{"messages": CHAT}], tokenizer, prompt_template="chat")

    assert shown(encoded, tokenizer)[1] == "Ho.</s>No.</s>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        CHATML_WITH_BLOCKS.replace("</s>{% endgeneration %}", "{% endgeneration %}</s>"),
    ],
    ids=["no end", "a block that ends before it"],
)
def test_answers_that_never_end_in_a_token_that_stops_are_a_warning(template, caplog):
    encode([{"messages": CHAT}], byte_tokenizer(template), prompt_template="chat")

    assert "no answer ends in a token that stops generation ('</s>')" in caplog.text


def test_answers_of_one_kind_that_do_not_end_in_a_token_that_stops_are_counted(caplog):
    """DeepSeek V3's template ends no answer that makes a single tool call."""
    template = CHATML.replace("</s>", "{{ '' if 'call' in m.content else '</s>' }}")
    talk = [*CHAT[:1], {"role": "assistant", "content": "call f"}, *CHAT]

    encode([{"messages": talk}], byte_tokenizer(template), prompt_template="chat")

    assert "1 of 3 answers do not end in a token that stops generation ('</s>')" in caplog.text
    assert "<|assistant|>call f')" in caplog.text


# --- templates that rewrite earlier turns ---

FORGETS_THINKING = (  # Qwen 3's way: thinking is written in the last answer alone
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPENS_THINKING = (  # R1's way: the prompt opens the thinking, and no answer shows it
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def thinking(*answers, in_content=False):
    messages = []
    for reasoning, content in answers:
        messages.append({"role": "user", "content": "?"})
        messages.append({"role": "assistant", "content": content})
        if in_content:
            messages[-1]["content"] = f"<think>\n{reasoning}\n</think>\n\n{content}"
        else:
            messages[-1]["reasoning_content"] = reasoning
    return {"messages": messages}


def test_each_answer_is_a_sample_where_the_template_rewrites_earlier_turns(caplog):
    tokenizer = byte_tokenizer(FORGETS_THINKING)

    encoded = encode([thinking(("r", "a"), ("s", "b"))], tokenizer, prompt_template="chat")

    assert [shown(encoded, tokenizer, i) for i in range(len(encoded))] == [
        ("<|user|>?</s>\n<|assistant|><think>r</think>a</s>\n", "<think>r</think>a</s>"),
        (
            "<|user|>?</s>\n<|assistant|>a</s>\n<|user|>?</s>\n<|assistant|><think>s</think>b</s>\n",
            "<think>s</think>b</s>",
        ),
    ]
    assert "1 conversations became one sample for each answer" in caplog.text
    assert encoded.report.records == encoded.report.kept == 2


@pytest.mark.parametrize("in_content", [False, True])
def test_a_prompt_that_opens_the_thinking_is_followed_by_thinking(in_content):
    tokenizer = byte_tokenizer(OPENS_THINKING)

    record = thinking(("r", "a"), ("s", "b"), in_content=in_content)
    encoded = encode([record], tokenizer, prompt_template="chat")

    blanks = "\n\n" if in_content else ""
    assert [shown(encoded, tokenizer, i)[1] for i in range(2)] == ["r\n</think>\n\na</s>", "s\n</think>\n\nb</s>"]
    assert shown(encoded, tokenizer, 1)[0].startswith(
        f"<|user|>?</s><|assistant|>{blanks}a</s><|user|>?</s><|assistant|><think>\ns"
    )
    template = templates.load_template("chat", tokenizer, conversations=True)
    ids = encoded.ids[: encoded.offsets[1]].tolist()
    prompt = templates.prompt_ids({"messages": record["messages"][:1]}, template, tokenizer)
    assert ids[: len(prompt)] == prompt


# --- templates as programs ---


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0]['content'] + 1 }}", r"the chat template fails on the conversation .*: TypeError"),
        ("{{ 'a'.split()[3] }}|{{ messages[9].content }}", r"refuses|fails"),
        ("{{ 1 // 0 }}", r"fails on the conversation that begins 'Be brief\.': ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"fails on the conversation .*: RecursionError"),
        ("{{ 3 ** 10 ** 9 }}", r"line 1 of the chat template uses \*\*"),
        ("{% for m in messages %}", r"--prompt-template chat: line 1 of the chat template is not Jinja"),
        ("{{ '%99999999999s' % 'a' }}", r"takes too much memory: .*LOLDU_TEMPLATE_BYTES"),
        ("{{ 'a' * 10000000000 }}", r"takes too much memory"),
        (
            "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
            r"takes more than 0\.5 seconds|takes too much memory",
        ),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            r"takes more than 0\.5 seconds: the limit is 0\.5; raise it with LOLDU_TEMPLATE_SECONDS",
        ),
        (
            "{% for a in range(99999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
            r"takes more than 0\.5 seconds|takes too much memory",
        ),
        ("{{ 'a' * 20000000 }}", r"writes 20,000,000 characters for one conversation: .*LOLDU_TEXT_CHARACTERS"),
    ],
)
def test_a_template_that_fails_or_takes_too_much_is_refused(template, expected, monkeypatch):
    seconds = 0.5 if "0\\.5 seconds" in expected else 60
    monkeypatch.setattr("launcher.data.limits.limits", lambda: Limits(template_seconds=seconds))

    with pytest.raises(ValueError, match=expected):
        encode([{"messages": CHAT}], byte_tokenizer(template), prompt_template="chat")


@pytest.mark.parametrize("sizes", [[], [5], [50], [3, 3, 3, 3], [9, 50, 1], [50, 50], [4, 4, 4, 50, 2]])
def test_a_tokenizer_gets_neighbours_up_to_a_size_together(sizes):
    found = [sizes[group] for group in encoding.groups(sizes, 10)]

    assert [size for group in found for size in group] == sizes
    assert all(group and (len(group) == 1 or sum(group) <= 10) for group in found)
    assert all(sum(one) + other[0] > 10 for one, other in itertools.pairwise(found))


def test_groups_of_texts_give_the_samples_of_all_at_once(monkeypatch):
    rows = [{"instruction": "Add." * number, "input": "", "output": "3" * number} for number in range(1, 9)]
    at_once = encode(rows)

    monkeypatch.setattr(encoding.groups, "__defaults__", (60,))

    assert encode(rows).digest() == at_once.digest()


def test_a_text_that_is_too_long_is_refused_or_left_out(monkeypatch):
    monkeypatch.setattr("launcher.data.limits.limits", lambda: Limits(text_characters=200))
    rows = [ALPACA, {**ALPACA, "output": "3" * 300}]

    with pytest.raises(ValueError, match=r"begins 'Add\.' has 3\d\d characters: .*raise it with LOLDU_TEXT_CHARACTERS"):
        encode(rows)

    assert len(encode(rows, on_bad_record="skip")) == 1


def loop_for_ever():
    while True:
        time.sleep(0.01)


@pytest.fixture
def clock_by_hand(monkeypatch):
    """Let `pass_time(seconds)` set the time that limits see, and wait until the watching thread has looked at it."""
    now, looks = [0.0], []

    def monotonic():
        looks.append(threading.current_thread())
        return now[0]

    def pass_time(seconds):
        now[0] += seconds
        looks.clear()
        while sum(thread is not threading.main_thread() for thread in [*looks]) < 2:
            time.sleep(0.001)

    monkeypatch.setattr("launcher.data.limits.time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr("launcher.data.limits.limits", lambda: Limits(template_seconds=1.5))
    return pass_time


def test_the_time_counts_for_each_conversation(clock_by_hand):
    with bounded("rendering") as clock:
        for _ in range(3):
            clock_by_hand(1.4)
            clock.restart()
    with pytest.raises(ValueError, match=r"rendering takes more than 1\.5 seconds"), bounded("rendering"):
        clock_by_hand(1.6)


def test_a_template_that_ends_just_in_time_is_not_interrupted_afterwards():
    """The watching thread may send the interrupt when the work is done, and it may arrive while the clock stops."""
    clock = Clock(60.0)

    class Held:
        """The clock's lock; when it is taken first, the interrupt arrives."""

        taken = 0

        def __enter__(self):
            self.taken += 1
            if self.taken == 1:
                clock.fired = True
                _interrupt(threading.get_ident(), _TooSlow)
                loop_for_ever()

        def __exit__(self, *_):
            pass

    clock.lock = held = Held()

    clock.stop()

    assert (held.taken, clock.ended.is_set()) == (2, True)


def test_limits_are_raised_by_environment_variables(monkeypatch):
    monkeypatch.setenv("LOLDU_TEMPLATE_SECONDS", "9.5")
    assert limits.__wrapped__().template_seconds == 9.5

    monkeypatch.setenv("LOLDU_TEMPLATE_BYTES", "much")
    with pytest.raises(ValueError, match="LOLDU_TEMPLATE_BYTES=much is not a number"):
        limits.__wrapped__()


def test_the_memory_limit_is_lifted_after_rendering():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    encode([{"messages": CHAT}], byte_tokenizer(CHATML), prompt_template="chat")

    assert resource.getrlimit(resource.RLIMIT_AS) == before


# --- order ---


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3)])
def test_every_epoch_visits_every_sample_once(count, batch_size):
    steps = math.lcm(count, batch_size) // batch_size

    visited = [i for step in range(steps) for i in batches.batch_indices(3, step, batch_size, count)]

    for epoch in range(len(visited) // count):
        assert sorted(visited[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_batches_follow_the_order_of_their_epoch():
    three = [batches.batch_indices(3, step, 6, 9) for step in range(3)]

    expected = batches.epoch_order(3, 0, 9).tolist() + batches.epoch_order(3, 1, 9).tolist()
    assert [i for batch in three for i in batch] == expected
    assert batches.batch_indices(3, 1, 6, 9) == three[1]  # asked for alone, as after a resume


def test_orders_differ_between_epochs_and_seeds_and_repeat_exactly():
    orders = {
        (seed, epoch): tuple(batches.epoch_order(seed, epoch, 50).tolist()) for seed in range(4) for epoch in range(4)
    }

    assert len(set(orders.values())) == 16
    assert tuple(batches.epoch_order(2, 1, 50).tolist()) == orders[2, 1]
    # A resumed run must find the order of the run before it, on any machine and version: so this one is recorded.
    assert batches.epoch_order(42, 0, 8).tolist() == [4, 2, 0, 6, 1, 5, 3, 7]


def test_a_batch_that_cannot_be_shared_shows_its_arithmetic():
    with pytest.raises(ValueError, match=r"--batch-size 10 / 4 processes = 2\.50 samples each.*--batch-size 8 or 12"):
        batches.check_batch(10, 4)
    with pytest.raises(ValueError, match=r"--batch-size 2 / 4 processes = 0\.50 .*--batch-size 4, or"):
        batches.check_batch(2, 4)


# --- packing ---


def some_samples(babyllama, count=12, max_length=160):
    """Samples of different lengths in the real model's vocabulary."""
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "once " * (1 + i % 5)} for i in range(count)]
    return encode(rows, AutoTokenizer.from_pretrained(babyllama), max_length=max_length)


def model_of(babyllama, attention="sdpa"):
    return AutoModelForCausalLM.from_pretrained(babyllama, dtype=torch.float32, attn_implementation=attention).eval()


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits


def by_sample(values, encoded, rows, flat):
    """{sample: its slice of values (B, N, ...)} for packed rows, or rows flattened into one."""
    result, end = {}, 0
    for b, row in enumerate(rows):
        end = end if flat else 0
        for sample in row:
            begin, end = end, end + encoded.lengths[sample]
            result[sample] = values[0 if flat else b, begin:end]
    return result


def test_packed_rows_hold_every_sample_once_and_fit():
    lengths = torch.randint(1, 65, (1000,), generator=torch.Generator().manual_seed(0)).tolist()

    rows = batches.pack(lengths, batches.epoch_order(7, 0, 1000), 64)

    assert sorted(i for row in rows for i in row) == list(range(1000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64
    assert sum(lengths) / (64 * len(rows)) > 0.9  # what packing is for
    assert rows == batches.pack(lengths, batches.epoch_order(7, 0, 1000).tolist(), 64)


@pytest.mark.parametrize("packing", [False, True])
def test_target_tokens_are_those_the_models_shifted_loss_counts(babyllama, packing):
    encoded = some_samples(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160) if packing else list(range(len(encoded)))

    batch = batches.collate(encoded, rows, pad_id=0, packing=packing)

    assert (batch["labels"][:, 1:] != -100).sum() == batches.target_tokens(encoded, rows) == encoded.targets.sum()


def test_padding_is_on_the_right_and_carries_nothing(babyllama):
    encoded = some_samples(babyllama, count=3)

    batch = batches.collate(encoded, [0, 2], pad_id=2, multiple_of=8)

    first, last = encoded.lengths[0], encoded.lengths[2]
    assert batch["input_ids"].shape == (2, -(-last // 8) * 8)
    assert batch["attention_mask"].sum(1).tolist() == [first, last]
    assert batch["input_ids"][0, first:].eq(2).all()
    assert batch["labels"][0, first:].eq(-100).all()
    assert batch["position_ids"][1, :last].tolist() == list(range(last))


def test_no_packed_sample_sees_another(babyllama):
    """Other samples' tokens change nothing, bit for bit: a hidden key's weight is exactly 0."""
    encoded, model = some_samples(babyllama), model_of(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160)
    batch = batches.collate(encoded, rows, pad_id=0, packing=True)
    before = by_sample(logits_of(model, batch), encoded, rows, flat=False)
    disturbed = rows[0][0]
    by_sample(batch["input_ids"], encoded, rows, flat=False)[disturbed][1:] = 300

    after = by_sample(logits_of(model, batch), encoded, rows, flat=False)

    assert len(rows[0]) > 2
    assert not torch.equal(before[disturbed], after[disturbed])
    assert all(torch.equal(before[i], after[i]) for i in before if i != disturbed)


def varlen_reference(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **kwargs):
    """What a flash kernel does with its borders, in plain torch: causal attention inside each (heads, length, size)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    assert attention_mask is None
    spans = zip(cu_seq_lens_q.tolist(), cu_seq_lens_q.tolist()[1:], strict=False)
    parts = [
        scaled_dot_product_attention(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling)
        for a, b in spans
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register("varlen_reference", varlen_reference)


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_packed_and_unpacked_samples_have_the_same_logits_and_loss(babyllama, attention):
    """float32 sums over rows of other lengths run in another order: logits of size 10 agree to 1e-4, losses to 1e-5."""
    encoded = some_samples(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160)
    plain = batches.collate(encoded, list(range(len(encoded))), pad_id=0)
    packed = batches.collate(encoded, rows, pad_id=0, packing=True, attention=attention)
    flat = attention == "flash"

    unpacked_logits = logits_of(model_of(babyllama), plain)
    packed_logits = logits_of(model_of(babyllama, "varlen_reference" if flat else "sdpa"), packed)

    expected = by_sample(unpacked_logits, encoded, [[i] for i in range(len(encoded))], flat=False)
    for sample, logits in by_sample(packed_logits, encoded, rows, flat).items():
        torch.testing.assert_close(logits, expected[sample], rtol=0, atol=1e-4)
    losses = [
        cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        for logits, batch in ((unpacked_logits, plain), (packed_logits, packed))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_the_flash_layout_is_the_one_transformers_collates(babyllama):
    encoded = some_samples(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160)
    order = [i for row in rows for i in row]
    one_by_one = batches.collate(encoded, list(range(len(encoded))), pad_id=0)
    features = [{k: one_by_one[k][i, : encoded.lengths[i]] for k in ("input_ids", "labels")} for i in order]
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features, return_tensors="pt")

    batch = batches.collate(encoded, rows, pad_id=0, packing=True, attention="flash", multiple_of=8)

    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(batch[name]).squeeze(), torch.as_tensor(value).squeeze()), name
        assert torch.as_tensor(batch[name]).dtype == torch.as_tensor(value).dtype, name


@pytest.mark.gpu
def test_flash_attention_keeps_packed_samples_apart(babyllama):
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    encoded = some_samples(babyllama)
    rows = batches.pack(encoded.lengths, range(len(encoded)), 160)
    batch = batches.collate(encoded, rows, pad_id=0, packing=True, attention="flash")
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    model = model_of(babyllama, "flash_attention_2").to("cuda", torch.bfloat16)
    before = by_sample(logits_of(model, batch), encoded, rows, flat=True)
    disturbed = rows[0][0]
    by_sample(batch["input_ids"], encoded, rows, flat=True)[disturbed][1:] = 300

    after = by_sample(logits_of(model, batch), encoded, rows, flat=True)

    assert not torch.equal(before[disturbed], after[disturbed])
    assert all(torch.equal(before[i], after[i]) for i in before if i != disturbed)


def test_prompts_that_do_not_repeat_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(encoding, "MOST_SEGMENTS", 10)
    rows = [{**ALPACA, "instruction": str(i)} for i in range(50)]
    whole = encode(rows)
    encoder = encoding.Encoder(rows[0], byte_tokenizer(), DataConfig(prompt_template="short"))

    lengths = [encoder.part([row]).lengths[0] for row in rows]

    assert len(encoder.seen.segments) <= 11
    assert lengths == whole.lengths
