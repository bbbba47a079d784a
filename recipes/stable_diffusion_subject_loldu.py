"""Stable Diffusion 1.5 on a subject's pictures with LoLDU, as DreamBooth does (arXiv 2410.13618, 2208.12242).

    loldu train stable_diffusion_subject_loldu --tiny         # a random pipeline made here: a minute on a laptop CPU
    loldu train stable_diffusion_subject_loldu --data DIR --instance-prompt "a photo of sks dog"
    loldu train stable_diffusion_subject_loldu --data DIR --instance-prompt "a photo of sks dog" \\
        --class-prompt "a photo of a dog" --prior-weight 1    # with prior preservation
    loldu generate runs/NAME --prompts "a photo of sks dog on a beach"
    ... --train-text-encoder --targets to_q to_k to_v to_out.0 q_proj v_proj    # the text encoder too

Settings and their sources (the paper's table, as transcribed; its body text was not available):
    rank 32 on to_q, to_k, to_v and to_out of the UNet, learning rate 5e-4, constant after 15 steps of warm-up, weight
    decay 0.01, batch 1, 1000 steps, 512 pixels, seed 42: the paper's table of settings. It computes in fp16 with the
    VAE sd-vae-ft-mse; here it is bfloat16 and the pipeline's own VAE. Whether it uses prior preservation is not listed:
    without it is our choice. Weight decay pulls the diagonal to its start, the base model.
Expected results, from the paper's table (DINO / CLIP-T / CLIP-I): .723 / .319 / .830; DreamBooth .679 / .323 / .801.
Machine, time and result of our run: not yet run.
"""

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from loldu import recipe

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def subject() -> Config:
    """The paper's run, on the pictures of a dog that diffusers' documentation uses."""
    return Config(
        model=ModelConfig(model="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        data=DataConfig(data="diffusers/dog-example", instance_prompt="a photo of sks dog"),
        adapter=AdapterConfig(rank=32, targets=TARGETS),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, batch_size=1, max_steps=1000, schedule="constant", warmup_ratio=0.015,
            weight_decay=0.01, seed=42,
        ),
        run=RunConfig(save_every=250),
    )  # fmt: skip


def tiny() -> Config:
    """A random pipeline of 300,000 parameters and pictures of a red disc, both made here."""
    from tiny.pipeline import tiny_pipeline  # diffusers takes seconds to import

    folder = tiny_pipeline()
    return Config(
        model=ModelConfig(model=str(folder / "pipeline")),
        data=DataConfig(
            data=str(folder / "pictures"), instance_prompt="a photo of sks disc", class_prompt="a photo of a disc",
            class_pictures=4, prior_weight=0.2, eval_data=str(folder / "held_out"),
        ),
        adapter=AdapterConfig(rank=32, targets=TARGETS, options=("normalize_directions=true",)),
        optimizer=OptimizerConfig(learning_rate=3e-2, batch_size=4, max_steps=100, schedule="constant"),
        run=RunConfig(save_every=50, eval_every=25),
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(recipe("stable_diffusion_subject_loldu", subject, tiny))
