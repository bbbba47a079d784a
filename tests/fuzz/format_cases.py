"""Hostile files of the kinds that came later: settings, PEFT's own adapters, tokenizers, tasks, sweeps, cached tokens.

Used as cases.py is, which adds them to its own.
"""
# ruff: noqa: E501 (tables of inputs)

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_parts import ASK, DEEP, RECORD, Case, Materials, model_folder, train_words

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SETTINGS = {
    "a billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "an alias of itself": "model: &m {model: *m}\n", "a merge with itself": "model: &m\n  <<: *m\n", "a python object": "model: !!python/object/apply:os.system ['touch owned']\n",
    "a python name": "model: !!python/name:os.system\n", "an unknown tag": "model: !x {model: y}\n", "a key twice": "run: {seed: 1}\nrun: {seed: 2}\n",
    "a date that does not exist": "run: {output: 2001-99-99}\n", "a date": "run: {output: 2001-01-01}\n", "a time": "run: {output: 2001-01-01 99:99:99}\n",
    "a number of base 60": "optimizer: {max_steps: 1:30}\n", "an octal number": "optimizer: {max_steps: 010}\n", "infinity": "optimizer: {learning_rate: .inf}\n", "no number": "optimizer: {learning_rate: .nan}\n",
    "10,000 digits": f"optimizer: {{max_steps: {'9' * 10_000}}}\n", "10,000 hexadecimal digits": f"optimizer: {{max_steps: 0x{'f' * 10_000}}}\n", "a key that is a number": "1: 2\n", "a key that is a list": "? [1, 2]\n: 3\n",
    "a key that is null": "~: 1\n", "two documents": "run: {}\n---\nrun: {}\n", "a tab": "run:\n\tseed: 1\n", "binary": "run: {output: !!binary 'AAEC/w=='}\n", "wrong binary": "run: {output: !!binary '%'}\n",
    "a set": "adapter: {targets: !!set {a, b}}\n", "an ordered map": "adapter: !!omap [a: 1]\n", "pairs": "run: !!pairs [a: 1]\n", "markup": "'[/b]': {'[red]': 1}\n", "an escape sequence": '"\\e[2J": {"\\e]0;x\\a": 1}\n', "a null byte": "run: {output: 'a\0b'}\n",
    "an escaped null byte": 'run: {output: "a\\0b"}\n', "half a character": 'run: {output: "\\ud800"}\n', "nested deeply": "model: " + "[" * 20_000, "nested deeply by indents": "".join(" " * i + "a:\n" for i in range(2000)),
    "a list": "- a\n", "a word": "hello\n", "nothing": "", "a comment": "# x\n", "a null section": "run:\n", "a list as section": "run: [1]\n", "a value of text": "optimizer: {max_steps: x}\n", "true": "optimizer: {max_steps: true}\n", "yes": "run: {output: yes}\n",
    "a directive": "%YAML 9.9\n---\nrun: {}\n", "a long key": f"{'k' * 5000}: 1\n", "a very long line": f"run: {{output: {'x' * 2_000_000}}}\n", "UTF-16": "\udcff\udcfer\0u\0n\0", "options of a method": "adapter: {options: ['x=[/b]', 'y']}\n", "targets of numbers": "adapter: {targets: [1, null]}\n",
}  # fmt: skip
JSON_SETTINGS = {
    "10,000 digits": f'{{"optimizer": {{"max_steps": {"9" * 10_000}}}}}', "NaN": '{"optimizer": {"learning_rate": NaN}}', "1e999": '{"optimizer": {"learning_rate": 1e999}}', "a key twice": '{"run": {}, "run": 3}',
    "nested deeply": f'{{"run": {DEEP}}}', "half a character": '{"run": {"output": "\\ud800"}}', "a list": "[]", "config of a list": '{"config": []}', "config of null": '{"config": null}', "a null byte": '{"run": {"output": "a\\u0000b"}}',
}  # fmt: skip


def settings_cases(materials: Materials) -> Iterator[Case]:
    """`loldu train FILE.yaml` and FILE.json."""
    for suffix, texts in ((".yaml", SETTINGS), (".json", JSON_SETTINGS)):
        for name, text in texts.items():

            def write(folder: Path, text: str = text, suffix: str = suffix) -> list[str]:
                (folder / f"run{suffix}").write_bytes(text.encode("utf-8", "surrogateescape"))
                words = train_words(folder, materials)
                return ["train-file", str(folder / f"run{suffix}"), *words[1:]]

            yield Case("settings", f"{suffix}: {name}", write, (0, 2))


LORA = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "BASE",
    "inference_mode": True, "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0, "init_lora_weights": True,
}  # fmt: skip
LORA_FIELDS: dict[str, dict[str, Any]] = {
    "a module to import": {"megatron_config": {"a": 1}, "megatron_core": "owned_module"}, "an auto mapping": {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}, "task_type": None},
    "a mapping to a module here": {"auto_mapping": {"base_model_class": "X", "parent_library": "owned_module"}, "task_type": None}, "10^6 copies of layers": {"layer_replication": [[0, 2]] * 500_000}, "layers up to 10^9": {"layer_replication": [[0, 10**9]]},
    "negative layers": {"layer_replication": [[-5, -1]]}, "a rank of 10^9": {"r": 10**9}, "a rank of 10^9 by pattern": {"rank_pattern": {"q_proj": 10**9}}, "a rank pattern that backtracks": {"rank_pattern": {"(a+)+(a+)+(a+)+$|(.*)*(.*)*(.*)*x": 4}},
    "an alpha pattern that backtracks": {"alpha_pattern": {"(([a-z._0-9])+.)+([A-Z]([a-z._0-9])+)+x": 4}}, "a rank of zero by pattern": {"rank_pattern": {"q_proj": 0}}, "an alpha of 1e308": {"lora_alpha": 1e308}, "alpha no number": {"lora_alpha": float("nan")},
    "pissa": {"init_lora_weights": "pissa"}, "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "corda": {"init_lora_weights": "corda", "corda_config": {"cache_file": "/etc/passwd"}}, "eva": {"init_lora_weights": "eva", "eva_config": {}},
    "orthogonal": {"init_lora_weights": "orthogonal"}, "an unknown start": {"init_lora_weights": "[/b]\x1b[2J"}, "tokens beyond the vocabulary": {"trainable_token_indices": [10**12]}, "tokens of text": {"trainable_token_indices": ["x"]}, "10^7 tokens": {"trainable_token_indices": {"embed_tokens": list(range(600_000))}},
    "target parameters": {"target_parameters": ["mlp.x"]}, "all modules saved": {"modules_to_save": [""]}, "modules saved by regular expression": {"modules_to_save": [".*"]}, "an exclusion that backtracks": {"exclude_modules": "(([a-z._0-9])+.)+([A-Z]([a-z._0-9])+)+x"},
    "a pattern of layers": {"layers_to_transform": [0], "layers_pattern": ["(((("]}, "layers 10^12": {"layers_to_transform": [10**12]}, "a bias": {"bias": "all"}, "an unknown bias": {"bias": "[red]"}, "DoRA": {"use_dora": True}, "rslora with rank 0": {"use_rslora": True, "r": 0},
    "a runtime config": {"runtime_config": {"ephemeral_gpu_offload": True}}, "invocation tokens": {"alora_invocation_tokens": [10**12]}, "another method": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "prefix of 10^9": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**9},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "encoder_hidden_size": 10**9}, "an unknown method": {"peft_type": "[/b]"}, "IA3": {"peft_type": "IA3"}, "X-LoRA": {"peft_type": "XLORA", "adapters": {"a": "/etc"}}, "a base that is a FIFO": {"base_model_name_or_path": "fifo"},
    "a base of 5,000 letters": {"base_model_name_or_path": "x" * 5000}, "a base with a null byte": {"base_model_name_or_path": "a\0b"}, "a base of markup": {"base_model_name_or_path": "[/b]/\x1b[2J"}, "a task of its own": {"task_type": "FEATURE_EXTRACTION"}, "classification": {"task_type": "SEQ_CLS"},
}  # fmt: skip


def _tensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def peft_cases(materials: Materials) -> Iterator[Case]:
    """Adapters of PEFT's own methods, whose configs have more fields."""
    hidden = json.loads((materials.model / "config.json").read_text())["hidden_size"]
    layers = json.loads((materials.model / "config.json").read_text())["num_hidden_layers"]
    place = "base_model.model.model.layers.{}.self_attn.q_proj"
    good = {}
    for layer in range(layers):
        good[f"{place.format(layer)}.lora_A.weight"] = ("F32", [2, hidden], struct.pack("<f", 0.01) * 2 * hidden)
        good[f"{place.format(layer)}.lora_B.weight"] = ("F32", [hidden, 2], struct.pack("<f", 0.01) * 2 * hidden)
    A = f"{place.format(0)}.lora_A.weight"

    def case(name: str, fields: dict[str, Any], weights: dict[str, Any], command: str, accepts=(0, 2)) -> Case:
        def write(folder: Path) -> list[str]:
            adapter = folder / "adapter"
            adapter.mkdir()
            (folder / "owned_module.py").write_text("open('owned', 'w')\nclass X: pass\n")
            os.mkfifo(folder / "fifo")
            config = {**LORA, "base_model_name_or_path": str(materials.model), **fields}
            if config["base_model_name_or_path"] == "fifo":
                config["base_model_name_or_path"] = str(folder / "fifo")
            (adapter / "adapter_config.json").write_text(json.dumps(config))
            (adapter / "adapter_model.safetensors").write_bytes(_tensors(weights))
            if command == "generate":
                return ["generate", str(adapter), *ASK]
            return [command, str(adapter), "--out", str(folder / "run")]

        return Case("peft", f"{command}: {name}", write, accepts)

    yield case("a good one", {}, good, "generate", (0,))
    for name, fields in LORA_FIELDS.items():
        yield case(name, fields, good, "generate")
    for name in ("a module to import", "layers up to 10^9", "a rank of 10^9", "an alpha of 1e308"):
        yield case(name, LORA_FIELDS[name], good, "merge")
        yield case(name, LORA_FIELDS[name], good, "export-lora")
    _, shape, content = good[A]
    for name, changed in {
        "no number": ("F32", shape, struct.pack("<f", float("nan")) + content[4:]), "infinity": ("F32", shape, struct.pack("<f", float("inf")) + content[4:]), "integers": ("I32", shape, content), "float64": ("F64", shape, content * 2), "truth values": ("BOOL", shape, b"\1" * (2 * hidden)),
        "another shape": ("F32", [hidden, 2], content), "three dimensions": ("F32", [1, 2, hidden], content), "no numbers": ("F32", [0], b""), "a single number": ("F32", [], content[:4]), "3e38": ("F32", shape, struct.pack("<f", 3e38) * (2 * hidden)),
    }.items():  # fmt: skip
        yield case(f"a tensor of {name}", {}, {**good, A: changed}, "generate")
    for name, key in {"a weight of the base": "base_model.model.model.embed_tokens.weight", "a base layer": f"{place.format(0)}.base_layer.weight", "markup": "[/b]\x1b[2J", "an empty name": "", "a path": "../../x", "a layer beyond": f"{place.format(10**9)}.lora_A.weight"}.items():  # fmt: skip
        yield case(f"a further tensor: {name}", {}, {**good, key: ("F32", [2], b"\0" * 8)}, "generate", (2,))
    yield case("a missing tensor", {}, {name: value for name, value in good.items() if name != A}, "generate", (2,))


TOKENIZER: dict[str, Any] = {
    "padding to 10^9": {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
    "truncation to nothing": {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}}, "a stride beyond the length": {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9}},
    "an added token 2^31": {"added_tokens": [{"id": 2**31, "content": "h", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}]}, "an added token 10^6": {"added_tokens": [{"id": 10**6, "content": "h", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}]},
    "a negative added token": {"added_tokens": [{"id": -1, "content": "h", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}]}, "an empty added token": {"added_tokens": [{"id": 5, "content": "", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}]},
    "a regular expression that backtracks": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|aa|h|he|e)+(x+x+)+y"}, "behavior": "Isolated", "invert": False}}, "an open regular expression": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    "a replacement that grows": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}] * 3}}, "a replacement that doubles": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "xxxxxxxxxx"}] * 9}},
    "a prefix of 10^7": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**7}}, "an unknown normalizer": {"normalizer": {"type": "[/b]"}}, "a wrong precompiled map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "tokens of a processor that do not exist": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "Q", "type_id": 0}}], "pair": [], "special_tokens": {}}},
    "a processor of ids beyond": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "Q", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {"Q": {"id": "Q", "ids": [10**9], "tokens": ["Q"]}}}},
    "a processor without the text": {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}}, "no vocabulary": {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "merges of no tokens": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["q w"]}}, "an unknown model": {"model": {"type": "X"}},
    "unigram without an unknown token": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}, "unigram of an unknown id": {"model": {"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]]}}, "word pieces of 10^9 letters": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "zz", "continuing_subword_prefix": "", "max_input_chars_per_word": 10**9}},
    "ids with holes": {"model": {"type": "WordLevel", "vocab": {"a": 10**9, "[UNK]": 0}, "unk_token": "[UNK]"}}, "two tokens of one id": {"model": {"type": "WordLevel", "vocab": {"a": 1, "b": 1, "[UNK]": 0}, "unk_token": "[UNK]"}}, "a version of the future": {"version": "99.0"},
    "a decoder that strips": {"decoder": {"type": "Strip", "content": "x", "start": 10**12, "stop": 10**12}}, "a dropout of 1": {"model": {"type": "BPE", "dropout": 1.0, "vocab": {"a": 0, "h": 1}, "merges": []}}, "a dropout of 2": {"model": {"type": "BPE", "dropout": 2.0, "vocab": {"a": 0}, "merges": []}},
}  # fmt: skip
TOKENIZER_CONFIG: dict[str, Any] = {
    "a class of another module": {"tokenizer_class": "os.system"}, "code": {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "a maximum of 0": {"model_max_length": 0}, "a maximum of -1": {"model_max_length": -1}, "a maximum of 1e400": {"model_max_length": 10**400}, "an end token of a list": {"eos_token": ["x"]}, "an end token of an object": {"eos_token": {"content": "[/b]", "__type": "AddedToken"}},
    "an unknown end token": {"eos_token": "nowhere"}, "added tokens of text": {"added_tokens_decoder": {"x": "y"}}, "added tokens beyond": {"added_tokens_decoder": {str(10**12): {"content": "q", "special": True}}}, "a template for ever": {"chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"},
    "templates by name": {"chat_template": [{"name": "default", "template": "{{ 1/0 }}"}]}, "templates without names": {"chat_template": [{"x": 1}]}, "a padding side": {"padding_side": "up"}, "a truncation side": {"truncation_side": "[/b]"},
}  # fmt: skip


def tokenizer_cases(materials: Materials) -> Iterator[Case]:
    known = json.loads((materials.model / "tokenizer.json").read_text())
    config = json.loads((materials.model / "tokenizer_config.json").read_text())
    for file, all_of, table in (
        ("tokenizer.json", known, TOKENIZER),
        ("tokenizer_config.json", config, TOKENIZER_CONFIG),
    ):
        for name, fields in table.items():
            for train in (False, True):

                def write(folder: Path, file=file, all_of=all_of, fields=fields, train=train) -> list[str]:
                    model = model_folder(folder, materials)
                    (model / file).write_text(json.dumps({**all_of, **fields}))
                    if train:
                        rows = [{"messages": TURNS}] * 4 if "chat_template" in fields else [RECORD] * 4
                        (folder / "rows.json").write_text(json.dumps(rows))
                        return train_words(folder, materials, model=str(model), data=str(folder / "rows.json"))
                    return ["generate", str(model), *ASK]

                yield Case("tokenizer", f"{'train' if train else 'generate'}: {name}", write, (0, 2))


LONE = "a\ud800b"
ROWS: dict[str, tuple[Any, dict[str, str]]] = {
    "half a character in an instruction": ([{**RECORD, "instruction": LONE}] * 4, {}), "half a character in an answer": ([{**RECORD, "output": LONE}] * 4, {}), "half a character in a turn": ([{"messages": [{"role": "user", "content": LONE}, TURNS[1]]}] * 4, {}), "half a character in a role": ([{"messages": [{"role": LONE, "content": "x"}, TURNS[1]]}] * 4, {}),
    "a label that is half a character": ([{"sentence": "x", "label": LONE}, {"sentence": "y", "label": "b"}] * 4, {"task": "label", "text_columns": "sentence"}), "labels of lists": ([{"sentence": "x", "label": [1]}, {"sentence": "y", "label": [2]}] * 4, {"task": "label", "text_columns": "sentence"}), "labels of objects": ([{"sentence": "x", "label": {"a": 1}}] * 4, {"task": "label", "text_columns": "sentence"}),
    "10^400 as a label": ([{"sentence": "x", "label": 10**400}, {"sentence": "y", "label": 1}] * 4, {"task": "label", "text_columns": "sentence"}), "a label of no number": ([{"sentence": "x", "label": float("nan")}, {"sentence": "y", "label": 1}] * 4, {"task": "label", "text_columns": "sentence"}), "2,000 labels": ([{"sentence": "x", "label": i} for i in range(2000)], {"task": "label", "text_columns": "sentence"}),
    "a label of 10^9": ([{"sentence": "x", "label": 10**9}, {"sentence": "y", "label": 1}] * 4, {"task": "label", "text_columns": "sentence"}), "a chosen answer of null": ([{"prompt": "x", "chosen": None, "rejected": "b"}] * 4, {"task": "prefer"}), "a rejected list": ([{"prompt": "x", "chosen": "a", "rejected": ["b"]}] * 4, {"task": "prefer"}), "a chosen object": ([{"prompt": "x", "chosen": {"a": 1}, "rejected": "b"}] * 4, {"task": "prefer"}),
    "equal answers": ([{"prompt": "x", "chosen": "a", "rejected": "a"}] * 4, {"task": "prefer"}), "half a character chosen": ([{"prompt": "x", "chosen": LONE, "rejected": "a"}] * 4, {"task": "prefer"}), "conversations to choose from": ([{"chosen": TURNS, "rejected": [TURNS[0]]}] * 4, {"task": "prefer"}), "text of null": ([{"text": None}] * 4, {"task": "text"}), "half a character as text": ([{"text": LONE}] * 4, {"task": "text"}),
    "text of a list": ([{"text": ["x"]}] * 4, {"task": "text"}), "parts of content": ([{"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}, TURNS[1]]}] * 4, {}), "an image": ([{"messages": [{"role": "user", "content": [{"type": "image", "url": "file:///etc/passwd"}]}, TURNS[1]]}] * 4, {}), "tool calls of text": ([{"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": "x"}]}] * 4, {}),
    "tool calls nested deeply": ([{"messages": [TURNS[0], {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "[/b]", "arguments": {"a": {"a": {"a": {}}}}}}]}]}] * 4, {}), "tools of a number": ([{"messages": TURNS, "tools": 3}] * 4, {}), "a turn of null": ([{"messages": [None, TURNS[1]]}] * 4, {}), "10,000 turns": ([{"messages": TURNS * 5000}] * 4, {}), "a megabyte of spaces": ([{**RECORD, "instruction": " " * 10**6}] * 4, {}),
    "null bytes": ([{**RECORD, "instruction": "\0\0"}] * 4, {}), "directions of text": ([{**RECORD, "instruction": "\u202e\u2066x"}] * 4, {}), "special tokens": ([{**RECORD, "instruction": "</s><s><unk>"}] * 4, {}), "a column of 10,000 letters": ([{"x" * 10_000: 1}] * 4, {}), "columns of markup": ([{"[/b]": 1, "\x1b[2J": 2}] * 4, {}), "10,000 columns": ([{**RECORD, **{f"c{i}": i for i in range(10_000)}}] * 2, {}),
}  # fmt: skip
TABLES = {
    "a field of 200,000 letters.csv": "instruction,output\n" + "x" * 200_000 + ",yes\n" * 3, "an open quote.csv": 'instruction,output\n"a,b\n' * 4, "a null byte.csv": "instruction,output\na\0,b\n" * 3, "more fields than columns.csv": "instruction,output\na,b,c,d\n", "fewer fields than columns.csv": "instruction,input,output\na\n",
    "a column twice.csv": "instruction,output,output\na,b,c\n", "no header.csv": "\n\n\n", "carriage returns.csv": "instruction,output\ra,b\r", "an empty column.csv": ",output\na,b\n", "UTF-16.csv": "\udcff\udcfei\0n\0", "a field of 200,000 letters.tsv": "instruction\toutput\n" + "x" * 200_000 + "\tyes\n", "quotes.tsv": 'instruction\toutput\n"\t"\n',
    "noise.arrow": "ARROW1\0\0" + "x" * 100, "noise.zip": "PK\3\4" + "x" * 100, "noise.zst": "(\udcb5/\udcfd" + "x" * 50, "noise.xz": "\udcfd7zXZ\0" + "x" * 50, "noise.bz2": "BZh9" + "x" * 50, "no suffix": "x", "lines of numbers.jsonl": "1\n2\n", "an array in lines.jsonl": '[{"instruction": "a"}]\n', "two objects in a line.jsonl": '{"instruction": "a", "output": "b"} {"a": 1}\n', "a mark of order.jsonl": '\ufeff{"instruction": "a", "output": "b"}\n' * 4,
}  # fmt: skip


def table_cases(materials: Materials) -> Iterator[Case]:
    for name, (rows, options) in ROWS.items():

        def write(folder: Path, rows: Any = rows, options: Any = options) -> list[str]:
            (folder / "rows.json").write_text(json.dumps(rows))
            return train_words(folder, materials, data=str(folder / "rows.json"), **options)

        yield Case("table", name, write, (0, 2))
    for name, text in TABLES.items():

        def write_text(folder: Path, name: str = name, text: str = text) -> list[str]:
            (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
            return train_words(folder, materials, data=str(folder / name))

        yield Case("table", name, write_text, (0, 2))


QUESTIONS: dict[str, Any] = {
    "an answer beyond": {"question": "x", "choices": ["a", "b"], "answer": 9}, "a negative answer": {"question": "x", "choices": ["a", "b"], "answer": -1}, "an answer of text": {"question": "x", "choices": ["a", "b"], "answer": "zz"}, "an answer of null": {"question": "x", "choices": ["a", "b"], "answer": None}, "no choices": {"question": "x", "choices": [], "answer": 0},
    "choices of numbers": {"question": "x", "choices": [1, 2], "answer": 0}, "choices of text": {"question": "x", "choices": "ab", "answer": 0}, "empty choices": {"question": "x", "choices": ["", ""], "answer": 0}, "half a character": {"question": LONE, "choices": [LONE, "b"], "answer": 0}, "a question of a list": {"question": ["x"], "choices": ["a", "b"], "answer": 0}, "200 choices": {"question": "x", "choices": ["a"] * 200, "answer": 0},
    "a very long choice": {"question": "x", "choices": ["a" * 10_000, "b"], "answer": 0}, "an answer of true": {"question": "x", "choices": ["a", "b"], "answer": True}, "an answer of 1.5": {"question": "x", "choices": ["a", "b"], "answer": 1.5}, "an answer of 10^400": {"question": "x", "choices": ["a", "b"], "answer": 10**400}, "markup": {"question": "[/b]", "choices": ["[red]", "\x1b[2J"], "answer": 0},
}  # fmt: skip


def eval_cases(materials: Materials) -> Iterator[Case]:
    """`loldu eval`: tasks, the results that are there already, and where they go."""

    def case(name: str, make: Callable[[Path], list[str]], accepts=(0, 2)) -> Case:
        def write(folder: Path) -> list[str]:
            shutil.copytree(materials.run, folder / "run", symlinks=True)
            (folder / "task.json").write_text(json.dumps([RECORD] * 2))
            options = make(folder)
            tasks = [] if "--tasks" in options else ["--tasks", str(folder / "task.json")]
            return ["eval", str(folder / "run"), "--max-tokens=0", *tasks, *options]

        return Case("eval", name, write, accepts)

    for name, question in QUESTIONS.items():
        yield case(
            f"questions: {name}",
            lambda folder, q=question: [(folder / "task.json").write_text(json.dumps([q] * 2)), []][1],
        )
    for name, make in {"a FIFO": os.mkfifo, "a folder": lambda path: path.mkdir(), "a broken link": lambda path: path.symlink_to("/nowhere/x"), "a link to a device": lambda path: path.symlink_to("/dev/zero")}.items():  # fmt: skip
        yield case(f"eval.json: {name}", lambda folder, make=make: [make(folder / "run" / "eval.json"), []][1])
        yield case(
            f"--tasks: {name}",
            lambda folder, make=make: [make(folder / "t.json"), ["--tasks", str(folder / "t.json")]][1],
        )
    for name, text in {"a list": "[]", "nested deeply": DEEP, "tasks of a list": '{"tasks": [1]}', "scores of text": '{"tasks": {"x": {"scores": "y"}}}', "markup": '{"tasks": {"[/b]": {"scores": {"[/b]": {"loss": 1}}}}}'}.items():  # fmt: skip
        yield case(
            f"eval.json: {name}", lambda folder, text=text: [(folder / "run" / "eval.json").write_text(text), []][1]
        )
        for command in ("status", "report"):

            def shown(folder: Path, text: str = text, command: str = command) -> list[str]:
                shutil.copytree(materials.run, folder / "run", symlinks=True)
                (folder / "run" / "eval.json").write_text(text)
                return [command, str(folder / "run")]

            yield Case("eval", f"{command}: eval.json: {name}", shown, (0, 2))
    yield case(
        "a task of YAML with code",
        lambda folder: [
            (folder / "t.yaml").write_text("task: x\nprocess_docs: !function owned_module.X\n"),
            ["--tasks", str(folder / "t.yaml")],
        ][1],
        (2,),
    )
    yield case("a task with an escape sequence", lambda folder: ["--tasks", "\x1b[2J[/b]"], (2,))
    yield case("out in a folder that is missing", lambda folder: ["--out", str(folder / "no" / "x.json")], (0, 2))


def stored_cases(materials: Materials) -> Iterator[Case]:
    """Tokens in the cache, read by a second run and by plan."""
    saved = materials.run.parent / "cache" / "tokenised"

    def change(data: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        edit(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    def shape(name: str, value: Any) -> Callable[[bytes], bytes]:
        return lambda data: change(
            data, lambda header: next(v for k, v in header.items() if k != "__metadata__").update({name: value})
        )

    edits: dict[str, Callable[[bytes], bytes]] = {
        "nothing": lambda data: b"", "noise": lambda data: os.urandom(500), "the first half": lambda data: data[: len(data) // 2], "all but a byte": lambda data: data[:-1], "a byte more": lambda data: data + b"\0", "a flipped byte at the end": lambda data: data[:-1] + bytes([data[-1] ^ 1]), "zeros behind the header": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        "a negative shape": shape("shape", [-1]), "another type": shape("dtype", "F64"), "offsets beyond the end": shape("data_offsets", [0, 10**12]), "no metadata": lambda data: change(data, lambda header: header.pop("__metadata__", None)), "metadata of markup": lambda data: change(data, lambda header: header.update({"__metadata__": {"about": "[/b]\x1b[2J", "seal": "x"}})), "no tensors": lambda data: change(data, lambda header: [header.pop(k) for k in list(header) if k != "__metadata__"]),
    }  # fmt: skip
    specials: dict[str, Callable[[Path], Any]] = {"a FIFO": os.mkfifo, "a folder": lambda path: path.mkdir(), "a broken link": lambda path: path.symlink_to("/nowhere/x"), "a link to a device": lambda path: path.symlink_to("/dev/zero")}  # fmt: skip
    for command in ("train", "plan"):
        for name, edit in {**edits, **specials}.items():

            def write(folder: Path, name: str = name, edit: Any = edit, command: str = command) -> list[str]:
                words = train_words(folder, materials, data=str(materials.run.parent / "good.json"))
                shutil.copytree(materials.run.parent / "cache", folder / "cache")
                for file in (folder / "cache" / "tokenised").glob("*.safetensors"):
                    data = file.read_bytes()
                    file.unlink()
                    if name in specials:
                        edit(file)
                    else:
                        file.write_bytes(edit(data))
                return words if command == "train" else ["plan", "llama2_alpaca_loldu", *words[1:]]

            yield Case("stored", f"{command}: tokens of {name}", write, (0,))
    assert saved.is_dir()


def output_cases(materials: Materials) -> Iterator[Case]:
    """--out of merge and export-lora, --output of train and sweep: folders that are something else."""
    places: dict[str, Callable[[Path, Path], Any]] = {
        "a file": lambda place, model: place.write_text("x"), "a folder with files": lambda place, model: [place.mkdir(), (place / "mine.txt").write_text("x")], "a model": lambda place, model: shutil.copytree(model, place), "a broken link": lambda place, model: place.symlink_to("/nowhere/x"), "a link to itself": lambda place, model: place.symlink_to(place),
        "a link to a folder with files": lambda place, model: [(place.parent / "target").mkdir(), (place.parent / "target" / "mine.txt").write_text("x"), place.symlink_to(place.parent / "target")], "a FIFO": lambda place, model: os.mkfifo(place), "a path below a file": lambda place, model: None, "a name of 300 letters": lambda place, model: None, "an escape sequence": lambda place, model: None, "half a character": lambda place, model: None,
    }  # fmt: skip
    for command in ("merge", "export-lora", "train", "train --resume never", "sweep"):
        for name, make in places.items():

            def write(folder: Path, name: str = name, make: Any = make, command: str = command) -> list[str]:
                (folder / "file").write_text("x")
                place = {"a path below a file": folder / "file" / "x", "a name of 300 letters": folder / ("x" * 300), "an escape sequence": folder / "run" / "\x1b[2J[/b]", "half a character": folder / "run" / "\udc80"}.get(name, folder / "there")  # fmt: skip
                if place.parent == folder / "run":
                    place.parent.mkdir()
                make(place, materials.model)
                if command in ("merge", "export-lora"):
                    return [command, str(materials.run / "adapter"), "--out", str(place)]
                words = train_words(folder, materials, output=str(place))
                if command == "sweep":
                    return [
                        "sweep",
                        "llama2_alpaca_loldu",
                        "--vary",
                        "rank=2",
                        f"--output={place}",
                        *[word for word in words[1:] if not word.startswith(("--output", "--rank"))],
                    ]
                return [*words, *(["--resume=never"] if "never" in command else [])]

            fits = name in ("a broken link", "an escape sequence", "half a character")
            yield Case("output", f"{command} to {name}", write, (0, 2) if fits else (2,))


FORMAT_KINDS: dict[str, Callable[[Materials], Iterator[Case]]] = {
    "settings": settings_cases, "peft": peft_cases, "tokenizer": tokenizer_cases, "table": table_cases, "eval": eval_cases, "stored": stored_cases,
    "output": output_cases,
}  # fmt: skip
