"""One adapter on one layer: the frozen maps of a weight and the trained core between them.

Shapes: y0 (..., out) the base layer's output, r the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import FactorConfig
from adapters.factors import Factors
from adapters.functions import add_rows, in_blocks, lower_linear, take_rows


class FactorMap(nn.Module):
    """One adapter on one layer: read r numbers from y0, multiply them by the trained core, write them back.

    core, of the config's core_shape, is float32 and the only trained parameter. write (out, r) and read are frozen
    parameters, so that sharding engines shard them; they follow from the base and are in no state dict. pivots, values
    and probe identify what they follow from.
    """

    derived: ClassVar[tuple[str, ...]] = ("write", "read")  # left out of state dicts

    core: nn.Parameter
    write: nn.Parameter
    read: nn.Parameter
    pivots: Tensor
    values: Tensor
    probe: Tensor
    rows: Tensor

    def __init__(
        self, out: int, r: int, config: FactorConfig, dtype: torch.dtype, device: torch.device, *, embedding: bool
    ):
        super().__init__()
        self.config, self.scale, self.embedding = config, config.scale, embedding
        wide = torch.promote_types(dtype, torch.float32)
        place = torch.device("cpu") if device.type == "meta" else device
        self.core = nn.Parameter(torch.zeros(config.core_shape(r), device=device))
        self.write = nn.Parameter(torch.empty(out, r, dtype=dtype, device=device), requires_grad=False)
        self.read = nn.Parameter(
            torch.empty((r,) if config.through_write else (r, r), dtype=wide, device=device), False
        )
        self.register_buffer("pivots", torch.zeros(r, dtype=torch.int32, device=place))
        self.register_buffer("values", torch.zeros(r, device=place))
        self.register_buffer("probe", torch.zeros(32, dtype=torch.uint8, device=place))
        self.register_buffer("rows", torch.arange(r, device=place), persistent=False)  # entries of y0 that are read
        self._made_from: bytes | None = None
        self._seen: Tensor | None = None

    @property
    def factors(self) -> Factors:
        """The frozen maps and what they follow from."""
        return Factors(*(getattr(self, name).detach() for name in Factors._fields))

    def set_factors(self, factors: Factors) -> None:
        """Set the two maps and what they follow from; the core is not changed."""
        device = self.probe.device
        self.write = nn.Parameter(factors.write.to(device, self.write.dtype).contiguous(), requires_grad=False)
        self.read = nn.Parameter(factors.read.to(device, self.read.dtype), requires_grad=False)
        self.set_origin(factors)

    def start(self, name: str) -> None:
        """Set the core of the module of this name to what training starts from."""
        self.core.data = self.starting_core(name).to(self.core)

    def starting_core(self, name: str) -> Tensor:
        """What training starts from, whole and on the CPU."""
        if not self.config.init_weights:
            return self.config.random_core(len(self.values), name)
        return self.config.start_core(self.values.cpu())

    def set_origin(self, factors: Factors) -> None:
        """Set what the maps follow from, for maps that are filled separately, shard by shard."""
        device = torch.device("cpu") if self.probe.is_meta else self.probe.device  # PEFT moves 8-bit layers whole
        for name in ("pivots", "values", "probe"):
            setattr(self, name, getattr(factors, name).to(device))
        self.rows = torch.arange(len(self.pivots), device=device) if self.embedding else self.pivots.long()
        self._made_from, self._seen = self._origin(), self.probe

    @property
    def stale(self) -> bool:
        """Whether a loader replaced pivots or probe, so that the maps no longer belong to them."""
        if self._seen is not self.probe:
            if self.write.is_meta or self._made_from != self._origin():
                return True
            self._seen = self.probe
        return False

    def same_directions(self, other: FactorMap) -> bool:
        """Whether the maps of both follow from the same weight, pivots and settings."""
        return (
            self.config.factorization() == other.config.factorization()
            and (self.write.shape, self.write.dtype) == (other.write.shape, other.write.dtype)
            and torch.equal(self.pivots, other.pivots)
            and torch.equal(self.probe, other.probe)
        )

    def _origin(self) -> bytes:
        return torch.cat([self.pivots.cpu().view(torch.uint8), self.probe.cpu()]).numpy().tobytes()

    def forward(self, y0: Tensor, bias: Tensor | None, onto: Tensor, cores: Tensor | None = None) -> Tensor:
        """onto + Write (scale core * Read (y0 - bias)); y0 (..., out) is the base output with its bias.

        cores (rows, *core_shape), with the scale in them, replace the layer's own core: y0 is then (rows, tokens, out).
        y0 is not overwritten, which would save a tensor of its size: other code may keep it (selective activation
        checkpointing does), and on a CPU the step was not faster.
        """
        if self.config.through_write:
            offset = None if bias is None else -torch.mv(self.write.T, bias)
            h = F.linear(y0, self.write.T, offset).to(self.read.dtype) * self.read
        else:
            if onto is y0:
                onto, taken = take_rows(y0, self.rows)
            else:
                taken = y0.index_select(-1, self.rows)
            if bias is not None:
                taken = taken - bias[self.rows]
            h = lower_linear(taken.to(self.read.dtype), self.read)
        if cores is None:
            core = self.scaled_core(h.dtype)
        else:  # a vector core is the same for all tokens of its row
            core = (cores if self.core.ndim == 2 else cores.unsqueeze(1)).to(h.dtype)
        h = self.config.multiply(h, core).to(self.write.dtype)
        if y0.dtype != self.write.dtype:  # under autocast
            return onto + F.linear(h, self.write).to(onto.dtype)
        at_full_rank = len(self.rows) == onto.shape[-1] and not self.config.through_write
        if at_full_rank and in_blocks(h):  # then Write is triangular too
            return add_rows(onto, lower_linear(h, self.write, self.rows).to(onto.dtype), self.rows)
        return torch.addmm(onto.reshape(-1, onto.shape[-1]), h.reshape(-1, h.shape[-1]), self.write.T).view(onto.shape)

    def scaled_core(self, dtype: torch.dtype) -> Tensor:
        """scale * core; the core itself if scale is 1."""
        core = self.core.to(dtype)
        return core if self.scale == 1 else self.scale * core

    def train(self, mode: bool = True) -> Any:
        """Keep the core in float32: TRL casts trained parameters on a 4-bit base to bf16, without calling any hook."""
        if self.core.element_size() < 4:
            self.core.data = self.core.data.float()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Only write takes a narrower dtype (half(), PEFT's casts); core, read and what is saved stay float32."""

        def apply(old: Tensor) -> Tensor:
            new = fn(old)
            return old.to(new.device) if new.element_size() < old.element_size() and old is not self.write else new

        super()._apply(apply, recurse)
        if self.write.is_meta:
            self._made_from = None  # moved to meta: the maps have to be made again
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.derived:
            if not getattr(getattr(self, name), "_fsdp_flattened", False):  # FSDP1 requires all of its parameters here
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "values")
        if saved is not None:
            if saved.shape != self.values.shape:
                raise ValueError(
                    f"{prefix.rstrip('.')} was saved at rank {len(saved)} but has rank {len(self.values)} here: the "
                    f"config's r is not the saved {len(saved)}, or this is another base model"
                )
            self._seen = None  # loading in place keeps the buffer's identity
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing: list[str] = rest[2]
        missing[:] = [name for name in missing if name not in [prefix + each for each in self.derived]]
