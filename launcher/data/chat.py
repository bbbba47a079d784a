"""Conversations through a chat template: the text of each sample, and where in it the answers are.

The template decides what a model reads when it is served, so a sample is what the template writes. Most templates
write the turns one after the other: a conversation is then one sample, with loss on each of its answers. Some (Qwen 3,
R1) rewrite earlier turns, for example without their thinking: each answer is then a separate sample.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import Environment
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from launcher.data.bad_records import BadRecord
from launcher.data.limits import Clock, LimitExceeded, bounded, limits

TEMPLATE_DATE = "2024-07-26"  # for templates that write today's date; the default date of Llama 3.1's own template
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")
OPEN_THINKING = re.compile(r"<think>\s*$")
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
REASONING = ("thinking", "reasoning")  # in some templates (gpt-oss), for reasoning_content
PROBE = "w8Zq"  # a text that no conversation holds
_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


class Sample(NamedTuple):
    """A text, and the characters [start, stop) of each answer that carries loss, in order.

    Generation of an answer starts from the text before it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class Rendered(NamedTuple):
    """The samples of one record."""

    samples: list[Sample]
    split: bool = False  # one sample for each answer, because the template rewrites earlier turns
    dropped: Counter[str] = Counter()  # noqa: RUF012 (never changed): what the template leaves out, with counts


@contextmanager
def many(what: str) -> Iterator[None]:
    """Render many conversations under one guard of time and memory; the time counts for each one."""
    with bounded(what) as clock:
        token = _clock.set(clock)
        try:
            yield
        finally:
            _clock.reset(token)


@lru_cache(maxsize=16)
def compiled(jinja: str, date: str) -> str:
    """The template's text, compiled by transformers with a fixed date: the same tokens before and after midnight.

    The text put before it makes it another template for transformers, whose own use of it keeps today's date. Raises
    ValueError for a template with a mistake in its syntax, and for one that raises numbers to powers: one such
    operation can take hours and cannot be interrupted.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    day = datetime.date.fromisoformat(date)
    text = f"{{{{ '' if '{date}' }}}}{jinja}"  # writes nothing; a comment would strip blanks around it
    try:
        powers = [line for line, kind, value in Environment().lex(text) if kind == "operator" and value == "**"]
        if powers:
            raise ValueError(f"line {powers[0]} of the chat template uses **, which chat templates may not: remove it")
        with bounded("compiling the chat template"):  # which computes constants
            environment = _compile_jinja_template(text).environment
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the chat template is not Jinja: {error.message}") from None
    except RecursionError:
        raise ValueError("the chat template is nested too deeply to be compiled") from None
    environment.globals["strftime_now"] = day.strftime
    return text


class Chat(NamedTuple):
    """A chat template and the special tokens it writes."""

    jinja: str
    date: str
    tokens: dict[str, Any]

    def render(self, record: dict[str, Any], end: int | None = None, *, prompt: bool = False) -> str:
        """The conversation up to message `end`; with prompt also the beginning of the next answer."""
        return self._render(record, end, prompt, spans=False)[0]

    def render_blocks(self, record: dict[str, Any], end: int | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The same, with the characters of the template's {% generation %} blocks."""
        return self._render(record, end, prompt=False, spans=True)

    def _render(
        self, record: dict[str, Any], end: int | None, prompt: bool, *, spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        clock = _clock.get()
        if clock is None:
            with many("rendering the chat template"):
                return self._render(record, end, prompt, spans=spans)
        clock.restart()
        text, marked = self._call(record, end, prompt, spans=spans)
        if len(text) > limits().text_characters:
            raise LimitExceeded(
                f"the chat template writes {len(text):,} characters for one conversation: "
                + limits().raised("text_characters")
            )
        return text, marked

    def _call(
        self, record: dict[str, Any], end: int | None, prompt: bool, *, spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        messages = self.messages(record, end)
        if any(message.get("tool_calls") and not message.get("content") for message in messages) and _wants_none(self):
            messages = [_without_empty_content(message) for message in messages]
        return self.write(record, messages, prompt, spans=spans)

    def write(
        self, record: dict[str, Any], messages: list[dict[str, Any]], prompt: bool = False, *, spans: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """What the template makes of these messages with the record's tools and settings, without any limit."""
        from transformers.utils.chat_template_utils import render_jinja_template

        settings = self.tokens | {"date_string": self._date_string()} | record.get("chat_template_kwargs", {})
        template = compiled(self.jinja, self.date)

        def write(messages: list[dict[str, Any]]) -> Any:
            return render_jinja_template(
                conversations=[messages],
                tools=record.get("tools") or None,
                chat_template=template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **settings,
            )

        try:
            try:
                texts, marked = write(messages)
            except TypeError:  # some templates (DeepSeek V3) join a call's arguments as text
                if not any(message.get("tool_calls") for message in messages):
                    raise
                texts, marked = write([_arguments_as_text(message) for message in messages])
        except MemoryError:
            raise
        except TemplateError as error:
            raise BadRecord(
                "refused by the chat template",
                f"the chat template refuses the conversation that begins {_begin(record)}: {error}",
            ) from error
        except Exception as error:  # a template is a program, and may raise any error
            raise BadRecord(
                "the chat template fails",
                f"the chat template fails on the conversation that begins {_begin(record)}: "
                f"{type(error).__name__}: {str(error)[:200] or 'no message'}",
            ) from error
        return texts[0], marked[0] if spans else []

    def _date_string(self) -> str:
        return datetime.date.fromisoformat(self.date).strftime("%d %b %Y")

    def messages(self, record: dict[str, Any], end: int | None = None) -> list[dict[str, Any]]:
        """The messages up to `end` as the template wants them: without our own `weight`, developers as system if
        the template does not know them, reasoning under the name that it knows."""
        knows_developers = "developer" in self.jinja
        known = () if "reasoning_content" in self.jinja else [name for name in REASONING if name in self.jinja]
        return [
            {name: value for name, value in message.items() if name != "weight"}
            | ({} if knows_developers or message["role"] != "developer" else {"role": "system"})
            | (dict.fromkeys(known, message["reasoning_content"]) if message.get("reasoning_content") else {})
            for message in record["messages"][:end]
        ]

    @property
    def has_blocks(self) -> bool:
        """Whether the template marks its answers."""
        return GENERATION_BLOCK.search(self.jinja) is not None


@lru_cache(maxsize=16)
def _closing(jinja: str, date: str, tokens: str, marks: tuple[str, ...]) -> tuple[str, str]:
    """(what the template writes after the last answer, its part up to the mark that ends the turn)."""
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]}
    try:
        text = Chat(jinja, date, json.loads(tokens)).render(record)
    except BadRecord:
        return "", ""
    tail = text.rpartition(PROBE)[2] if PROBE in text else ""
    ends = [tail.index(mark) + len(mark) for mark in marks if mark in tail]
    return tail, tail[: min(ends)] if ends else tail


def samples_of(record: dict[str, Any], chat: Chat, marks: tuple[str, ...]) -> Rendered:
    """The samples of a conversation. marks: the texts of the tokenizer's special tokens.

    Raises BadRecord if the template refuses the conversation, hides its answers or writes none.
    """
    rendered = _samples_of(record, chat, marks)
    for sample in rendered.samples:
        if not any(sample.text[start:stop].strip() for start, stop in sample.answers):
            there = f"only {sample.text!r:.80}" if sample.text.strip() else "nothing"
            blocks = "the template's {% generation %} blocks" if chat.has_blocks else "the template"
            raise BadRecord(
                "no answer in what the chat template writes",
                f"for the conversation that begins {_begin(record)} the chat template writes {there}, in which no text "
                f"is an answer to learn: look at {blocks} (--prompt-template FILE.jinja gives another)",
            )
    return rendered


def _samples_of(record: dict[str, Any], chat: Chat, marks: tuple[str, ...]) -> Rendered:
    messages = record["messages"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [i for i in answers if messages[i].get("weight", 1)]
    _check_tools(record, chat)
    if chat.has_blocks:
        whole, blocks = chat.render_blocks(record)
        if len(trained) == len(answers) and len(blocks) != len(answers):
            spans = [_closed(whole, start, stop, chat, marks) for start, stop in blocks]
            return Rendered([Sample(whole, tuple(spans))], dropped=_dropped(record, [whole], chat))
        if len(blocks) != len(answers):
            raise BadRecord(
                "weights without a block for each answer",
                f"the conversation that begins {_begin(record)} has answers of weight 0, but the chat template marks "
                f"{len(blocks)} {{% generation %}} blocks for {len(answers)} answers: use a template with one each",
            )
        extent = dict(zip(answers, blocks, strict=True))
    else:
        whole, extent = chat.render(record), {}
    spans, one_sample = [], True
    for i in trained:
        before = chat.render(record, i, prompt=True)
        if i in extent:
            start, stop = extent[i]
            one_sample &= whole[:start] == before
        else:
            after = whole if i == len(messages) - 1 else chat.render(record, i + 1)
            start, stop = len(before), len(after)
            one_sample &= after.startswith(before)
            start, stop = _closed(after, start, stop, chat, marks)
            one_sample &= whole.startswith(after[:stop])
        if not one_sample:
            break
        spans.append(_closed(whole, start, stop, chat, marks))
    if one_sample:
        return Rendered([Sample(whole, tuple(spans))], dropped=_dropped(record, [whole], chat))
    samples = [_one_answer(record, i, chat, marks) for i in trained]
    return Rendered(samples, split=len(answers) > 1, dropped=_dropped(record, [each.text for each in samples], chat))


def _one_answer(record: dict[str, Any], i: int, chat: Chat, marks: tuple[str, ...]) -> Sample:
    """The conversation up to answer i, with loss on this answer alone."""
    before = chat.render(record, i, prompt=True)
    text, blocks = chat.render_blocks(record, i + 1) if chat.has_blocks else (chat.render(record, i + 1), [])
    if text.startswith(before):
        stop = blocks[-1][1] if blocks else len(text)
        return Sample(text, (_closed(text, len(before), stop, chat, marks),))
    # Templates of models that always think open the thinking themselves, and leave it out of answers.
    opened = OPEN_THINKING.search(before)
    if opened is not None and text.startswith(before[: opened.start()]):
        message = record["messages"][i]
        in_content = THINKING.match(message.get("content") or "")
        reasoning = message.get("reasoning_content") or (in_content[1] if in_content else "")
        answered = text[opened.start() :].lstrip("\n")
        answer = f"{reasoning.strip()}\n</think>\n\n{answered}"
        return Sample(before + answer, (_closed(before + answer, len(before), len(before + answer), chat, marks),))
    raise BadRecord(
        "the chat template hides the answer",
        f"the chat template does not begin answer {i} of the conversation that begins {_begin(record)} as it begins "
        "an answer to be generated, so the answer cannot be found: use a template with {% generation %} blocks "
        "(--prompt-template FILE.jinja)",
    )


def _closed(text: str, start: int, stop: int, chat: Chat, marks: tuple[str, ...]) -> tuple[int, int]:
    """The answer's characters up to the mark that ends its turn: a line break or a new header after it is not part of
    the answer."""
    tail, closing = _closing(chat.jinja, chat.date, json.dumps(chat.tokens), marks)
    answer = text[start:stop]
    if closing and answer.endswith(tail):
        return start, stop - len(tail) + len(closing)
    stripped = answer.rstrip()
    return start, start + len(stripped) if stripped.endswith(marks) else stop


def _arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in calls
    ]
    return message | {"tool_calls": calls}


def _without_empty_content(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"content": None} if message.get("tool_calls") and not message.get("content") else message


def _wants_none(chat: Chat) -> bool:
    """Whether the template writes the tool calls of an answer without text only if its content is none."""
    return _writes_calls_without_content(chat.jinja, chat.date, json.dumps(chat.tokens))


@lru_cache(maxsize=16)
def _writes_calls_without_content(jinja: str, date: str, tokens: str) -> bool:
    chat = Chat(jinja, date, json.loads(tokens))
    call = {"id": "000000000", "type": "function", "function": {"name": PROBE, "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}

    def writes(message: dict[str, Any]) -> bool:
        try:
            return PROBE in chat.write({}, [{"role": "user", "content": "Hi"}, message])[0]
        except BadRecord:
            return False

    return not writes(calling) and writes(_without_empty_content(calling))


def _check_tools(record: dict[str, Any], chat: Chat) -> None:
    """Raises BadRecord if an answer calls a tool and the template does not write the call.

    Each call gets a name that occurs nowhere else, since some templates leave out calls beside text (DeepSeek V3).
    """
    messages: list[dict[str, Any]] = []
    found: list[tuple[int, str, str]] = []  # place, name for the probe, name of each call
    for i, message in enumerate(record["messages"]):
        calls = []
        for call in message.get("tool_calls") or ():
            probe = f"{PROBE}{len(found)}z"
            found.append((i, probe, call["function"]["name"]))
            calls.append(call | {"function": call["function"] | {"name": probe}})
        messages.append(message | ({"tool_calls": calls} if calls else {}))
    probed = record | {"messages": messages}
    text = chat.render(probed) if found else ""
    for i, probe, name in found:
        if probe not in text and probe not in chat.render(probed, i + 1):
            beside = messages[i].get("content") and "tool_calls" in chat.jinja
            where = " beside an answer's text" if beside else ""
            raise BadRecord(
                "tool calls that the chat template does not write",
                f"the conversation that begins {_begin(record)} calls the tool {name!r}, and the chat template does "
                f"not write tool_calls{where}: the model would learn to stop instead. Give a --prompt-template "
                "FILE.jinja that writes them",
            )


def _dropped(record: dict[str, Any], texts: Sequence[str], chat: Chat) -> Counter[str]:
    """What of the conversation is in none of the texts, with counts."""
    found: Counter[str] = Counter()
    if record.get("tools") and "tools" not in chat.jinja:
        found["tools"] += 1
    for message in record["messages"]:
        content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
        said = content.rpartition("</think>")[2] if message["role"] == "assistant" else content
        # Some templates write results of tools as JSON.
        forms = (said.strip(), json.dumps(said.strip(), ensure_ascii=False)[1:-1])
        if not any(form in text for form in forms for text in texts):
            found[f"content of {message['role']} messages"] += 1
        if reasoning and message.get("weight", 1) and not any(reasoning.strip() in text for text in texts):
            found["reasoning_content"] += 1
    return found


def _begin(record: dict[str, Any]) -> str:
    content = record["messages"][0].get("content") or ""
    return f"{content!r:.50}"
