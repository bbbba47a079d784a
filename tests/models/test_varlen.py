"""`--attention varlen`: rows without padding, through a stand-in of torch's signature; on a GPU through the kernel."""

import inspect
import re
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.models import build, varlen
from launcher.training import run as run_module
from launcher.training.report import read_events

BASE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class Kernel:
    """What varlen_attn computes, in plain torch, and the arguments it got."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
        seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert enable_gqa == ("enable_gqa" in varlen._TAKES and query.shape[1] != key.shape[1])
        borders = cu_seq_q.tolist()
        assert borders[0] == 0
        assert borders[-1] == len(query) == len(key)
        assert max_q == max(b - a for a, b in pairwise(borders))
        self.calls.append((borders, window_size))
        parts = []
        for a, b in pairwise(borders):
            place = torch.arange(b - a)
            back = place[:, None] - place
            seen = (back >= 0) & ((back <= window_size[0]) if window_size[0] >= 0 else True)
            q, k, v = (part[a:b].transpose(0, 1)[None] for part in (query, key, value))
            groups = query.shape[1] != key.shape[1]
            part = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=groups)
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch):
    found = Kernel()
    monkeypatch.setattr(varlen, "varlen_kernel", lambda: found)
    varlen.register()
    return found


def test_the_stand_in_has_torchs_signature():
    kernel = varlen.varlen_kernel()
    if kernel is None:
        pytest.skip("this torch has no varlen_attn with windows")
    theirs, ours = (list(inspect.signature(f).parameters) for f in (kernel, Kernel()))

    assert [name for name in ours if name in theirs] == theirs  # an earlier torch has fewer


def test_a_torch_without_enable_gqa_is_not_given_it(kernel, monkeypatch):
    """torch 2.11: its varlen_attn has windows but not this argument, and shares keys among heads by itself."""
    monkeypatch.setattr(varlen, "_TAKES", varlen._TAKES - {"enable_gqa"})
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    borders = torch.tensor([0, 2, 5], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 3, "max_length_k": 3}

    out, _ = varlen.varlen_attention(torch.nn.Module(), q, k, k, None, **lengths)

    first = scaled_dot_product_attention(q[:, :, :2], k[:, :, :2], k[:, :, :2], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[:, :2], first.transpose(1, 2))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_flattened_row_gives_the_same_results_as_separate_samples(kind, groups, kernel):
    """mistral has a window of 5 tokens. float32, sums in another order."""
    sizes = BASE | {"num_key_value_heads": 4 // groups, "max_position_embeddings": 64}
    settings = AutoConfig.for_model(kind, **sizes | ({"sliding_window": 5} if kind == "mistral" else {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=varlen.NAME).eval()
    lengths = [7, 3, 12]
    samples = [torch.randint(0, 64, (length,)) for length in lengths]
    borders = torch.tensor([0, 7, 10, 22], dtype=torch.int32)
    flat = {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 12, "max_length_k": 12,
    }  # fmt: skip

    with torch.no_grad():
        together = model(**flat, use_cache=False).logits[0].split(lengths)
        model.set_attn_implementation("sdpa")
        alone = [model(sample[None], use_cache=False).logits[0] for sample in samples]

    assert kernel.calls == [([0, 7, 10, 22], (4 if kind == "mistral" else -1, 0))] * 2
    for ours, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_a_padded_batch_without_borders_is_computed_by_sdpa(kernel):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**BASE), attn_implementation=varlen.NAME).eval()
    ids, mask = torch.randint(0, 64, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0  # on the left, as generation pads

    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("sdpa")
        wanted = model(ids, attention_mask=mask).logits[mask.bool()]

    assert not kernel.calls
    assert torch.equal(found, wanted)


def test_what_the_kernel_does_not_compute_is_refused(kernel):
    borders = torch.tensor([0, 4], dtype=torch.int32)
    q = torch.ones(1, 2, 4, 8)
    lengths = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 4, "max_length_k": 4}

    for options in ({"softcap": 30.0}, {"dropout": 0.1}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(ValueError, match="give --attention sdpa"):
            varlen.varlen_attention(torch.nn.Module(), q, q, q, None, **lengths, **options)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (LlamaConfig(**BASE), ""),
        (LlamaConfig(**BASE, attention_dropout=0.1), "attention_dropout 0.1"),
        (LlamaConfig(**BASE, head_dim=512), "512 numbers, more than 256"),
        (LlamaConfig(**BASE, head_dim=20), "20 numbers, no multiple of 8"),
        (AutoConfig.for_model("gemma2", **BASE), "attn_logit_softcapping"),
    ],
)
def test_a_model_that_the_kernel_cannot_compute_is_recognised(settings, reason):
    found = varlen.unsupported(settings)

    assert (reason in found) if reason else not found


def test_auto_takes_flash_then_varlen_then_sdpa(monkeypatch):
    flash, lacking = [None], [""]
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: flash[0])
    monkeypatch.setattr(varlen, "missing", lambda *, on_gpu, dtype: lacking[0])
    monkeypatch.setattr(build, "unusable_flash", lambda: "")
    how = {"on_gpu": True, "dtype": "bfloat16"}

    assert build.choose_attention("auto", **how) == ("varlen", "flash-attn is not installed")
    assert build.choose_attention("varlen", **how) == ("varlen", "as requested")
    flash[0] = SimpleNamespace()
    assert build.choose_attention("auto", **how)[0] == "flash_attention_2"
    assert build.choose_attention("varlen", **how)[0] == "varlen"
    flash[0], lacking[0] = None, "no GPU"
    assert build.choose_attention("auto", **how) == ("sdpa", "flash-attn is not installed")
    with pytest.raises(ValueError, match="--attention varlen cannot be used: no GPU; give --attention auto or sdpa"):
        build.choose_attention("varlen", **how)


@pytest.mark.parametrize(
    ("capability", "module", "reason"),
    [
        ((7, 5), "flash_attn", "flash-attn needs a GPU of compute capability 8.0"),
        ((9, 0), "broken", "flash-attn is installed but does not load: undefined symbol: _ZN3c105"),
        ((9, 0), "another version", "does not load: module .* has no attribute 'flash_attn_varlen_func'"),
    ],
)
def test_a_flash_attn_that_is_installed_but_unusable_is_not_chosen(monkeypatch, tmp_path, capability, module, reason):
    text = "raise ImportError('undefined symbol: _ZN3c105')" if "broken" in module else ""
    (tmp_path / "flash_attn.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(varlen, "missing", lambda *, on_gpu, dtype: "no varlen_attn")

    attention, why = build.choose_attention("auto", on_gpu=True, dtype="bfloat16")

    assert attention == "sdpa"
    assert re.search(reason, why)
    with pytest.raises(ValueError, match=f"--attention flash cannot be used: .*{reason}"):
        build.choose_attention("flash", on_gpu=True, dtype="bfloat16")
    sys.modules.pop("flash_attn", None)


def test_a_run_on_flattened_rows_has_the_curve_of_padded_ones(
    kernel, stories, alpaca_file, tmp_path, monkeypatch, capsys
):
    """The run as on a GPU, with the stand-in: without packing too, nothing is padded."""
    config = Config(
        model=ModelConfig(model=str(stories), attention="sdpa"),
        data=DataConfig(data=str(alpaca_file), eval_records=4, prompt_template="short", max_length=96),
        adapter=AdapterConfig(method="lora", rank=4, targets=("q_proj", "v_proj")),
        optimizer=OptimizerConfig(batch_size=6, micro_batch_size=3, max_steps=3),
        run=RunConfig(output=str(tmp_path / "padded"), cache=str(tmp_path / "cache"), report=False),
    )
    assert run_module.run(config, "test") == 0
    monkeypatch.setattr(varlen, "missing", lambda *, on_gpu, dtype: "")
    kernel.calls.clear()

    flat = replace(config, model=replace(config.model, attention="varlen"))
    assert run_module.run(replace(flat, run=replace(flat.run, output=str(tmp_path / "flat"))), "test") == 0

    losses = [
        [event.get("loss", event.get("eval_loss")) for event in read_events(tmp_path / name / "events.jsonl")]
        for name in ("padded", "flat")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=5e-6)
    assert len({tuple(borders) for borders, _ in kernel.calls}) > 3  # those of three steps beside the probe's
    assert "batch size 6, no padding" in capsys.readouterr().out


@pytest.mark.gpu
def test_torchs_kernel_agrees_with_sdpa_on_a_gpu():
    if reason := varlen.missing(on_gpu=True, dtype="bfloat16"):
        pytest.skip(reason)
    varlen.register()
    torch.manual_seed(0)
    sizes = BASE | {"hidden_size": 256, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation=varlen.NAME)
    model = model.to("cuda", torch.bfloat16)
    samples = [torch.randint(0, 64, (length,), device="cuda") for length in (7, 130, 64)]
    borders = torch.tensor([0, 7, 137, 201], dtype=torch.int32, device="cuda")
    flat = {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(len(sample), device="cuda") for sample in samples])[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda"),
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 130, "max_length_k": 130,
    }  # fmt: skip

    together = model(**flat, use_cache=False).logits[0].split([7, 130, 64])
    together[1].float().square().mean().backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    alone = [model(sample[None], use_cache=False).logits[0] for sample in samples]
    alone[1].float().square().mean().backward()

    for ours, wanted in zip(together, alone, strict=True):
        assert (ours - wanted).norm() <= 2e-2 * wanted.norm()
    wanted = model.model.layers[0].self_attn.q_proj.weight.grad
    assert (gradient - wanted).norm() <= 5e-2 * wanted.norm()
