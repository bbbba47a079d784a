"""Several runs in one start of N processes, since importing takes longer than training: torchrun several_runs.py PLAN.

PLAN is a JSON list of runs: {"config": ..., "without": [names of checkpoints to remove first]}. Each is a whole run of
its own in the processes that are there; every exit code must be 0.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from launcher import ranks as ranks_module
from launcher.config import Config, from_dict
from launcher.training import run as run_module


def main(plan: list[dict]) -> int:
    torch.set_num_threads(1)
    ranks = ranks_module.Ranks.from_environment()
    party = ranks_module.connect(ranks)
    run_module.connect = lambda _: party
    run_module._disconnect = lambda _: None
    for number, entry in enumerate(plan):
        config = from_dict(Config, entry["config"])
        if source := entry.get("copy_of"):
            party.from_main("copy", lambda source=source, config=config: copy(source, config))
        code = run_module.run(config, "several")
        if code != 0:
            print(f"run {number} of the plan, {config.run}, ended with {code}", file=sys.stderr)
            return code
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def copy(source: dict, config: Config) -> None:
    """The run in source["folder"] as if it had been interrupted after source["step"]."""
    target = Path(config.run.output)
    shutil.copytree(source["folder"], target)
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > source["step"]:
            shutil.rmtree(folder)
    shutil.rmtree(target / "adapter")
    (target / "state").write_text("stopped\n")


if __name__ == "__main__":
    raise SystemExit(main(json.loads(Path(sys.argv[1]).read_text())))
