"""Each process uses its own GPU, and a run without a GPU logs the reason."""

import pytest
import torch

from launcher import devices
from launcher.devices import check_distinct, emulated_bfloat16, own_device, unusable_gpus
from launcher.models.build import choose_dtype
from tests.conftest import asks_for_gpu


@pytest.fixture
def gpus(monkeypatch):
    """As many GPUs as a test says, to the functions that count them."""

    def there(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there


@pytest.mark.parametrize(
    ("count", "local_rank", "local_world", "expected"),
    [(0, 3, 4, "cpu"), (4, 3, 4, "cuda:3"), (8, 1, 2, "cuda:1"), (1, 0, 1, "cuda:0"), (1, 3, 4, "cuda:0")],
)
def test_each_process_takes_the_gpu_of_its_number_or_the_only_one_it_sees(
    gpus, count, local_rank, local_world, expected
):
    gpus(count)

    assert str(own_device(local_rank, local_world)) == expected


def test_more_processes_than_gpus_are_refused(gpus):
    gpus(2)

    with pytest.raises(ValueError, match=r"4 processes on .*, where torch sees 2 GPUs: start 2"):
        own_device(1, 4)


def test_two_processes_on_one_gpu_are_named_before_nccl_fails():
    check_distinct([["a", "GPU-1"], ["a", "GPU-2"], ["b", "GPU-1"]])

    with pytest.raises(ValueError, match="ranks 0 and 2 have the same GPU of a"):
        check_distinct([["a", "GPU-1"], ["b", "GPU-1"], ["a", "GPU-1"]])


def test_a_driver_whose_gpus_torch_cannot_use_is_told(gpus, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus(0)
    assert unusable_gpus(tmp_path / "no driver") is None
    (tmp_path / "0000:01:00.0").mkdir()

    assert "1 NVIDIA GPU that torch cannot use" in (unusable_gpus(tmp_path) or "")
    assert torch.__version__ in (unusable_gpus(tmp_path) or "")

    gpus(1)
    assert unusable_gpus(tmp_path) is None
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert unusable_gpus(tmp_path) is None


@pytest.mark.parametrize(
    ("can", "slow"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False),
        ({"bf16": True}, False),
        ({"bf16": False}, True),
        ({"architecture": "unknown"}, False),
    ],
)
def test_a_cpu_without_instructions_for_bfloat16_is_told(monkeypatch, can, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)

    assert bool(emulated_bfloat16()) == slow


def test_a_torch_that_does_not_say_what_the_cpu_can_is_not_guessed_about(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)

    assert emulated_bfloat16() is None


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)

    assert choose_dtype("auto") == "float32"
    assert choose_dtype("bfloat16") == "bfloat16"


def test_a_run_shows_why_it_does_without_a_gpu(monkeypatch, tmp_path, capsys):
    from launcher.start import run_recipe
    from recipes.llama2_alpaca_loldu import llama2_alpaca, tiny

    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(devices.unusable_gpus, "__defaults__", (tmp_path / "gpus",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = ["--tiny", "--max-steps", "1", "--rank", "4", "--eval-records", "0", "--batch-size", "1"]
    options += ["--no-exact-match", "--show-samples", "0", "--no-report", "--cache", str(tmp_path / "cache")]

    run_recipe("test", llama2_alpaca, tiny, [*options, "--output", str(tmp_path / "run")])

    assert "that torch cannot use, so this run takes the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("", False),
        ("not slow", False),
        ("not gpu", False),
        ("not (gpu)", False),
    ],
)
def test_plain_pytest_hides_the_gpus(marks, expected):
    assert asks_for_gpu(marks) is expected
