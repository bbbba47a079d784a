"""Text of files, models and libraries, made safe for the terminal; their errors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

# Control characters other than newline and tab, Unicode line separators, bidirectional overrides, lone surrogates.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

OUT_OF_MEMORY = ("can't start new thread", "DefaultCPUAllocator: can't allocate memory")  # of threading, of torch

# Keys of the Hugging Face hub and others, users in URLs, and values that are named as secrets.
SECRET = re.compile(
    r"\b(?:hf|sk|ghp)[_-][A-Za-z0-9_-]{8,}|(?<=://)[^/\s@]+(?=@)|(?<=bearer )\S+"
    r"|(?P<name>[\w-]*(?:token|key|secret|password|signature)=)[^&\s'\"]{4,}",
    re.IGNORECASE,
)
SECRET_NAME = re.compile("TOKEN|KEY|SECRET|PASSWORD")  # of a variable of the environment

COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def printable(text: str) -> str:
    r"""The text with control characters escaped: an escape sequence shows as \x1b[2J and does nothing."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str, limit: int | None = None) -> str:
    """`printable` text on one line, cut to a number of characters."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return printable(text).replace("\n", "\\n")


def without_secrets(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with *** for what looks like a secret, and for what the environment has under the name of one."""
    values = {value for name, value in environ.items() if SECRET_NAME.search(name) and len(value) >= 8}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return SECRET.sub(lambda found: f"{found['name'] or ''}***", text)


def without_colours(text: str) -> str:
    """The text without the colour codes that progress bars and loggers write."""
    return COLOUR.sub("", text)


def json_line(value: Any) -> str:
    """The value as one line of JSON, with control characters as JSON escapes: it decodes to the same value."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def padding(token_share: float) -> str:
    """What share of the computed positions is no token, for the screen."""
    if token_share >= 1:
        return "no padding"
    share = 1 - token_share
    return f"{'less than 1%' if share < 0.005 else f'{share:.0%}'} of computed positions are padding"


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its class if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def brief(error: BaseException) -> str:
    """`first_line`, with the error's class unless the message is meant for users; 300 characters at most."""
    kind = "" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}"[:300]


def needs_code(error: BaseException) -> str | None:
    """Why a folder did not load, if the reason is that it would run its own Python code and that was not allowed."""
    if "trust_remote_code" not in str(error):
        return None
    return "it loads only with Python code of its own: read that code, and give --trust-remote-code if you trust it"


def expected(error: BaseException) -> Exception:
    """The error as an Exception: a panic of a library in Rust (tokenizers, safetensors), which is none, as ValueError.

    So is a lack of main memory, which says nothing about itself. Raises what is neither, such as KeyboardInterrupt.
    """
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
        return ValueError(
            "this process got no more main memory: raise its limit (ulimit -v shows it), or let it take less, with a "
            "smaller --micro-batch-size or --max-length"
        )
    if isinstance(error, Exception):
        return error
    if type(error).__name__ == "PanicException":
        return ValueError(f"{type(error).__module__} failed on this input ({str(error) or 'without a reason'})")
    raise error
