"""Find what a command was given: a model, an adapter or a run. Nothing is downloaded, and no weight of a base is read.

Python code in a model's folder runs only with trust_remote_code; nothing ever asks for it on standard input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.checkpoint_files import local_folder
from launcher.data.saved_template import adapter_template, read_template
from launcher.data.templates import Template
from launcher.files import user_path
from launcher.inference.adapter_folder import adapter_config
from launcher.inference.options import Kind
from launcher.models.files import base_folder, has_tokenizer, recorded_run
from launcher.models.image_processor import is_image_model, model_type
from launcher.models.same_tokenizer import own_tokenizer


@dataclass(frozen=True, kw_only=True)
class Source:
    """Folders to load from, and the settings of the run that trained the model (None without a run)."""

    base: Path
    base_name: str  # as given: a folder or a hub name
    adapter: Path | None = None
    tokenizer: Path
    template: str | None = None  # the setting
    saved_template: Template | None = None  # saved beside the adapter or the model
    dtype: str | None = None
    quantize: Kind = "none"  # of the base in training; the base's files are in full precision
    data: dict[str, Any] | None = None
    trust_remote_code: bool = False  # never taken from a run's record


def find(
    model: str, *, adapter: str | None = None, base: str | None = None, trust_remote_code: bool = False,
    classifies: bool = False,
) -> Source:  # fmt: skip
    """Find a model (folder, or hub name in the local cache), an adapter folder or a run folder.

    With adapter (an adapter or run folder), model is its base. base replaces the base that an adapter or run names.
    classifies: a classifier is wanted. Nothing is downloaded. Raises ValueError with what was found and what to give
    instead.
    """
    if adapter is not None:
        if base is not None:
            raise ValueError(f"--adapter makes {model} the base model already: leave --base {base} out")
        source = find(adapter, base=model, classifies=classifies)
        if source.adapter is None:
            raise ValueError(f"--adapter {adapter} holds a whole model: give it alone, without a base")
    else:
        source = _find(model, base, classifies)
    if not classifies and is_image_model(model_type(source.base)):
        raise ValueError(
            f"{model} classifies images, and this command is for models that write text: loldu predict names the "
            f"classes. To merge, load {source.base} with AutoModelForImageClassification.from_pretrained(BASE, "
            "num_labels=N), then an adapter with PeftModel.from_pretrained, and call merge_and_unload()"
        )
    return replace(source, trust_remote_code=trust_remote_code)


def _find(model: str, base: str | None, classifies: bool) -> Source:
    place = user_path(model)
    if (place / "adapter_config.json").is_file():
        place = place if place.name == "adapter" else place.resolve()  # `.` in a run's folder of its adapter
        return _from_adapter(place, base, recorded_run(place.parent) if place.name == "adapter" else None, classifies)
    run = recorded_run(place)
    if run is not None:
        if (place / "adapter" / "adapter_config.json").is_file():
            return _from_adapter(place / "adapter", base, run, classifies)
        if not (place / "model" / "config.json").is_file():
            raise ValueError(f"run {place} has not saved an adapter yet: start it again to finish training")
        place = place / "model"
    elif base is not None:
        raise ValueError(
            f"--base {base} needs an adapter, and {model} is not one: give a folder with adapter_config.json, or a "
            "run folder"
        )
    folder = base_folder(str(place) if place.exists() else model)
    tokenizer = folder
    if run is not None and not has_tokenizer(folder):
        tokenizer = next((found for name in _bases(run) if (found := local_folder(name))), folder)
    template = read_template(folder)
    return Source(base=folder, base_name=model, tokenizer=tokenizer, saved_template=template, **_recorded(run))


def tokenizer_of(source: Source) -> Any:
    """The tokenizer beside the adapter, else the base's. Raises ValueError if neither loads."""
    return own_tokenizer(source.tokenizer, source.base, trust_remote_code=source.trust_remote_code)


def _from_adapter(folder: Path, base: str | None, run: dict[str, Any] | None, classifies: bool) -> Source:
    config = adapter_config(folder, classifies=classifies)
    names = [base] if base else [*_bases(run), *filter(None, [config.base_model_name_or_path])]
    found = next((name for name in names if local_folder(str(user_path(name))) or local_folder(name)), None)
    if found is None:
        asked = " or ".join(dict.fromkeys(names)) or "a model that it does not name"
        raise ValueError(f"adapter {folder} needs its base model, {asked}, which is not here: give --base MODEL")
    model = base_folder(found)
    tokenizer = folder if has_tokenizer(folder) else model
    return Source(
        base=model, base_name=found, adapter=folder, tokenizer=tokenizer, saved_template=adapter_template(folder),
        **_recorded(run),
    )  # fmt: skip


def _bases(run: dict[str, Any] | None) -> list[str]:
    if run is None:
        return []
    folder = run.get("resolved", {}).get("base_folder")
    return [run["config"]["model"]["model"], *([folder] if folder else [])]


def _recorded(run: dict[str, Any] | None) -> dict[str, Any]:
    if run is None:
        return {}
    model, data = run["config"]["model"], run["config"].get("data", {})
    resolved = run.get("resolved", {})  # what auto became on the machine that trained
    return {
        "template": resolved.get("prompt_template") or data.get("prompt_template"),
        "dtype": resolved.get("dtype") or model.get("dtype"),
        "quantize": model.get("quantize", "none"),
        "data": data,
    }
