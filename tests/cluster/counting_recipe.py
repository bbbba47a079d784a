"""A run that counts instead of training: it keeps the run folder's contract, and starts in a tenth of a second.

    python counting_recipe.py --output RUN [--steps 20] [--seconds 0.2] [--save-every 1] [--fail-rank 1]
        [--never-save]

Rank 0 counts and saves; the others wait for it. Each step's loss follows from the one before, so a resumed run shows
the numbers of an uninterrupted one only if it resumed exactly where it was saved. A step takes --seconds until the run
was interrupted, and none afterwards: there is time to interrupt it on a busy machine, and none lost on a quiet one.
"""

import argparse
import json
import os
import time
from pathlib import Path

from launcher.training.stop import StopRequest


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--fail-rank", type=int)
    parser.add_argument("--never-save", action="store_true")
    chosen = parser.parse_args()
    run, rank, world = chosen.output, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with StopRequest() as stop:
        if rank == chosen.fail_rank:
            raise RuntimeError(f"the disk of rank {rank} is on fire")
        if rank:
            while read(run / "state") not in ("stopped", "finished") or (run / "state").stat().st_mtime < began:
                time.sleep(0.1)
            return 0
        saved = sorted(run.glob("checkpoints/step-*/COMPLETE"))
        step, loss = json.loads(saved[-1].read_text()) if saved else (0, 1.0)
        lines = (run / "events.jsonl").read_text().splitlines()[:step] if saved else []
        (run / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
        write(run / "state", "running")
        stop.watch(run / "control")
        print(f"rank {rank} of {world} begins at step {step}", flush=True)
        while step < chosen.steps:
            time.sleep(0.0 if saved else chosen.seconds)
            step, loss = step + 1, (loss * 1.7 + step) % 1.0
            with open(run / "events.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "loss": loss}) + "\n")
            asked = stop.asked()
            if not chosen.never_save and (asked or step % chosen.save_every == 0 or step == chosen.steps):
                folder = run / "checkpoints" / f"step-{step:06d}"
                folder.mkdir(parents=True, exist_ok=True)
                write(folder / "COMPLETE", json.dumps([step, loss]))
            if asked and step < chosen.steps:
                print(f"stopped by {stop.reason} at step {step}", flush=True)
                write(run / "state", "stopped")
                return 0 if world > 1 else 75
        write(run / "state", "finished")
    return 0


def read(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.new")
    partial.write_text(text + "\n")
    os.replace(partial, file)


if __name__ == "__main__":
    raise SystemExit(main())
