"""`loldu plan` from the command line: what it prints, and that its advice works."""

import json
import shlex
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.engines.layout import Unit, layout
from launcher.engines.registry import ENGINES
from launcher.planning.machines import parse
from launcher.start import instead_of_training

SHAPES = Path(__file__).parent / "shapes"


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_json_stands_alone_on_standard_output(capsys):
    found = planned(capsys, "llama2_alpaca_loldu", "--tiny", "--rank", "32")

    assert found["model"]["trained"] == 4 * 7 * 32
    assert found["steps"] == 500
    assert found["peak_bytes"] == found["asked"]["peak_bytes"] > found["asked"]["bytes"]["fixed"]
    assert found["asked"]["sharding"] == "none"
    assert found["fits"] is True
    assert {way["precision"] for way in found["ways"]} == {"float32", "bfloat16", "int8", "nf4", "fp4"}
    assert found["command"] == "loldu train llama2_alpaca_loldu --tiny --rank 32"
    parts = found["asked"]["bytes"]
    assert parts["optimizer"] == 2 * parts["trained"] == 8 * 4 * 7 * 32
    assert found["data"]["padding"] == 0  # a CPU computes none


def test_the_options_of_the_recipe_change_the_plan(capsys):
    small = planned(capsys, "llama2_alpaca_loldu", "--tiny", "--micro-batch-size", "2", "--dtype", "bfloat16")
    large = planned(capsys, "llama2_alpaca_loldu", "--tiny", "--micro-batch-size", "16", "--dtype", "float32")

    assert large["asked"]["bytes"]["activations"] > 4 * small["asked"]["bytes"]["activations"]
    assert large["asked"]["bytes"]["weights"] == 2 * small["asked"]["bytes"]["weights"]
    assert small["data"]["passes_per_step"] > large["data"]["passes_per_step"]


def test_a_model_of_70_billion_numbers_is_planned_from_its_config_alone(capsys):
    found = planned(
        capsys, "llama2_alpaca_loldu", "--model", str(SHAPES / "llama-2-70b"), "--gpus", "8x80GB", "--nodes", "2",
        "--data", "nowhere/no-data",
    )  # fmt: skip

    assert found["model"]["parameters"] == 68_976_648_192
    assert found["machines"]["processes"] == 16
    assert found["asked"]["precision"] == "bfloat16"
    assert not found["fits"]
    assert "138.0 GB of it weights" in found["asked"]["why_not"]
    by_name = {(way["sharding"], way["precision"]): way for way in found["ways"] if not way["gradient_checkpointing"]}
    sharded = by_name["fsdp2", "bfloat16"]
    assert sharded["bytes"]["weights"] == pytest.approx(2 * 68_976_648_192 / 16, rel=1e-6)
    assert sharded["fits"]
    assert not by_name["zero3", "nf4"]["fits"]
    assert "zero3" in by_name["zero3", "nf4"]["why_not"]
    assert found["command"].startswith("loldu submit llama2_alpaca_loldu --nodes 2 --gpus-per-node 8 -- --model ")
    assert "--sharding" in found["command"]
    assert any("nowhere/no-data is not here" in note for note in found["notes"])


def test_the_recommended_command_asks_for_the_recommended_way(capsys, tmp_path):
    """What does not fit as asked is given as a command that loldu train accepts, with the settings that fit."""
    found = planned(
        capsys, "llama2_alpaca_loldu", "--model", str(SHAPES / "llama-2-13b"), "--gpus", "1x24GB", "--data", "no/data"
    )
    assert not found["fits"]
    words = shlex.split(found["command"])
    seen = []

    with instead_of_training(lambda config, name, **_: seen.append(config) or 0):
        assert main(words[1:]) == 0

    assert words[:3] == ["loldu", "train", "llama2_alpaca_loldu"]
    assert seen[0].model.quantize == found["recommended"]["precision"] == "int8"
    assert seen[0].model.gradient_checkpointing == found["recommended"]["gradient_checkpointing"]


def test_the_screen_shows_parts_ways_and_a_command(capsys):
    words = ["--model", str(SHAPES / "qwen3-8b"), "--data", "no/data", "--gpus", "2xH100", "--method", "lora"]
    assert main(["plan", "llama2_alpaca_loldu", *words]) == 0

    shown = capsys.readouterr().out
    for text in ("weights of the base", "16.4 GB", "All ways", "fsdp2", "nf4", "Recommended as asked: ddp, bfloat16"):
        assert text in shown
    assert "torchrun --standalone --nproc-per-node 2 -m launcher train llama2_alpaca_loldu" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "8xbananas"], "give COUNTxMEMORY (8x80GB)"),
        (["--gpus", "8x0.5GB"], "CUDA alone takes 0.8 GB"),
        (["--gpus", "--nodes", "2"], "--gpus: expected one value"),
        (["--gpus", "8x80GB", "--nodes", "-1"], "--nodes and --processes are at least 1, got -1"),
        (["--nodes", "two"], "--nodes: expected a whole number, got 'two'"),
        (["--gpus", "8x80GB", "--processes", "2"], "leave it out with --gpus"),
        (["--model", "nowhere"], "neither a folder here nor in the hub cache"),
        (["--rnak", "8"], "did you mean --rank"),
        (["--gpus", "3x80GB"], "--batch-size 16 / 3 processes"),
        (["--method", "full", "--quantize", "nf4"], "makes read-only"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    assert main(["plan", "llama2_alpaca_loldu", "--tiny", *words]) == 2

    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_classifier_of_images_is_planned(capsys):
    found = planned(capsys, "vit_images_loldu", "--tiny", "--gpus", "2x24GB")

    assert found["data"]["samples"] == 1197
    assert found["asked"]["sharding"] == "ddp"
    assert found["asked"]["bytes"]["activations"] > 0
    assert found["notes"] == []


@pytest.mark.parametrize(
    "task", [["label", "--text-columns", "text"], ["prefer"], ["text"], ["instruct"]], ids=lambda words: words[0]
)
def test_each_task_is_planned_without_data_and_tokenizer(task, capsys):
    found = planned(
        capsys, "llama2_alpaca_loldu", "--model", str(SHAPES / "llama-2-7b"), "--data", "no/data", "--gpus", "1x80GB",
        "--task", *task, "--micro-batch-size", "2",
    )  # fmt: skip

    assert found["data"]["lengths_from"] == "assumptions"
    assert found["asked"]["bytes"]["activations"] > 1e9
    assert [note.partition(":")[0] for note in found["notes"]] == ["no/data is not here"]


def test_a_pipeline_is_refused_by_name(capsys):
    pytest.importorskip("diffusers")

    assert main(["plan", "stable_diffusion_subject_loldu", "--tiny"]) == 2

    assert "does not predict runs of image pipelines: loldu train with the same" in capsys.readouterr().err


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("world", "local", "group"), [(1, 1, 1), (8, 8, 8), (16, 8, 8), (16, 8, 16)])
def test_all_processes_together_hold_the_model(name, world, local, group):
    info = ENGINES[name]
    units = [Unit(100.0, 8.0)] * 3 + [Unit(50.0, 2.0)]
    copies = world if info.holds_base else world / group

    found = layout(info, units, world, local, 1 if info.holds_base else group)

    assert found.frozen * world == pytest.approx(350 * copies)
    assert found.trained * world == pytest.approx(26 * copies)
    assert found.optimizer == pytest.approx(2 * found.gradients)
    assert (found.sent_per_pass + found.sent_per_step > 0) == (world > 1)
    assert found.across_per_step <= max(found.sent_per_step * local, 1e-9)
    assert (found.across_per_pass + found.across_per_step > 0) == (world > local)


def test_the_gradient_of_the_root_unit_is_exchanged_once_the_layers_are_done():
    """Before that it waits in full beside a gathered layer; then a copy of it is sent, and no layer is gathered."""
    units = [Unit(10.0, 10.0)] * 4 + [Unit(0.0, 300.0)]

    found = layout(ENGINES["fsdp2"], units, 2, 2, 2)

    assert found.gathered == 300 + 300 + 2 * 20 + 2 * 10
    assert found.at_root == 3 * 300


def test_replicated_processes_exchange_gradients_in_float32():
    units = [Unit(0.0, 100.0)]  # 50 numbers in bfloat16

    found = layout(ENGINES["ddp"], units, 2, 2, 1, widened=2.0)

    assert found.gradients == 100
    assert found.exchanged == 200
    assert found.sent_per_step == 200 + 4 * 2


def test_a_sharded_step_gathers_each_layer_twice():
    """As benchmarks/scaling.py has it: layers forward and backward, the rest once, gradients scattered once."""
    units = [Unit(1e6, 0.0)] * 4 + [Unit(3e6, 0.0)]

    found = layout(ENGINES["fsdp2"], units, 4, 4, 4)

    assert found.sent_per_pass == pytest.approx(3 / 4 * (2 * 4e6 + 3e6))


@pytest.mark.parametrize(
    ("given", "count", "memory"), [("8x80GB", 8, 80e9), ("4xH100", 4, 80e9), ("24GB", 1, 24e9), ("2", 2, 80e9)]
)
def test_gpus_are_named_by_count_and_memory_or_name(given, count, memory):
    found = parse(given, 3, 1)

    assert (found.local, found.processes) == (count, 3 * count)
    assert 0.9 * memory < found.memory < memory


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(sharding, tmp_path):
    """A Llama of 60 million parameters with the embedded model's tokenizer, trained for two steps in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from benchmarks import plan as benchmark

    folder = tmp_path / "model"
    tiny = benchmark.TINY / "model"
    config = AutoConfig.from_pretrained(tiny)
    config.update({"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5, "num_attention_heads": 8,
                   "num_key_value_heads": 8, "head_dim": 128})  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    data = tmp_path / "few.json"  # tokenising 8,000 takes 70 MB more, of whichever process does most of it
    data.write_text(json.dumps(json.loads((benchmark.TINY / "instructions" / "train.json").read_text())[:200]))
    name = f"tiny/loldu/{sharding}/float32"
    words = benchmark.command(name, folder, data, "short", tmp_path)

    measured, predicted = benchmark.measure(words, name, tmp_path), benchmark.predict(words, name)

    assert predicted["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.1), (predicted, measured)
    assert measured["peak_bytes"] > 0.7e9, "mostly the model, not the interpreter"
