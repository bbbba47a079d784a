"""docs/add-a-method.md: its files and lines, in a copy of the project, pass their tests, train, merge and load."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "add-a-method.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
CHANGES = dict(re.findall(r"<!-- change: (\S+) -->\n```diff\n(.*?)```", PAGE, re.DOTALL))
(COMMANDS,) = re.findall(r"<!-- run: .*? -->\n```bash\n(.*?)```", PAGE, re.DOTALL)


def with_added_lines(text: str, diff: str) -> str:
    """The text with each + line of a diff after the line that is before it there."""
    lines, before = text.splitlines(), ""
    for line in diff.splitlines():
        if line.startswith("+"):
            assert lines.count(before) == 1, f"the page's context is not in the file once: {before}"
            lines.insert(lines.index(before) + 1, line[1:])
        before = line[1:]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project with the page's files and lines, and the commands of the page in the shell's search path."""
    copy = tmp_path_factory.mktemp("copy")
    for part in ("adapters", "launcher", "recipes", "tests/adapters"):
        shutil.copytree(REPO / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("loldu.py", "pyproject.toml", "tests/conftest.py"):
        shutil.copy(REPO / file, copy / file)
    for name, text in FILES.items():
        assert not (copy / name).exists()
        (copy / name).write_text(text)
    for name, diff in CHANGES.items():
        (copy / name).write_text(with_added_lines((copy / name).read_text(), diff))
    (copy / "bin").mkdir()
    for name, module in {"loldu": "-m launcher", "python": "", "pytest": "-m pytest"}.items():
        (copy / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (copy / "bin" / name).chmod(0o755)
    return copy


def in_copy(copy: Path, command: list[str]) -> subprocess.CompletedProcess:
    environ = os.environ | {
        "PATH": f"{copy / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
        "XDG_CACHE_HOME": str(copy / "cache"),
    }
    return subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True)


@pytest.mark.slow
def test_the_commands_of_the_page_run_and_the_method_learns(copy):
    done = in_copy(copy, ["bash", "-e", "-c", COMMANDS])

    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
    events = [json.loads(line) for line in (copy / "runs" / "qr" / "events.jsonl").read_text().splitlines()]
    first, last = (event["eval_loss"] for event in events if "eval_loss" in event)
    assert last < first - 0.1
    tensors = load_file(copy / "runs" / "qr" / "adapter" / "adapter_model.safetensors")
    assert any("qrlora_map" in name for name in tensors)
    headers = list((copy / "cache" / "loldu" / "factors").glob("*.safetensors"))
    assert headers  # the factors went through the cache


@pytest.mark.slow
def test_the_adapter_of_the_page_loads_with_peft_and_is_what_was_merged(copy):
    script = (
        "import torch, adapters\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('recipes/tiny/model', dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(model, 'runs/qr/adapter').eval()\n"
        "torch.save(model(torch.arange(1, 20)[None]).logits, 'logits.pt')\n"
    )
    done = in_copy(copy, [sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr

    merged = AutoModelForCausalLM.from_pretrained(copy / "runs" / "qr-merged", dtype=torch.float32).eval()
    with torch.no_grad():
        found = merged(torch.arange(1, 20)[None]).logits

    torch.testing.assert_close(found, torch.load(copy / "logits.pt"), rtol=1e-3, atol=1e-3)  # float32 sums


def test_a_weight_without_enough_directions_is_refused_by_name(copy):
    script = (
        "import torch, adapters\n"
        "from peft import get_peft_model\n"
        "layer = torch.nn.Linear(8, 8)\n"
        "layer.weight.data[:, 4:] = 0\n"
        "get_peft_model(torch.nn.Sequential(layer), adapters.METHODS['qrlora'](r=6, target_modules=['0']))\n"
    )

    done = in_copy(copy, [sys.executable, "-c", script])

    assert done.returncode == 1
    assert "0: it has fewer than 6 independent columns; leave the layer out" in done.stderr
