"""From a record to the text a model reads: prompt templates.

A template's text has {instruction} and {input}; a part in square brackets around {input} is left out when the input is
empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from launcher.config import DataConfig
from launcher.data.bad_records import BadRecord
from launcher.data.chat import PROBE, TEMPLATE_DATE, Chat, Rendered, Sample, compiled, samples_of
from launcher.data.forms import Record, as_conversation
from launcher.data.limits import check_length
from launcher.files import user_path

SHORT = "### Instruction:\n{instruction}[\n### Input:\n{input}]\n### Response:\n"
# The two prompts of github.com/tatsu-lab/stanford_alpaca (train.py, PROMPT_DICT), letter for letter.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
# Beginnings of turns in public prompt templates. A prompt that holds one has a template already.
OWN_MARKS = (
    "[INST]", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>", "### Instruction:", "### Response:",
    "### Human:", "### Assistant:",
)  # fmt: skip
OPTIONAL = re.compile(r"\[([^\[\]]*\{input\}[^\[\]]*)\]")
CHOICES = "auto, short, alpaca, chat, none (the bare prompt), or a FILE with {instruction} and {input}"


class Template(NamedTuple):
    """Text with placeholders, or (chat) the tokenizer's own chat template or the Jinja text of a .jinja file."""

    name: str
    with_input: str = ""
    without_input: str = ""
    jinja: str | None = None  # set: a chat template
    date: str = TEMPLATE_DATE  # what a chat template writes for today


def load_template(setting: str, tokenizer: Any, *, conversations: bool, date: str = TEMPLATE_DATE) -> Template:
    """The template that `setting` (CHOICES) names, checked against the tokenizer and the kind of records.

    Raises ValueError for an unknown name, a file without {instruction}, a chat template the tokenizer does not have,
    and for conversations with a template that can carry only one question and one answer.
    """
    if setting == "auto":
        setting = "chat" if conversations else "alpaca"
    if setting == "chat":
        if not tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat template"
                + (", which conversations need" if conversations else "")
                + ": take a model that has one, or give --prompt-template FILE.jinja"
                + ("" if conversations else ", short or alpaca")
            )
        return check_template(Template("chat", jinja=tokenizer.get_chat_template(), date=date))
    path = user_path(setting)
    if path.suffix == ".jinja" and path.is_file():
        return check_template(Template(setting, jinja=path.read_text(encoding="utf-8-sig"), date=date))
    if setting == "alpaca":
        template = Template(setting, ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT)
    elif setting == "none":
        template = Template(setting, "{instruction}\n\n{input}", "{instruction}")
    elif setting == "short":
        template = _from_text(setting, SHORT)
    elif path.is_file():
        template = _from_text(setting, path.read_text(encoding="utf-8-sig"))
    else:
        raise ValueError(f"--prompt-template {setting}: no such file and no such template; expected {CHOICES}")
    return check_template(template, conversations=conversations)


def template_of(config: DataConfig, record: Record, tokenizer: Any) -> Template:
    """The template of a run whose records are like this one."""
    conversations = "messages" in record
    return load_template(config.prompt_template, tokenizer, conversations=conversations, date=config.template_date)


def check_template(template: Template, *, conversations: bool = False) -> Template:
    """The same template. Raises ValueError for Jinja that does not compile, and for conversations without turns."""
    if template.jinja is None:
        if conversations:
            raise ValueError(
                f"--prompt-template {template.name} has no turns, and the records are conversations: give chat"
            )
        return template
    try:
        compiled(template.jinja, template.date)
    except ValueError as error:
        raise ValueError(f"--prompt-template {template.name}: {error}") from None
    return template


def _from_text(name: str, text: str) -> Template:
    if doubled := re.search(r"\{\{(instruction|input)\}\}", text):
        raise ValueError(
            f"--prompt-template {name}: found {doubled[0]}, expected single braces, {{{doubled[1]}}} (Jinja is "
            "read from a FILE.jinja)"
        )
    placeholders = set(re.findall(r"\{(\w+)\}", text))
    if "instruction" not in placeholders or placeholders - {"instruction", "input"}:
        found = ", ".join(f"{{{word}}}" for word in sorted(placeholders)) or "none"
        raise ValueError(
            f"--prompt-template {name}: expected the placeholders {{instruction}} and {{input}}, found {found} "
            "(the answer follows the template by itself)"
        )
    if OPTIONAL.search(text):
        return Template(name, OPTIONAL.sub(r"\1", text), OPTIONAL.sub("", text))
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if "{input}" not in line or "{instruction}" in line]
    return Template(name, text, "".join(kept))


def render_prompt(record: Record, template: Template, tokenizer: Any) -> str:
    """All that the model reads before it answers; of a conversation, up to its last answer if it has that already."""
    if template.jinja is not None:
        conversation = as_conversation(record)
        answered = conversation["messages"][-1]["role"] == "assistant"
        return _chat(template, tokenizer).render(conversation, -1 if answered else None, prompt=True)
    if record["input"] and "{input}" not in template.with_input:
        raise BadRecord(
            "an input that the template has no place for",
            f"--prompt-template {template.name} has no {{input}}, but a record has one: {record['input']!r:.60}",
        )
    text = template.with_input if record["input"] else template.without_input
    prompt = re.sub(r"\{(instruction|input)\}", lambda match: record[match[1]], text)  # one pass: data may hold braces
    return check_length(prompt, f"the prompt of the record that begins {record['instruction']!r:.50}")


def prompt_ids(record: Record, template: Template, tokenizer: Any) -> list[int]:
    """Token ids to generate from: those that precede the answer in training."""
    ids = tokenizer(render_prompt(record, template, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
    return lacking(ids, *frame(template, tokenizer))[0] + ids


def conversation_ids(messages: Sequence[Mapping[str, str]], template: Template, tokenizer: Any) -> list[int]:
    """`prompt_ids` of a conversation to be answered. Raises BadRecord for a system prompt that the template omits."""
    roles = tuple(each["role"] for each in messages)
    omitted = None
    if not set(roles) <= {"user", "assistant"}:
        omitted = _omitted(template, json.dumps(tokenizer.special_tokens_map), roles)
    if omitted is not None:
        raise BadRecord(
            f"{omitted} messages that the chat template does not write",
            f"the chat template does not write messages of the role {omitted}, so the model would not see them: put "
            "the text into a message of the user",
        )
    return prompt_ids({"messages": [dict(message) for message in messages]}, template, tokenizer)


@lru_cache(maxsize=256)
def _omitted(template: Template, tokens: str, roles: tuple[str, ...]) -> str | None:
    """The first role other than user and assistant whose text the template does not write in such a conversation."""
    assert template.jinja is not None
    probes = [{"role": role, "content": f"{PROBE}{number}z"} for number, role in enumerate(roles)]
    try:
        text = Chat(template.jinja, template.date, json.loads(tokens)).render({"messages": probes}, prompt=True)
    except BadRecord:  # the conversation itself gets the template's error
        return None
    return next((each["role"] for each in probes
                 if each["role"] not in ("user", "assistant") and each["content"] not in text), None)  # fmt: skip


def expected_text(record: Record, template: Template, tokenizer: Any) -> str:
    """The record's last answer as `answer_text` has it; tool calls as the chat template writes them."""
    last = record["messages"][-1] if "messages" in record else {"content": record["output"]}
    if template.jinja is None or not last.get("tool_calls") or not last.get("weight", 1):
        written = last["content"] if template.jinja is not None else last["content"].rstrip()
        ends = () if template.jinja is not None else frame(template, tokenizer)[1]
        return answer_text(written.removesuffix(tokenizer.decode(ends) if ends else ""))
    sample = render(record, template, tokenizer).samples[-1]
    start, stop = sample.answers[-1]
    ids = tokenizer(sample.text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
    return answer_text(tokenizer.decode(ids, skip_special_tokens=True))


def answer_text(written: str) -> str:
    """What a model wrote as its answer: without its thinking, which ends in </think>, and surrounding blanks."""
    return written.rpartition("</think>")[2].strip()


def frame(template: Template, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before the prompt and after the answer: bos and eos, which a chat template writes itself."""
    if template.jinja is not None:
        return [], []
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no eos token, so no answer would have an end: set eos_token in its files")
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], [tokenizer.eos_token_id]


def lacking(ids: Sequence[int], head: list[int], tail: list[int]) -> tuple[list[int], list[int]]:
    """What a text's tokens lack of head and tail: texts for other programs often begin with <s> and end with </s>."""
    begins, ends = list(ids[: len(head)]) == head, list(ids[len(ids) - len(tail) :]) == tail
    return [] if begins else head, [] if ends else tail


def own_mark(record: Record, template: Template) -> str:
    """The mark of a template that a record's prompt has already, if another is put around it; empty if none."""
    if template.without_input.strip() == "{instruction}":
        return ""
    asked = [turn["content"] for turn in record.get("messages", ()) if turn["role"] == "user"]
    asked += [record["instruction"]] if "instruction" in record else []
    return next((mark for mark in OWN_MARKS if any(mark in text for text in asked)), "")


def render(record: Record, template: Template, tokenizer: Any) -> Rendered:
    """The record's samples as text: one, or one for each answer if a chat template rewrites earlier turns.

    Raises BadRecord if the template cannot carry the record.
    """
    if template.jinja is None:
        prompt = render_prompt(record, template, tokenizer)
        text = check_length(prompt + record["output"], f"the record that begins {record['instruction']!r:.50}")
        return Rendered([Sample(text, ((len(prompt), len(text)),))])
    return samples_of(as_conversation(record), _chat(template, tokenizer), _marks(tokenizer))


@lru_cache(maxsize=4)
def _marks(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the special tokens, which can end a turn."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _chat(template: Template, tokenizer: Any) -> Chat:
    assert template.jinja is not None
    return Chat(template.jinja, template.date, tokenizer.special_tokens_map)
