"""From a record to the text a model reads: prompt templates.

A template's text has {instruction} and {input}; a part in square brackets around {input} is left out when the input is
empty.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.records import Record

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


OPTIONAL = re.compile(r"\[([^\[\]]*\{input\}[^\[\]]*)\]")
CHOICES = "auto, short, alpaca, chat, or a FILE with {instruction} and {input}"


class Template(NamedTuple):
    """Text with placeholders, or (chat) the tokenizer's own chat template or the Jinja text of a .jinja file."""

    name: str
    with_input: str = ""
    without_input: str = ""
    jinja: str | None = None  # set: a chat template


Pieces = list[tuple[str, bool]]  # (text, whether it is an answer), in order; tokenised one by one


def load_template(setting: str, tokenizer: Any, *, conversations: bool) -> Template:
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
        return Template("chat", jinja=tokenizer.get_chat_template())
    path = Path(setting).expanduser()
    if path.suffix == ".jinja" and path.is_file():
        return Template(setting, jinja=path.read_text(encoding="utf-8"))
    if setting == "alpaca":
        template = Template(setting, ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT)
    elif setting == "short":
        template = _from_text(setting, SHORT)
    elif path.is_file():
        template = _from_text(setting, path.read_text(encoding="utf-8"))
    else:
        raise ValueError(f"--prompt-template {setting}: no such file and no such template; expected {CHOICES}")
    if conversations:
        raise ValueError(f"--prompt-template {setting} has no turns, and the records are conversations: give chat")
    return template


def _from_text(name: str, text: str) -> Template:
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
        messages = _messages(record)
        return _chat(
            messages[:-1] if messages[-1]["role"] == "assistant" else messages, template, tokenizer, prompt=True
        )
    if record["input"] and "{input}" not in template.with_input:
        raise ValueError(
            f"--prompt-template {template.name} has no {{input}}, but a record has one: {record['input']!r:.60}"
        )
    text = template.with_input if record["input"] else template.without_input
    return re.sub(r"\{(instruction|input)\}", lambda match: record[match[1]], text)  # in one pass: data may hold braces


def prompt_ids(record: Record, template: Template, tokenizer: Any) -> list[int]:
    """Token ids to generate from: the same that stood before the answer in training."""
    ids = tokenizer(render_prompt(record, template, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
    return frame(template, tokenizer)[0] + ids


def frame(template: Template, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before the prompt and after the answer: bos and eos, which a chat template writes itself."""
    if template.jinja is not None:
        return [], []
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no eos token, so no answer would have an end: set eos_token in its files")
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], [tokenizer.eos_token_id]


def pieces(record: Record, template: Template, tokenizer: Any) -> Pieces:
    """The sample's text, cut where an answer begins or ends.

    A chat template with {% generation %} blocks says itself what the answers are. For any other, the text up to each
    answer must be a beginning of the text that includes it, which is checked.
    """
    if template.jinja is None:
        return [(render_prompt(record, template, tokenizer), False), (record["output"], True)]
    messages, result = _messages(record), []
    if re.search(r"\{%-?\s*generation\b", template.jinja):
        text, spans = _chat(messages, template, tokenizer, prompt=False, spans=True)
        end = 0
        for start, stop in spans:
            result += [(text[end:start], False), (text[start:stop], True)]
            end = stop
        return [*result, (text[end:], False)]
    seen = ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _chat(messages[:i], template, tokenizer, prompt=True)
            after = _chat(messages[: i + 1], template, tokenizer, prompt=False)
            if not (before.startswith(seen) and after.startswith(before)):
                raise ValueError(
                    f"the chat template rewrites earlier turns (at turn {i} of a conversation that begins "
                    f"{messages[0]['content']!r:.50}), so its answers cannot be found: use a template with "
                    "{% generation %} blocks (--prompt-template FILE.jinja), or conversations of one answer"
                )
            result += [(before[len(seen) :], False), (after[len(before) :], True)]
            seen = after
    return result


def _messages(record: Record) -> list[dict[str, str]]:
    if "messages" in record:
        return record["messages"]
    question = "\n\n".join(part for part in (record["instruction"], record["input"]) if part)
    turns = [{"role": "user", "content": question}]
    return [*turns, {"role": "assistant", "content": record["output"]}] if record.get("output") else turns


def _chat(
    messages: list[dict[str, str]], template: Template, tokenizer: Any, *, prompt: bool, spans: bool = False
) -> Any:
    """The rendered text; with spans also the (start, stop) characters of its {% generation %} blocks."""
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(  # annotated -> str, returns (texts, spans)
            conversations=[messages],
            chat_template=template.jinja,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            date_string="26 Jul 2024",  # Llama 3.1's default; later templates would put today's date into the data
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        begin = messages[0]["content"]
        raise ValueError(f"the chat template refuses the conversation that begins {begin!r:.50}: {error}") from error
    texts, marked = rendered
    return (texts[0], marked[0]) if spans else texts[0]
