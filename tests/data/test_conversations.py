"""Turns without loss, tools and their calls, and what reaches the chat template."""

import pytest
from byte_records import CHAT, CHATML, CHATML_WITH_BLOCKS, byte_tokenizer, encode, shown
from forms_of_records import ADD, ANSWER, RECORD, TALK, USER, load

from launcher.data import templates


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


def test_an_empty_answer_inside_a_conversation_is_not_learned(tmp_path, caplog):
    """ShareGPT's conversations have some. A model would learn to say nothing."""
    [record] = load(tmp_path, {"messages": [USER, {**ANSWER, "content": " "}, *TALK]})
    tokenizer = byte_tokenizer(CHATML)

    encoded = encode([record], tokenizer, prompt_template="chat")

    assert shown(encoded, tokenizer)[1] == "Ho.</s>"
    assert "answers inside conversations that are empty carry no loss: 1 times" in caplog.text


def test_text_beside_a_call_that_the_template_leaves_out_is_counted(caplog):
    """Llama 3.1's template writes either the call or the text; results of tools it writes as JSON."""
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% elif m.role == 'tool' %}{{ m.content | tojson }}"
        "{% else %}{{ m.content }}{% endif %}",
    )
    calling = {"role": "assistant", "content": "Let me look.", "tool_calls": [ADD]}
    record = {"messages": [USER, calling, {"role": "tool", "content": '{"sum": "3"}'}, ANSWER]}

    encode([record], byte_tokenizer(template), prompt_template="chat")

    assert "the chat template leaves out content of assistant messages: 1 times" in caplog.text
    assert "content of tool messages" not in caplog.text


def test_reasoning_reaches_a_template_under_the_name_that_it_knows(caplog):
    """gpt-oss's template writes message.thinking."""
    template = CHATML.replace("{{ m.content }}", "{% if m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }}")
    tokenizer = byte_tokenizer(template)

    encoded = encode([{"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]}], tokenizer, prompt_template="chat")

    assert shown(encoded, tokenizer)[1] == "[Hm.]Ho.</s>"
    assert "leaves out" not in caplog.text
