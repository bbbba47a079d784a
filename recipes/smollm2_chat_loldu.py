"""SmolLM2-135M-Instruct on Alpaca with LoLDU: a real instruction model, on a laptop's CPU.

python recipes/smollm2_chat_loldu.py                     # model and data from the hub
python recipes/smollm2_chat_loldu.py --model DIR --data FILE --max-steps 600
loldu chat runs/smollm2_chat_loldu-TIME                  # talk with the result
"""

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from loldu import recipe


def smollm2_chat() -> Config:
    """Sixty steps of eight samples, all linear layers, directions normalised."""
    return Config(
        model=ModelConfig(model="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="bfloat16"),
        data=DataConfig(data="tatsu-lab/alpaca", prompt_template="chat", max_length=256, eval_records=64),
        adapter=AdapterConfig(rank=64, targets=("all-linear",), options=("normalize_directions=true",)),
        optimizer=OptimizerConfig(
            learning_rate=3e-2, batch_size=8, micro_batch_size=4, max_steps=60, warmup_ratio=0.05
        ),
        run=RunConfig(save_every=20, show_samples=3),
    )


if __name__ == "__main__":
    raise SystemExit(recipe("smollm2_chat_loldu", smollm2_chat, None))
