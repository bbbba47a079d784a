"""Hostile files of models and adapters."""

# ruff: noqa: E501 (tables of inputs)

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_parts import (
    ASK,
    DEEP,
    WRONG,
    Case,
    Materials,
    change_bytes,
    change_json,
    change_text,
    make_special,
    model_folder,
    tensor_header,
    train_words,
)


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
            yield generate(f"config {key}: {name}", change_json("config.json", key, value), train=at % 3 == 0)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                 "special_tokens_map.json", "model.safetensors.index.json"):  # fmt: skip
        texts = {"nested deeply": DEEP, "a list": "[]", "a number": "3", "nothing": "", "cut": '{"a": ', "no UTF-8": "\udcff",
                 "null": "null", "a string": '"x"', "nested deeply in a field": f'{{"model_type": {DEEP}}}'}  # fmt: skip
        for name, text in texts.items():
            yield generate(f"{file}: {name}", change_text(file, text))
        for name, make in {"a FIFO": os.mkfifo, "a folder": lambda path: path.mkdir(),
                           "a broken link": lambda path: path.symlink_to("/nowhere")}.items():  # fmt: skip
            yield generate(f"{file}: {name}", make_special(file, make))
    for name, value in WRONG.items():
        yield generate(f"index weight_map: {name}", _index({"weight_map": value}), accepts=(2,))
        yield generate(f"index file: {name}", _index({"weight_map": {"a": value}}), accepts=(2,))
    yield generate("index leaves the folder", _index({"weight_map": {"a": "../../secret.safetensors"}}), accepts=(2,))
    yield generate("index names an absolute path", _index({"weight_map": {"a": "/etc/passwd"}}), accepts=(2,))
    for name, data in {
        "nothing": b"", "a length of 2^63": struct.pack("<Q", 1 << 63), "a length of 1 GB": struct.pack("<Q", 1 << 30),
        "a header that is no JSON": struct.pack("<Q", 4) + b"oops", "a header that is a list": struct.pack("<Q", 2) + b"[]",
        "a deep header": struct.pack("<Q", len(DEEP)) + DEEP.encode(), "a pickle": b"\x80\x04}.", "text": b"hello" * 100,
        "offsets beyond the end": tensor_header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
        "a negative shape": tensor_header({"a": {"dtype": "F32", "shape": [-9], "data_offsets": [0, 0]}}),
        "an overflowing shape": tensor_header({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 0]}}),
        "an unknown dtype": tensor_header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}),
        "no tensors": tensor_header({}),
    }.items():  # fmt: skip
        yield generate(f"weights: {name}", change_bytes("model.safetensors", data), accepts=(2,))
        yield generate(f"weights: {name}", change_bytes("model.safetensors", data), train=True, accepts=(2,))


def _index(content: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


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
            yield case(f"{key}: {name}", change_json("adapter_config.json", key, value))
    for name, value in {
        "a regex that backtracks": "(a+)+$|(.*)*(.*)*(.*)*x",
        "an open regex": "(",
        "all": ".*",
    }.items():
        yield case(f"target_modules: {name}", change_json("adapter_config.json", "target_modules", value))
    for name, text in {"nested deeply": DEEP, "a list": "[]", "nothing": "", "cut": "{"}.items():
        yield case(f"adapter_config.json: {name}", change_text("adapter_config.json", text), (2,))
    for name, data in {"nothing": b"", "text": b"hello" * 50, "a length of 2^63": struct.pack("<Q", 1 << 63),
                       "no tensors": tensor_header({})}.items():  # fmt: skip
        yield case(f"weights: {name}", change_bytes("adapter_model.safetensors", data), (2,))
    for name, make in {"a FIFO": os.mkfifo, "a folder": lambda path: path.mkdir()}.items():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            yield case(f"{file}: {name}", make_special(file, make), (2,))
