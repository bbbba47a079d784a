"""Small checkpoints, and requests for factors of their weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters import METHODS
from adapters.checkpoint_files import list_tensors
from launcher.factorization import cache
from launcher.factorization.make import FactorRequest
from launcher.processes import Communicator, Ranks

ALONE = Communicator(Ranks())


def write_model(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Path:
    draw = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"{name}.weight": torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def factorization(method: str = "loldu", **options: Any) -> Any:
    config: Any = METHODS[method]
    return config(**options).factorization()


LU = factorization()


def requests_for(model: Path, rank: int = 4, method: Any = LU, **options: Any) -> list[FactorRequest]:
    names = list_tensors(model)
    return [FactorRequest(name.removesuffix(".weight"), names[name], rank, method, **options) for name in sorted(names)]


SIX = {f"layers.{i}.{part}": shape for i in range(3) for part, shape in {"q": (16, 12), "up": (40, 16)}.items()}


def assert_nothing_half_written(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != cache.MARK]
    assert [file for file in files if file.suffix not in (".safetensors", ".json")] == []
    assert cache.verify(folder) == []


def no_reading(*_args: Any) -> Any:
    raise AssertionError("a warm start opens no tensor data")


def notes_of(folder: Path) -> list[Path]:
    """The index files that say which factors this user has compared."""
    return [file for file in (folder / "index").iterdir() if '\\"compared\\"' in file.read_text()]
