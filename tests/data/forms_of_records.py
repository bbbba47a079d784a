"""Records and a loader for the tests of this folder."""

from byte_records import jsonl, write

from launcher.data import records

USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}
TALK = [USER, ANSWER]
RECORD = {"instruction": "Hi?", "input": "", "output": "Ho."}
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def load(folder, *rows, **settings):
    return records.load_records(write(folder, "a.jsonl", jsonl(*rows)), **settings)


def numbered(folder, name, count):
    return write(folder, name, jsonl(*({**RECORD, "output": f"{name} {i}"} for i in range(count))))
