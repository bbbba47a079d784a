"""The first recipe, held once it has trained HELD_AFTER steps (3) until it is asked to stop, or killed.

So there is time to interrupt it also where a step takes milliseconds. Rank 0 holds; the others wait for its sums.
"""

import os
import runpy
import time
from pathlib import Path

from launcher.training import loop

AFTER = int(os.environ.get("HELD_AFTER", 3))
trained = loop.gradients


def gradients(job, step):
    deadline = time.monotonic() + 120
    while step == AFTER + 1 and not job.comm.ranks.rank and not job.stop.asked():
        assert time.monotonic() < deadline, f"held for 120 s after step {AFTER}, and never asked to stop"
        time.sleep(0.02)
    return trained(job, step)


if __name__ == "__main__":
    loop.gradients = gradients
    runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "llama2_alpaca_loldu.py"), run_name="__main__")
