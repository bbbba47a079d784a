"""Hostile and unlucky inputs, by kind: each writes files into a folder and gives the command line that reads them.

Used by the tests beside this file, which run some of each kind, and by benchmarks/hostile.py, which runs them all.
"""
# ruff: noqa: E501 (tables of inputs)

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = {"instruction": "Say yes.", "input": "", "output": "yes"}
ASK = ("--prompt", "hello", "--max-tokens", "2")  # options of generate
DEEP = "[" * 100_000 + "]" * 100_000
WRONG: dict[str, Any] = {
    "null": None, "minus one": -1, "zero": 0, "huge": 10**9, "beyond 64 bits": 1 << 70, "a float": 1.5, "1e308": 1e308,
    "a string": "x", "empty string": "", "a list": [1], "an empty list": [], "an object": {"a": 1}, "true": True,
    "a path": "../../../etc/passwd", "markup": "[/b][red]", "an escape sequence": "\x1b[2J\x1b]0;owned\x07",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One input. accepts: exit codes that are right; an input that is odd but valid may also run."""

    kind: str
    name: str
    write: Callable[[Path], list[str]]  # writes into a folder; returns the words of the command
    accepts: tuple[int, ...] = (2,)


@dataclass(frozen=True)
class Materials:
    """What the cases are made from: a small model, a finished run of it, and its cache."""

    model: Path
    run: Path


def train_words(folder: Path, materials: Materials, **changed: str | None) -> list[str]:
    """One step on a few records; changed replaces options (data="x" for --data x; None leaves one out)."""
    data = folder / "good.json"
    if not data.exists():
        data.write_text(json.dumps([RECORD] * 4))
    options: dict[str, str | None] = {
        "model": str(materials.model), "data": str(data), "output": str(folder / "run"), "rank": "4",
        "cache": str(folder / "cache"), "batch-size": "2", "max-steps": "1", "eval-records": "0",
    }  # fmt: skip
    options |= {name.replace("_", "-"): value for name, value in changed.items()}
    return ["train", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def data_cases(materials: Materials) -> Iterator[Case]:
    """--data: files that are no files, no JSON, too deep, too large, or full of other things."""

    def file(name: str, content: bytes | str | Callable[[Path], Any], suffix: str = ".json") -> Case:
        def write(folder: Path) -> list[str]:
            path = folder / f"data{suffix}"
            if callable(content):
                content(path)
            else:
                path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
            return train_words(folder, materials, data=str(path))

        return Case("data", name, write)

    good = json.dumps([RECORD] * 4).encode()
    squeezed = gzip.compress(good)
    for suffix in (".json", ".jsonl"):
        yield file(f"nested deeply{suffix}", DEEP, suffix)
        yield file(f"a record that is nested deeply{suffix}", f'{{"instruction": {DEEP}}}', suffix)
        yield file(f"a FIFO{suffix}", os.mkfifo, suffix)
        yield file(f"an endless device{suffix}", lambda path: path.symlink_to("/dev/zero"), suffix)
        yield file(f"a folder{suffix}", lambda path: path.mkdir(), suffix)
        yield file(f"a broken link{suffix}", lambda path: path.symlink_to("/nowhere"), suffix)
        yield file(f"a link to itself{suffix}", lambda path: path.symlink_to(path), suffix)
        yield file(f"an unreadable process file{suffix}", lambda path: path.symlink_to("/proc/self/mem"), suffix)
        yield file(f"nothing{suffix}", b"", suffix)
        yield file(f"zeros{suffix}", bytes(10_000), suffix)
        yield file(f"UTF-16{suffix}", good.decode().encode("utf-16"), suffix)
        yield file(f"cut in the middle{suffix}", good[: len(good) // 2], suffix)
        yield file(f"a pickle{suffix}", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94", suffix)
        yield file(f"cut gzip{suffix}", squeezed[: len(squeezed) // 2], f"{suffix}.gz")
        yield file(f"gzip with a wrong checksum{suffix}", squeezed[:-8] + b"\0" * 8, f"{suffix}.gz")
        yield file(f"gzip header alone{suffix}", squeezed[:10], f"{suffix}.gz")
        yield file(f"gzip with noise{suffix}", squeezed[:15] + b"\xff" * 30, f"{suffix}.gz")
        yield file(f"a gzip bomb of 20 GB{suffix}", _bomb, f"{suffix}.gz")
        yield file(f"a number of 10,000 digits{suffix}", b"1" * 10_000, suffix)
    for name, value in WRONG.items():
        for column in ("instruction", "input", "output", "messages", "conversations", "instances"):
            if (name, column) in (("null", "input"), ("null", "instances")):
                continue  # an empty column is no mistake
            row: dict[str, Any] = {**RECORD, column: value}
            accepts = (0, 2) if isinstance(value, str) or column == "instances" or value is None else (2,)
            text = json.dumps([row] * 4)
            case = file(f"{column}: {name}", text)
            yield Case("data", case.name, case.write, accepts)
    for name, value in WRONG.items():
        for place in ("role", "content"):
            turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
            turns[1] = {**turns[1], place: value}
            yield file(f"a turn's {place}: {name}", json.dumps([{"messages": turns}] * 4))
        if not isinstance(value, str):
            yield file(f"the whole file: {name}", json.dumps(value))
        yield file(f"a row: {name}", json.dumps([value] * 3))
    for name, content in {
        "noise": b"PAR1" + os.urandom(100) + b"PAR1", "nothing": b"", "a header alone": b"PAR1", "JSON": good,
    }.items():  # fmt: skip
        yield file(f"parquet: {name}", content, ".parquet")
    for name, path in {"an empty name": "", "a null byte": "a\0.json", "too long": "x" * 5000 + ".json",
                       "an escape sequence": "\x1b[2J.json", "a parent": "../../../../../etc/shadow"}.items():  # fmt: skip
        yield Case("data", f"path: {name}", lambda folder, path=path: train_words(folder, materials, data=path))


def _bomb(path: Path) -> None:
    """A gzip file of 20 GB of spaces, which takes 20 MB: made once, then linked."""
    kept = Path(os.environ.get("TMPDIR", "/tmp")) / f"loldu-fuzz-bomb-{os.getuid()}.gz"
    if not kept.exists():
        partial = kept.with_suffix(f".{os.getpid()}")
        block = b" " * (1 << 20)
        member = gzip.compress(block * 64, 6)  # gzip files may be concatenated
        with open(partial, "wb") as file:
            for _ in range(320):
                file.write(member)
        os.replace(partial, kept)
    path.symlink_to(kept)


def model_folder(folder: Path, materials: Materials) -> Path:
    """A copy of the model whose files may be changed; the weights are linked."""
    model = folder / "model"
    model.mkdir()
    for file in materials.model.iterdir():
        if file.suffix == ".safetensors":
            (model / file.name).symlink_to(file)
        elif file.is_file():
            shutil.copy(file, model / file.name)
            (model / file.name).chmod(0o644)
    return model


def model_cases(materials: Materials) -> Iterator[Case]:
    """A model's config.json, weights, index and tokenizer, read by training and by generate."""

    def generate(name: str, change: Callable[[Path], Any], *, train: bool = False, accepts=(0, 2)) -> Case:
        def write(folder: Path) -> list[str]:
            model = model_folder(folder, materials)
            change(model)
            if train:
                return train_words(folder, materials, model=str(model))
            return ["generate", str(model), *ASK]

        return Case("model", f"{'train' if train else 'generate'}: {name}", write, accepts)

    config = json.loads((materials.model / "config.json").read_text())
    keys = sorted({*config, "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers",
                   "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_scaling", "auto_map",
                   "quantization_config", "torch_dtype", "dtype", "head_dim", "intermediate_size", "hidden_act"})  # fmt: skip
    for at, key in enumerate(keys):
        for name, value in WRONG.items():
            yield generate(f"config {key}: {name}", _json_change("config.json", key, value), train=at % 3 == 0)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                 "special_tokens_map.json", "model.safetensors.index.json"):  # fmt: skip
        texts = {"nested deeply": DEEP, "a list": "[]", "a number": "3", "nothing": "", "cut": '{"a": ', "no UTF-8": "\udcff",
                 "null": "null", "a string": '"x"', "nested deeply in a field": f'{{"model_type": {DEEP}}}'}  # fmt: skip
        for name, text in texts.items():
            yield generate(f"{file}: {name}", _text_change(file, text))
        for name, make in {"a FIFO": os.mkfifo, "a folder": lambda path: path.mkdir(),
                           "a broken link": lambda path: path.symlink_to("/nowhere")}.items():  # fmt: skip
            yield generate(f"{file}: {name}", _special(file, make))
    for name, value in WRONG.items():
        yield generate(f"index weight_map: {name}", _index({"weight_map": value}), accepts=(2,))
        yield generate(f"index file: {name}", _index({"weight_map": {"a": value}}), accepts=(2,))
    yield generate("index leaves the folder", _index({"weight_map": {"a": "../../secret.safetensors"}}), accepts=(2,))
    yield generate("index names an absolute path", _index({"weight_map": {"a": "/etc/passwd"}}), accepts=(2,))
    for name, data in {
        "nothing": b"", "a length of 2^63": struct.pack("<Q", 1 << 63), "a length of 1 GB": struct.pack("<Q", 1 << 30),
        "a header that is no JSON": struct.pack("<Q", 4) + b"oops", "a header that is a list": struct.pack("<Q", 2) + b"[]",
        "a deep header": struct.pack("<Q", len(DEEP)) + DEEP.encode(), "a pickle": b"\x80\x04}.", "text": b"hello" * 100,
        "offsets beyond the end": _header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
        "a negative shape": _header({"a": {"dtype": "F32", "shape": [-9], "data_offsets": [0, 0]}}),
        "an overflowing shape": _header({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 0]}}),
        "an unknown dtype": _header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}),
        "no tensors": _header({}),
    }.items():  # fmt: skip
        yield generate(f"weights: {name}", _bytes_change("model.safetensors", data), accepts=(2,))
        yield generate(f"weights: {name}", _bytes_change("model.safetensors", data), train=True, accepts=(2,))


def _json_change(file: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**known, key: value}))

    return change


def _text_change(file: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))


def _bytes_change(file: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(data)

    return change


def _special(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return change


def _index(content: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def _header(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def adapter_cases(materials: Materials) -> Iterator[Case]:
    """An adapter's folder: its config and its weights."""
    saved = materials.run / "adapter"
    config = json.loads((saved / "adapter_config.json").read_text())

    def case(name: str, change: Callable[[Path], Any], accepts=(0, 2)) -> Case:
        def write(folder: Path) -> list[str]:
            shutil.copytree(saved, folder / "adapter")
            for file in (folder / "adapter").iterdir():
                file.chmod(0o644)
            change(folder / "adapter")
            return ["generate", str(folder / "adapter"), *ASK]

        return Case("adapter", name, write, accepts)

    for key in sorted(config):
        for name, value in WRONG.items():
            yield case(f"{key}: {name}", _json_change("adapter_config.json", key, value))
    for name, value in {
        "a regex that backtracks": "(a+)+$|(.*)*(.*)*(.*)*x",
        "an open regex": "(",
        "all": ".*",
    }.items():
        yield case(f"target_modules: {name}", _json_change("adapter_config.json", "target_modules", value))
    for name, text in {"nested deeply": DEEP, "a list": "[]", "nothing": "", "cut": "{"}.items():
        yield case(f"adapter_config.json: {name}", _text_change("adapter_config.json", text), (2,))
    for name, data in {"nothing": b"", "text": b"hello" * 50, "a length of 2^63": struct.pack("<Q", 1 << 63),
                       "no tensors": _header({})}.items():  # fmt: skip
        yield case(f"weights: {name}", _bytes_change("adapter_model.safetensors", data), (2,))
    for name, make in {"a FIFO": os.mkfifo, "a folder": lambda path: path.mkdir()}.items():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            yield case(f"{file}: {name}", _special(file, make), (2,))


TEMPLATES = {
    "an endless loop of loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a huge power": "{{ 2 ** 99999999 }}", "a power of powers": "{{ 9 ** 9 ** 9 ** 9 }}", "a wide format": "{{ '%99999999s' % 'x' }}",
    "a repeated string": "{{ 'x' * 999999999 }}", "a repeated list": "{{ [0] * 999999999 }}", "a division by zero": "{{ 1 / 0 }}",
    "an index beyond the end": "{{ messages[99] }}", "a type error": "{{ 'x' + 1 }}", "a missing name": "{{ nothing.more }}",
    "an open block": "{% for a in b %}", "an unknown tag": "{% explode %}", "an include": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}", "a way out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "another way out": "{{ cycler.__init__.__globals__.os.system('touch owned') }}", "a raised error": "{{ raise_exception('no') }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nothing": "", "a null byte": "\0", "deep brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "a long filter chain": "{{ 'x'" + "|upper" * 5000 + " }}", "a huge range": "{{ range(10**12)|list }}", "joined lists": "{{ range(99999)|map('string')|join('x' * 9999) }}",
    "a value that is no text": "{{ messages }}", "center": "{{ 'x'|center(999999999) }}", "batches": "{{ range(99999)|batch(1)|list|length }}",
    "an escape sequence": "\x1b[2J{{ messages[0].content }}", "half a character": "\ud800",
}  # fmt: skip


def template_cases(materials: Materials) -> Iterator[Case]:
    """--prompt-template: Jinja that loops, prints without end, raises, or tries to leave its sandbox; text that fits none."""
    for name, text in TEMPLATES.items():

        def write(folder: Path, text: str = text) -> list[str]:
            (folder / "t.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
            rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}] * 4
            (folder / "chats.json").write_text(json.dumps(rows))
            return train_words(
                folder, materials, prompt_template=str(folder / "t.jinja"), data=str(folder / "chats.json")
            )

        yield Case("template", f"jinja: {name}", write, (2,))
    for name, text in {"no placeholder": "x", "an unknown placeholder": "{instruction}{secret}", "a format attack":
                       "{instruction.__class__}", "open brace": "{instruction}{", "open bracket": "{instruction}[{input}",
                       "nothing": "", "no UTF-8": "\udcff{instruction}"}.items():  # fmt: skip

        def write_text(folder: Path, text: str = text) -> list[str]:
            (folder / "t.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
            return train_words(folder, materials, prompt_template=str(folder / "t.txt"))

        yield Case("template", f"text: {name}", write_text, (0, 2))


NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e30",
    "1e308",
    "1" * 400,
    str(1 << 63),
    str(1 << 70),
    "x",
    "",
    "1,5",
    "٣",
    "0x10",
)
OPTIONS = (
    "learning-rate", "batch-size", "micro-batch-size", "max-steps", "epochs", "rank", "seed", "warmup-ratio", "max-length",
    "eval-records", "save-every", "eval-every", "max-seconds", "weight-decay",
)  # fmt: skip


def option_cases(materials: Materials) -> Iterator[Case]:
    """Numbers outside every range."""
    for option in OPTIONS:
        for value in NUMBERS:
            name = option.replace("-", "_")
            yield Case("option", f"--{option}={value[:20]}", lambda folder, name=name, value=value: train_words(
                folder, materials, **{name: value}), (0, 2))  # fmt: skip


def run_cases(materials: Materials) -> Iterator[Case]:
    """A run folder with false contents, read by resuming, by status, by generate and by report; its checkpoint index
    resealed."""

    def case(name: str, change: Callable[[Path], Any], command: str = "resume", accepts=(0, 2)) -> Case:
        def write(folder: Path) -> list[str]:
            shutil.copytree(materials.run, folder / "run", symlinks=True)
            change(folder / "run")
            if command == "resume":
                return train_words(folder, materials, max_steps="3")
            if command == "generate":
                return ["generate", str(folder / "run"), *ASK]
            return [*command.split(), str(folder / "run")]

        return Case("run", f"{command}: {name}", write, accepts)

    (point,) = (materials.run / "checkpoints").glob("step-*")
    index = json.loads((point / "index.json").read_text())

    def resealed(changed: Any) -> Callable[[Path], None]:
        def change(run: Path) -> None:
            import hashlib

            here = run / "checkpoints" / point.name
            text = changed if isinstance(changed, str) else json.dumps(changed)
            (here / "index.json").write_text(text)
            (here / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())

        return change

    for path in _paths(index):
        for name in ("null", "minus one", "huge", "a string", "a list", "an object", "a path"):
            changed = copy.deepcopy(index)
            _set(changed, path, WRONG[name])
            yield case(f"index {'.'.join(map(str, path))}: {name}", resealed(changed))
        changed = copy.deepcopy(index)
        _delete(changed, path)
        yield case(f"index without {'.'.join(map(str, path))}", resealed(changed))
    for name, text in {"nested deeply": DEEP, "a list": "[]", "a number": "3", "nothing": "", "cut": "{"}.items():
        yield case(f"index: {name}", resealed(text))
        for file in ("config.json", "events.jsonl", "state"):
            for command in ("resume", "status", "generate", "report", "logs"):
                accepts = (0, 2)
                yield case(f"{file}: {name}", _text_change(file, text), command, accepts)
    for file in ("config.json", "events.jsonl", "state", "control"):
        for name, make in {"a FIFO": os.mkfifo, "a folder": lambda path: path.mkdir(), "a link to a device":
                           lambda path: path.symlink_to("/dev/zero"), "a broken link": lambda path: path.symlink_to("/nowhere/x")}.items():  # fmt: skip
            for command in ("resume", "status", "generate", "report"):
                yield case(f"{file}: {name}", _special(file, make), command)
    events = [
        '{"step": "x", "loss": "y"}',
        '{"step": 1e308, "loss": 1}',
        "[]",
        "3",
        '{"loss": [1]}',
        '{"loss": 1' + "0" * 400 + "}",
    ]
    for line in events:
        for command in ("resume", "status", "report"):
            yield case(f"an event {line[:30]}", _text_change("events.jsonl", f"{line}\n"), command)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields, and of the first element of each list."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        found += _paths(child, (*path, key))
    return found[:60]


def _set(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def _delete(value: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        value = value[key]
    del value[path[-1]]


HOSTFILES = {
    "nothing": "", "spaces": "  \n\t\n", "no slots": "node1\n", "slots of words": "node1 slots=many\n", "minus": "node1 slots=-1\n",
    "zero": "node1 slots=0\n", "10^9 slots": "node1 slots=1000000000\n", "400 digits": f"node1 slots={'1' * 400}\n",
    "an Arabic digit": "node1 slots=٣\n", "an option": "-oProxyCommand=touch${IFS}owned slots=1\n", "a command": "$(touch owned) slots=1\n",
    "a back quote": "`touch owned` slots=1\n", "a semicolon": "a;touch slots=1\n", "a user": "root@node1 slots=1\n", "IPv6": "::1 slots=1\n",
    "twice": "a slots=1\na slots=1\n", "localhost and others": "localhost slots=1\nnode2 slots=1\n", "a null byte": "a\0 slots=1\n",
    "an escape sequence": "\x1b[2J slots=1\n", "a path": "../x slots=1\n", "a long name": "x" * 100_000 + " slots=1\n", "JSON": "{}",
    "no UTF-8": "\udcff slots=1\n", "many lines": "x y z\n" * 10_000, "a bell": "a\x07 slots=1\n", "a line separator": "a\u2028b slots=1\n",
}  # fmt: skip


def cluster_cases(materials: Materials) -> Iterator[Case]:
    """Hostfiles, arrays, names and options of the commands that start runs elsewhere."""
    for name, text in HOSTFILES.items():
        for command in ("launch", "doctor"):

            def write(folder: Path, text: str = text, command: str = command) -> list[str]:
                (folder / "hosts").write_bytes(text.encode("utf-8", "surrogateescape"))
                words = [command, f"--hostfile={folder / 'hosts'}"]
                return [*words, "llama2_alpaca_loldu", f"--output={folder / 'run'}"] if command == "launch" else words

            yield Case("cluster", f"{command}: hostfile of {name}", write)
    for name, make in {
        "a FIFO": os.mkfifo,
        "a folder": lambda path: path.mkdir(),
        "a device": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        for option in ("hostfile", "array"):

            def special(folder: Path, make: Any = make, option: str = option) -> list[str]:
                make(folder / "file")
                words = [f"--{option}={folder / 'file'}", "llama2_alpaca_loldu"]
                return ["launch", *words] if option == "hostfile" else ["submit", *words[::-1], "--dry-run"]

            yield Case("cluster", f"--{option}: {name}", special)
    for name, text in {
        "nothing": "",
        "an open quote": "--rank 8 'x\n",
        "an output": "--output x\n",
        "no UTF-8": "\udcff\n",
    }.items():

        def array(folder: Path, text: str = text) -> list[str]:
            (folder / "array").write_bytes(text.encode("utf-8", "surrogateescape"))
            return ["submit", "llama2_alpaca_loldu", f"--array={folder / 'array'}", "--dry-run"]

        yield Case("cluster", f"an array of {name}", array)
    injections = (
        "a\n#SBATCH --uid=0",
        "a\rb",
        "a\u2028b",
        "$(touch owned)",
        "`touch owned`",
        '"; touch owned #',
        "\x1b[2J",
        "a\\",
    )
    for option in (
        "name",
        "partition",
        "account",
        "qos",
        "constraint",
        "time",
        "host-suffix",
        "python",
        "container",
        "sbatch",
        "srun",
    ):
        for value in injections:

            def submit(folder: Path, option: str = option, value: str = value) -> list[str]:
                return ["submit", "llama2_alpaca_loldu", f"--{option}={value}", "--dry-run", "--", f"--output={folder / 'run'}"] if option != "name" else ["submit", "llama2_alpaca_loldu", f"--name={value}", "--dry-run"]  # fmt: skip

            yield Case("cluster", f"submit --{option}={value!r}", submit, (0, 2))


def cache_cases(materials: Materials) -> Iterator[Case]:
    """--cache: folders that are something else, and cached files with false contents."""
    for command in ("cache ls", "cache verify", "cache prune --max-gb 0"):
        for name in ("model", "run", "file", "fifo", "link", "root"):

            def write(folder: Path, command: str = command, name: str = name) -> list[str]:
                place = folder / "place"
                if name == "model":
                    shutil.copytree(materials.model, place)
                elif name == "run":
                    shutil.copytree(materials.run, place)
                elif name == "file":
                    place.write_text("x")
                elif name == "fifo":
                    os.mkfifo(place)
                elif name == "link":
                    place.symlink_to(place)
                else:
                    place = Path("/")
                return [*command.split(), "--cache", str(place)]

            yield Case("cache", f"{command} on a {name}", write, (2,))
        for name, data in {"noise": b"x" * 100, "nothing": b"", "a deep header": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
                           "no tensors": _header({}), "markup": _header({"__metadata__": {"about": "[/b]", "seal": "x"}})}.items():  # fmt: skip

            def file(folder: Path, command: str = command, data: bytes = data) -> list[str]:
                (folder / "cache" / "factors").mkdir(parents=True)
                (folder / "cache" / "factors" / f"{'a' * 64}.safetensors").write_bytes(data)
                (folder / "cache" / "index").mkdir()
                (folder / "cache" / "index" / f"{'b' * 64}.json").write_bytes(data)
                return [*command.split(), "--cache", str(folder / "cache")]

            yield Case("cache", f"{command} with a file of {name}", file, (0, 1))


KINDS = {
    "data": data_cases, "model": model_cases, "adapter": adapter_cases, "template": template_cases, "option": option_cases,
    "run": run_cases, "cluster": cluster_cases, "cache": cache_cases,
}  # fmt: skip
