"""What scores were measured on, beside them in eval.json: other weights, records or settings give other figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.files import weights_digest
from launcher.inference.load import chosen_precision
from launcher.inference.sources import Source

UNKNOWN = "not recorded"  # by an earlier version
ABSENT = "absent"  # a setting that only the other scores have


def measured(source: Source, model: Any, quantize: Any, *, other_base: bool) -> dict[str, Any]:
    """The weights of the adapter, or of the model if there is none, and the precision. other_base: name the base too,
    since the run does not tell it."""
    return {
        "weights": weights_digest(source.adapter or source.base),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": chosen_precision(source, quantize),
        **({"base": source.base_name} if other_base else {}),
    }


def notes(before: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the file should know: which scores with other settings are replaced, and which kept ones are of
    other weights."""
    for name, entry in found.items():
        was, now = _settings(before.get(name)), _settings(entry)
        if was["weights"] != UNKNOWN:
            was = {**dict.fromkeys(now, ABSENT), **was}
        differ = [_named(key, was[key]) for key in was if was[key] not in (now.get(key, ABSENT), UNKNOWN)]
        if differ:
            yield f"{name}: the scores with {', '.join(differ)} are replaced; --out keeps others in a file of their own"
    weights = [_settings(entry)["weights"] for entry in found.values()]  # a damaged file may hold a list
    others = [
        name for name, entry in before.items() if name not in found and _settings(entry)["weights"] not in weights
    ]
    if others:
        yield f"scores of other weights, or of weights not recorded, stay in the file: {', '.join(others)}"


def _named(key: str, value: Any) -> str:
    if value == ABSENT:
        return "the run's own base" if key == "base" else f"no {key}"
    if key in ("weights", "records"):
        return f"other {key}"
    return f"{key} {'all' if value is None else value}"


def _settings(entry: Any) -> dict[str, Any]:
    known = entry if isinstance(entry, dict) else {}
    recorded = known.get("measured")
    return {
        "weights": UNKNOWN,
        **(recorded if isinstance(recorded, dict) else {}),
        "limit": known.get("limit", UNKNOWN),
    }
