"""Llama-2-7B on Alpaca with LoLDU: 65,536 trained parameters (arXiv 2410.13618, instruction tuning).

    loldu train llama2_alpaca_loldu --tiny               # the embedded model: minutes on a laptop CPU
    loldu train llama2_alpaca_loldu --model DIR --data FILE
    accelerate launch recipes/llama2_alpaca_loldu.py     # the paper's run; the embedded one if its model is missing

Settings and their sources (the paper's tables, as transcribed; its body text was not available):
    rank 1024 on q_proj and v_proj, scale 1, learning rate 1e-3, batch 128, length 256, 3 epochs, bf16, seed 42: the
    paper's table of settings (micro-batches of one sample; eight give the same sum, faster). Schedule and warm-up are
    not listed: cosine without warm-up is our choice. The paper's table of results has 0.016M parameters, which means
    rank 256: it contradicts the settings, which we follow.
Machine, time and result of the full run: not yet run.
"""

from pathlib import Path

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from loldu import recipe

TINY = Path(__file__).parent / "tiny"


def llama2_alpaca() -> Config:
    """The paper's run."""
    return Config(
        model=ModelConfig(model="meta-llama/Llama-2-7b-hf", dtype="auto"),
        data=DataConfig(data="tatsu-lab/alpaca", prompt_template="alpaca", max_length=256, eval_records=500),
        adapter=AdapterConfig(rank=1024, targets=("q_proj", "v_proj")),
        optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=128, micro_batch_size=8, epochs=3, seed=42),
        run=RunConfig(save_every=100),
    )


def tiny() -> Config:
    """The small Llama of this project, and its instructions."""
    return Config(
        model=ModelConfig(model=str(TINY / "model")),
        data=DataConfig(
            data=str(TINY / "instructions" / "train.json"),
            eval_data=str(TINY / "instructions" / "test.json"),
            prompt_template="short",
            max_length=192,
            exact_match=True,
            answer_tokens=16,
        ),
        adapter=AdapterConfig(rank=128, targets=("all-linear",), options=("normalize_directions=true",)),
        optimizer=OptimizerConfig(learning_rate=1e-1, batch_size=16, max_steps=500, warmup_ratio=0.03),
        run=RunConfig(save_every=100, show_samples=3),
    )


if __name__ == "__main__":
    raise SystemExit(recipe("llama2_alpaca_loldu", llama2_alpaca, tiny))
