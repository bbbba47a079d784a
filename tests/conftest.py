"""Shared fixtures: real small models and data beside the checkout, and one thread per test process."""

import os
import sys
from pathlib import Path

# The commands installed beside this Python (accelerate, torchrun), also where its environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # multi-process tests share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(part: str) -> Path:
    path = SHARED / "data" / part
    if not path.exists():
        pytest.skip(f"needs the shared data folder beside the checkout: no {path}")
    return path


@pytest.fixture(scope="session")
def babyllama() -> Path:
    """A real pretrained Llama of 969,216 parameters."""
    return _shared("models/babyllama-361")


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real pretrained Llama of 260,032 parameters with a BPE vocabulary."""
    return _shared("models/stories260K")


@pytest.fixture(scope="session")
def alpaca_file() -> Path:
    """5,000 real Alpaca records."""
    return _shared("instruction/alpaca_5000.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
