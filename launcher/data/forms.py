"""The public forms of a record, each turned into one of two kinds, with everything in them that carries meaning.

    {"instruction": str, "input": str, "output": str}          one question (input may be empty) and its answer
    {"messages": [{"role": ..., "content": str, ...}, ...]}    a conversation whose last turn is an answer

A message may also have `weight` (0: no loss), `reasoning_content`, `tool_calls`, `tool_call_id` and `name`; a
conversation `tools` and `chat_template_kwargs`. Roles are system, developer, user, assistant and tool.

These forms are read: Alpaca (with system and history), seed tasks ({instruction, instances}), Dolly ({instruction,
context, response}), {prompt, completion} as texts or messages, ShareGPT (with system, tools, function_call and
observation), OpenAI's messages, and columns of other names by a mapping.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launcher.data.bad_records import BadRecord
from launcher.data.files import FORMS
from launcher.data.tool_calls import calls_of, from_json, tools_of

Record = dict[str, Any]
ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
MAPPED = {  # what --columns may name, and the columns that stand for it
    "prompt": "instruction", "instruction": "instruction", "question": "instruction",
    "input": "input", "context": "input",
    "answer": "output", "output": "output", "completion": "output", "response": "output",
    "system": "system", "history": "history", "messages": "messages", "tools": "tools",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos")
SYSTEM = ("system", "system_prompt", "system_message")
NOT_HONOURED = {  # fields that carry meaning in some public format
    "parallel_tool_calls", "response_format", "documents", "rejected", "margin", "mask", "loss_weight", "prefix",
    "sample_weight", "training_detail", "train_detail", "rationale", "cot", "chain_of_thought",
}  # fmt: skip
NOT_MAPPED = {*SYSTEM, "history", "tools", "functions", "input", "context", "chat_template_kwargs"}  # by --columns
QUESTIONS = {"question", "query", "problem"}  # beside an instruction
BESIDE_MESSAGES = {"input", "context", "history", *REASONING}  # of a question and not of a conversation
EMPTY_TURN = "an empty answer"  # counted among what is not used
DESIRABLE = ("label", "kto_tag")  # false: an answer to avoid


def mapping_of(columns: tuple[str, ...]) -> dict[str, str]:
    """{our field: column} of `--columns prompt=question answer=solution`. Raises ValueError for other names."""
    found = {}
    for pair in columns:
        name, _, column = pair.partition("=")
        if name not in MAPPED or not column:
            raise ValueError(f"--columns takes name=COLUMN, the name one of {', '.join(MAPPED)}; got {pair!r}")
        if MAPPED[name] in found:
            same = " or ".join(other for other, ours in MAPPED.items() if ours == MAPPED[name])
            raise ValueError(f"--columns names one column for {same}; got {' '.join(columns)}")
        found[MAPPED[name]] = column
    if "messages" in found and (beside := sorted(found.keys() & {"instruction", "input", "output", "history"})):
        raise ValueError(f"--columns messages=COLUMN has question and answer in it: leave out what names {beside[0]}")
    if found and "messages" not in found and not {"instruction", "output"} <= found.keys():
        raise ValueError(f"--columns names prompt and answer, or messages; got {' '.join(columns)}")
    return found


def kind_of(row: Any, mapping: Mapping[str, str], where: str) -> str:
    """What a row is, by its columns: messages, conversations, prompt, or instruction. Raises BadRecord."""
    if not isinstance(row, dict):
        raise BadRecord("no object", f"{where} is a {type(row).__name__}, expected an object: {FORMS}")
    there = {name for name, value in row.items() if value is not None}
    if mapping:
        if missing := [column for column in mapping.values() if column not in row]:
            raise BadRecord(
                "a column of --columns is missing",
                f"{where} has no {missing[0]!r}, which --columns names (its columns: {_columns(row)})",
            )
        return "messages" if "messages" in mapping else "instruction"
    for column in ("messages", "conversations", "conversation", "instruction"):
        if column in there:
            return column
    if "prompt" in there and there & {"completion", "response"}:
        return "prompt"
    if {"chosen", "rejected"} <= there:
        raise BadRecord(
            "a preference pair",
            f"{where} is a preference pair (chosen, rejected): give --task prefer, or keep the chosen answer alone",
        )
    for asked in ("question", "prompt", "query", "problem"):
        for answered in ("answer", "response", "solution", "output", "completion"):
            if {asked, answered} <= there:
                more = {"system": SYSTEM, "input": ("input", "context"), "history": ("history",), "tools": ("tools",)}
                named = [f"{ours}={name}" for ours, names in more.items() for name in names if name in there][:4]
                raise BadRecord(
                    "columns of other names",
                    f"{where} has the columns {_columns(row)}: give --columns "
                    + " ".join([f"prompt={asked}", f"answer={answered}", *named]),
                )
    if "text" in there:
        raise BadRecord(
            "plain text",
            f"{where} is plain text ('text' without a question): give --task text to learn all of it; for answers, "
            f"expected {FORMS}, or other names by --columns prompt=COLUMN answer=COLUMN",
        )
    raise BadRecord(
        "unknown columns",
        f"{where} has no 'instruction' (its columns: {_columns(row)}); expected {FORMS}, or other names by "
        "--columns prompt=COLUMN answer=COLUMN",
    )


def records_of(
    row: Record, kind: str, where: str, mapping: Mapping[str, str], ignored: Counter[str]
) -> list[tuple[Record, bool]]:
    """The records of a row, each with whether it has an answer. Counts in `ignored` what is not used.

    Raises BadRecord naming the place.
    """
    if media := next((name for name in MEDIA if row.get(name)), None):
        raise BadRecord(
            "images, audio or video", f"{where} has {media!r}: only text is supported, leave the record out"
        )
    if unwanted := next((name for name in DESIRABLE if _is_false(row.get(name), name, kind)), None):
        raise BadRecord(
            "an answer to avoid",
            f"{where} has {unwanted!r} false, so its answer is one to avoid, and training would teach it: leave the "
            "record out, or make pairs of chosen and rejected answers for --task prefer",
        )
    conversation = kind not in ("instruction", "prompt") or (kind == "prompt" and not isinstance(row["prompt"], str))
    names = NOT_HONOURED | (NOT_MAPPED if mapping else set()) | set(REASONING)
    if not mapping and conversation:
        names = names | BESIDE_MESSAGES
    if not mapping and kind == "instruction":
        names = names | QUESTIONS
    if row.get("weight") not in (1, "1"):
        names = names | {"weight"}
    ignored.update(name for name in (names & row.keys()) - set(mapping.values()) if row[name] not in (None, "", [], {}))
    if mapping:
        row = {name: row[column] for name, column in mapping.items()}
    read: Callable[..., list[Record]] = _conversation if conversation else _question
    if kind == "prompt" and conversation:
        read = _prompt_messages
    return [(record, _has_answer(record)) for record in read(row, kind, where, ignored)]


def unused(source: str, ignored: Counter[str]) -> Iterator[str]:
    """What to log of a source whose records have parts that are not used."""
    for name, count in sorted(ignored.items()):
        if name == EMPTY_TURN:
            yield f"{source}: answers inside conversations that are empty carry no loss: {count:,} times"
        elif count:
            yield f"{source}: {name!r} carries meaning in some formats and is not used here: {count:,} times"


def _is_false(value: Any, name: str, kind: str) -> bool:
    """Whether a value marks an answer to avoid. In a CSV file it is a text; a label may also be a class of that name,
    but not beside a prompt and its completion, which is the form of KTO's data."""
    may_be_text = name == "kto_tag" or kind == "prompt"
    return value is False or (may_be_text and isinstance(value, str) and value.strip().lower() == "false")


def as_conversation(record: Record) -> Record:
    """A question and its answer, if there is one, as messages."""
    if "messages" in record:
        return record
    question = "\n\n".join(part for part in (record["instruction"], record["input"]) if part)
    turns = [{"role": "user", "content": question}]
    answer = [{"role": "assistant", "content": record["output"]}] if record.get("output") else []
    return {"messages": turns + answer}


def text_of(row: Record, column: str, where: str, default: str | None = None) -> str:
    """The text in a column, default if there is none. Raises BadRecord naming what is there instead."""
    value = row.get(column)
    if value is None and default is not None:
        return default
    if value is None:
        raise BadRecord(f"no {column!r}", f"{where} has no {column!r} (its columns: {_columns(row)})")
    if not isinstance(value, str):
        raise BadRecord(
            f"{column!r} is no text", f"{where}: {column!r} is a text, got the {type(value).__name__} {value!r:.60}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            "half a character", f"{where}: {column!r} holds half a character ({value[error.start]!r}): repair the text"
        ) from error
    return value


def _columns(row: Record) -> str:
    return ", ".join(map(str, row)) or "none"


def _has_answer(record: Record) -> bool:
    if "messages" not in record:
        return bool(record["output"].strip())
    last = record["messages"][-1]
    return bool((last.get("content") or "").strip() or last.get("tool_calls"))


def _question(row: Record, kind: str, where: str, ignored: Counter[str]) -> list[Record]:
    """One question, or one for each of a seed task's instances; a conversation if it has a system or a history."""
    instruction = text_of(row, "prompt" if kind == "prompt" else "instruction", where)
    if row.get("output") is None and "instances" in row:
        if not isinstance(row["instances"], list) or not all(isinstance(one, dict) for one in row["instances"]):
            raise BadRecord(
                "'instances' is no list of objects",
                f"{where}: 'instances' is a list of {{input, output}}, got {row['instances']!r:.60}",
            )
        return [
            {"instruction": instruction, "input": text_of(one, "input", at, ""), "output": text_of(one, "output", at)}
            for i, one in enumerate(row["instances"])
            for at in [f"{where}, instance {i}"]
        ]
    given = next((name for name in ("output", "completion", "response") if row.get(name) is not None), "output")
    record = {
        "instruction": instruction,
        "input": input_of(row, where, ignored),
        "output": text_of(row, given, where),
    }
    system, history, tools = _system(row, where), turns_before(row, where), tools_of(row, where)
    if not (system or history or tools):
        return [record]
    before = [{"role": "system", "content": system}] if system else []
    messages = before + history + as_conversation(record)["messages"]
    if not record["output"]:
        messages.append({"role": "assistant", "content": ""})
    return [{"messages": messages} | tools]


def input_of(row: Record, where: str, ignored: Counter[str]) -> str:
    """What stands beside a question: its input, or else its context."""
    given, context = row.get("input"), row.get("context")
    found = text_of(row, "context" if given is None or (not given and isinstance(context, str)) else "input", where, "")
    if context not in (None, "", found):
        ignored["context"] += 1
    return found


def turns_before(row: Record, where: str) -> list[Record]:
    """The messages of a 'history' of questions and answers. Raises BadRecord."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    ):
        raise BadRecord("an odd history", f"{where}: 'history' is a list of [question, answer], got {history!r:.60}")
    return [
        {"role": role, "content": text_of({"history": text}, "history", where)}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _prompt_messages(row: Record, kind: str, where: str, ignored: Counter[str]) -> list[Record]:
    """A list of messages as the prompt, and another as its completion: the completion alone carries loss."""
    completion = row.get("completion", row.get("response"))
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(row["prompt"], list) or not isinstance(completion, list):
        raise BadRecord(
            "an odd prompt",
            f"{where}: 'prompt' and 'completion' are texts or lists of {{role, content}}, got {row['prompt']!r:.60}",
        )
    asked = [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in row["prompt"]]
    rest = {name: value for name, value in row.items() if name not in ("prompt", "completion", "response")}
    return _conversation(rest | {"messages": asked + completion}, "messages", where, ignored)


def _conversation(row: Record, kind: str, where: str, ignored: Counter[str]) -> list[Record]:
    """A conversation with an answer at the end."""
    turns = row[kind]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        speaker, said = ("role", "content") if kind == "messages" else ("from", "value")
        raise BadRecord(
            f"{kind!r} is no list of messages",
            f"{where}: {kind!r} is a list of {{{speaker}, {said}}}, got {turns!r:.60}",
        )
    messages = [_message(turn, kind, f"{where}, turn {i}", ignored) for i, turn in enumerate(turns)]
    system = _system(row, where)
    if system and messages[0]["role"] in ("system", "developer"):
        if system != messages[0]["content"]:
            messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    elif system:
        messages.insert(0, {"role": "system", "content": system})
    asked = [message["role"] for message in messages]
    if "assistant" not in asked:
        raise BadRecord(
            "no assistant turn", f"{where} has no assistant turn, so there is nothing to learn: leave the record out"
        )
    if asked[-1] != "assistant":
        raise BadRecord(
            "no answer at the end",
            f"{where} ends with a {asked[-1]} turn: the last turn is the assistant's; cut or answer it",
        )
    if "user" not in asked[: asked.index("assistant")]:
        raise BadRecord(
            "an answer before any question",
            f"{where} has an assistant turn before any user turn: cut it, or put the question before it",
        )
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise BadRecord(
            "every answer has weight 0", f"{where}: every answer has weight 0, so there is nothing to learn"
        )
    for message in messages[:-1]:
        if message["role"] == "assistant" and not (message["content"].strip() or message.get("tool_calls")):
            ignored[EMPTY_TURN] += message.get("weight", 1)
            message["weight"] = 0
    record: Record = {"messages": messages} | tools_of(row, where)
    if settings := row.get("chat_template_kwargs"):
        if not isinstance(settings, dict):
            raise BadRecord("odd chat_template_kwargs", f"{where}: 'chat_template_kwargs' is an object")
        record["chat_template_kwargs"] = settings
    return [record]


def _message(turn: Record, kind: str, where: str, ignored: Counter[str]) -> Record:
    """One message under the names of OpenAI's format."""
    usual = "role" if kind == "messages" else "from"
    speaker = next((name for name in ("role", "from") if name in turn), usual)
    said = next((name for name in ("content", "value", "text") if name in turn), None)
    said = said or ("content" if speaker == "role" else "value")
    given = text_of(turn, speaker, where)
    role = ROLES.get(given.strip().lower())
    if role is None:
        raise BadRecord(
            f"unknown role {given!r:.40}", f"{where}: unknown role {given!r:.60}, expected one of {', '.join(ROLES)}"
        )
    if media := next((name for name in MEDIA if turn.get(name)), None):
        raise BadRecord(
            "images, audio or video", f"{where} has {media!r}: only text is supported, leave the record out"
        )
    message: Record = {"role": role, "content": _content(turn, said, role, where)}
    if given.strip().lower() == "function_call":
        calls, message["content"] = from_json(message["content"], "a function call", where), ""
        message["tool_calls"] = calls_of(calls if isinstance(calls, list) else [calls], where)
    if turn.get("tool_calls"):
        message["tool_calls"] = calls_of(turn["tool_calls"], where)
    elif turn.get("function_call") and role == "assistant":
        message["tool_calls"] = calls_of([turn["function_call"]], where)
    if reasoning := next((name for name in REASONING if turn.get(name)), None):
        message["reasoning_content"] = text_of(turn, reasoning, where)
    for name in ("name", "tool_call_id"):
        if turn.get(name):
            message[name] = text_of(turn, name, where)
    if _weight(turn, where) == 0:
        message["weight"] = 0
    ignored.update(name for name in NOT_HONOURED & turn.keys() if turn[name] not in (None, "", [], {}))
    return message


def _content(turn: Record, said: str, role: str, where: str) -> str:
    """The text of a message; a list of parts is joined."""
    value = turn.get(said)
    if value is None and role == "assistant":
        if isinstance(turn.get("refusal"), str):
            return text_of(turn, "refusal", where)
        if turn.get("tool_calls") or turn.get("function_call"):
            return ""
    if not isinstance(value, list):
        return text_of(turn, said, where)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise BadRecord(
                "images, audio or video" if kind in MEDIA else f"a part of type {kind!r:.40}",
                f"{where}: {said!r} has a part of type {kind!r:.60}: only text is supported, leave the record out",
            )
        texts.append(text_of(part if isinstance(part, dict) else {"text": part}, "text", where))
    return "".join(texts)


def _system(row: Record, where: str) -> str:
    """The system prompt beside a question or a conversation; empty if there is none."""
    return next((text for name in SYSTEM if (text := text_of(row, name, where, ""))), "")


def _weight(turn: Record, where: str) -> int:
    """Whether a message carries loss: OpenAI's weight 0 or 1, and true or false under the names of other tools."""
    for name in ("weight", "train", "loss", "training", "train_on_turn", "masked"):
        value = turn.get(name)
        if value is not None:
            if value not in (0, 1):
                raise BadRecord(f"a {name} that is not 0 or 1", f"{where}: {name!r} is 0 or 1, got {value!r:.40}")
            return int(value) if name != "masked" else 1 - int(value)
    return 1
