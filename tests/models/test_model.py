"""What is told, and heard, while the model is loaded."""

from pathlib import Path

import pytest
import torch

from launcher.config import ModelConfig
from launcher.models.build import build
from launcher.processes import Stopped


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of a process's maps")
def test_a_frozen_base_in_its_files_dtype_is_a_map_of_them(stories):
    how = {"dtype": "float32", "attention": "sdpa", "device": torch.device("cpu")}

    base = build(ModelConfig(), stories, None, factors=lambda module: None, **how)

    file = str((stories / "model.safetensors").resolve())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ends = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[-1] == file]
    assert all(any(low <= p.data_ptr() < high for low, high in ends) for p in base.parameters())


def test_loading_a_quantised_base_tells_of_each_parameter_and_can_be_stopped_there(stories):
    told = []

    def progress(done, total):
        told.append((done, total))
        if done == 5:
            raise Stopped

    config, how = ModelConfig(quantize="nf4"), {"dtype": "float32", "attention": "sdpa"}
    with pytest.raises(Stopped):
        build(config, stories, None, factors=lambda module: None, device=torch.device("cpu"), progress=progress, **how)

    assert told == [(number, 47) for number in range(1, 6)]  # 5 layers of 9, the embedding and the last norm
