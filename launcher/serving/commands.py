"""`loldu serve`: its options and help. Imports its work when called."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Annotated

from launcher.files import user_path
from launcher.inference.options import Quantize
from launcher.options import Option
from launcher.serving.limits import Limits, read_keys
from launcher.serving.requests import Engine

NEEDED = {"fastapi": "0.115", "uvicorn": "0.30", "psutil": "5.9", "transformers": "5.23"}  # the extra `serve`


def serve(
    model: str,
    *,
    adapters: Annotated[tuple[str, ...], Option(repeated=True)] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    api_key_file: str | None = None,
    watch_s: float = 2.0,
    prompt_template: str | None = None,
    dtype: str = "auto",
    quantize: Quantize = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    log_requests: bool = True,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> int:
    """Serve a base model and its adapters over HTTP, with OpenAI's API.

    Each folder in DIR is an adapter, and its name is the model that requests name. Requests for different adapters are
    answered in one batch.

    Args:
        model: The base model (folder, or hub name in the local cache).
        adapters: Folder of adapter or run folders. It is watched: what is added, replaced or removed takes effect while
            the server runs. Repeat the option for several folders.
        host: Address to listen at. Any but this machine's own (127.0.0.1) needs an API key.
        port: Port to listen at; 0 takes a free one.
        api_key: Key that requests must send. Other users of this machine can see it: --api-key-file, or the variable
            LOLDU_API_KEY, keep it hidden.
        api_key_file: File with such keys, one a line.
        watch_s: Seconds between two scans of the adapter folders; 0 scans them only at the start.
        prompt_template: For chat with the base, and with adapters that have none of their own: auto, short, alpaca,
            chat, none or a FILE. Default: the base's own, or alpaca if it has none.
        dtype: auto (the one of the model's files), float32, bfloat16 or float16.
        quantize: Precision of the base weights: auto (as in the files), none, int8, nf4 or fp4.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        trust_remote_code: Run Python code from the model's folder. Only for models that you trust.
        log_requests: Print a line for each answer: model, tokens and times, no texts.
        limits: What clients may ask.
    """
    check_packages()
    if not 0 <= watch_s < 1e6:
        raise ValueError(f"--watch-s is at least 0 (do not watch), got {watch_s:g}")
    keys = read_keys(api_key, api_key_file)
    folders = [user_path(each) for each in adapters]
    if wrong := [each for each in folders if not each.is_dir()]:
        raise ValueError(f"--adapters {wrong[0]} is no folder: give the folder in which the adapters' folders are")
    from launcher.serving.server import logging_to_stderr, run

    def make_engine() -> tuple[Engine, Path]:
        try:
            from launcher.serving.engine import load_engine
        except ImportError as error:  # a newer version may have moved what batching.py uses
            raise ValueError(
                f"loldu serve does not work with transformers {importlib.metadata.version('transformers')} ({error}): "
                f"pip install transformers=={NEEDED['transformers']}.*"
            ) from error
        return load_engine(model, dtype=dtype, quantize=quantize, device=device, trust_remote_code=trust_remote_code)

    with logging_to_stderr():
        return run(
            make_engine, folders=folders, host=host, port=port, keys=keys, limits=limits, template=prompt_template,
            watch_s=watch_s, log_requests=log_requests,
        )  # fmt: skip


def check_packages() -> None:
    """Raises ValueError, with the command that installs them, for packages that are missing or too old."""
    wrong = {}
    for name, least in NEEDED.items():
        if importlib.util.find_spec(name) is None:
            wrong[name] = "missing here"
            continue
        found = importlib.metadata.version(name)
        if _numbers(found) < _numbers(least):
            wrong[name] = f"{found} here"
    if wrong:
        told = " and ".join(f"{name}>={NEEDED[name]} ({why})" for name, why in wrong.items())
        asked = " ".join(f"'{name}>={NEEDED[name]}'" for name in wrong)
        raise ValueError(
            f"loldu serve needs {told}: pip install {asked} (with -c constraints.txt: the versions that were tested)"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers with which a version begins: (5, 23) of 5.23.0rc1 and of 5.23."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
