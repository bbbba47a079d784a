"""The prompt template of a run, saved by content beside what the run trained.

prompt_template.json is read by our own commands. chat_template.jinja is the same template for transformers and for
servers, which find it beside a model and its tokenizer; a template without turns is written as one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.data.templates import Template, check_template
from launcher.files import read_text

PROMPT_TEMPLATE, CHAT_TEMPLATE = "prompt_template.json", "chat_template.jinja"
TOKENIZER_SETTINGS = "tokenizer_config.json"  # where transformers before 4.51 wrote the template


def save_template(template: Template, tokenizer: Any, folder: Path) -> None:
    """Write both files."""
    jinja = as_jinja(template, has_bos=adds_bos(template, tokenizer))
    (folder / PROMPT_TEMPLATE).write_text(json.dumps(template._asdict(), indent=2) + "\n", encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(jinja, encoding="utf-8")
    drop_older(folder)


def drop_older(folder: Path) -> None:
    """Remove the template in tokenizer_config.json if there is a chat_template.jinja: servers read one or the other."""
    file = folder / TOKENIZER_SETTINGS
    if not (file.is_file() and (folder / CHAT_TEMPLATE).is_file()):
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.pop("chat_template", None) is not None:
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_template(folder: Path) -> Template | None:
    """The template saved in a folder; None if there is none. Raises ValueError for a damaged file."""
    file = folder / PROMPT_TEMPLATE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        template = Template(**found)
        texts = (template.name, template.with_input, template.without_input, template.date)
        if not all(isinstance(text, str) for text in texts) or not isinstance(template.jinja, str | None):
            raise ValueError("its values are texts")
        return check_template(template)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): give --prompt-template") from None


def adapter_template(folder: Path) -> Template | None:
    """The template in an adapter's folder: of this project, or in a chat_template.jinja or tokenizer_config.json that
    other programs write; None if there is none. Raises ValueError for a damaged one."""
    saved, file = read_template(folder), folder / CHAT_TEMPLATE
    if saved is not None:
        return saved
    try:
        if file.is_file():
            text: Any = read_text(file)
        elif (file := folder / TOKENIZER_SETTINGS).is_file():
            text = json.loads(read_text(file)).get("chat_template")
            if isinstance(text, list):  # several with names
                text = {each["name"]: each["template"] for each in text}.get("default")
        else:
            return None
        if not isinstance(text, str | None):
            raise ValueError("chat_template is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return None if text is None else check_template(Template("chat", jinja=text))


def adds_bos(template: Template, tokenizer: Any) -> bool:
    """Whether the tokenizer's bos is put before a template's text, which may begin with it itself."""
    return tokenizer.bos_token is not None and not template.without_input.startswith(tokenizer.bos_token)


def as_jinja(template: Template, *, has_bos: bool) -> str:
    """The chat template; for one without turns, Jinja that writes bos, the prompt without input, the answer and eos.

    Each question of a conversation is then a separate prompt. A system prompt is refused: there is no place for it.
    """
    if template.jinja is not None:
        return template.jinja
    parts = template.without_input.split("{instruction}")
    prompt = "{{ m.content }}".join(
        "{{ " + json.dumps(part, ensure_ascii=False) + " }}" if part else "" for part in parts
    )
    return (
        ("{{ bos_token }}" if has_bos else "") + "{% for m in messages %}{% if m.role == 'user' %}" + prompt
        + "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
        + "{% else %}{{ raise_exception('this model was trained on questions and answers alone, not on ' ~ m.role) }}"
        + "{% endif %}{% endfor %}"
    )  # fmt: skip
