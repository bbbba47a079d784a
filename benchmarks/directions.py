"""Which frozen directions suit a diagonal core of full rank best? SVFit's against five other choices.

    python benchmarks/directions.py [FOLDER]   # benchmarks/results/directions.json; half an hour on one core

Every choice trains min(m, n) numbers per weight: W' = W + A diag(delta) B, with unit columns in A and unit rows in B
that lie in the row space of W (the layer reads its own output). Runs are those of benchmarks/methods.py: babyllama on
Alpaca, a learning rate searched on the validation split with seed 0, and three other seeds on the test split for a
choice that beats SVFit's.

    svd         A = U, B = V^T of W                                            SVFit
    gradient    A = U, B = V^T of the summed gradient of 64 training samples, projected to W's row space
    outputs     A = U of W C^(1/2), C the inputs' second moments on these samples; B = U^T W
    rows        A = unit vectors at W's longest rows, B those rows             IA3's scaling of outputs, k of them
    random      A = a random orthonormal basis, B = another one, of W's row space
    svd * s     SVFit's, each scaled by its singular value: Adam then moves the large ones more
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import methods
import torch
from methods import RESULTS, measure, what, write_data, write_models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapters.checkpoint_files import open_tensor
from launcher.config import DataConfig
from launcher.data import batches, encode, records
from launcher.models.files import load_tokenizer
from launcher.training import run as running

CHOICES = {  # learning rates; the best one is in the middle
    "svd": (1e-2, 3e-2, 1e-1),
    "gradient": (3e-3, 1e-2, 3e-2),
    "outputs": (1e-2, 3e-2, 1e-1),
    "rows": (3e-3, 1e-2, 3e-2),
    "random": (3e-3, 1e-2, 3e-2),
    "svd * s": (3e-3, 1e-2, 3e-2),
}
FILE = RESULTS.with_name("directions.json")
MODEL, TASK = methods.CELLS[0]
SAMPLES = 64


def statistics(folder: Path, file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By module, the summed gradient (m, n) of a file's first samples and the second moments (n, n) of its inputs."""
    setting = DataConfig(prompt_template="short", max_length=methods.MAX_LENGTH)
    encoded = encode.encode(records.load_records(str(file))[:SAMPLES], load_tokenizer(folder), setting)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "proj" in name}
    moments: dict[str, Tensor] = {
        name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()
    }

    def watch(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor]) -> None:
            x = given[0].detach().flatten(0, -2)
            moments[name] += x.T @ x

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(watch(name))
    for start in range(0, SAMPLES, 16):
        model(**batches.collate(encoded, range(start, start + 16), pad_id=0), use_cache=False).loss.backward()
    return {name: layer.weight.grad.double() for name, layer in layers.items()}, {
        k: v.double() for k, v in moments.items()
    }


def directions(choice: str, name: str, W: Tensor, gradient: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """A (m, k), B (k, n) in float64 for W (m, n); k = min(m, n)."""
    m, n = W.shape
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    k = len(s)
    if choice == "svd":
        return U, Vh
    if choice == "svd * s":
        return U * (s / s.square().mean().sqrt()), Vh
    if choice == "gradient":
        A, _, B = torch.linalg.svd(gradient @ Vh.T @ Vh, full_matrices=False)
        return A, B
    if choice == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        left, right = (torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=W.dtype)).Q for rows in (m, k))
        return left, right @ Vh
    if choice == "rows":
        longest = W.norm(dim=1).argsort(descending=True)[:k]
        A, B = torch.eye(m, dtype=W.dtype)[:, longest], W[longest]
    else:
        ridge = 1e-4 * moments.diagonal().mean() * torch.eye(n, dtype=W.dtype)
        A = torch.linalg.svd(W @ torch.linalg.cholesky(moments + ridge), full_matrices=False).U
        B = A.T @ W
    return A, B / B.norm(dim=1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=methods.REPO.parent / "shared" / "data")
    shared = parser.parse_args().folder
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = json.loads(FILE.read_text())["runs"] if FILE.exists() else []
    plain = running.factors_of
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_data(shared, work)
        write_models(shared, work)
        gradients, moments = statistics(work / MODEL, work / f"{TASK}-train.json")

        def loss(choice: str, rate: float, seed: int, split: str) -> float:
            for old in found:
                if (old["choice"], old["rate"], old["seed"], old["split"]) == (choice, rate, seed, split):
                    return old["loss"]

            def factors(request: Any, cache: Path, rows: slice = slice(None)) -> Any:
                """LoLDU's factors with other maps. Its pivot rows span all rows of W, so it can read any such B."""
                frozen, name = plain(request, cache), request.module
                W = open_tensor(request.tensor)[:].double()
                A, B = directions(choice, name, W, gradients[name], moments[name])
                read = torch.linalg.lstsq(W[frozen.pivots.long()].T, B.T).solution.T
                return frozen._replace(write=A.float().contiguous()[rows], read=read.float().contiguous())

            running.factors_of = factors
            result = measure(what(MODEL, TASK, "LoLDU", rate, seed, split), work)["loss"]
            found.append({"choice": choice, "rate": rate, "seed": seed, "split": split, "loss": result})
            FILE.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "runs": found}, indent=1) + "\n")
            print(*found[-1].values(), flush=True)
            return result

        best = {}
        for choice, rates in CHOICES.items():
            losses = {rate: loss(choice, rate, 0, "validation") for rate in rates}
            best[choice] = min(losses.values())
            if best[choice] <= best["svd"]:
                for seed in methods.SEEDS:
                    loss(choice, min(losses, key=lambda rate: losses[rate]), seed, "test")


if __name__ == "__main__":
    main()
