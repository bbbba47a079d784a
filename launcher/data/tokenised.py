"""Tokenised data on disk: what `encode` makes of records is made once, by one process of a machine, and found again.

One file per answer in the folder of the factor cache, tokenised/<key>.safetensors; the key is a hash of all that the
tokens depend on, and the file is compared with its own digest when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from launcher.config import DataConfig
from launcher.data.encode import DataReport, Encoded, encode
from launcher.data.records import Record
from launcher.data.templates import frame, load_template
from launcher.factorization.cache import put

log = logging.getLogger(__name__)
FORMAT = 1  # another one whenever `encode` gives other tokens for the same records
TENSORS = ("ids", "loss", "offsets", "targets")


def encode_once(records: Sequence[Record], tokenizer: Any, config: DataConfig, folder: Path) -> Encoded:
    """`encode`, from the cache in folder where it was done before. A cache that cannot be written is said, and left."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return encode(records, tokenizer, config)  # pure Python: nothing tells one of them from another
    file = folder / "tokenised" / f"{_key(records, tokenizer, config)}.safetensors"
    if (found := _read(file)) is not None:
        return found
    made = encode(records, tokenizer, config)
    about = {"report": json.dumps(dataclasses.asdict(made.report)), "digest": _digest(made)}
    try:
        put(folder, file, lambda partial: save_file({name: getattr(made, name) for name in TENSORS}, partial, about))
    except ValueError as error:
        _say_once(f"the tokenised data are not kept for the next start: {error}")
    return made


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)


def _read(file: Path) -> Encoded | None:
    """The file's content; None where it is missing, or damaged, which is said."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
            found = Encoded(
                **{name: opened.get_tensor(name) for name in TENSORS}, report=DataReport(**json.loads(about["report"]))
            )
        if _digest(found) != about["digest"]:
            raise ValueError("its tokens do not fit their digest")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): the data are tokenised again", file, error)
        return None
    with suppress(OSError):  # the time of its last use, by which the cache is pruned
        os.utime(file)
    return found


def _digest(encoded: Encoded) -> str:
    return hashlib.sha256(f"{encoded.digest()} {encoded.targets.tolist()}".encode()).hexdigest()


def _key(records: Sequence[Record], tokenizer: Any, config: DataConfig) -> str:
    template = load_template(config.prompt_template, tokenizer, conversations="messages" in records[0])
    depends_on = [
        FORMAT, tokenizers.__version__, tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map),
        template, frame(template, tokenizer), config.max_length, config.loss_on, list(records),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
