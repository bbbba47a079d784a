"""The first recipe, held after HELD_AFTER steps (3) until it is asked to stop, or killed.

So there is time to interrupt it even if a step takes milliseconds. Rank 0 holds; the others wait for its sums.
"""

import os
import runpy
import time
from pathlib import Path

from loldu import recipe

AFTER = int(os.environ.get("HELD_AFTER", 3))
RECIPE = Path(__file__).parents[1] / "recipes" / "llama2_alpaca_loldu.py"


def hold(training, event):
    deadline = time.monotonic() + 120
    while event["step"] == AFTER and training.comm.ranks.is_main and not training.stop.asked():
        assert time.monotonic() < deadline, f"held for 120 s after step {AFTER}, and never asked to stop"
        time.sleep(0.02)


if __name__ == "__main__":
    functions = runpy.run_path(str(RECIPE))
    raise SystemExit(recipe(RECIPE.stem, functions["llama2_alpaca"], functions["tiny"], on_step=hold))
