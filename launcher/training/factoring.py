"""The factors of a run: which weights need some, what they come from, and the adapter's config once they are made.

Plain functions for `run`. None changes its arguments; each returns what the next step needs.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from adapters import FactorConfig
from adapters.factor_map import FactorMap
from launcher.config import Config
from launcher.data.encoded import Encoded
from launcher.factorization.make import Factored, FactorRequest, fingerprint
from launcher.factorization.share import factorize
from launcher.factorization.targets import targets_of
from launcher.factorization.watch import OnProgress
from launcher.models.skeleton import stored_base
from launcher.processes import SLOW_S, Communicator
from launcher.training.checkpoint import Checkpoint
from launcher.training.resolve import Resolved
from launcher.training.sample_gradients import SampleGradients


class Factoring(NamedTuple):
    """What the run has to factor."""

    adapter: Any  # the PEFT config; None for full fine-tuning
    requests: list[FactorRequest]  # empty for PEFT's own methods
    gradients: SampleGradients | None = None  # for methods whose factors come from gradients
    seals: Mapping[str, str] = MappingProxyType({})  # of the factors by module, once they are made or compared


def request_factors(
    config: Config, adapter: Any, base: Path, dtype: str, comm: Communicator, model: nn.Module | None = None
) -> Factoring:
    """The weights of the base that this adapter needs factors of. model: its skeleton, if it has been built.

    Raises ValueError on all ranks if the targets do not fit the base.
    """
    if not isinstance(adapter, FactorConfig):
        return Factoring(adapter, [])

    def look() -> list[FactorRequest]:
        own = config.adapter
        return targets_of(
            base, own.targets, list(adapter.exclude_modules or ()), own.rank, adapter.factorization(),
            dtype=dtype, modules_to_save=own.modules_to_save, model=model,
        )  # fmt: skip

    return Factoring(adapter, comm.each("targets", look))


def complete(
    factoring: Factoring,
    resolved: Resolved,
    train: Encoded,
    identity: Mapping[str, Any],
    comm: Communicator,
    *,
    load: Callable[[], nn.Module],
    pad_id: int,
    labels_model: nn.Module | None = None,
    converted: bool = False,
) -> Factoring:
    """The same, with the base's fingerprint and the learning rate in the adapter's config, and gradients if needed.

    load() returns the plain base on this rank's device. labels_model is the skeleton of a model that labels. converted
    says that the model holds other tensors than its files (fused experts): the files' fingerprint is not the model's,
    which is taken if a process holds it whole.
    """
    if not isinstance(factoring.adapter, FactorConfig):
        return factoring
    config = resolved.config
    adapter = copy.copy(factoring.adapter.for_training(config.optimizer.learning_rate))
    if converted:
        adapter.base_fingerprint = None
    elif labels_model is None:
        adapter.base_fingerprint = identity["base"]
    else:  # neither the checkpoint's language modelling head nor a new one for labels is part of this base
        of_base = stored_base(labels_model)
        adapter.base_fingerprint = comm.from_main("fingerprint", lambda: fingerprint(of_base, resolved.cache), SLOW_S)
    if not adapter.factors_from_gradients:
        return factoring._replace(adapter=adapter)
    samples: int = adapter.samples  # type: ignore[attr-defined]
    gradients = SampleGradients(config, samples, resolved.task, train, identity, load, pad_id)
    requests = [dataclasses.replace(request, gradients=gradients.digest) for request in factoring.requests]
    return Factoring(adapter, requests, gradients)


def make_factors(
    factoring: Factoring, resolved: Resolved, comm: Communicator, on_progress: OnProgress
) -> tuple[Factoring, dict[str, Factored]]:
    """Have all factors in the cache; returns them by module, and the config with the ranks that they decided."""
    run = resolved.config.run
    factored = factorize(
        factoring.requests,
        resolved.cache,
        comm,
        on_progress,
        verify_base=run.verify_base,
        per_node=run.cache_per_node,
        gradient_of=factoring.gradients,
    )
    if factoring.gradients is not None:
        factoring.gradients.free()
    ranks = {module: entry.rank for module, entry in factored.items()}
    seals = {module: entry.seal for module, entry in factored.items()}
    return factoring._replace(adapter=factoring.adapter.with_ranks(ranks), seals=seals), factored


def summary(factored: Mapping[str, Factored], folder: Path) -> list[str]:
    """What is printed about the factors."""
    made = sum(entry.made for entry in factored.values())
    lines = [f"factors of {len(factored)} weights: {made} made, {len(factored) - made} from {folder}"]
    if len(ranks := sorted({entry.rank for entry in factored.values()})) > 1:
        lines.append(f"their ranks: {ranks[0]} to {ranks[-1]}")
    return lines


def identify_factors(model: nn.Module, identity: Mapping[str, Any], resume: Checkpoint | None) -> dict[str, Any]:
    """The run's identity, with digests of what its cores belong to: the model's pivots, and its factors if these come
    from gradients.

    Checkpoints hold the cores alone. Raises ValueError if those of `resume` belong to other factors: the cache was
    lost, and another kernel or device rounds the gradients differently, or chooses between equal pivots otherwise.
    """
    maps = [(name, each) for name, each in model.named_modules() if isinstance(each, FactorMap)]
    from_gradients = [(name, each) for name, each in maps if each.config.factors_from_gradients]
    found = dict(identity)
    if from_gradients:
        found["factors"] = _digest((name, (each.write, each.read)) for name, each in from_gradients)
    if pivoted := [(name, each) for name, each in maps if _depends_on_pivots(each)]:
        found["pivots"] = _digest((name, (each.pivots,)) for name, each in pivoted)
    if resume is None:
        return found
    saved = {"pivots": found.get("pivots"), **resume.meta["identity"]}  # those of earlier versions have none
    if any(found.get(name) != saved.get(name) for name in ("factors", "pivots")):
        raise ValueError(
            f"the factors that {resume.folder} belongs to are gone from the cache, and made again they differ: bring "
            "that cache back (--cache), or start over with --resume never"
        )
    return found


def _depends_on_pivots(each: FactorMap) -> bool:
    """The pivots of singular vectors decide their signs, which a diagonal core does not notice."""
    return not each.config.through_write or len(each.config.core_shape(len(each.pivots))) > 1


def _digest(named: Iterable[tuple[str, tuple[torch.Tensor, ...]]]) -> str:
    sha = hashlib.sha256()
    for name, tensors in named:
        sha.update(name.encode())
        for tensor in tensors:
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()
