"""From messages to token ids: the chat template of an adapter, or of the base, rendered one request at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from launcher.data import saved_template
from launcher.data.saved_template import adds_bos, as_jinja, read_template
from launcher.data.templates import Template, conversation_ids, load_template, prompt_ids
from launcher.serving.errors import Refused
from launcher.serving.protocol import Asked

Messages = Sequence[Mapping[str, str]]
# Rendering limits the memory of the whole process for a moment (launcher/data/limits.py), so two must not overlap.
RENDERING = Lock()


def base_template(setting: str | None, base: Path, tokenizer: Any) -> Template:
    """The template of the base: the given one, else the one saved with it, its chat template, or alpaca."""
    with RENDERING:
        if setting is not None:
            return load_template(setting, tokenizer, conversations=False)
        saved = read_template(base)
        return saved or load_template("chat" if tokenizer.chat_template else "auto", tokenizer, conversations=False)


def adapter_template(folder: Path) -> Template | None:
    """The template saved in an adapter's folder; None if there is none. Raises ValueError for a damaged one."""
    with RENDERING:
        return saved_template.adapter_template(folder)


def token_ids(asked: Asked, template: Template, tokenizer: Any) -> tuple[int, ...]:
    """The prompt of a request. Raises Refused (400) if the template or the tokenizer cannot carry it."""
    if asked.messages is not None:
        try:
            with RENDERING:
                return tuple(chat_ids(asked.messages, template, tokenizer))
        except ValueError as error:
            raise Refused(400, str(error), param="messages") from None
    if isinstance(asked.prompt, str):
        ids = tuple(tokenizer(asked.prompt, verbose=False)["input_ids"])
    else:
        assert asked.prompt is not None
        ids = asked.prompt
        if bad := [token for token in ids if not 0 <= token < len(tokenizer)]:
            raise Refused(400, f"prompt: {bad[0]} is no token: ids go from 0 to {len(tokenizer) - 1}", param="prompt")
    if not ids:
        raise Refused(400, "prompt is empty: give at least one token", param="prompt")
    return ids


def chat_ids(messages: Messages, template: Template, tokenizer: Any) -> list[int]:
    """Token ids of a conversation up to where the answer begins.

    A template without turns writes each question as a separate instruction, as after `loldu merge`.
    """
    if template.jinja is None:
        if len(messages) == 1 and messages[0]["role"] == "user":
            record = {"instruction": messages[0]["content"], "input": "", "output": ""}
            return prompt_ids(record, template, tokenizer)
        template = template._replace(jinja=as_jinja(template, has_bos=adds_bos(template, tokenizer)))
    return conversation_ids(messages, template, tokenizer)
