"""Several runs in one start of N processes, since importing takes longer than training: torchrun several_runs.py PLAN.

PLAN is a JSON list of runs. Each is a complete run in these processes:

    config      of the run
    copy_of     {folder, step}: resume that run, as if it had been interrupted after that step
    code        the exit code that every process must end with (0)
    nodes       whether each process counts as a node, with its rank added to the name of the cache folder
    offload     whether --cpu-offload is accepted without a GPU
    poison      the sample in whose backward pass every gradient becomes NaN
    blocks      whether frozen triangles are multiplied in blocks of four rows, as large ones are in larger blocks
    counts      whether to write OUTPUT-counts-RANK.json: after each step the rows of logits so far, and how many tokens
                of this process carried loss in it
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from adapters import functions
from launcher import processes as ranks_module
from launcher.config import Config, from_dict
from launcher.training import loop, resolve
from launcher.training import run as run_module

batch_loss = loop.batch_loss
SMALL = {"SMALLEST": 4, "FROM": 4, "TOKENS": 1}
LARGE = {name: getattr(functions, name) for name in SMALL}


def main(plan: list[dict]) -> int:
    torch.set_num_threads(1)
    ranks = ranks_module.Ranks.from_environment()
    comm = ranks_module.connect(ranks)
    run_module.connect = lambda *_, **__: comm
    run_module._disconnect = lambda _: None
    local, check_offload = (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]), resolve.check_offload
    for number, entry in enumerate(plan):
        config, nodes = from_dict(Config, entry["config"]), entry.get("nodes")
        if nodes:
            config = replace(config, run=replace(config.run, cache=f"{config.run.cache}-{ranks.rank}"))
        os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = ("0", "1") if nodes else local
        comm.ranks = ranks_module.Ranks.from_environment()
        vars(functions).update(SMALL if entry.get("blocks") else LARGE)
        resolve.check_offload = (lambda *_, **__: None) if entry.get("offload") else check_offload
        if source := entry.get("copy_of"):
            comm.from_main("copy", lambda source=source, config=config: copy(source, config))
        loop.batch_loss = batch_loss if (sample := entry.get("poison")) is None else poisoned(sample)
        counts: list[list[int]] = []
        on_step = partial(count, counts) if entry.get("counts") else None
        code = run_module.run(config, "several", on_step=on_step)
        if counts:
            Path(f"{config.run.output}-counts-{ranks.rank}.json").write_text(json.dumps(counts))
        if code != entry.get("code", 0):
            print(f"run {number} of the plan, {config.run}, ended with {code}", file=sys.stderr)
            return 1
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def count(counts: list[list[int]], training, event: dict) -> None:
    parts = training.batches.at(event["step"]).of_rank(training.comm.ranks.rank)
    targets = sum(int(training.samples.train.targets[row]) for rows in parts for row in rows)
    counts.append([training.forward.logits_rows, targets])


class NaNBackward(torch.autograd.Function):
    """The number as it is; its gradient is NaN."""

    @staticmethod
    def forward(_, loss):
        return loss.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient * float("nan")


def poisoned(sample: int):
    """The loop's batch_loss, with a NaN in the backward pass of one sample: its loss stays finite."""

    def loss_of(training, rows, targets, step=0):
        loss = batch_loss(training, rows, targets, step)
        return NaNBackward.apply(loss) if sample in rows else loss

    return loss_of


def copy(source: dict, config: Config) -> None:
    """The run in source["folder"] as if it had been interrupted after source["step"]."""
    target = Path(config.run.output)
    shutil.copytree(source["folder"], target)
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > source["step"]:
            shutil.rmtree(folder)
    for result in ("adapter", "model"):
        shutil.rmtree(target / result, ignore_errors=True)
    (target / "state").write_text("stopped\n")


if __name__ == "__main__":
    raise SystemExit(main(json.loads(Path(sys.argv[1]).read_text())))
