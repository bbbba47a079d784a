"""What clients send: OpenAI's requests, read strictly.

A field that would change the answer and is not supported is refused; its neutral value is accepted, since clients send
defaults. Fields that cannot change an answer are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launcher.config import nearest
from launcher.serving.errors import Refused

MOST_STOPS, MOST_STOP_CHARACTERS, MOST_ALTERNATIVES = 16, 256, 20
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
})  # fmt: skip
# Fields without support: the values (besides null) that ask for nothing, and what to do instead.
NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "send the request once for each answer, with different seeds"),
    "best_of": ((1,), "send several requests and choose"),
    "echo": ((False,), "put the prompt before the answer yourself"),
    "suffix": (("",), "leave it out"),
    "presence_penalty": ((0,), "leave it out or give 0"),
    "frequency_penalty": ((0,), "leave it out or give 0"),
    "logit_bias": (({},), "leave it out"),
    "response_format": (({"type": "text"},), 'leave it out or give {"type": "text"}'),
    "tools": (([],), "leave it out"),
    "tool_choice": (("none", "auto"), "leave it out"),
    "functions": (([],), "leave it out"),
    "function_call": (("none", "auto"), "leave it out"),
    "modalities": ((["text"],), "leave it out"),
    "audio": ((), "leave it out"),
    "reasoning_effort": ((), "leave it out"),
    "verbosity": ((), "leave it out"),
    "web_search_options": ((), "leave it out"),
}
OF_A_MESSAGE = ("tool_calls", "function_call", "refusal", "audio", "annotations", "reasoning_content")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Strict):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers: none is written


class Common(_Strict):
    """The fields of both kinds of request."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None


class Part(_Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class ChatRequest(Common):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None


class CompletionRequest(Common):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None


class AdapterRequest(_Strict):
    """The body of POST /v1/adapters."""

    name: Annotated[str, Field(min_length=1, max_length=255)]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, read: either messages or a prompt (text or token ids)."""

    model: str
    messages: tuple[Mapping[str, str], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    max_tokens: int | None  # None: as many as are allowed
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None  # alternatives to return with each token; None: no log-probabilities
    stream: bool
    include_usage: bool

    @property
    def chat(self) -> bool:
        return self.messages is not None


def read_chat(body: bytes) -> Asked:
    """A chat request. Raises Refused (400) naming the first field that is wrong."""
    value = _object(body)
    messages = value.get("messages")
    if isinstance(messages, list):  # clients send back an answer's message with all its empty fields
        value["messages"] = [_without_empty(each) if isinstance(each, dict) else each for each in messages]
        _refuse_other_than_text(value["messages"])
    asked = _validated(ChatRequest, value)
    if asked.messages[-1].role == "assistant":
        raise Refused(400, "messages: the last one is the assistant's, which leaves nothing to answer: end with a "
                      "message of the user", param="messages")  # fmt: skip
    if asked.top_logprobs and not asked.logprobs:
        raise Refused(400, "top_logprobs needs logprobs: give logprobs true", param="top_logprobs")
    limits = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise Refused(400, f"max_tokens {asked.max_tokens} and max_completion_tokens {asked.max_completion_tokens} "
                      "differ: give max_completion_tokens alone", param="max_completion_tokens")  # fmt: skip
    return Asked(
        messages=tuple(map(_message, asked.messages)),
        max_tokens=limits.pop() if limits else None,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        **_common(asked),
    )


def read_completion(body: bytes) -> Asked:
    """A completion request; without max_tokens an answer has 16 tokens, as at OpenAI. Raises Refused (400)."""
    asked = _validated(CompletionRequest, _object(body))
    prompt: Any = asked.prompt
    if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)):
        if len(prompt) != 1:
            raise Refused(400, f"prompt is a list of {len(prompt)}, and one prompt is answered per request: send a "
                          "request for each; they are computed in one batch", param="prompt")  # fmt: skip
        prompt = prompt[0]
    return Asked(
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        max_tokens=16 if asked.max_tokens is None else asked.max_tokens,
        logprobs=asked.logprobs,
        **_common(asked),
    )


def read_adapter(body: bytes) -> str:
    """The name of the adapter to load. Raises Refused (400)."""
    return _validated(AdapterRequest, _object(body)).name


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise Refused(
            400, f"the body is a JSON {type(value).__name__}: an object with the request's fields is expected"
        )
    return value


def _without_empty(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in OF_A_MESSAGE or value not in (None, [])}


def _refuse_other_than_text(messages: list[Any]) -> None:
    """Raises Refused for a part of a message that is an image, audio or a file."""
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for place, part in enumerate(content if isinstance(content, list) else []):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                where = f"messages.{number}.content.{place}"
                raise Refused(400, f"{where}: a part of type {kind!r:.60} is not supported: this server reads text "
                              "alone", param=where)  # fmt: skip


Read = TypeVar("Read", bound=BaseModel)


def _validated(kind: type[Read], value: dict[str, Any]) -> Read:
    """The request without ignored and neutral fields, checked."""
    kept: dict[str, Any] = {}
    for name, given in value.items():
        if name in kind.model_fields:
            kept[name] = given
        elif name in NEUTRAL:
            neutral, remedy = NEUTRAL[name]
            if given is not None and not any(given == each and type(given) in _alike(each) for each in neutral):
                raise Refused(400, f"{name} {given!r:.60} is not supported: {remedy}", param=name)
        elif name not in IGNORED:
            raise Refused(
                400, f"unknown field {name!r:.100}; {nearest(name[:100], set(kind.model_fields))}", param=name[:100]
            )
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "str" and not str(part).startswith("list["))
        given = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        raise Refused(400, f"{where}: {first['msg']}{given}", param=where) from None


def _alike(value: Any) -> tuple[type, ...]:
    """The types that a JSON value equal to this one may have: true is not 1."""
    return (int, float) if isinstance(value, (int, float)) and not isinstance(value, bool) else (type(value),)


def _message(message: Message) -> dict[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return {"role": message.role, "content": text} | ({"name": message.name} if message.name else {})


def _common(asked: Common) -> dict[str, Any]:
    stop = [] if asked.stop is None else [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if len(stop) > MOST_STOPS or not all(1 <= len(text) <= MOST_STOP_CHARACTERS for text in stop):
        raise Refused(
            400, f"stop is at most {MOST_STOPS} texts of 1 to {MOST_STOP_CHARACTERS} characters", param="stop"
        )
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options needs stream: give stream true", param="stream_options")
    return {
        "model": asked.model,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "seed": asked.seed,
        "stop": tuple(stop),
        "stream": bool(asked.stream),
        "include_usage": bool(asked.stream_options and asked.stream_options.include_usage),
    }
