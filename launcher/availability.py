"""Whether a recipe's own base model and data are available: checked within ten seconds, without retries."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

LIMIT_S = 10.0


def unavailable(model: str, data: str) -> str | None:
    """Why they are not available, in a few words; None if both are on this machine, or the hub offers them."""
    from huggingface_hub import HfApi, constants

    from adapters.checkpoint_files import local_folder

    data = data.split(":")[0]  # without configuration and split
    cached = Path(constants.HF_HUB_CACHE) / f"datasets--{data.replace('/', '--')}"
    here = {model: local_folder(model) is not None, data: Path(data).exists() or cached.is_dir()}
    missing = [name for name, found in here.items() if not found]
    if not missing:
        return None
    if constants.HF_HUB_OFFLINE:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not available (HF_HUB_OFFLINE is set)"

    def ask(name: str) -> Any:
        api = HfApi()
        found = api.model_info(name, timeout=LIMIT_S) if name == model else api.dataset_info(name, timeout=LIMIT_S)
        if name == model:
            api.auth_check(name)  # model_info answers for a gated model without access
        return found

    # Threads, because a name lookup has no timeout; one that hangs is abandoned.
    pool = concurrent.futures.ThreadPoolExecutor()
    asked = {pool.submit(ask, name): name for name in missing}
    _, pending = concurrent.futures.wait(asked, timeout=LIMIT_S)
    pool.shutdown(wait=False, cancel_futures=True)
    reasons = []
    for future, name in asked.items():
        if future in pending:
            reasons.append(f"{name} is not available (no answer within {LIMIT_S:.0f} s)")
        elif error := future.exception():
            reasons.append(f"{name} is not available ({type(error).__name__})")
    return "; ".join(reasons) or None
