"""`--quantize`: the base's linear layers in 8 or 4 bits, through bitsandbytes; what is trained stays float32.

    int8          one byte per number and 4 per row           (LLM.int8(), arXiv 2208.07339)
    nf4, fp4      half a byte and 0.016 for its scales         (QLoRA, arXiv 2305.14314)

Embeddings, norms, the output head and modules that are trained whole keep the compute dtype. Each process reads the
full-precision checkpoint a few rows at a time, quantises them and keeps its part: no full-precision weight is ever
whole in memory. Factors come from that same checkpoint, so one cache and one adapter serve every precision.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftType
from torch import Tensor, nn

from adapters.base import FactorConfig
from adapters.checkpoint_files import list_tensors
from launcher.models.suitable import is_plain, read_by_parents

OLDEST = (0, 50)  # of bitsandbytes: the first that multiplies by 4-bit weights with 8-bit scales on every backend
INTEGERS = ("I64", "I32", "I16", "BOOL")  # tables, such as DeepSeek-V4's of tokens and experts: never a packed weight
READABLE = ("F64", "F32", "F16", "BF16")  # as safetensors names them
# PEFT's methods that train on packed weights as on the same numbers unpacked. The layers of most others take the bytes
# for numbers: some fail, some train on them without a word, some write them.
ON_PACKED = (
    "beft", "boft", "c3a", "fourierft", "gralora", "hira", "ia3", "lily", "ln_tuning", "lora", "miss", "oft", "pvera",
    "randlora", "road", "shadow", "shira", "trainable_tokens", "vblora", "vera", "waveft",
)  # fmt: skip


ON_INT8 = ("loha", "lokr")  # as well
READ_4BIT_CLASS = ("shira",)  # PEFT's layers for these find the scales at bitsandbytes' Params4bit alone


def check_quantize(kind: str, *, cpu_offload: bool = False) -> None:
    """Whether this machine can quantise so. Raises ValueError with the remedy."""
    if kind == "none":
        return
    needed = ".".join(map(str, OLDEST))
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"--quantize {kind} needs bitsandbytes, which is not installed: pip install 'bitsandbytes>={needed}'"
        ) from None
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) < OLDEST:
        raise ValueError(
            f"--quantize {kind} needs bitsandbytes {needed} or newer, this is {found}: pip install -U bitsandbytes"
        )
    if cpu_offload:
        raise ValueError(
            f"--cpu-offload moves weights between GPU and main memory, but the scales of --quantize {kind} stay where "
            "they are: leave one of the two out"
        )


def check_method(adapter: Any, kind: str) -> None:
    """Whether the adapter of this PEFT config can be trained on such a base. Raises ValueError with the remedy."""
    if kind == "none" or adapter is None or isinstance(adapter, FactorConfig):
        return
    method, start = PeftType(adapter.peft_type).value.lower(), getattr(adapter, "init_lora_weights", True)
    able = (*ON_PACKED, *(ON_INT8 if kind == "int8" else ()))
    if method not in able:
        raise ValueError(
            f"--method {method} cannot be trained with --quantize {kind}: PEFT's layers for it take packed bytes for "
            f"numbers. Give --quantize none, or one of our methods, dora, rslora, {', '.join(able)}"
        )
    if method == "lora" and isinstance(start, str) and start != "gaussian":
        raise ValueError(
            f"LoRA's start {start} cannot be had with --quantize {kind}: it is made of the base's weights, or changes "
            "those. Give --method lora, which starts as the base, or --quantize none"
        )


def check_base(folder: Path, kind: str) -> None:
    """Whether the checkpoint is in full precision. Raises ValueError naming what it has instead.

    Without --quantize as well: transformers would load packed weights, which nothing here guards or knows how to shard.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (stored := settings.get("quantization_config")) is not None:
        method = stored.get("quant_method") or "some way" if isinstance(stored, dict) else "some way"
        raise ValueError(
            f"{folder} is quantised already ({method}, by its config.json), and adapters are made and merged with the "
            "full-precision weights: give that checkpoint, with --quantize nf4 or int8 to have it small in memory"
        )
    if kind == "none":
        return
    for info in list_tensors(folder).values():
        if len(info.shape) == 2 and info.dtype not in (*READABLE, *INTEGERS):
            raise ValueError(
                f"--quantize {kind}: {info.name} in {info.file} is stored as {info.dtype}; bitsandbytes quantises "
                f"{', '.join(READABLE)}: give the full-precision checkpoint"
            )


def linear_layers(base: Any, trained_whole: Iterable[str] = ()) -> dict[str, Any]:
    """The layers that are quantised, by name: linear ones but the output head and those that are trained whole.

    A layer of another class than torch's is quantised where it computes the same, and none whose weight other code
    reads. trained_whole: last parts of names of modules that keep their precision.
    """
    head, whole, read = base.get_output_embeddings(), set(trained_whole), read_by_parents(base)
    return {
        name: module
        for name, module in base.named_modules()
        if is_plain(module) and module is not head and name not in read and not whole & set(name.split("."))
    }


def check_share(base: Any, kind: str) -> None:
    """Raises ValueError where nothing of this model would be quantised."""
    if kind != "none" and not linear_layers(base):
        raise ValueError(
            f"--quantize {kind} finds no linear layer in a {type(base).__name__}, so it would save no memory: leave "
            "--quantize out"
        )


def quantised_share(model: Any) -> float:
    """What part of the base's numbers is quantised."""
    packed: list[Any] = [module for module in model.modules() if isinstance(module, Quantised)]
    return sum(layer.in_features * layer.out_features for layer in packed) / base_size(model)


def quantize_skeleton(base: Any, layers: Mapping[str, Any], kind: str, dtype: torch.dtype) -> None:
    """Put quantised layers on meta in the place of those linear layers, in place. `fill` gives them bytes."""
    from launcher.models.layers import LAYERS

    for name, module in layers.items():
        base.set_submodule(name, LAYERS[kind](module, kind, dtype))
    # What transformers sets: PEFT and save_pretrained go by it.
    base.is_quantized = True
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = kind == "int8", kind != "int8"


@runtime_checkable
class Quantised(Protocol):
    """A layer that makes its weight parameter from the checkpoint's weight: see `quantized_layers`."""

    in_features: int
    out_features: int
    from_shape: tuple[int, ...]  # of the checkpoint's weight

    def pack(self, stored: Any, device: torch.device) -> Tensor: ...

    def keep(self, filled: nn.Parameter) -> None: ...

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]: ...

    def saved(self, packed: Tensor) -> dict[str, Tensor]: ...


def keep_packing(model: nn.Module) -> None:
    """Keep bitsandbytes' own 4-bit layers from packing their bytes another way, in place, at the first pass without
    gradients: on a CPU with AVX512-BF16 they would, gradients are wrong afterwards, and some row widths crash."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def transformers_config(kind: str, dtype: torch.dtype, kept: Iterable[str]) -> dict[str, Any]:
    """The quantization_config with which transformers loads such weights from files; kept: linear layers in dtype."""
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    )
    return BitsAndBytesConfig(**how, llm_int8_skip_modules=sorted(kept)).to_dict()


def base_size(model: Any) -> int:
    """Numbers of the base, however they are cut or packed; what an adapter adds is not counted."""
    added = ("modules_to_save.", getattr(getattr(model, "base_model", None), "prefix", None) or "modules_to_save.")
    base = [p for name, p in model.named_parameters() if not any(part in name for part in added)]
    packed: list[Any] = [module for module in model.modules() if isinstance(module, Quantised)]
    unpacked = sum(layer.in_features * layer.out_features - size(layer.weight) for layer in packed)
    return sum(map(size, base)) + unpacked


def bytes_per_number(kind: str, dtype: torch.dtype, width: float) -> float:
    """Predicted bytes of one number of a weight with rows of that width, its scales included."""
    if kind == "int8":
        return 1 + 4 / width
    if kind in ("nf4", "fp4"):
        return 0.5 + 1 / 64 + 4 / (64 * 256)
    return dtype.itemsize


def size(parameter: Any) -> int:
    """Numbers in the whole parameter, however it is cut."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()
