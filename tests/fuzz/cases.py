"""Hostile and unlucky inputs, by kind: each writes files into a folder and gives the command line that reads them.

Used by the tests beside this file, which run some of each kind, and by benchmarks/hostile.py, which runs them all.
"""

# ruff: noqa: E501 (tables of inputs)

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster_cases import cluster_cases
from hostile_parts import DEEP, RECORD, WRONG, Case, Materials, train_words
from model_cases import adapter_cases, model_cases
from run_cases import cache_cases, run_cases


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


KINDS = {
    "data": data_cases, "model": model_cases, "adapter": adapter_cases, "template": template_cases, "option": option_cases,
    "run": run_cases, "cluster": cluster_cases, "cache": cache_cases,
}  # fmt: skip
