"""Whether a recipe's own base model and data can be had, found out within ten seconds and without retries."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

LIMIT_S = 10.0


def unavailable(model: str, data: str) -> str | None:
    """Why they cannot be had, in a few words; None where both are on this machine or the hub hands them out."""
    from huggingface_hub import HfApi, constants

    from adapters.checkpoint_files import local_folder

    data = data.split(":")[0]  # without configuration and split
    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{data.replace('/', '--')}"
    here = {model: local_folder(model) is not None, data: Path(data).exists() or cached.is_dir()}
    missing = [name for name, found in here.items() if not found]
    if not missing:
        return None
    if constants.HF_HUB_OFFLINE:
        return f"{' and '.join(missing)} cannot be had (HF_HUB_OFFLINE is set)"

    def ask(name: str) -> Any:
        api = HfApi()
        found = api.model_info(name, timeout=LIMIT_S) if name == model else api.dataset_info(name, timeout=LIMIT_S)
        if name == model:
            api.auth_check(name)  # a gated model answers model_info without access
        return found

    # Threads, since a name look-up has no time limit of its own; one that hangs is left behind.
    pool = concurrent.futures.ThreadPoolExecutor()
    asked = {pool.submit(ask, name): name for name in missing}
    _, pending = concurrent.futures.wait(asked, timeout=LIMIT_S)
    pool.shutdown(wait=False, cancel_futures=True)
    reasons = []
    for future, name in asked.items():
        if future in pending:
            reasons.append(f"{name} cannot be had (no answer in {LIMIT_S:.0f} s)")
        elif error := future.exception():
            reasons.append(f"{name} cannot be had ({type(error).__name__})")
    return "; ".join(reasons) or None
