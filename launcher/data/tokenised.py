"""Tokenised data on disk: one process of each machine tokenises, and later starts read its result.

Each result is one file in the folder of the factor cache, tokenised/<key>.safetensors. The key is a hash of everything
that the tokens depend on, and the file is compared with its own digest when it is read.
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
from launcher.data.encode import DataReport, Encoded, encode, stop_ids
from launcher.data.forms import Record
from launcher.data.templates import frame, template_of
from launcher.factorization.cache import put

log = logging.getLogger(__name__)
FORMAT = 2  # changes whenever `encode` gives other tokens for the same records
TENSORS = ("ids", "loss", "offsets", "targets")


def encode_once(records: Sequence[Record], tokenizer: Any, config: DataConfig, folder: Path) -> Encoded:
    """`encode`, or its result from the cache in folder. Warns where the cache cannot be written."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return encode(records, tokenizer, config)  # a pure Python tokenizer has no content to make a key of
    file = folder / "tokenised" / f"{_key(records, tokenizer, config)}.safetensors"
    if (found := _read(file)) is not None:
        found.report.log()
        return found
    made = encode(records, tokenizer, config)
    about = {"report": json.dumps(dataclasses.asdict(made.report)), "digest": _digest(made)}
    try:
        put(folder, file, lambda partial: save_file({name: getattr(made, name) for name in TENSORS}, partial, about))
    except ValueError as error:
        _warn_once(f"the tokenised data cannot be kept for the next start: {error}")
    return made


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _read(file: Path) -> Encoded | None:
    """The file's content; None where it is missing or, with a warning, damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
            report = json.loads(about["report"])
            report["notes"] = tuple(report["notes"])
            found = Encoded(**{name: opened.get_tensor(name) for name in TENSORS}, report=DataReport(**report))
        if _digest(found) != about["digest"]:
            raise ValueError("its tokens differ from their digest")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): the data are tokenised again", file, error)
        return None
    with suppress(OSError):  # the cache is pruned by the time of last use
        os.utime(file)
    return found


def _digest(encoded: Encoded) -> str:
    return hashlib.sha256(f"{encoded.digest()} {encoded.targets.tolist()}".encode()).hexdigest()


def _key(records: Sequence[Record], tokenizer: Any, config: DataConfig) -> str:
    template = template_of(config, records[0], tokenizer)
    depends_on = [
        FORMAT, tokenizers.__version__, tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map),
        template, frame(template, tokenizer), sorted(stop_ids(tokenizer)), config.max_length, config.loss_on,
        config.on_bad_record, list(records),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
