"""What real tokenizers and chat templates make of conversations: training tokens are serving tokens."""

import json
import unicodedata
from datetime import datetime
from pathlib import Path

import pytest

from launcher.config import DataConfig
from launcher.data import chat, templates
from launcher.data.encode import encode

pytestmark = pytest.mark.slow

WITH_TEMPLATE = ["llama3", "llama3_1", "qwen3", "gemma3", "deepseek_v3", "smollm2"]
WITHOUT = ["gptoss", "llama2"]
INST = (  # Llama 2's own, written for lists of turns
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>\n"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
HARMONY = (  # the shape of gpt-oss's: the last answer ends in another token than the ones before
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
ONE = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is four."}]
MULTI = [
    *ONE,
    {"role": "user", "content": " And in Greek,\nplease? 😀"},
    {"role": "assistant", "content": "τέσσερα\n\n- *tessera* 🙂"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome, e\u0301 and é "},
]


def tokenizer_of(name, real_tokenizer):
    tokenizer = real_tokenizer(name)
    if name in WITHOUT:
        assert tokenizer.chat_template is None
        tokenizer.chat_template = {"llama2": INST, "gptoss": HARMONY}[name]
    return tokenizer


def encoded(messages, tokenizer, **settings):
    return encode([{"messages": messages}], tokenizer, DataConfig(prompt_template="chat", max_length=2048, **settings))


def sample_of(data, i):
    span = slice(*data.offsets[i : i + 2].tolist())
    return data.ids[span].tolist(), data.loss[span].tolist()


@pytest.mark.parametrize("messages", [ONE, MULTI], ids=["one answer", "three answers"])
@pytest.mark.parametrize("name", WITH_TEMPLATE + WITHOUT)
def test_training_ids_are_those_of_apply_chat_template(name, messages, real_tokenizer):
    """Of the whole conversation; if the template rewrites earlier turns, of the conversation up to each answer."""
    tokenizer = tokenizer_of(name, real_tokenizer)

    data = encoded(messages, tokenizer)

    rewrites = name in ("qwen3", "gptoss") and messages is MULTI
    ends = (2, 4, 6) if rewrites else (len(messages),)
    assert len(data) == len(ends)
    for i, end in enumerate(ends):
        expected = tokenizer.apply_chat_template(messages[:end], tokenize=True, return_dict=False)
        assert sample_of(data, i)[0] == expected
    assert ("one sample for each answer" in " ".join(data.report.notes)) == rewrites


@pytest.mark.parametrize("name", WITH_TEMPLATE + WITHOUT)
def test_generation_starts_from_the_tokens_before_each_answer(name, real_tokenizer):
    tokenizer = tokenizer_of(name, real_tokenizer)
    template = templates.load_template("chat", tokenizer, conversations=True)

    data = encoded(MULTI, tokenizer)

    found = []
    for i in range(len(data)):
        ids, loss = sample_of(data, i)
        found += [ids[:at] for at in range(1, len(ids)) if loss[at] and not loss[at - 1]]
    assert found == [templates.prompt_ids({"messages": MULTI[:end]}, template, tokenizer) for end in (1, 3, 5)]
    assert not any("joins" in note for note in data.report.notes)


ENDS = {
    "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma3": "<end_of_turn>",
    "deepseek_v3": "<｜end▁of▁sentence｜>", "smollm2": "<|im_end|>", "llama2": "</s>", "gptoss": "<|return|>",
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_TEMPLATE + WITHOUT)
def test_the_loss_ends_at_the_token_that_ends_the_turn(name, real_tokenizer):
    """Llama 3 writes a new header after the conversation; Qwen 3, Gemma 3 and SmolLM2 a line break."""
    tokenizer = tokenizer_of(name, real_tokenizer)

    data = encoded(MULTI, tokenizer)

    for i in range(len(data)):
        ids, loss = sample_of(data, i)
        last = [ids[at] for at in range(len(ids)) if loss[at] and not (at + 1 < len(ids) and loss[at + 1])]
        assert tokenizer.convert_ids_to_tokens(last) == [ENDS[name]] * len(last)
    text = tokenizer.decode([token for token, counts in zip(*sample_of(data, len(data) - 1), strict=True) if counts])
    assert text.rstrip().endswith(ENDS[name])
    assert "header" not in text
    never_stops = any("stops generation" in note for note in data.report.notes)
    assert never_stops == (
        name == "llama3"
    )  # its tokenizer's eos is <|end_of_text|>; generation_config.json is missing


def test_a_generation_config_beside_the_tokenizer_names_more_tokens_that_stop(real_tokenizer, tmp_path):
    tokenizer = real_tokenizer("llama3")
    tokenizer.save_pretrained(tmp_path)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, eot]}))
    tokenizer = type(tokenizer).from_pretrained(tmp_path)

    data = encoded(MULTI, tokenizer)

    assert not any("stops generation" in note for note in data.report.notes)


@pytest.mark.parametrize("template", ["alpaca", "short"])
@pytest.mark.parametrize("name", WITH_TEMPLATE + WITHOUT)
def test_a_text_template_gives_the_tokens_of_the_whole_text(name, template, real_tokenizer):
    """SentencePiece tokenizers put a mark before a text: an answer tokenised alone would begin with one."""
    tokenizer = real_tokenizer(name)
    record = {"instruction": "Name a colour.", "input": "", "output": "Green, like grass."}
    loaded = templates.load_template(template, tokenizer, conversations=False)
    prompt = templates.render_prompt(record, loaded, tokenizer)

    data = encode([record], tokenizer, DataConfig(prompt_template=template))

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    whole = tokenizer(prompt + record["output"], add_special_tokens=False)["input_ids"]
    assert data.ids.tolist() == [*bos, *whole, tokenizer.eos_token_id]
    first = data.loss.tolist().index(True)
    assert data.ids.tolist()[:first] == templates.prompt_ids(record, loaded, tokenizer)
    assert tokenizer.decode(data.ids[data.loss]).lstrip().startswith("Green")


def test_qwen3_is_trained_on_thinking_where_the_record_has_some(real_tokenizer):
    tokenizer = real_tokenizer("qwen3")
    messages = [dict(message) for message in MULTI]
    for message in messages:
        if message["role"] == "assistant":
            message["reasoning_content"] = f"Hmm, {len(message['content'])}."

    data = encoded(messages, tokenizer)

    for i, message in enumerate(each for each in messages if each["role"] == "assistant"):
        ids, loss = sample_of(data, i)
        learned = tokenizer.decode([token for token, counts in zip(ids, loss, strict=True) if counts])
        content = unicodedata.normalize("NFC", message["content"])  # as Qwen's tokenizer does
        assert learned == f"<think>\n{message['reasoning_content']}\n</think>\n\n{content}<|im_end|>"
    assert not any("leaves out" in note for note in data.report.notes)


def test_tools_calls_and_results_reach_the_model(real_tokenizer):
    tokenizer = real_tokenizer("qwen3")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three."},
    ]

    data = encode([{"messages": messages, "tools": tools}], tokenizer, DataConfig(max_length=2048))

    text = tokenizer.decode(sample_of(data, len(data) - 1)[0])
    assert '{"name": "add", "parameters"' in text
    assert "<tool_response>\n3\n</tool_response>" in text
    learned = [
        tokenizer.decode([t for t, counts in zip(*sample_of(data, i), strict=True) if counts]) for i in range(len(data))
    ]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>' in "".join(learned)
    assert learned[-1].endswith("Three.<|im_end|>")
    assert data.ids[: data.offsets[1]].tolist() == tokenizer.apply_chat_template(
        messages[:2] if len(data) > 1 else messages, tools=tools, tokenize=True, return_dict=False
    )


def deepseek_call(*names, content):
    calls = [{"type": "function", "function": {"name": name, "arguments": {"a": 1}}} for name in names]
    return [{"role": "user", "content": "Add."}, {"role": "assistant", "content": content, "tool_calls": calls}]


def test_deepseek_v3s_template_writes_calls_of_answers_without_text(real_tokenizer):
    """It wants none as their content, and closes the answer at the second call only."""
    two = deepseek_call("add", "mul", content="")
    results = [{"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}]
    tokenizer = real_tokenizer("deepseek_v3")

    data = encoded([*two, *results, {"role": "assistant", "content": "Three."}], tokenizer)

    ids, loss = sample_of(data, 0)
    learned = tokenizer.decode([token for token, counts in zip(ids, loss, strict=True) if counts])
    call = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{{"a": 1}}\n```<｜tool▁call▁end｜>'
    end = "<｜end▁of▁sentence｜>"
    assert learned == (
        f"<｜tool▁calls▁begin｜>{call.format('add')}\n{call.format('mul')}<｜tool▁calls▁end｜>{end}Three.{end}"
    )
    assert not data.report.notes


def test_deepseek_v3s_template_that_leaves_a_call_open_or_out_is_named(real_tokenizer):
    tokenizer = real_tokenizer("deepseek_v3")
    one = [*deepseek_call("add", content=""), {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]

    notes = encoded(one, tokenizer).report.notes

    assert any("1 of 2 answers do not end in a token that stops generation" in note for note in notes)
    with pytest.raises(ValueError, match=r"'add', and .* does not write tool_calls beside an answer's text"):
        encoded(deepseek_call("add", content="Let me look."), tokenizer)


def test_todays_date_does_not_change_the_tokens(real_tokenizer):
    tokenizer = real_tokenizer("smollm2")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ date_string }}|" + tokenizer.chat_template

    text = tokenizer.decode(encoded(ONE, tokenizer).ids)

    assert text.startswith("26 Jul 2024 26 Jul 2024|")
    live = tokenizer.apply_chat_template(ONE, tokenize=False)
    assert live.startswith(datetime.now().strftime("%d %b %Y"))
    assert chat.TEMPLATE_DATE == "2024-07-26"


def test_an_answer_that_the_tokenizer_joins_with_a_chat_prompt_is_logged(real_tokenizer):
    """SmolLM2 has a token for a line break and blanks: the header's line break is another token before this answer."""
    tokenizer = real_tokenizer("smollm2")
    messages = [ONE[0], {"role": "assistant", "content": "    indented"}]

    data = encoded(messages, tokenizer)

    assert data.ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    [note] = data.report.notes
    assert "in 1 of 1 answers the tokenizer joins the end of the prompt" in note
    assert r"'assistant\n' and '    indented" in note


@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma3", "smollm2"])
def test_every_alpaca_prompt_is_tokenised_as_generation_does(name, real_tokenizer, alpaca_file):
    """Of 200 real records: eight answers begin with "-", which Llama 2 joins with the colon before it."""
    tokenizer = real_tokenizer(name)
    records = [row for row in json.loads(Path(alpaca_file).read_text())[:200] if row["output"].strip()]
    template = templates.load_template("alpaca", tokenizer, conversations=False)

    data = encode(records, tokenizer, DataConfig(prompt_template="alpaca", max_length=2048))

    assert not data.report.notes
    for i, record in enumerate(records):
        ids, loss = sample_of(data, i)
        first = loss.index(True)
        assert ids[:first] == templates.prompt_ids(record, template, tokenizer)
        assert tokenizer.decode(ids[first:-1], clean_up_tokenization_spaces=False).strip() == record["output"].strip()
