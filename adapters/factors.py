"""What all methods share: the frozen factors of a weight, the update they carry, and the digests that identify a base.

Letters: W (m, n) = out x in, k = min(m, n), r <= k the rank, y0 = W x.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROBE_BLOCKS, PROBE_WIDTH = 64, 16


class Factors(NamedTuple):
    """The frozen maps of one weight, and what lets a reload rebuild and check them; LU: loldu.py, SVD: svd.py."""

    write: Tensor  # (out, r) maps the core's r numbers to the output
    read: Tensor  # LU: (r, r), applied to r entries of the base layer's output; SVD: (r,), scales write^T y0
    pivots: Tensor  # (r,) int32; LU: the chosen rows of W, in order of elimination; SVD: a positive entry of each u_i
    values: Tensor  # (r,) float32; LU: d_r; SVD: s_r
    probe: Tensor  # (32,) uint8, digest of the whole weight (`probe_digest`)


def lora_pair(weight: Tensor, factors: Factors, core: Tensor, *, embedding: bool = False) -> tuple[Tensor, Tensor]:
    """The update as an ordinary low-rank product B A: A (r, n), B (m, r) with B A = Write core U_r (SVD: V_r^T).

    weight is the unmerged W (m, n); core, (r,) or (r, r), includes the scale. For an embedding A is (r, m) and B is
    (n, r), as PEFT's LoRA has them: the update is (B A)^T.
    """
    outputs = (weight.T if embedding else weight).to(factors.read)  # a row for each output feature
    write, core = factors.write.to(outputs), core.to(outputs)
    if factors.read.ndim == 1:
        A = factors.read[:, None] * (write.T @ outputs)
    else:
        A = factors.read @ (outputs[: len(factors.read)] if embedding else outputs[factors.pivots.long()])
    return A, write * core if core.ndim == 1 else write @ core


def delta_weight(weight: Tensor, factors: Factors, core: Tensor, *, embedding: bool = False) -> Tensor:
    """The adapter's update of the unmerged W (m, n), in the precision of the read map."""
    A, B = lora_pair(weight, factors, core, embedding=embedding)
    return (B @ A).T if embedding else B @ A


def fresh_draws() -> torch.Generator:
    """Unpredictable random numbers, which do not change the state of torch's own generator."""
    draw = torch.Generator()
    draw.seed()
    return draw


def signs(*shape: int) -> Tensor:
    """Fresh random signs, 1.0 or -1.0."""
    return torch.randint(0, 2, shape, generator=fresh_draws()) * 2.0 - 1


def probe_digest(weight: Any, shape: Sequence[int]) -> Tensor:
    """Digest (32,) uint8 of a tensor's shape and 64 fixed blocks of up to 16 numbers, spread over rows and columns.

    weight is a tensor or a safetensors slice of that shape. The numbers are hashed as float32, so a weight stored as
    float16 and loaded as float32 keeps its digest; one rounded to another precision does not.
    """
    if len(shape) < 2:
        blocks = weight[:].reshape(1, -1)
    else:
        count, width = shape[0], min(PROBE_WIDTH, shape[1])
        places = [
            (b * (count - 1) // (PROBE_BLOCKS - 1), int(b * 0.6180339887 % 1 * (shape[1] - width + 1)))
            for b in range(PROBE_BLOCKS)
        ]
        blocks = torch.stack([weight[row : row + 1, at : at + width].reshape(-1) for row, at in places])
    payload = repr(tuple(shape)).encode() + blocks.detach().float().cpu().contiguous().numpy().tobytes()
    return torch.frombuffer(bytearray(hashlib.sha256(payload).digest()), dtype=torch.uint8)


def base_fingerprint(digests: Iterable[Tensor]) -> str:
    """One hex digest of a base model from the probe digests of its tensors with two or more dimensions.

    Independent of names, order and repeats (tied weights), so a model in memory and its files give the same.
    """
    return hashlib.sha256(b"".join(sorted({bytes(digest.tolist()) for digest in digests}))).hexdigest()
