"""--cpu-offload is refused if it would do nothing; on a GPU it gives the same losses with shards in main memory."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from launching import Runs
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from launcher.engines.choose import check_offload
from launcher.engines.fsdp2 import Rows


@pytest.mark.parametrize(
    ("sharding", "on_gpu", "message"),
    [
        ("none", True, "works with --sharding fsdp2, hsdp, zero2 or zero3; none keeps everything on the GPU"),
        ("ddp", True, "works with --sharding fsdp2, hsdp, zero2 or zero3; ddp keeps everything on the GPU"),
        ("fsdp2", False, "torch finds no GPU here: leave it out"),
        ("zero3", False, "torch finds no GPU here: leave it out"),
    ],
)
def test_offloading_that_would_do_nothing_is_refused(sharding, on_gpu, message):
    with pytest.raises(ValueError, match=message):
        check_offload(True, sharding, on_gpu=on_gpu)


@pytest.mark.parametrize("sharding", ["fsdp2", "hsdp", "zero2", "zero3"])
def test_every_sharding_engine_offloads_from_a_gpu(sharding):
    check_offload(True, sharding, on_gpu=True)


@pytest.fixture
def gpu_mesh():
    """Of one process; nothing is computed on it, so that no GPU is needed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cuda", torch.arange(1), _init_backend=False)
    dist.destroy_process_group()


def test_rows_that_are_read_for_a_gpu_stay_in_main_memory_until_they_are_used(gpu_mesh):
    """Otherwise torch refuses to offload them, and the whole model would pass through the GPU."""
    rows = torch.arange(15.0).view(5, 3)
    on_meta = DTensor.from_local(rows.to("meta"), gpu_mesh, [Shard(0)], run_check=False)

    placed = Rows().place(torch.nn.Parameter(on_meta, requires_grad=False), rows)

    assert isinstance(placed.data, DTensor)
    assert (placed.device.type, placed.device_mesh, placed.placements) == ("cpu", gpu_mesh, (Shard(0),))
    assert torch.equal(placed.data.to_local(), rows)
    assert not placed.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("sharding", ["fsdp2", "hsdp", "zero2", "zero3"])
def test_on_a_gpu_offloading_gives_the_same_losses_also_after_a_resume(stories, alpaca_file, tmp_path, sharding):
    """AdamW then steps on the CPU, which rounds in another order: 5e-6 in float32."""
    runs = Runs(tmp_path, stories, alpaca_file)
    runs.base = replace(runs.base, model=replace(runs.base.model, dtype="float32"))

    runs.start(
        1,
        runs.entry("plain", sharding),
        runs.entry("offload", sharding, cpu_offload=True),
        runs.entry("plain>offload", sharding, source="plain", step=4, cpu_offload=True),
    )

    for name in ("offload", "plain>offload"):
        torch.testing.assert_close(runs.losses(name), runs.losses("plain"), atol=5e-6, rtol=0)
