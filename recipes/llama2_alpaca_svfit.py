"""Llama-2-7B on Alpaca with SVFit (arXiv 2409.05926): 65,536 trained singular values, otherwise as with LoLDU.

    loldu train llama2_alpaca_svfit --tiny               # the embedded model: minutes on a laptop CPU
    loldu train llama2_alpaca_svfit --model DIR --data FILE
    loldu train llama2_alpaca_svfit --options energy=0.99            # each weight's rank from its spectrum
    accelerate launch recipes/llama2_alpaca_svfit.py     # the 7B run; the embedded one if its model is missing

Settings and their sources: all but adapter and learning rate are those of recipes/llama2_alpaca_loldu.py, for
comparison; SVFit's paper has no instruction tuning. The learning rate was measured on two small Llamas at full rank
(benchmarks/methods.py, 60 steps): 3e-2 was best on one and 1e-1 on the other, and 3e-2 was best for both together, as
for LoLDU with normalised directions. The embedded run keeps the learning rate of LoLDU's.
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
