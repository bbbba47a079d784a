"""Tiny models, and the steps that adapter tests share."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapters import METHODS, FactorConfig
from adapters.layer import FactorLayer
from adapters.lora_sb import first_step_factors

CONFIGS = {name: cls for name, cls in METHODS.items() if issubclass(cls, FactorConfig)}
METHOD = "loldu"  # the fixture `method` puts in another
RANK = 8  # of the last config


def tiny_llama(seed=0, **changes):
    """A random Llama of 14,000 parameters; two layers, grouped keys and values, square, tall and wide weights."""
    torch.manual_seed(seed)
    sizes: dict = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    sizes["initializer_range"] = 0.2  # logits of size 1, which every layer moves; the default 0.02 leaves them at 0.1
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes})).eval()


def tiny_gpt2(seed=0):
    """A random GPT-2, whose layers are transformers' Conv1D and whose head is tied."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, initializer_range=0.2)
    ).eval()


def config(**options):
    """A config of the test's method."""
    global RANK
    RANK = options.get("r", RANK)
    return CONFIGS[METHOD](**({"step": 0.01} if METHOD == "lorasb" else {}), **options)


def gradient(shape):
    """A substitute for a weight's summed gradient, if the method's factors come from one."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def factors_of_gradient(name, shape):
    return first_step_factors(gradient(shape), min(RANK, *shape))


def lm_config(**changes):
    return config(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def adapted(model, seed=1, **changes) -> PeftModel:
    """The model with an adapter whose cores are random, so that it differs from its base."""
    return randomise(get_peft_model(model, lm_config(**changes)), seed=seed).eval()


def randomise(model, adapter="default", seed=1, size=0.1):
    """Random cores: size is that of the update relative to the weight, whatever the directions' norms."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        if adapter in layer.maps:
            core = layer.maps[adapter].core
            core.data = torch.randn(core.shape, generator=generator)
            core.data *= size * layer.matrix().float().norm() / layer.get_delta_weight(adapter).float().norm()
    return model


def paper(W, r):
    """The paper's frozen left (m, r), starting core (r, r) and right (r, n), from torch's factors of all of W."""
    if METHOD in ("loldu", "lolduxs"):
        P, L, U = torch.linalg.lu(W)
        d = U.diagonal()
        return (P @ L)[:, :r], d[:r].diag(), (U / d[:, None])[:r]
    U, s, Vh = torch.linalg.svd(-gradient(W.shape).sign().to(W) if METHOD == "lorasb" else W, full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0)[None]).sign()[0]
    U, Vh = U * sign, Vh * sign[:, None]
    if METHOD == "loraxs":  # its core has no start of its own: W' = W + U R diag(s) V^T
        return U[:, :r], torch.zeros(r, r).to(W), (s[:, None] * Vh)[:r]
    if METHOD == "lorasb":  # likewise
        return U[:, :r], torch.zeros(r, r).to(W), Vh[:r]
    return U[:, :r], s[:r].diag(), Vh[:r]


def dense_update(W, core, r, embedding=False, normalize=False):
    """What the paper's formula with this core adds to W (m, n)."""
    if embedding and METHOD in ("svfit", "svft", "loraxs"):  # whose output is a column of W^T
        return dense_update(W.T, core, r, normalize=normalize).T
    left, _, right = paper(W, r)
    if normalize:
        left, right = left / left.norm(dim=0), right / right.norm(dim=1, keepdim=True)
    M = as_matrix(core, r)
    return left @ (M.T if embedding else M) @ right


def as_matrix(core, r):
    """The r x r matrix that a core stands for, written out entry by entry."""
    if METHOD in ("loldu", "svfit"):
        return core.diag()
    if METHOD != "svft":
        return core
    M, at = torch.zeros(r, r).to(core), 0
    for above in range(-min(2, r - 1), min(2, r - 1) + 1):
        for i in range(r):
            if 0 <= i + above < r:
                M[i, i + above] = core[at]
                at += 1
    assert at == len(core)
    return M


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, FactorLayer)]


def tokens(vocabulary=64, shape=(2, 12), seed=3):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, vocabulary=64):
    return model(tokens(vocabulary)).logits


def one_layer(layer: nn.Module, r=8, **changes):
    """A model of one layer, and the same adapted with random cores."""
    model = nn.Sequential(layer)
    return randomise(get_peft_model(model, config(r=r, target_modules=["0"], **changes)))
