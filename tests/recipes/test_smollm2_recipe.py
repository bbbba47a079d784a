"""The recipe of a real instruction model, from training to a merged model that answers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import REPO, finish, start
from safetensors.torch import load_file

from launcher.inference.export import export_lora
from launcher.inference.generate import generate
from launcher.inference.merge import merge
from launcher.inference.options import Answering

SCRIPT = REPO.parent / "shared" / "data" / "models" / "get-smollm2"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def smollm2() -> str:
    """SmolLM2-135M-Instruct, made once per machine."""
    if not SCRIPT.exists():
        pytest.skip(f"needs the script {SCRIPT}")
    folder = Path.home() / ".cache" / "loldu-tests" / "smollm2"
    done = subprocess.run(["bash", SCRIPT, str(folder), sys.executable], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"{SCRIPT.name} failed: {done.stderr.strip()[-200:]}")
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def trained(smollm2, alpaca_file, tmp_path_factory):
    """Short runs of the recipe: bfloat16, float32 and nf4 on one process, float32 under fsdp2 on two."""
    folder = tmp_path_factory.mktemp("smollm2")
    records = folder / "records.json"
    records.write_text(json.dumps([r for r in json.loads(alpaca_file.read_text())[:200] if r["output"]]))
    options = [
        "--model", smollm2, "--data", str(records), "--max-steps", "2", "--batch-size", "4", "--micro-batch-size", "2",
        "--max-length", "96", "--eval-records", "4", "--rank", "8", "--show-samples", "0", "--no-report",
        "--cache", str(folder / "cache"),
    ]  # fmt: skip
    recipe = str(REPO / "recipes" / "smollm2_chat_loldu.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, words, more in (
        ("bf16", [], []),
        ("one", [], ["--dtype", "float32"]),
        ("nf4", [], ["--dtype", "float32", "--quantize", "nf4", "--save-every", "1"]),
        ("fsdp2", torchrun, ["--dtype", "float32", "--sharding", "fsdp2"]),
    ):
        command = [sys.executable, *words, recipe, *options, *more, "--output", str(folder / name)]
        code, out = finish(start(command), 900)
        assert code == 0, out[-4000:]
        (folder / f"{name}.json").write_text(json.dumps(command))
    return folder


def losses(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event.get("loss", event.get("eval_loss")) for event in events]


@pytest.mark.slow
def test_two_processes_under_fsdp2_train_as_one_does(trained):
    assert losses(trained / "fsdp2") == pytest.approx(losses(trained / "one"), abs=2e-5)
    assert losses(trained / "bf16") == pytest.approx(losses(trained / "one"), abs=5e-2)


@pytest.mark.slow
def test_a_base_in_4_bits_trains_and_resumes_to_the_same_loss_and_adapter(trained):
    whole = losses(trained / "nf4")
    adapter = load_file(trained / "nf4" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(trained / "nf4" / "adapter")
    shutil.rmtree(max((trained / "nf4" / "checkpoints").iterdir()))
    (trained / "nf4" / "state").write_text("stopped\n")

    code, out = finish(start(json.loads((trained / "nf4.json").read_text())), 900)

    assert code == 0, out[-4000:]
    assert "resuming from" in out
    assert losses(trained / "nf4") == whole
    again = load_file(trained / "nf4" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in adapter.items())
    assert 0 < whole[0] - losses(trained / "one")[0] < 0.5  # what rounding the base to 4 bits costs


@pytest.mark.slow
def test_the_tuned_model_answers_as_before_and_so_do_its_merged_and_exported_forms(trained, smollm2):
    """Merge and export compare logits with base and adapter themselves."""
    merge(str(trained / "one"), out=str(trained / "merged"), dtype="float32")
    export_lora(str(trained / "one"), out=str(trained / "lora"), tolerance=1e-3)

    answers = []
    for model in (smollm2, str(trained / "one"), str(trained / "merged")):
        answers += [answer.text for answer in generate(model, Answering(max_tokens=12), prompt=QUESTION)]

    assert ["Paris" in answer for answer in answers] == [True, True, True], answers
