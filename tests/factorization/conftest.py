"""A small model and a cache folder."""

from pathlib import Path

import pytest
from small_weights import SIX, write_model


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model", SIX)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"
