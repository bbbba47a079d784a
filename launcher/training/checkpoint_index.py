"""The schema of a checkpoint's index, and whether its parts agree with each other. Reads no other file.

A checkpoint may come from anywhere (--resume PATH), so nothing in it is trusted: names are those that `save` gives,
numbers have bounds, and the pieces of a tensor are its rows, each once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

STRICT = ConfigDict(strict=True, frozen=True)  # text is not accepted as a number
Count = Annotated[int, Field(ge=0, le=10**15)]
Step = Annotated[int, Field(ge=0, lt=10**12)]
FileName = Annotated[str, Field(pattern=r"^rank-[0-9]{5,9}\.safetensors\z")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass
class TrainingState:
    """The progress of a run: a checkpoint holds this, the trained parameters and the optimizer's state."""

    step: Step = 0
    tokens: Count = 0
    best_loss: float = math.inf
    best_step: Step = 0
    worse: Count = 0  # evaluations since the best one
    evaluated: Annotated[int, Field(ge=-1, lt=10**12)] = -1  # the step of the last evaluation
    held_out: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?\z")] = ""  # digest of the samples that it used

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


class EventsSeal(BaseModel):
    """What events.jsonl was when the checkpoint was made."""

    model_config = STRICT
    bytes: Count
    sha256: Sha256


class Meta(BaseModel):
    """What a run records about itself."""

    model_config = STRICT
    identity: dict[str, Any]
    progress: TrainingState
    world_size: Annotated[int, Field(ge=1, le=10**7)]
    events: EventsSeal


class PieceEntry(BaseModel):
    """Rows start .. start + rows of a tensor, in one file."""

    model_config = STRICT
    file: FileName
    start: Count
    rows: Count


class TensorEntry(BaseModel):
    """A whole tensor, and the pieces that hold it."""

    model_config = STRICT
    shape: Annotated[list[Count], Field(max_length=8)]
    dtype: str
    pieces: Annotated[list[PieceEntry], Field(min_length=1)]


class Index(BaseModel):
    """index.json."""

    model_config = STRICT
    format: Annotated[int, Field(ge=1)]
    step: Step
    meta: Meta
    files: dict[FileName, Sha256]
    tensors: dict[str, TensorEntry]


class Format(BaseModel):
    """The one part of index.json that every version has."""

    model_config = STRICT
    format: Annotated[int, Field(ge=1)]


def read_format(raw: bytes) -> int:
    """The number of the format. Raises ValueError if there is none."""
    return _checked(Format, raw).format


def read_index(raw: bytes) -> Index:
    """The index in these bytes of JSON. Raises ValueError naming what is missing, mistyped or contradicts the rest."""
    index = _checked(Index, raw)
    if index.meta.progress.step != index.step:
        raise ValueError(f"its step is {index.step}, that of its progress {index.meta.progress.step}")
    for name, tensor in index.tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has the dtype {tensor.dtype!r}")
        rows, end = tensor.shape[0] if tensor.shape else 1, 0
        for piece in sorted(tensor.pieces, key=lambda piece: piece.start):
            if piece.file not in index.files:
                raise ValueError(f"{name} lies in {piece.file}, which has no checksum")
            if piece.start != end:
                raise ValueError(f"its pieces of {name} leave out or repeat rows between {end} and {piece.start}")
            end += piece.rows
        if end != rows:
            raise ValueError(f"its pieces of {name} end at row {end} of {rows}")
    return index


def _checked(model: type[Any], raw: bytes) -> Any:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
