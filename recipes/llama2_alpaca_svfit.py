"""Llama-2-7B on Alpaca with SVFit (arXiv 2409.05926): 65,536 trained singular values, LoLDU's run otherwise.

    accelerate launch recipes/llama2_alpaca_svfit.py     # the 7B run; the embedded one where it cannot be had
    python recipes/llama2_alpaca_svfit.py --tiny         # the embedded one: minutes on a laptop CPU
    python recipes/llama2_alpaca_svfit.py --model DIR --data FILE
    python recipes/llama2_alpaca_svfit.py --options energy=0.99      # each weight's rank from its spectrum

Settings, and where they come from: all but adapter and rate are those of recipes/llama2_alpaca_loldu.py, so that the
two can be compared; SVFit's paper reports no instruction tuning. The rate is measured on two small Llamas, full rank
(benchmarks/methods.py, 60 steps): best were 3e-2 on one and 1e-1 on the other; 3e-2 costs least over both, and for
LoLDU's normalised directions too. The embedded run has those, and keeps its rate.
Machine, time and result of the full run: not yet run.
"""

from dataclasses import replace

import llama2_alpaca_loldu as loldu_run

from launcher.config import AdapterConfig, Config
from loldu import recipe


def llama2_alpaca() -> Config:
    """LoLDU's run with the singular values trained instead."""
    config = _with_svfit(loldu_run.llama2_alpaca())
    return replace(config, optimizer=replace(config.optimizer, learning_rate=3e-2))


def tiny() -> Config:
    """The small Llama of this project, and its instructions."""
    return _with_svfit(loldu_run.tiny())


def _with_svfit(config: Config) -> Config:
    adapter = AdapterConfig(method="svfit", rank=config.adapter.rank, targets=config.adapter.targets)
    return replace(config, adapter=adapter)


if __name__ == "__main__":
    raise SystemExit(recipe("llama2_alpaca_svfit", llama2_alpaca, tiny))
