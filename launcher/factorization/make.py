"""One weight: what its factors depend on, whether the cache has them, and how they are made.

Letters: W (m, n) = out x in, k = min(m, n), r the rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from adapters import METHODS, FactorConfig
from adapters.base import Factorization
from adapters.checkpoint_files import TensorInfo, list_tensors, open_tensor
from adapters.factors import Factors, base_fingerprint, probe_digest
from launcher.factorization import cache

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FactorRequest:
    """One weight to factor, as the headers of the checkpoint describe it."""

    module: str
    tensor: TensorInfo
    rank: int  # at most min(m, n); exactly that if the method chooses each weight's rank
    method: Factorization
    transposed: bool = False  # transformers' Conv1D stores W as (in, out)
    embedding: bool = False
    dtype: str = "float32"  # of the stored write map
    gradients: str | None = None  # digest of all that the gradient depends on, for factors that come from it

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n); a convolution is its output channels x everything else."""
        m, n = self.tensor.shape[0], prod(self.tensor.shape[1:])
        return (n, m) if self.transposed else (m, n)

    @property
    def needs_all(self) -> bool:
        """Whether the factors depend on more of W than its panel W[:, :r]."""
        return self.method.needs_whole_weight(embedding=self.embedding)

    @property
    def cost(self) -> float:
        """Multiplications that making the factors takes."""
        return self.method.cost(self.shape, self.rank, embedding=self.embedding)


class NoFactors(ValueError):
    """A weight that has no factors at this rank. The message says why; `remedy` adds what to do."""

    def __init__(self, module: str, message: str):
        super().__init__(message)
        self.module = module


class Factored(NamedTuple):
    """The cache entry of a module's factors."""

    key: str
    made: bool  # by this run; False: the cache had them
    rank: int
    seal: str  # of the factors that were made or compared with the weight (`cache.Entry.seal`)


def lookup(request: FactorRequest, folder: Path) -> str | None:
    """The key of a request whose factors are in the cache, from headers alone; None if they have to be made."""
    key = cache.recall(folder, _identity(request))
    return key if key and cache.find(folder, key) else None


def make(
    request: FactorRequest,
    folder: Path,
    device: torch.device | None = None,
    gradient: Callable[[], Tensor] | None = None,
) -> Factored:
    """Read what the factors depend on; make and store them unless the cache has factors of the same content.

    gradient returns the summed gradient of this weight, for factors that come from it.

    Raises NoFactors if the weight has none, and ValueError if the cache cannot be written; both name module,
    tensor and file.
    """
    recipe, (key, stored, probe) = _recipe(request), content(request)
    found = check(request, folder, key, device) if cache.find(folder, key) else None
    if found is None:
        W = stored.T if request.transposed else stored
        where = (
            f"{request.module} ({request.tensor.name} in {request.tensor.file}, {' x '.join(map(str, request.shape))})"
        )
        method, rank = request.method, None if request.method.chooses_rank else request.rank
        if not method.from_gradients:
            panel = method.panel(W, rank).to(device)
        elif gradient is not None:
            panel = gradient().to(device)
        else:  # requested while the model is being built
            raise ValueError(
                f"{where}: its factors are gone from the cache, and only a new start can make them: run this again"
            )

        def rows(indices: Tensor) -> Tensor:
            return W[indices.cpu().long()].to(panel.device)

        try:
            factors = method.factors(panel, rank, rows=rows, embedding=request.embedding)
        except ValueError as error:
            raise NoFactors(request.module, f"{where}: {error}") from error
        about = recipe | {
            "name": request.module,
            "tensor": request.tensor.name,
            "file": str(request.tensor.file),
            "rank": len(factors.values),
            "residual": method.residual(panel, factors, embedding=request.embedding),
            "norms": {
                "panel": _norm(panel),
                "write": float(factors.write.norm()),
                "read": float(factors.read.norm()),
            },
            "device": torch.cuda.get_device_name(panel.device) if panel.is_cuda else "cpu",
        }
        write = factors.write.to(getattr(torch, request.dtype), memory_format=torch.contiguous_format)
        factors = factors._replace(write=write, probe=probe)  # frees the wide one before the file is written
        if why := compare(request, W, factors):  # it would be refused at the next start
            raise NoFactors(request.module, f"{where}: its factors are too inaccurate: {why}")
        try:
            seal = cache.store(folder, key, factors, about).seal
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        _note_compared(folder, key, seal)
    cache.remember(folder, _identity(request), key)
    return found or Factored(key, True, len(factors.values), seal)


def content(request: FactorRequest) -> tuple[str, Tensor, Tensor]:
    """The key of the factors, the part of the stored weight that they depend on, and the weight's probe."""
    opened = _open_matrix(request.tensor)
    if request.needs_all:
        stored = opened[:].contiguous()
    else:  # a view of the file: the disk reads whole pages anyway, but only r columns are copied to memory
        stored = opened[: request.rank] if request.transposed else opened[:, : request.rank]
    # the probe is part of the key: it is stored with the factors, and the panel does not determine it
    probe = probe_digest(_Turned(opened) if request.transposed else opened, request.shape)
    return cache.content_key(_recipe(request), stored, probe), stored, probe


def read_ahead(info: TensorInfo, leaving: Callable[[], bool] = lambda: False) -> None:
    """Read a whole tensor into the system's page cache. Errors are ignored here: `make` raises them again.

    All of it, because rows are one or two pages long: a slice of columns touches nearly every page, and sequential
    reading is faster than skipping (4096 x 4096, r = 64, row by row: 2.3 times fewer bytes in 14 times the time).
    read() keeps more requests queued at the disk than page faults in a memory map do.
    """
    with suppress(Exception), open(info.file, "rb", buffering=0) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        first, last = json.loads(file.read(header_bytes))[info.name]["data_offsets"]
        file.seek(8 + header_bytes + first)
        block = memoryview(bytearray(READ_BYTES))
        while (left := 8 + header_bytes + last - file.tell()) > 0 and file.readinto(block[:left]) and not leaving():
            pass


def factors_of(request: FactorRequest, folder: Path, rows: slice = slice(None), seal: str | None = None) -> Factors:
    """Verified factors, with these rows of `write`. This process makes factors again that are damaged or gone.

    seal: of the factors that a rank has compared with the weight, or made. Others are compared here.
    """
    for _ in range(3):  # another job may prune the cache between making and reading
        key = lookup(request, folder)
        how = make(request, folder) if key is None else None if seal else check(request, folder, key)
        key, seal = (how.key, how.seal) if how else (key, seal)
        if key and seal and (found := cache.load(folder, key, rows, seal)):
            return found
        seal = None  # damaged, gone, or replaced since it was compared
    raise ValueError(
        f"the factors of {request.module} in {folder} are damaged or gone each time after they are made: check that "
        "disk, or give another folder with --cache DIR"
    )


def check(request: FactorRequest, folder: Path, key: str, device: torch.device | None = None) -> Factored | None:
    """Compare cached factors with their weight; None if they are gone, or damaged or not its factors (set aside).

    In a cache that users share, a well-formed file may come from anybody, who can also compute its checksums. So this
    user compares every file once, and notes its seal where no other user can. Also None if the weight has changed
    although its file's size and time have not: it has another key.
    """
    found: list[Factored] = []
    compared = cache.recall(folder, _comparison(key), own=True)

    def misfit(factors: Factors, entry: cache.Entry) -> str | None:
        known = compared == {"key": key, "seal": entry.seal}
        why = shape_misfit(request, factors) or _not_of(request, factors, device, known=known)
        if why is None:
            found.append(Factored(key, False, len(factors.values), entry.seal))
            if not known:
                _note_compared(folder, key, entry.seal)
        return why if why and content(request)[0] == key else None

    cache.load(folder, key, misfit=misfit)
    return found[-1] if found else None


def _comparison(key: str) -> dict[str, Any]:
    return {"compared": key, "user": os.getuid()}


def _note_compared(folder: Path, key: str, seal: str) -> None:
    """Note that this user has made the factors with this seal, or compared them with their weight."""
    with suppress(ValueError):  # a cache that this user may only read: compared again at the next start
        cache.remember(folder, _comparison(key), {"key": key, "seal": seal}, durable=False)


def _not_of(
    request: FactorRequest, factors: Factors, device: torch.device | None = None, *, known: bool = False
) -> str | None:
    """Why these factors, of the right shapes, are not those of the request's weight; None if they are.

    known: this user has compared them before, so only whether the weight is still the same is checked.
    """
    opened = _open_matrix(request.tensor)
    if not torch.equal(probe_digest(_Turned(opened) if request.transposed else opened, request.shape), factors.probe):
        return "it was made from another weight"
    if known:
        return None
    if request.method.from_gradients:
        return "factors that come from gradients cannot be compared with the weight, and another user may have made it"
    W = opened[:]  # a map of the file: only what is compared is read
    if request.needs_all and device is not None and device.type != "cpu":
        factors = Factors(*(part.to(device) for part in factors))
    return compare(request, W.T if request.transposed else W, factors)


def compare(request: FactorRequest, W: Tensor, factors: Factors) -> str | None:
    """Why these factors of the right shapes are not those of W (m, n); None if no check fails."""
    extremes = [torch.stack(part.aminmax()) for part in (factors.write, factors.read, factors.values)]
    if not all(bool(torch.isfinite(pair).all()) for pair in extremes):
        return "it has NaN or infinite numbers"
    return request.method.misfit(W, factors, embedding=request.embedding)


def fingerprint(tensors: Mapping[str, TensorInfo], folder: Path) -> str:
    """The base's fingerprint (`adapters.factors.base_fingerprint`) from its files.

    The cache keeps the digests of a file with its size and modification time, so a second call reads no weights.
    """
    digests: list[str] = []
    matrices = [info for info in tensors.values() if len(info.shape) >= 2]
    for file in sorted({info.file for info in matrices}):
        inside = sorted(info for info in matrices if info.file == file)
        identity = {"probes": [info.name for info in inside], **_file_identity(file)}
        if (known := cache.recall(folder, identity)) is None:
            probes = [
                probe_digest(_open_matrix(info), (info.shape[0], info.shape[1] * prod(info.shape[2:])))
                for info in inside
            ]
            known = [bytes(probe.tolist()).hex() for probe in probes]
            cache.remember(folder, identity, known)
        digests += known
    return base_fingerprint(torch.tensor(list(bytes.fromhex(digest))) for digest in digests)


class _Turned:
    """The transpose of a slice of the file."""

    def __init__(self, stored: Any):
        self.stored = stored

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        rows, columns = place
        return self.stored[columns, rows].T


def _open_matrix(info: TensorInfo) -> Any:
    """Slices of a tensor (a, b) as stored; a convolution is read whole, as a matrix of a rows."""
    return open_tensor(info) if len(info.shape) == 2 else open_tensor(info)[:].flatten(1)


def shape_misfit(request: FactorRequest, factors: Factors) -> str | None:
    """Why the shapes of cached factors, all rows of them, are not those of this weight's; None if they are."""
    (m, n), r = request.shape, len(factors.values)
    out = n if request.embedding else m
    if r != request.rank and not (request.method.chooses_rank and 0 < r <= min(m, n)):
        return f"it has rank {r}, expected {request.rank}"
    write, read = tuple(factors.write.shape), tuple(factors.read.shape)
    if write != (out, r) or read not in ((r,), (r, r), (r, n)) or factors.pivots.shape != (r,):
        return f"its maps have the shapes {write} and {read}"
    if not bool(((factors.pivots >= 0) & (factors.pivots < max(m, n))).all()):
        return "its pivots are not rows of the weight"
    return None


def compare_with_base(factors: Factors, entry: cache.Entry) -> tuple[bool, str | None]:
    """Whether the base that a cached file names is there, unchanged; and why the factors are not its weight's."""
    try:
        request = _request_of(entry.about)
        if request is None or content(request)[0] != entry.key:
            return False, None
    except (ValueError, TypeError, KeyError, AttributeError, OSError, SafetensorError):  # a header may say anything
        return False, None
    return True, shape_misfit(request, factors) or _not_of(request, factors)


def _request_of(about: Mapping[str, Any]) -> FactorRequest | None:
    """The request that a cached file's header describes; None if this version has no such factors or tensor."""
    file = Path(about["file"])
    for config in METHODS.values():
        how: Any = config().factorization() if issubclass(config, FactorConfig) else None
        if how is None or how.from_gradients or not file.is_file():
            continue
        own = {each.name: about[each.name] for each in dataclasses.fields(how) if each.name in about}
        how = dataclasses.replace(how, **own)
        info = {each.name: each for each in list_tensors(file.parent).values()}.get(about["tensor"])
        if info and all(about.get(name) == value for name, value in how.recipe().items()):
            rank = min(info.shape[0], prod(info.shape[1:])) if how.chooses_rank else about["rank"]
            told = {name: about[name] for name in ("transposed", "embedding", "dtype")}
            return FactorRequest(about["name"], info, rank, how, **told)
    return None


def remedy(refused: Mapping[str, str]) -> str:
    """The error for weights without factors, from the reasons by module."""
    shown = [*list(refused.values())[:5], *([f"and {len(refused) - 5} more"] if len(refused) > 5 else [])]
    several = f"{len(refused)} weights have no factors: " if len(refused) > 1 else ""
    them = "the layer" if len(refused) == 1 else "these layers"
    if any("are NaN or infinite" in why for why in refused.values()):  # which the base itself would compute with
        return f"{several}{'; '.join(shown)}; the checkpoint is damaged: fetch it again, or ask who made it"
    return f"{several}{'; '.join(shown)}; leave {them} out with --exclude {' '.join(refused)}, or lower --rank"


def _recipe(request: FactorRequest) -> dict[str, Any]:
    """All that decides the factors besides the weight. Changing what it returns invalidates every cache."""
    recipe = {name: getattr(request, name) for name in ("rank", "embedding", "transposed", "dtype")}
    if request.method.from_gradients:  # equal weights at two places have different gradients
        recipe |= {"gradients": request.gradients, "module": request.module}
    return recipe | request.method.recipe() | {"shape": list(request.tensor.shape)}


def _identity(request: FactorRequest) -> dict[str, Any]:
    return _recipe(request) | {"tensor": request.tensor.name, **_file_identity(request.tensor.file)}


def _file_identity(file: Path) -> dict[str, Any]:
    stat = os.stat(file)
    return {"file": os.path.realpath(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _norm(W: Tensor) -> float:
    """Frobenius norm, by blocks of rows: no float32 copy of W."""
    wide = torch.promote_types(W.dtype, torch.float32)
    return float(torch.stack([rows.to(wide).norm() for rows in W.split(512)]).norm())
