"""Adapters of several kinds in folders, and what each gives alone."""

import copy

import torch
from peft import get_peft_model
from tiny_models import randomise, tiny_llama

from adapters import (
    LoLDUConfig,
    LoLDUXSConfig,
    LoRAXSConfig,
    SVFitConfig,
    SVFTConfig,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32: only the order of additions differs


def written(folder, config, count=3, base=tiny_llama, seed=10):
    """Folders of adapters with random cores, and the base's logits with each of them alone."""
    expected = {}
    for i in range(count):
        model = randomise(get_peft_model(base(), copy.deepcopy(config)), seed=seed + i).eval()
        model.save_pretrained(folder / f"a{i}")
        expected[f"a{i}"] = model
    return expected


def alone(models, base, name, ids):
    with torch.no_grad():
        return (base if name is None else models[name])(ids).logits


CONFIGS = {
    "loldu": LoLDUConfig(r=8, target_modules="all-linear"),
    "loldu normalised, scaled": LoLDUConfig(r=8, target_modules="all-linear", normalize_directions=True, scale=0.5),
    "loldu full rank": LoLDUConfig(r=99, target_modules="all-linear"),
    "lolduxs": LoLDUXSConfig(r=6, target_modules="all-linear"),
    "svfit": SVFitConfig(r=8, target_modules="all-linear"),
    "svfit by energy": SVFitConfig(energy=0.7, target_modules="all-linear"),
    "svft": SVFTConfig(r=8, target_modules="all-linear", off_diagonals=2),
    "loraxs": LoRAXSConfig(r=8, target_modules="all-linear"),
    "loraxs normalised": LoRAXSConfig(r=8, target_modules=["q_proj", "down_proj"], normalize_directions=True),
}
