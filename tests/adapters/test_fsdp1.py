"""Adapters in a model that torch's FullyShardedDataParallel wraps, as transformers' Trainer and accelerate do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import logits, tiny_llama

HERE = Path(__file__).resolve().parent
TRAIN = """
import functools, sys
from pathlib import Path
import torch
import torch.distributed as dist
from peft import get_peft_model
from tiny_models import logits, tiny_llama, tokens
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel as FSDP, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
import adapters

out, method = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
model = get_peft_model(
    tiny_llama(), adapters.METHODS[method](r=8, target_modules="all-linear", task_type="CAUSAL_LM")
).eval()
policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
wrapped = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
for _ in range(3):
    wrapped(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
with FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
    state = wrapped.state_dict()
trained = logits(wrapped)
if dist.get_rank() == 0:
    model.save_pretrained(out, state_dict=state)  # as Trainer saves
    torch.save(trained, out / "logits.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("method", ["loldu", "svfit"])
def test_an_adapter_trained_under_fsdp1_is_saved_without_its_maps_and_loads_on_one_process(method, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}

    subprocess.run([*launcher, tmp_path / "train.py", tmp_path, method], check=True, env=environ, timeout=300)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()

    saved = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert saved == {"core", "pivots", "values", "probe"}
    trained = torch.load(tmp_path / "logits.pt")
    assert torch.equal(logits(loaded), trained)
    assert not torch.allclose(trained, logits(tiny_llama()), atol=1e-3)
