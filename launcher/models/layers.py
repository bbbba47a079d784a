"""bitsandbytes' quantised linear layers, filled from a checkpoint's weight and sharded by rows like other parameters.

W (m, n) is out x in. Each layer has one frozen parameter, which the engines shard; its scales (0.016 bytes per number
in 4 bits, 4 bytes per row in 8 bits) stay whole on every process. `pack` reads W a few rows at a time: on a
CPU bitsandbytes needs 14 bytes (fp4: 25) of working memory per number it quantises, 228 MiB for a 4096 x 4096 weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, int8_vectorwise_quant, quantize_4bit, quantize_blockwise
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PIECE = 1 << 19  # numbers quantised at a time
# On a GPU, LLM.int8() (arXiv 2208.07339) multiplies columns with an activation above this in full precision.
OUTLIER = 6.0
STATE = (
    256  # bytes for bitsandbytes' JSON about a 4-bit weight (about 160), fixed so that a file's layout is known ahead
)


class FourBit(bnb.nn.Linear4bit):
    """NF4 or FP4 in blocks of 64 numbers whose scales take 8 bits (arXiv 2305.14314).

    weight is a column (m n / 2, 1) of bytes, uint8; fully_shard accepts frozen parameters of any dtype. It must not be
    viewed as bfloat16, as engines for floating-point numbers need it: bytes that look like NaN have been reported to
    come back changed (bitsandbytes#1945). Casting it destroys it.
    """

    def __init__(self, like: Any, kind: str, dtype: torch.dtype):
        self.transposed, self.from_shape = isinstance(like, Conv1D), tuple(like.weight.shape)
        m, n = self.from_shape[::-1] if self.transposed else self.from_shape
        super().__init__(n, m, False, dtype, quant_type=kind, device=torch.device("meta"))
        self.bias = like.bias
        self.kind = kind
        packed = torch.empty(-(-m * n // 2), 1, dtype=torch.uint8, device="meta")
        self.weight: Any = nn.Parameter(packed, requires_grad=False)
        # Otherwise, on a CPU with AVX512-BF16, the first pass without gradients repacks the bytes in place.
        self.support_avx512bf16_for_cpu = False

    def pack(self, stored: Any, device: torch.device) -> Tensor:
        """Pack a checkpoint's weight (a tensor or a slice of a file) into a column, and keep its scales.

        The bytes equal those that bitsandbytes makes from the whole weight at once.
        """
        column = torch.empty(self.weight.shape, dtype=torch.uint8, device=device)
        at = 0
        scales: list[Tensor] = []
        for rows in _by_rows(stored, self.transposed, device, self.compute_dtype):
            packed, state = quantize_4bit(rows, quant_type=self.kind)
            column[at : at + len(packed)] = packed
            at += len(packed)
            scales.append(state.absmax)
        absmax = torch.cat(scales)
        offset = absmax.mean()
        codes, second = quantize_blockwise(absmax - offset, blocksize=256)
        self.quant_state = QuantState(
            absmax=codes,
            shape=torch.Size((self.out_features, self.in_features)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=self.kind,
            dtype=self.compute_dtype,
            offset=offset,
            state2=second,
        )
        return column

    def keep(self, filled: nn.Parameter) -> None:
        """Store the whole packed column in the parameter class that PEFT knows. Under a sharding engine bitsandbytes
        makes one at each forward pass, from the layer's scales."""
        how: Any = {"quant_type": self.kind, "bnb_quantized": True}
        self.weight = bnb.nn.Params4bit(filled.data, quant_state=self.quant_state, module=self, **how)

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype, as safetensors names it, and shape of what `saved` returns."""
        blocks = -(-self.in_features * self.out_features // 64)
        return {
            "weight": ("U8", tuple(self.weight.shape)),
            "weight.absmax": ("U8", (blocks,)),
            "weight.quant_map": ("F32", (16,)),
            "weight.nested_absmax": ("F32", (-(-blocks // 256),)),
            "weight.nested_quant_map": ("F32", (256,)),
            f"weight.quant_state.bitsandbytes__{self.kind}": ("U8", (STATE,)),
        }

    def saved(self, packed: Tensor) -> dict[str, Tensor]:
        """The layer's tensors in a file for transformers, by end of name; `pack` has just returned packed."""
        assert self.quant_state is not None
        self.quant_state.dtype = self.compute_dtype
        parts = {f"weight.{name}": part for name, part in self.quant_state.as_dict(packed=True).items()}
        text = parts[name := f"weight.quant_state.bitsandbytes__{self.kind}"]
        spaces = torch.full((STATE - len(text),), ord(" "), dtype=torch.uint8)  # JSON, so they mean nothing
        return {"weight": packed, **parts, name: torch.cat([text, spaces])}


class EightBit(bnb.nn.Linear8bitLt):
    """LLM.int8(): weight (m, n) in int8, one scale per row.

    bitsandbytes' own layer keeps a second reference to the whole weight, so no engine can shard it (fully_shard:
    "'Parameter' object has no attribute 'CB'"). This one passes on its parameter's data at each forward pass.
    """

    def __init__(self, like: Any, kind: str, dtype: torch.dtype):
        self.transposed, self.from_shape = isinstance(like, Conv1D), tuple(like.weight.shape)
        m, n = self.from_shape[::-1] if self.transposed else self.from_shape
        super().__init__(n, m, False, has_fp16_weights=False, threshold=OUTLIER, device=torch.device("meta"))
        self.bias = like.bias
        self.compute_dtype = dtype  # adapters make their frozen maps in it
        self.weight: Any = nn.Parameter(torch.empty(m, n, dtype=torch.int8, device="meta"), requires_grad=False)

    def pack(self, stored: Any, device: torch.device) -> Tensor:
        """Pack a checkpoint's weight into int8 (m, n), and keep its scales."""
        whole = torch.empty(self.weight.shape, dtype=torch.int8, device=device)
        at = 0
        scales: list[Tensor] = []
        for rows in _by_rows(stored, self.transposed, device, torch.float16):
            whole[at : at + len(rows)], scale, _ = int8_vectorwise_quant(rows)
            at += len(rows)
            scales.append(scale)
        self.state.SCB = torch.cat(scales)
        return whole

    def keep(self, filled: nn.Parameter) -> None:
        """Store the whole weight in the parameter class that tells PEFT to multiply it by the scales."""
        self.weight = bnb.nn.Int8Params(filled.data, requires_grad=False, SCB=self.state.SCB)

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype, as safetensors names it, and shape of what `saved` returns."""
        m, n = self.weight.shape
        return {"weight": ("I8", (m, n)), "SCB": ("F32", (m,)), "weight_format": ("U8", ())}

    def saved(self, packed: Tensor) -> dict[str, Tensor]:
        """The layer's tensors in a file for transformers, by end of name; `pack` has just returned packed."""
        assert self.state.SCB is not None
        return {"weight": packed, "SCB": self.state.SCB, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def forward(self, x: Tensor) -> Tensor:
        # is_training: on a CPU, evaluation then uses the dequantised weight too. With the choice of outliers, the
        # loss of a sample would depend on the others in its batch (by 0.003). On a GPU the flag has no effect.
        self.state.is_training, self.state.CB = True, self.weight.data
        return bnb.matmul(x, self.weight, bias=self.bias, state=self.state)


def _no_cast_warning(record: logging.LogRecord) -> bool:
    """Whether a record is anything but bitsandbytes' warning of each int8 layer and pass that it casts to float16."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_cast_warning)
LAYERS: dict[str, Any] = {"int8": EightBit, "nf4": FourBit, "fp4": FourBit}


def _by_rows(stored: Any, transposed: bool, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """W (m, n) a few rows at a time: a multiple of 64 rows, so that no block with one scale is split."""
    shape = stored.get_shape() if hasattr(stored, "get_shape") else stored.shape
    m, n = shape[::-1] if transposed else shape
    step = max(PIECE // n // 64, 1) * 64
    for start in range(0, m, step):
        rows = stored[:, start : start + step].T if transposed else stored[start : start + step]
        yield rows.to(device, dtype).contiguous()
