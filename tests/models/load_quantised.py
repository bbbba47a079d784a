"""Load a base quantised and print the memory that took: python load_quantised.py FOLDER KIND SMALL.

SMALL is another base, loaded before the count, since libraries import parts of themselves at their first use.
"""

import json
import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launcher.config import ModelConfig
from launcher.models.build import build


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def load(folder: str, kind: str) -> dict[str, int]:
    """Peak and remaining growth of the process's own memory (RssAnon), the mapped files left out."""
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    config = ModelConfig(model=folder, quantize=kind)  # type: ignore[arg-type]
    how = {"dtype": "bfloat16", "attention": "sdpa", "factors": lambda module: None, "device": torch.device("cpu")}
    model = build(config, Path(folder), None, **how)
    done.set()
    watcher.join()
    left = anonymous_bytes() - before
    return {"peak_bytes": peak[0] - before, "left_bytes": left, "parameters": sum(1 for _ in model.parameters())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    load(sys.argv[3], sys.argv[2])
    print(json.dumps(load(sys.argv[1], sys.argv[2])))
