"""`--quantize`: the base's linear layers in 8 or 4 bits, with bitsandbytes; trained numbers stay float32.

    int8          one byte per number and 4 per row           (LLM.int8(), arXiv 2208.07339)
    nf4, fp4      half a byte and 0.016 for its scales         (QLoRA, arXiv 2305.14314)

Embeddings, norms, the output head and modules that are trained whole keep the compute dtype. Each process reads the
full-precision checkpoint a few rows at a time, quantises them and keeps its part, so no full-precision weight is ever
in memory as a whole. Factors come from the same checkpoint, so one cache and one adapter work for every precision.
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
from adapters.checkpoint_files import config_file, list_tensors
from launcher.models.suitable import is_plain, read_by_parents

OLDEST = (0, 50)  # bitsandbytes: the first version whose 4-bit product supports 8-bit scales on every backend
INTEGERS = ("I64", "I32", "I16", "BOOL")  # tables (DeepSeek-V4 maps tokens to experts), never a packed weight
READABLE = ("F64", "F32", "F16", "BF16")  # as safetensors names them
# PEFT's methods that train on packed weights with the same result as on the unpacked ones. Layers of most others use
# the bytes as if they were numbers: some fail, some train on them without an error, some overwrite them.
ON_PACKED = (
    "beft", "boft", "c3a", "fourierft", "gralora", "hira", "ia3", "lily", "ln_tuning", "lora", "miss", "oft", "pvera",
    "randlora", "road", "shadow", "shira", "trainable_tokens", "vblora", "vera", "waveft",
)  # fmt: skip


ON_INT8 = ("loha", "lokr")  # in addition
READ_4BIT_CLASS = ("shira",)  # PEFT's layers of these read the scales from bitsandbytes' Params4bit only


def check_quantize(kind: str, *, cpu_offload: bool = False) -> None:
    """Check that this machine can quantise like this. Raises ValueError with the remedy."""
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
    """Check that the adapter of this PEFT config can be trained on such a base. Raises ValueError with the remedy."""
    if kind == "none" or adapter is None or isinstance(adapter, FactorConfig):
        return
    if (reason := getattr(adapter, "not_on_quantised", None)) is not None:  # a method of ours beside FactorConfig's
        if reason:
            raise ValueError(
                f"--method {adapter.method} cannot be trained with --quantize {kind}: {reason}. Give --quantize none"
            )
        return
    method, start = PeftType(adapter.peft_type).value.lower(), getattr(adapter, "init_lora_weights", True)
    able = (*ON_PACKED, *(ON_INT8 if kind == "int8" else ()))
    if method not in able:
        raise ValueError(
            f"--method {method} cannot be trained with --quantize {kind}: PEFT's layers for it use packed bytes as "
            f"if they were numbers. Give --quantize none, or one of our methods, dora, rslora, {', '.join(able)}"
        )
    if method == "lora" and isinstance(start, str) and start != "gaussian":
        raise ValueError(
            f"init_lora_weights={start} is not supported with --quantize {kind}: it is computed from the base's "
            "weights, or changes them. Give --method lora, which starts at zero, or --quantize none"
        )


def check_base(folder: Path, kind: str) -> None:
    """Check that the checkpoint is in full precision. Raises ValueError naming the format that it has instead.

    Checked without --quantize too: transformers would load packed weights, which this project can neither check nor
    shard.
    """
    settings = json.loads(config_file(folder).read_text(encoding="utf-8"))
    if (stored := settings.get("quantization_config")) is not None:
        method = stored.get("quant_method") or "some way" if isinstance(stored, dict) else "some way"
        raise ValueError(
            f"{folder} is quantised already ({method}, by its config.json), but adapters are made and merged with "
            "full-precision weights: give the full-precision checkpoint, with --quantize nf4 or int8 to save memory"
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
    """The layers to quantise, by name: all linear layers except the output head and modules that are trained in full.

    A layer of a class other than torch's is included if it computes the same product, and left out if other code reads
    its weight. trained_whole: last parts of the names of modules that keep their precision.
    """
    head, whole, read = base.get_output_embeddings(), set(trained_whole), read_by_parents(base)
    return {
        name: module
        for name, module in base.named_modules()
        if is_plain(module) and module is not head and name not in read and not whole & set(name.split("."))
    }


def check_share(base: Any, kind: str) -> None:
    """Raises ValueError if no layer of this model would be quantised."""
    if kind != "none" and not linear_layers(base):
        raise ValueError(
            f"--quantize {kind} finds no linear layer in a {type(base).__name__}, so it would save no memory: leave "
            "--quantize out"
        )


def quantised_share(model: Any) -> float:
    """The share of the base's numbers that is quantised."""
    packed: list[Any] = [module for module in model.modules() if isinstance(module, Quantised)]
    return sum(layer.in_features * layer.out_features for layer in packed) / base_size(model)


def quantize_skeleton(base: Any, layers: Mapping[str, Any], kind: str, dtype: torch.dtype) -> None:
    """Replace those linear layers by quantised ones on the meta device, in place. `fill` reads their values."""
    from launcher.models.layers import LAYERS

    for name, module in layers.items():
        base.set_submodule(name, LAYERS[kind](module, kind, dtype))
    # transformers sets these, and PEFT and save_pretrained read them.
    base.is_quantized = True
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = kind == "int8", kind != "int8"


@runtime_checkable
class Quantised(Protocol):
    """A layer that packs the checkpoint's weight into its own parameter: see `layers.py`."""

    in_features: int
    out_features: int
    from_shape: tuple[int, ...]  # of the checkpoint's weight

    def pack(self, stored: Any, device: torch.device) -> Tensor: ...

    def keep(self, filled: nn.Parameter) -> None: ...

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]: ...

    def saved(self, packed: Tensor) -> dict[str, Tensor]: ...


def keep_packing(model: nn.Module) -> None:
    """Stop bitsandbytes' own 4-bit layers from repacking their bytes, in place, at the first pass without gradients.

    They do so on a CPU with AVX512-BF16; gradients are wrong afterwards, and some row widths crash.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def transformers_config(kind: str, dtype: torch.dtype, kept: Iterable[str]) -> dict[str, Any]:
    """The quantization_config with which transformers loads such weights; kept: linear layers that stay in dtype."""
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
    """How many numbers the base has, sharded and packed ones included, without those of an adapter."""
    added = ("modules_to_save.", getattr(getattr(model, "base_model", None), "prefix", None) or "modules_to_save.")
    base = [p for name, p in model.named_parameters() if not any(part in name for part in added)]
    packed: list[Any] = [module for module in model.modules() if isinstance(module, Quantised)]
    unpacked = sum(layer.in_features * layer.out_features - size(layer.weight) for layer in packed)
    return sum(map(size, base)) + unpacked


def bytes_per_number(kind: str, dtype: torch.dtype, width: float) -> float:
    """Predicted bytes per number of a weight with rows of this width, scales included."""
    if kind == "int8":
        return 1 + 4 / width
    if kind in ("nf4", "fp4"):
        return 0.5 + 1 / 64 + 4 / (64 * 256)
    return dtype.itemsize


def size(parameter: Any) -> int:
    """How many numbers the whole parameter has, even if it is sharded."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()
