"""SmolLM2-135M-Instruct on Alpaca with LoLDU: 13,440 trained numbers of a real instruction model, on a laptop's CPU.

    loldu train smollm2_chat_loldu                           # model and data from the hub
    loldu train smollm2_chat_loldu --model DIR --data FILE --max-steps 600
    loldu chat runs/smollm2_chat_loldu-TIME                  # chat with the result

Settings: our choice. Rank 64 on all linear layers with normalised directions, at a learning rate that suits them
(3e-2), SmolLM2's own chat template, bfloat16, 60 steps of 8 samples.
Measured on 2026-11-27, one thread of an x86 CPU that computes bfloat16, the first 5,000 records of Alpaca, factors in
the cache, one seed: 164 s in all, 137 s of them steps, at most 2.2 GiB; loss on 64 held-out records 1.8697 before and
1.7506 after; the adapter's weights have 273 kB. To "What is the capital of France?" the tuned model answers "The
capital of France is Paris."
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
