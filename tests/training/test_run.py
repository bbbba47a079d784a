"""Whole runs on a real small Llama: the folder they leave, and mistakes."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import events, losses, with_run
from transformers import AutoModelForCausalLM

import adapters  # noqa: F401 (registers LoLDU)
from launcher import cli
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.engines import replicated
from launcher.training import folder, report
from launcher.training import run as run_module
from launcher.training.loop import learning_rate_at
from launcher.training.run import run


def test_a_run_leaves_a_complete_folder(small):
    assert run(small, "test") == 0

    folder = Path(small.run.output)
    assert (folder / "state").read_text().strip() == "finished"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-000002", "step-000004", "step-000006"}
    steps = [event["step"] for event in events(small) if "loss" in event]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in events(small) if "eval_loss" in event] == [0, 6]
    saved = json.loads((folder / "config.json").read_text())
    assert saved["resolved"]["attention"] == "sdpa"
    assert saved["resolved"]["attention_reason"]
    assert saved["identity"]["base"]


def test_callbacks_get_each_step_and_evaluation_as_it_is_recorded(small):
    """In the order of the run, with what it trains."""
    seen = []

    def note(training, event):
        assert training.task is not None
        assert training.engine.parameters
        seen.append(event)

    assert run(small, "test", on_step=note, on_evaluation=note) == 0

    assert seen == events(small)


def test_a_full_disk_in_training_is_one_line_and_the_state_says_failed(small, monkeypatch, capsys):
    """There is no room for a new file, so `state` is overwritten where it is."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def fill(training, event):
        def refuse(*_):
            raise full

        monkeypatch.setattr(folder, "write_atomically", refuse)
        monkeypatch.setattr(report.Events, "write", refuse)

    assert run(small, "test", on_step=fill) == 2

    said = capsys.readouterr().err
    assert "cannot write events to" in said
    assert "no space is left" in said
    assert "Traceback" not in said
    assert (Path(small.run.output) / "state").read_text() == "failed\n"


def test_an_exception_in_a_callback_ends_the_run_as_failed(small, capsys):
    def broken(training, event):
        raise KeyError("mine")

    assert run(small, "test", on_step=broken) == 1

    folder = Path(small.run.output)
    assert (folder / "state").read_text().strip() == "failed"
    assert (folder / "error").read_text() == "KeyError: 'mine'\n"
    assert "KeyError: 'mine'" in capsys.readouterr().err


def test_a_run_leaves_measurements_answers_and_a_report(small, tmp_path):
    config = with_run(small, report=True, show_samples=2, eval_every=4)

    assert run(config, "test") == 0

    folder = Path(config.run.output)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(line["seconds"] > 0 and line["tokens_per_s"] > 0 and line["memory_gib"] > 0 for line in metrics)
    assert all(0 <= line["padding"] < 1 for line in metrics)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in answers] == [0, 0, 4, 4, 6, 6]
    html = (folder / "report.html").read_text()
    assert "Tokens per second" in html
    assert "finished; loldu on" in html
    assert "<th>step 4</th>" in html


def test_the_adapter_of_a_run_loads_in_plain_peft_with_the_trained_cores(small, stories):
    """The adapter folder gives the cores of the last checkpoint, bit for bit, and changes the base's answers."""
    run(small, "test")

    base = AutoModelForCausalLM.from_pretrained(stories)
    tokens = torch.arange(3, 40)[None]
    before = base(tokens).logits
    model = PeftModel.from_pretrained(base, Path(small.run.output) / "adapter")
    saved = load_file(Path(small.run.output) / "checkpoints" / "step-000006" / "rank-00000.safetensors")

    cores = {f"model/{name}": value for name, value in model.state_dict().items() if name.endswith(".core")}
    assert cores
    assert all(torch.equal(value, saved[name]) for name, value in cores.items())
    assert not torch.equal(model(tokens).logits, before)


@pytest.mark.slow
def test_accumulation_and_checkpointing_do_not_change_the_curve(small, tmp_path):
    """4 samples at once, or 1 + 1 + 1 + 1, or recomputed: the same sums in another order; float32 rounding only."""
    run(small, "test")
    one = replace(with_run(small, output=str(tmp_path / "b")), optimizer=replace(small.optimizer, micro_batch_size=1))
    run(one, "test")
    again = replace(
        with_run(small, output=str(tmp_path / "c")), model=replace(small.model, gradient_checkpointing=True)
    )
    run(again, "test")

    torch.testing.assert_close(losses(one), losses(small), atol=5e-6, rtol=0)
    torch.testing.assert_close(losses(again), losses(small), atol=5e-6, rtol=0)


@pytest.mark.slow
def test_packing_trains_and_keeps_the_loss_of_each_token(small):
    packed = replace(small, data=replace(small.data, packing=True, max_length=192))

    assert run(packed, "test") == 0

    assert all(2.0 < loss < 6.0 for loss in losses(packed))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_go_through_the_same_door(small, method, tmp_path):
    config = replace(small, adapter=replace(small.adapter, method=method, rank=4))

    assert run(config, "test") == 0

    assert losses(config)[0] > 0
    assert (Path(config.run.output) / ("adapter" if method == "lora" else "model")).is_dir()


def test_a_base_in_another_precision_than_its_files_is_no_stranger_to_its_adapter(small, capfd):
    """The fingerprint is of the files (float32); in bfloat16 the same base has other bits."""
    config = replace(small, model=replace(small.model, dtype="bfloat16"))

    assert run(config, "test") == 0
    assert cli.main(["generate", config.run.output, "--prompt", "hello", "--max-tokens", "2"]) == 0

    said = "".join(capfd.readouterr())
    assert "fingerprint" not in said
    assert "differs" not in said


def test_where_the_recipes_own_cannot_be_had_the_embedded_one_runs_and_that_is_said(small, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "unavailable", lambda model, data: f"{model} cannot be had (no network)")
    paper = replace(small, model=replace(small.model, model="big/one"))

    assert run(paper, "test", instead=lambda: small) == 0

    shown = " ".join(capsys.readouterr().out.split())
    assert "big/one cannot be had (no network): running the embedded model" in shown
    assert "--model DIR --data FILE" in shown
    saved = json.loads((Path(small.run.output) / "config.json").read_text())
    assert saved["config"]["model"]["model"] == small.model.model


@pytest.mark.slow
def test_trackers_write_into_the_run_folder(small, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")

    assert run(with_run(small, trackers=("tensorboard", "wandb")), "test") == 0

    folder = Path(small.run.output)
    assert list((folder / "tensorboard").rglob("events.out.tfevents.*"))
    assert list((folder / "wandb").rglob("*.wandb"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, model=replace(c.model, model="/nowhere")), "--model /nowhere is neither a folder"),
        (lambda c: replace(c, data=replace(c.data, data="/nowhere.json")), "/nowhere.json"),
        (lambda c: replace(c, adapter=replace(c.adapter, method="lolduu")), "the nearest first: loldu"),
        (lambda c: replace(c, adapter=replace(c.adapter, targets=("q_prj",))), "q_proj"),
        (lambda c: replace(c, adapter=replace(c.adapter, options=("scal=2",))), "did you mean scale"),
        (lambda c: replace(c, adapter=replace(c.adapter, options=("scale=0",))), "scale is a finite number"),
        (lambda c: replace(c, data=replace(c.data, max_length=4096)), "context of 512"),
        (lambda c: replace(c, model=replace(c.model, attention="flash")), "--attention flash cannot be used"),
        (
            lambda c: with_run(c, sharding="ddp", shard_size=2),
            "--shard-size 2 works with --sharding hsdp only, not with ddp",
        ),
        (lambda c: with_run(c, cache="/proc/no-cache-here"), "--cache"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy_and_exit_code_2(small, change, message, capsys):
    assert run(change(small), "test") == 2

    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_sample_longer_than_the_context_is_refused_before_anything_is_made(small, capsys):
    assert run(replace(small, data=replace(small.data, max_length=513)), "test") == 2

    assert "--max-length 513 is more than this model's context of 512 tokens" in capsys.readouterr().err
    assert not Path(small.run.cache).exists()
    assert not Path(small.run.output).exists()


def test_the_learning_rate_is_a_pure_function_of_the_step():
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2, max_steps=10)

    rates = [learning_rate_at(step, 10, config) for step in range(1, 11)]

    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05
    assert learning_rate_at(10, 10, replace(config, schedule="constant")) == 1.0
    assert learning_rate_at(7, 10, replace(config, schedule="linear")) == pytest.approx(0.5)


def test_one_collective_per_step_carries_gradients_and_two_numbers(monkeypatch):
    """Payload 4 bytes per trained number and 8 bytes beside it; nothing else crosses the wire."""
    sent = []
    monkeypatch.setattr(
        replicated.dist, "all_reduce", lambda tensor: sent.append(tensor.numel() * tensor.element_size())
    )
    parameters = [torch.nn.Parameter(torch.zeros(7)), torch.nn.Parameter(torch.zeros(3, 2))]

    replicated.sum_over_ranks(parameters, [torch.tensor(1.0), torch.tensor(0.0)], world_size=2)

    assert sent == [4 * (7 + 6) + 8]


@pytest.mark.slow
def test_babyllama_learns_alpaca_as_far_as_the_prototype(babyllama, alpaca_file, tmp_path):
    """The held-out loss falls from about 3.0 to 2.05 or lower: 200 steps of batch 8, full rank, all linear layers."""
    config = Config(
        model=ModelConfig(model=str(babyllama)),
        data=DataConfig(data=str(alpaca_file), eval_records=150, prompt_template="short", max_length=256),
        adapter=AdapterConfig(rank=1024, targets=("all-linear",), options=("normalize_directions=true",)),
        optimizer=OptimizerConfig(learning_rate=3e-2, batch_size=8, max_steps=200),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )

    assert run(config, "test") == 0

    first, last = (event["eval_loss"] for event in events(config) if "eval_loss" in event)
    assert 2.9 < first < 3.1
    assert last <= 2.05
