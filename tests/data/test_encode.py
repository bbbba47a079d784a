"""From records to token ids and masks of the loss."""

import itertools

import pytest
import torch
from byte_records import ALPACA, CHAT, CHATML, CHATML_WITH_BLOCKS, byte_tokenizer, encode, prompt, shown, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from launcher.config import DataConfig
from launcher.data import encode as encoding
from launcher.data import encoded, templates, tokens
from launcher.data.limits import Limits

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

    monkeypatch.setattr(encoded, "CHUNK", 3)
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


@pytest.mark.parametrize("largest", [7, 10**9])
def test_the_tokens_that_occur_are_found_whatever_their_size(largest):
    ids = torch.tensor([5, 0, largest, 5], dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int64)
    samples = encoded.Encoded(ids, ids > 0, none, none, encoded.DataReport(1, 1, 0, 0, 4, 4, 9))

    assert samples.distinct_ids().tolist() == [0, 5, largest]


@pytest.mark.parametrize("sizes", [[], [5], [50], [3, 3, 3, 3], [9, 50, 1], [50, 50], [4, 4, 4, 50, 2]])
def test_a_tokenizer_gets_neighbours_up_to_a_size_together(sizes):
    found = [sizes[group] for group in encoded.groups(sizes, 10)]

    assert [size for group in found for size in group] == sizes
    assert all(group and (len(group) == 1 or sum(group) <= 10) for group in found)
    assert all(sum(one) + other[0] > 10 for one, other in itertools.pairwise(found))


def test_groups_of_texts_give_the_samples_of_all_at_once(monkeypatch):
    rows = [{"instruction": "Add." * number, "input": "", "output": "3" * number} for number in range(1, 9)]
    at_once = encode(rows)

    monkeypatch.setattr(encoded.groups, "__defaults__", (60,))

    assert encode(rows).digest() == at_once.digest()


def test_a_text_that_is_too_long_is_refused_or_left_out(monkeypatch):
    monkeypatch.setattr("launcher.data.limits.limits", lambda: Limits(text_characters=200))
    rows = [ALPACA, {**ALPACA, "output": "3" * 300}]

    with pytest.raises(ValueError, match=r"begins 'Add\.' has 3\d\d characters: .*raise it with LOLDU_TEXT_CHARACTERS"):
        encode(rows)

    assert len(encode(rows, on_bad_record="skip")) == 1


def test_prompts_that_do_not_repeat_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(tokens, "MOST_SEGMENTS", 10)
    rows = [{**ALPACA, "instruction": str(i)} for i in range(50)]
    whole = encode(rows)
    encoder = encoding.Encoder(rows[0], byte_tokenizer(), DataConfig(prompt_template="short"))

    lengths = [encoder.part([row]).lengths[0] for row in rows]

    assert len(encoder.seen.segments) <= 11
    assert lengths == whole.lengths
