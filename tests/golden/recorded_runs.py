"""Short runs on the embedded model and what they leave: `python tests/golden/recorded_runs.py` records it anew.

A change of structure must not change any of this. Losses may be recorded again if a change is meant to alter them (one
commit for each cause); cache keys, tensors of an adapter and fields of a checkpoint may not.
"""

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.training.run import run

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
RECORDED = Path(__file__).with_name("runs.json")
BASE = Config(
    model=ModelConfig(model=str(TINY / "model"), dtype="float32"),
    data=DataConfig(
        data=str(TINY / "instructions" / "train.json"), eval_records=6, prompt_template="short", max_length=96
    ),
    adapter=AdapterConfig(rank=15, targets=("all-linear",)),
    optimizer=OptimizerConfig(learning_rate=1e-3, batch_size=4, max_steps=20),
    run=RunConfig(save_every=10, report=False),
)
ADAPTERS = {
    "loldu": {},
    "loldu_normalized": {"options": ("normalize_directions=true",)},
    "loldu_embedding": {"targets": ("embed_tokens",)},
    "lolduxs": {"method": "lolduxs"},
    "svfit": {"method": "svfit"},
    "svfit_energy": {"method": "svfit", "options": ("energy=0.9",)},
    "svft": {"method": "svft"},
    "loraxs": {"method": "loraxs"},
    "lorasb": {"method": "lorasb"},
    "allora": {"method": "allora"},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
}


def configs() -> dict[str, Config]:
    """Every method on instructions; packing, a quantised base and labels with LoLDU."""
    found = {name: replace(BASE, adapter=replace(BASE.adapter, **values)) for name, values in ADAPTERS.items()}
    found["packing"] = replace(BASE, data=replace(BASE.data, packing=True))
    found["nf4"] = replace(BASE, model=replace(BASE.model, quantize="nf4"))
    found["labels"] = replace(
        BASE,
        data=replace(BASE.data, text_columns=("instruction",)),
        adapter=replace(BASE.adapter, targets=("q_proj", "v_proj"), modules_to_save=("score",)),
    )
    return found


def record(name: str, config: Config, folder: Path, tokens: Path) -> dict:
    """Run it, and describe its folder and its part of the cache. tokens: where the runs share their tokenised data."""
    if config.data.text_columns:
        rows = [row | {"label": len(row["output"]) % 2} for row in json.loads(Path(config.data.data).read_text())]
        (folder / "labelled.json").write_text(json.dumps(rows))
        config = replace(config, data=replace(config.data, data=str(folder / "labelled.json")))
    output, cache = folder / name, folder / f"cache-{name}"
    cache.mkdir()
    (cache / "tokenised").symlink_to(tokens)
    assert run(replace(config, run=replace(config.run, output=str(output), cache=str(cache))), name) == 0
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    saved = json.loads((output / "config.json").read_text())
    for part, field in (("config", "model"), ("config", "data"), ("config", "run"), ("resolved", "base_folder")):
        saved[part].pop(field)  # paths
    saved["versions"] = sorted(saved["versions"])
    checkpoint = output / "checkpoints" / "step-000020"
    index = json.loads((checkpoint / "index.json").read_text())
    index["files"] = sorted(index["files"])
    index["meta"] = {
        key: sorted(value) if isinstance(value, dict) and key != "identity" else value
        for key, value in index["meta"].items()
    }
    if config.adapter.method == "lorasb":
        for identity in (saved["identity"], index["meta"]["identity"]):
            identity |= {"factors": None, "pivots": None}  # see `tensors`
    final = output / ("model" if config.adapter.method == "full" else "adapter")
    return {
        "cache_keys": sorted(file.stem for file in (cache / "factors").glob("*")),
        "config": saved,
        "folder": sorted(path.name for path in output.iterdir() if not path.name.startswith(".")),
        "checkpoint": {"files": sorted(path.name for path in checkpoint.iterdir()), "index": index},
        "adapter": {
            "files": sorted(path.name for path in final.iterdir()),
            "tensors": tensors(final, config.adapter.method),
        },
        "adapter_config": adapter_config(final),
        "losses": [event["loss"] for event in events if "loss" in event],
        "events": [sorted(event) for event in events[:2]],
        "eval_losses": [event["eval_loss"] for event in events if "eval_loss" in event],
    }


def tensors(final: Path, method: str) -> dict:
    """dtype and shape of each tensor; the bytes of what is no float, and the norm of what is.

    LoRA-SB's pivots are not recorded: they follow from a gradient, which other processors round otherwise.
    """
    found = {}
    with safe_open(next(final.glob("*.safetensors")), framework="pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point():
                content = float(tensor.double().norm())
            else:
                content = None if method == "lorasb" else hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            found[name] = [str(tensor.dtype), list(tensor.shape), content]
    return found


def adapter_config(final: Path) -> dict | None:
    if not (final / "adapter_config.json").exists():
        return None
    found = json.loads((final / "adapter_config.json").read_text())
    return {
        key: sorted(value) if key == "target_modules" and isinstance(value, list) else value  # PEFT keeps a set
        for key, value in found.items()
        if key not in ("base_model_name_or_path", "peft_version")
    }


def main(into: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        tokens.mkdir()
        found = {name: record(name, config, Path(folder), tokens) for name, config in configs().items()}
    lines = (f"{json.dumps(name)}: {json.dumps(case, sort_keys=True)}" for name, case in found.items())
    into.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDED)
