"""Tools and the calls of them in a record, in the forms that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from launcher.data.bad_records import BadRecord

Record = dict[str, Any]


def from_json(value: Any, what: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRecord(f"{what} that is not JSON", f"{where}: {what} is JSON, got {value!r:.60}") from None


def calls_of(calls: Any, where: str) -> list[Record]:
    """Tool calls as {type, function: {name, arguments}}, the arguments as an object."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord("an odd tool call", f"{where}: a tool call has a name and arguments, got {call!r:.80}")
        arguments = from_json(
            function.get("arguments", function.get("parameters", {})), "a tool call's arguments", where
        )
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        made = ({"id": call["id"]} if isinstance(call.get("id"), str) else {}) | made
        found.append(_as_json(made, "a tool call", where))
    return found


def tools_of(row: Record, where: str) -> dict[str, list[Record]]:
    """{"tools": schemas} of a row, from JSON text or a list; empty if it has none."""
    tools = from_json(row.get("tools") or row.get("functions") or [], "tools", where)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("odd tools", f"{where}: 'tools' is a list of objects, got {tools!r:.60}")
    tools = _as_json(tools, "tools", where)
    made = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return {"tools": made} if made else {}


def _as_json(value: Any, what: str, where: str) -> Any:
    """The value. Raises BadRecord if it is no JSON, or holds half a character, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise BadRecord(
            "half a character", f"{where}: {what} with half a character in it ({half!r}): repair the text"
        ) from error
    except (TypeError, RecursionError) as error:  # parquet has dates and bytes, too
        raise BadRecord(f"{what} that is not JSON", f"{where}: {what} is JSON, but {error}") from error
    return value
