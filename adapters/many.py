"""Many adapters of one base in one batch: frozen maps once, a table of cores, an adapter for each row or token.

    many = ManyAdapters(model)                     # a loaded model; it is not changed
    many.add("anna", "adapters/anna")              # an adapter folder, even while others are in use
    with many.rows(["anna", None, "ben"]):         # a name for each row of the batch; None is the base
        model.generate(**batch)
    with many.packed([("anna", 12), ("ben", 1)]):  # one row of tokens: 12 of anna's, then one of ben's
        model(**packed)

Adapters whose maps follow from the same weights, pivots and settings are a group: the maps are in memory once, and an
adapter is one row of a table, its numbers and nothing else. Row 0 is zero: that is the base, whose output plus zero is
the same bit for bit. A batch with several groups (ranks, methods) passes through the maps of each, with row 0 if a
row of the batch belongs to another. LoRA adapters (many_lora.py) bring their own maps and run one after the other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load, save_file
from torch import Tensor, nn

from adapters.base import FactorConfig
from adapters.factor_map import FactorMap
from adapters.layer import FactorLayer
from adapters.many_files import Files, Layout, finite_row, layout_of
from adapters.many_lora import LoraWeights, lora_weights, lora_weights_of_maps
from adapters.many_table import Group
from adapters.many_tensors import Parts, by_module, module_of, refuse_unknown

LAYOUTS = 16  # of files, that are remembered


@dataclass(frozen=True, eq=False)
class Adapter:
    """Where one adapter is: a row of a group's table, or LoRA weights by module."""

    name: str
    group: Group | None = None
    row: int = 0
    lora: LoraWeights | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """What one group, or one LoRA adapter, does in a batch. index: rows of the table (leading part of y0's shape)."""

    shape: tuple[int, ...]  # of the batch: (rows,) or (1, tokens)
    index: Tensor  # (rows or tokens,): of the table; for LoRA the places that the adapter is for
    group: Group | None = None
    table: Tensor | None = None
    lora: LoraWeights | None = None


class ManyAdapters:
    """The adapters of one model. Hooks on its layers add the updates; outside of `rows` and `packed` it is the base.

    One thread runs the model. Others may add and remove adapters meanwhile: a batch keeps the tables that it began
    with. The model stays on its device and in its dtype.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self._groups: dict[Any, Group] = {}
        self._layouts: dict[tuple[bytes, bytes, int], tuple[Layout, Group]] = {}  # of files that were read
        self._hooks: dict[str, Any] = {}
        self._lock = RLock()  # of the tables and names
        self._batch: list[Part] = []

    def __len__(self) -> int:
        return len(self.adapters)

    def __contains__(self, name: str) -> bool:
        return name in self.adapters

    def add(self, name: str, folder: str | Path) -> Adapter:
        """Add an adapter from its folder. Raises ValueError for a name in use and for one that does not fit."""
        files = Files.read(Path(folder))
        if (known := self._add_known(name, files)) is not None:
            return known
        config = PeftConfig.from_pretrained(str(folder))
        with self._lock:
            adapter = self._add_tensors(name, config, load(files.weights))
            if (group := adapter.group) is not None:
                layout = layout_of(files, config.method, group.columns, config.scale)
                if layout is not None:
                    self._layouts[files.kind] = layout, group
                    while len(self._layouts) > LAYOUTS:
                        del self._layouts[next(iter(self._layouts))]
        return adapter

    def add_known(self, name: str, folder: str | Path) -> Adapter | None:
        """The same if an adapter with this config, laid out alike, has been added before; else None. Quick."""
        return self._add_known(name, Files.read(Path(folder)))

    def _add_known(self, name: str, files: Files) -> Adapter | None:
        with self._lock:
            layout, group = self._layouts.get(files.kind, (None, None))
            if layout is None or group is None or (row := layout.row(files)) is None:
                return None
            self._check_new(name)
            return self._fill(Adapter(name, group, group.take()), row)

    def add_tensors(self, name: str, config: Any, tensors: Mapping[str, Tensor]) -> Adapter:
        """Add an adapter from what its folder holds: its PEFT config, and its file's tensors by their names."""
        with self._lock:
            return self._add_tensors(name, config, tensors)

    def _add_tensors(self, name: str, config: Any, tensors: Mapping[str, Tensor]) -> Adapter:
        self._check_new(name)
        if config.modules_to_save:
            raise ValueError(
                f"adapter {name} also trains whole modules ({', '.join(config.modules_to_save)}), which cannot differ "
                "within a batch: serve it alone, or train without modules_to_save"
            )
        if isinstance(config, FactorConfig):
            parts, rest = by_module(tensors, f".{config.method}_map.")
            refuse_unknown(self.model, name, rest)
            if config.reads_input:
                return self._add(Adapter(name, lora=lora_weights_of_maps(self.model, name, config, parts)))
            group = self._group(name, config, parts)
            row = finite_row(torch.cat([parts[module]["core"].float().flatten() for module in group.columns]))
            return self._fill(Adapter(name, group, group.take()), config.scale * row)
        if type(config) is LoraConfig:  # AdaLoRA has a subclass
            return self._add(Adapter(name, lora=lora_weights(self.model, name, config, tensors)))
        raise ValueError(
            f"adapter {name} is a {config.peft_type.value} adapter; supported are this project's methods and LoRA"
        )

    def create(self, names: Sequence[str], config: FactorConfig) -> Group:
        """New adapters that start at the base, as the method does; train the `table` of the group. Freezes the base."""
        with self._lock:
            for name in names:
                self._check_new(name)
            made: Any = get_peft_model(self.model, copy.deepcopy(config))
            full, like = made.peft_config["default"], get_peft_model_state_dict(made)
            made.unload()
            full.inference_mode = True  # as a saved one
            parts, _ = by_module(like, f".{full.method}_map.")
            group = self._group(names[0], full, parts)
            row = torch.cat([parts[module]["core"].flatten() for module in group.columns])
            for name in names:
                self._fill(Adapter(name, group, group.take()), full.scale * row)
            group.table.requires_grad_(True)
        return group

    def remove(self, name: str) -> None:
        """Remove an adapter; a batch in progress still finishes. Raises KeyError for an unknown name."""
        with self._lock:
            adapter = self.adapters.pop(name)
            if adapter.group is not None:
                adapter.group.give_back(adapter.row)
                if not adapter.group.used:
                    self._groups = {key: group for key, group in self._groups.items() if group is not adapter.group}
                    self._layouts = {key: each for key, each in self._layouts.items() if each[1] is not adapter.group}
            used = {module for group in self._groups.values() for module in group.maps}
            used |= {module for each in self.adapters.values() if each.lora for module in each.lora}
            for module in [module for module in self._hooks if module not in used]:
                self._hooks.pop(module).remove()

    @contextmanager
    def rows(self, names: Sequence[str | Adapter | None]) -> Iterator[None]:
        """Inside, row i of the batch has adapter names[i]; a padded batch, prefill and decode alike."""
        with self._during((len(names),), [(name, 1) for name in names]):
            yield

    @contextmanager
    def packed(self, lengths: Sequence[tuple[str | Adapter | None, int]]) -> Iterator[None]:
        """Inside, the batch is one row of tokens (1, tokens): so many of each adapter, in this order."""
        with self._during((1, sum(count for _, count in lengths)), lengths):
            yield

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What an adapter's file holds. Raises KeyError for an unknown name, ValueError for a LoRA adapter."""
        adapter = self.adapters[name]
        if adapter.group is None:
            raise ValueError(f"{name} is a LoRA adapter, which is kept as it was given")
        found = {}
        for module, each in adapter.group.maps.items():
            core = adapter.group.table[adapter.row, adapter.group.columns[module]].detach() / each.scale
            prefix = f"base_model.model.{module}.{each.config.method}_map"
            found[f"{prefix}.core"] = core.view(each.core.shape).cpu().clone()
            found |= {f"{prefix}.{part}": getattr(each, part).cpu() for part in ("pivots", "values", "probe")}
        return found

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter as PEFT does: `PeftModel.from_pretrained` and every command of this project load it."""
        tensors, group = self.tensors(name), self.adapters[name].group
        assert group is not None
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        group.config.save_pretrained(str(folder))

    def memory(self) -> dict[str, int]:
        """Bytes of the tables, of the groups' frozen maps, and of LoRA weights."""
        groups = list(self._groups.values())
        maps = [tensor for group in groups for each in group.maps.values() for tensor in each.factors]
        loras = [pair for each in list(self.adapters.values()) if each.lora for pair in each.lora.values()]
        return {
            "tables": sum(group.table.nbytes for group in groups),
            "maps": sum(tensor.nbytes for tensor in maps),
            "lora": sum(A.nbytes + B.nbytes for A, B in loras),
        }

    def _group(self, name: str, config: FactorConfig, parts: Parts) -> Group:
        """The group of an adapter with these tensors; a new one checks that its maps belong to this base."""
        for module, tensors in parts.items():
            if missing := {"core", "pivots", "values", "probe"} - tensors.keys():
                raise ValueError(f"adapter {name} lacks {', '.join(sorted(missing))} of {module}: copy its file again")
            r, found = len(tensors["values"]), tuple(tensors["core"].shape)
            if found != config.core_shape(r):
                raise ValueError(
                    f"adapter {name}: the core of {module} has shape {found}, {config.method} at rank {r} has "
                    f"{config.core_shape(r)}: the file and its adapter_config.json do not belong together"
                )
        if not parts:
            raise ValueError(f"adapter {name} holds no tensors of {config.method}: copy its file again")
        ordered = sorted(parts)
        key = (
            config.method, config.factorization(), config.r, tuple(ordered),
            *(tuple(parts[m]["core"].shape) for m in ordered),
            torch.cat([parts[module]["pivots"] for module in ordered]).numpy().tobytes(),
            torch.cat([parts[module]["probe"] for module in ordered]).numpy().tobytes(),
        )  # fmt: skip
        if key not in self._groups:
            maps = {module: self._map(name, config, module, parts[module]) for module in ordered}
            columns, at = {}, 0
            for module, each in maps.items():
                columns[module] = slice(at, at := at + each.core.numel())
            device = next(iter(maps.values())).read.device
            group = Group(config, maps, columns, torch.zeros(1, at, device=device))
            self._groups[key] = group
        return self._groups[key]

    def _map(self, name: str, config: FactorConfig, module: str, tensors: Mapping[str, Tensor]) -> FactorMap:
        """The frozen maps of one module from its saved pivots, checked as PEFT's loading checks them."""
        base = module_of(self.model, name, module)
        layer = FactorLayer(base, module, config.method)
        loaded_from = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        layer.checkpoints = list(dict.fromkeys(filter(None, (loaded_from, config.base_model_name_or_path))))
        m, n = layer.shape
        r, out = len(tensors["values"]), n if layer.embedding else m
        if config.rank_of(module, layer.shape) not in (r, None):
            raise ValueError(
                f"adapter {name}: {module} was saved at rank {r}, but with r={config.r} of adapter_config.json it has "
                f"rank {config.rank_of(module, layer.shape)} here: the two files do not belong together"
            )
        weight = layer.base.weight
        made = FactorMap(out, r, config, layer.frozen_dtype, weight.device, embedding=layer.embedding)
        for part in ("pivots", "values", "probe"):
            setattr(made, part, tensors[part].to(weight.device))
        layer.maps[name.replace(".", "-")] = made
        layer.refresh()
        return made.requires_grad_(False)

    def _check_new(self, name: str) -> None:
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name} already: remove it first, or choose another name")

    def _fill(self, adapter: Adapter, row: Tensor) -> Adapter:
        """Write the cores, with the scale in them, into the adapter's row of the table."""
        group = adapter.group
        assert group is not None
        with torch.no_grad():
            group.table[adapter.row] = row.to(group.table.device)
        if group.table.is_cuda:  # the thread that runs the model uses another stream
            torch.cuda.synchronize(group.table.device)
        return self._add(adapter)

    def _add(self, adapter: Adapter) -> Adapter:
        for module in (adapter.group.maps if adapter.group is not None else adapter.lora) or ():
            if module not in self._hooks:
                layer = module_of(self.model, adapter.name, module)
                self._hooks[module] = layer.register_forward_hook(partial(self._update, module))
        self.adapters[adapter.name] = adapter
        return adapter

    @contextmanager
    def _during(self, shape: tuple[int, ...], lengths: Sequence[tuple[str | Adapter | None, int]]) -> Iterator[None]:
        found = [(self.adapters[each] if isinstance(each, str) else each, count) for each, count in lengths]
        assert not self._batch, "the model runs one batch at a time"
        self._batch = self._parts(shape, found)
        try:
            yield
        finally:
            self._batch = []

    def _parts(self, shape: tuple[int, ...], lengths: Sequence[tuple[Adapter | None, int]]) -> list[Part]:
        counts, parts = [count for _, count in lengths], []
        used = [each for each, _ in lengths if each is not None]
        for group in {each.group: None for each in used if each.group is not None}:
            rows = [each.row if each is not None and each.group is group else 0 for each, _ in lengths]
            table = group.table
            index = torch.tensor(rows).repeat_interleave(torch.tensor(counts)).to(table.device)
            if table.is_cuda:  # it may be replaced while this stream reads it
                table.record_stream(torch.cuda.current_stream(table.device))
            parts.append(Part(shape, index, group, table))
        for adapter in {each: None for each in used if each.lora is not None}:
            mine = torch.tensor([each is adapter for each, _ in lengths])
            A, _ = next(iter((adapter.lora or {}).values()))
            places = mine.repeat_interleave(torch.tensor(counts)).nonzero()[:, 0].to(A.device)
            parts.append(Part(shape, places, lora=adapter.lora))
        return parts

    def _update(self, module: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The forward hook of a module: its output plus the updates of the batch's adapters."""
        parts = [part for part in self._batch if module in (part.group.maps if part.group else part.lora or ())]
        if not parts:
            return None
        channels_first = isinstance(layer, nn.Conv2d)
        y = output.movedim(1, -1) if channels_first else output
        if y.shape[: len(parts[0].shape)] != parts[0].shape:
            raise ValueError(
                f"{module} gives {tuple(output.shape)} for a batch of {parts[0].shape} (rows, or one row of tokens): "
                "this model's layers do not keep rows apart, so its adapters cannot share a batch"
            )
        y0 = flat = y.reshape(math.prod(parts[0].shape), -1, y.shape[-1])
        bias = getattr(layer, "bias", None)
        for part in parts:
            if part.group is not None and part.table is not None:
                each = part.group.maps[module]
                cores = part.table[:, part.group.columns[module]].index_select(0, part.index)
                flat = each(y0, bias, onto=flat, cores=cores.view(-1, *each.core.shape))
            elif part.lora is not None:
                A, B = part.lora[module]
                x = args[0].reshape(len(y0), -1, args[0].shape[-1]).index_select(0, part.index)
                update = (x.to(A.dtype) @ A.T @ B.T).to(flat.dtype)
                flat = flat.index_add(0, part.index, update)
        y = flat.view(y.shape)
        return y.movedim(-1, 1) if channels_first else y
