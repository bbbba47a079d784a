"""Adapters in folders, and bases loaded from folders, for the tests of PEFT."""

import json

import pytest
import torch
from tiny_models import layers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

not_lorasb = pytest.mark.not_lorasb


def opened(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def distance(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def nf4(folder):
    """The base in NF4 through transformers, computing in float32."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = opened(folder, quantization_config=config, device_map="cpu")
    for module in model.modules():  # else bitsandbytes repacks the weight in place at the first forward without grad
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def factors_by_name(model):
    return {layer.name: layer._update_parts("default")[1] for layer in layers(model)}
