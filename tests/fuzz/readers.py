"""Every reader of a file or message that may be hostile, with random input for it. The one rule: bytes are read, or a
ValueError says what is wrong with them. Anything else that is raised, and any wait, is a fault.

A reader takes (data, folder): the bytes of the file, and an empty folder to put it into.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

# Text with what breaks parsers: quotes, digits of other scripts, controls, markup, halves of characters, templates.
TEXT = st.text(max_size=40) | st.sampled_from(
    [
        "",
        "\0",
        "\x1b[2J",
        "[/b]",
        "../../x",
        "-oProxyCommand=x",
        "٣",
        "\ud800",
        "{{ 1/0 }}",
        "{instruction}",
        "nan",
        "1e999",
    ]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 1 << 63, 1e308, True, None])
JSON = st.recursive(
    TEXT | NUMBERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=15
)
DEEP = st.integers(1, 200_000).map(lambda depth: b"[" * depth)
Reader = Callable[[bytes, Path], Any]


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def mutated(draw: st.DrawFn, example: Any) -> bytes:
    """The JSON of an example in which up to three fields are replaced, removed or added."""
    value = copy.deepcopy(example)
    for _ in range(draw(st.integers(1, 3))):
        path: list[Any] = []
        here = value
        while isinstance(here, (dict, list)) and here and (not path or draw(st.booleans())):
            key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            path.append((here, key))
            here = here[key]
        if not path:
            break
        parent, key = path[-1]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            parent[key] = draw(JSON)
        elif change == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(TEXT)] = draw(JSON)
    return as_bytes(value)


@st.composite
def damaged(draw: st.DrawFn, example: bytes) -> bytes:
    """The bytes of an example with some replaced, removed or inserted, or cut short."""
    data = bytearray(example)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["replace", "remove", "insert", "cut", "double"]))
        if change == "replace" and data:
            data[at] = draw(st.integers(0, 255))
        elif change == "remove":
            del data[at : at + draw(st.integers(1, 8))]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif change == "cut":
            del data[at:]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 30))]
    return bytes(data)


def like(example: Any) -> st.SearchStrategy[bytes]:
    """JSON like an example, any JSON, damaged text, deep nesting, noise."""
    return mutated(example) | JSON.map(as_bytes) | damaged(as_bytes(example)) | DEEP | st.binary(max_size=200)


def text_like(example: str) -> st.SearchStrategy[bytes]:
    return (
        damaged(example.encode())
        | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))
        | st.binary(max_size=200)
    )


KEY = "a" * 64


def read_hostfile(data: bytes, folder: Path) -> Any:
    from launcher.cluster import hostfile

    (folder / "hosts").write_bytes(data)
    return hostfile.read(str(folder / "hosts"))


def read_host_filter(data: bytes, folder: Path) -> Any:
    from launcher.cluster import hostfile

    hosts = hostfile.parse("node1 slots=4\nnode2 slots=4\n")
    return hostfile.choose(hosts, include=data.decode(errors="replace"))


def read_array(data: bytes, folder: Path) -> Any:
    from launcher.cluster import slurm

    (folder / "array").write_bytes(data)
    return slurm.read_tasks(folder / "array")


def read_job(data: bytes, folder: Path) -> Any:
    from launcher.cluster import runs

    (folder / "job.json").write_bytes(data)
    return runs.job_of(folder)


def read_last_step(data: bytes, folder: Path) -> Any:
    """What status formats: a step and a loss that are numbers, or nothing."""
    from launcher.cluster import runs

    (folder / "events.jsonl").write_bytes(data)
    step = runs.last_step(folder)
    return f"{step['loss']:.4f} {step['step']:d}" if step else ""


def read_events(data: bytes, folder: Path) -> Any:
    from launcher.training.report import read_events

    (folder / "events.jsonl").write_bytes(data)
    return read_events(folder / "events.jsonl")


def read_report(data: bytes, folder: Path) -> Any:
    """A run's events as `loldu report` reads them."""
    from launcher.reports.read import read_run

    (folder / "events.jsonl").write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"config": {"adapter": {}}, "identity": {}}))
    return read_run(folder)


def read_report_config(data: bytes, folder: Path) -> Any:
    from launcher.reports.read import read_run

    (folder / "events.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 1.0}\n')
    (folder / "config.json").write_bytes(data)
    return read_run(folder)


def read_scontrol(data: bytes, folder: Path) -> Any:
    from launcher.cluster import slurm_jobs

    text = data.decode(errors="replace")
    states = slurm_jobs.parse_scontrol(text) + slurm_jobs.parse_sacct(text)
    return [slurm_jobs._holds(state.job_id.partition("_")[2], "3") for state in states]


def read_agent_message(data: bytes, folder: Path) -> Any:
    from launcher.cluster import fleet

    return fleet._parse(data.decode(errors="replace"))


def read_rank(data: bytes, folder: Path) -> Any:
    """Rank 0's side of the rendezvous; nobody knows the token by chance."""
    from launcher.cluster import rendezvous

    async def greet() -> Any:
        reader = asyncio.StreamReader(limit=rendezvous.LINE_BYTES)
        reader.feed_data(data)
        reader.feed_eof()
        head = rendezvous.Head(4, "secret", "here", 1, rendezvous.Patience(1.0, lambda: 0))
        return await head.prove(reader, mock.Mock())

    found = asyncio.run(greet())
    raise AssertionError(f"{found} was taken for a rank")


def read_head(data: bytes, folder: Path) -> Any:
    """Another rank's side: no text may stand in for the verdict of the real rank 0."""
    from launcher.cluster import rendezvous

    line = mock.Mock()
    line.recv.side_effect = [data[:500], data[500:], b"", b"", b"", b""]
    found = rendezvous._ask(line, 1, "secret", rendezvous.Patience(1.0, lambda: 0))
    raise AssertionError(f"the verdict {found!r} was believed")


def read_cache_header(data: bytes, folder: Path) -> Any:
    """With a right checksum: the author of the header computed one."""
    import numpy
    from safetensors.numpy import save_file

    from launcher.factorization import cache

    (folder / "factors").mkdir()
    text = data.decode(errors="replace")
    file = folder / "factors" / f"{KEY}.safetensors"
    save_file({"write": numpy.ones((4, 2), "f4")}, file, {"about": text, "seal": cache._checksum(text)})
    found = [cache.find(folder, KEY), cache.entries(folder), cache.verify(folder)]
    from launcher.factorization.commands import cache_ls

    cache_ls(str(folder))
    return found


def read_cache_index(data: bytes, folder: Path) -> Any:
    from launcher.factorization import cache

    file, _ = cache._index_file(folder, {"rank": 4})
    file.parent.mkdir()
    text = data.decode(errors="replace")
    file.write_text(json.dumps([text, cache._checksum(text)]))
    found = cache.recall(folder, {"rank": 4})
    return cache.find(folder, found) or cache.prune(folder, max_bytes=0)


def read_cache_file(data: bytes, folder: Path) -> Any:
    from launcher.factorization import cache

    (folder / "factors").mkdir()
    (folder / "factors" / f"{KEY}.safetensors").write_bytes(data)
    return cache.find(folder, KEY) or cache.verify(folder)


def read_checkpoint_index(data: bytes, folder: Path) -> Any:
    from launcher.training.checkpoint_index import read_format, read_index

    read_format(data)
    return read_index(data)


def read_records(data: bytes, folder: Path) -> Any:
    from launcher.data.records import load_records

    file = folder / "data.json"
    file.write_bytes(data)
    return load_records(str(file))


def read_record_lines(data: bytes, folder: Path) -> Any:
    from launcher.data.records import load_records

    file = folder / "data.jsonl"
    file.write_bytes(data)
    return load_records(str(file))


def read_yaml(data: bytes, folder: Path) -> Any:
    from launcher.config_file import read_config

    (folder / "c.yaml").write_bytes(data)
    return read_config(folder / "c.yaml")


def read_config_json(data: bytes, folder: Path) -> Any:
    from launcher.config_file import read_config

    (folder / "c.json").write_bytes(data)
    return read_config(folder / "c.json")


def read_text_template(data: bytes, folder: Path) -> Any:
    from launcher.data.templates import load_template, render_prompt

    (folder / "t.txt").write_bytes(data)
    tokenizer = mock.Mock(chat_template=None)
    template = load_template(str(folder / "t.txt"), tokenizer, conversations=False)
    return render_prompt({"instruction": "Say {x}.", "input": "[a]", "output": "yes"}, template, tokenizer)


def read_adapter_config(data: bytes, folder: Path) -> Any:
    import numpy
    from safetensors.numpy import save_file

    from launcher.inference.adapter_folder import adapter_config

    save_file({"a": numpy.ones(2, "f4")}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(data)
    return adapter_config(folder)


def read_weights_index(data: bytes, folder: Path) -> Any:
    from adapters.checkpoint_files import list_tensors

    (folder / "model.safetensors.index.json").write_bytes(data)
    return list_tensors(folder)


def read_weights(data: bytes, folder: Path) -> Any:
    from adapters.checkpoint_files import list_tensors

    (folder / "model.safetensors").write_bytes(data)
    return list_tensors(folder)


RECORD = {"instruction": "Say yes.", "input": "", "output": "yes"}
TURNS = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
HEADER = {
    "key": KEY, "checksums": {"write": ["0" * 64]}, "name": "q_proj", "method": "loldu", "shape": [4, 2], "rank": 2,
    "dtype": "float32", "residual": 1e-6, "versions": {"torch": "2"},
}  # fmt: skip
INDEX = {
    "format": 1,
    "step": 2,
    "meta": {
        "identity": {"model": "x"}, "world_size": 1, "events": {"bytes": 3, "sha256": "0" * 64},
        "progress": {"step": 2, "tokens": 9, "best_loss": 1.5, "best_step": 1, "worse": 0, "evaluated": -1},
    },
    "files": {"rank-00000.safetensors": "0" * 64},
    "tensors": {"model/a": {"dtype": "float32", "shape": [2, 2], "pieces": [
        {"file": "rank-00000.safetensors", "start": 0, "rows": 2}]}},
}  # fmt: skip
SETTINGS = {
    "model": {"model": "m", "dtype": "auto"}, "data": {"data": "d.json"}, "adapter": {"rank": 4, "targets": ["q_proj"]},
    "optimizer": {"learning_rate": 0.001, "batch_size": 4, "epochs": 1.0}, "run": {"save_every": 10},
}  # fmt: skip
ADAPTER = {
    "peft_type": "LOLDU",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "m",
    "r": 4,
    "target_modules": ["q_proj"],
}
EVENT = {"step": 3, "loss": 1.25, "learning_rate": 0.1, "seconds": 0.5, "tokens": 10, "eval_loss": 2.0}
SCONTROL = (
    "JobId=9 ArrayJobId=7 ArrayTaskId=0-4%2 JobName=x UserId=a(1) JobState=RUNNING Restarts=1\n9|FAILED by 1|n|2\n"
)


@dataclass(frozen=True)
class Fuzzed:
    """A reader, its random input, and one input that it must accept (None: it accepts nothing)."""

    read: Reader
    data: st.SearchStrategy[bytes]
    good: bytes | None


def json_reader(read: Reader, example: Any) -> Fuzzed:
    return Fuzzed(read, like(example), as_bytes(example))


def text_reader(read: Reader, example: str) -> Fuzzed:
    return Fuzzed(read, text_like(example), example.encode())


SAFETENSORS = (
    b"\x40\x00\x00\x00\x00\x00\x00\x00" + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64) + bytes(8)
)
READERS: dict[str, Fuzzed] = {
    "hostfile": text_reader(read_hostfile, "node1 slots=8\nnode2 slots=4 # old\n"),
    "host_filter": text_reader(read_host_filter, "node1@node2:0,2"),
    "array": text_reader(read_array, "--rank 8 --targets 'q proj'\n# none\n--seed 3\n"),
    "job": json_reader(read_job, {"job_id": "17", "cluster": "alpine", "name": "x", "command": ["a"]}),
    "last_step": json_reader(read_last_step, EVENT),
    "events": json_reader(read_events, EVENT),
    "report": json_reader(read_report, EVENT),
    "report_config": json_reader(read_report_config, {"config": SETTINGS, "identity": {"a": 1}}),
    "scontrol": text_reader(read_scontrol, SCONTROL),
    "agent_message": text_reader(read_agent_message, '@loldu {"id": 3, "ok": true}\n'),
    "rank_hello": Fuzzed(read_rank, text_like(f"loldu-rank 1 {'0' * 32} {'0' * 64}\n"), None),
    "head_verdict": Fuzzed(read_head, text_like(f"loldu {'0' * 32}\n{'0' * 64} \n"), None),
    "cache_header": json_reader(read_cache_header, HEADER),
    "cache_index": json_reader(read_cache_index, [{"rank": 4}, KEY]),
    "cache_file": Fuzzed(read_cache_file, damaged(SAFETENSORS) | st.binary(max_size=100), SAFETENSORS),
    "checkpoint_index": json_reader(read_checkpoint_index, INDEX),
    "records": json_reader(read_records, [RECORD, RECORD]),
    "conversations": json_reader(read_records, [TURNS, TURNS]),
    "record_lines": text_reader(read_record_lines, f"{json.dumps(RECORD)}\n{json.dumps(RECORD)}\n"),
    "config_yaml": text_reader(read_yaml, "model: {model: m}\noptimizer:\n  learning_rate: 3e-2\nadapter: {rank: 4}\n"),
    "config_json": json_reader(read_config_json, SETTINGS),
    "text_template": text_reader(read_text_template, "### {instruction}[\nInput: {input}]\nAnswer:"),
    "adapter_config": json_reader(read_adapter_config, ADAPTER),
    "weights_index": json_reader(read_weights_index, {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}),
    "weights": Fuzzed(read_weights, damaged(SAFETENSORS) | st.binary(max_size=100), SAFETENSORS),
}  # fmt: skip
