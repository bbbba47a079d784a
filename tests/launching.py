"""Starting runs in separate processes, and comparing what they leave."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig, as_dict
from launcher.training.run import run

REPO = Path(__file__).resolve().parents[1]
RECIPE = REPO / "recipes" / "llama2_alpaca_loldu.py"
HELD = REPO / "tests" / "held_recipe.py"


def flags(config):
    """The recipe's options for this config: every setting that differs from the recipe's own."""
    found, default = [], as_dict(runpy.run_path(str(RECIPE))["llama2_alpaca"]())
    for part, values in as_dict(config).items():
        for name, value in values.items():
            if value != default[part][name]:
                flag = "--" + name.replace("_", "-")
                if isinstance(value, bool):
                    found.append(flag if value else flag.replace("--", "--no-", 1))
                elif isinstance(value, list):
                    found += [flag, *map(str, value)]
                else:
                    found.append(f"{flag}={value}")
    return found


def start(command, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)} | environment
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also where nohup started the tests
    )  # fmt: skip


def finish(process, timeout_s=300):
    out, _ = process.communicate(timeout=timeout_s)
    return process.returncode, out


class Runs:
    """Runs by name in one folder, all of the same training unless changed."""

    def __init__(self, folder, model, records):
        self.folder = folder
        data = folder / "records.json"
        data.write_text(json.dumps(json.loads(Path(records).read_text())[:200]))
        self.base = Config(
            model=ModelConfig(model=str(model)),
            data=DataConfig(data=str(data), eval_records=6, prompt_template="short", max_length=64),
            adapter=AdapterConfig(rank=15, targets=("all-linear",)),  # no number of processes here divides 15
            optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=4, max_steps=8),
            run=RunConfig(cache=str(folder / "cache"), save_every=2, report=False),
        )

    def config(self, name, sharding=None, change=lambda config: config, **options):
        config = change(self.base)
        return replace(config, run=replace(config.run, output=str(self.folder / name), sharding=sharding, **options))

    def entry(self, name, sharding, *, source=None, step=0, how=None, **options):
        """A run for several_runs.py; how: what its plan can say besides."""
        copy_of = {"folder": str(self.folder / source), "step": step} if source else None
        return {"config": as_dict(self.config(name, sharding, **options)), "copy_of": copy_of, **(how or {})}

    def start(self, processes, *entries):
        return start_several(self.folder, processes, entries)

    def alone(self, name, **options):
        assert run(self.config(name, **options), "test") == 0

    def alone_from(self, name, source, step):
        target = self.folder / name
        shutil.copytree(self.folder / source, target)
        for checkpoint in (target / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        (target / "state").write_text("stopped\n")
        self.alone(name)

    def events(self, name):
        return [json.loads(line) for line in (self.folder / name / "events.jsonl").read_text().splitlines()]

    def losses(self, name):
        return [event["loss"] for event in self.events(name) if "loss" in event]

    def adapter(self, name):
        return load_file(self.folder / name / "adapter" / "adapter_model.safetensors")


def start_several(folder, processes, entries):
    plan = folder / f"plan-{processes}-{len(list(folder.glob('plan-*')))}.json"
    plan.write_text(json.dumps(entries))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    code, out = finish(start([*command, str(Path(__file__).with_name("several_runs.py")), str(plan)]), 900)
    assert code == 0, out[-8000:]
    return out
