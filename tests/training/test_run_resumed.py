"""A run that is resumed is the uninterrupted one, in the folder that it began in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import events, losses, with_run

import adapters  # noqa: F401 (registers LoLDU)
from adapters import loldu
from launcher.exit_codes import STOPPED
from launcher.processes import SLOW_S, WAIT_S, Communicator
from launcher.tasks import base as tasks
from launcher.training import loop
from launcher.training.report import before_and_after
from launcher.training.run import run


def test_measurements_stand_once_after_a_resume_and_events_stay_deterministic(small, tmp_path):
    whole = with_run(small, output=str(tmp_path / "whole"))
    run(whole, "test")
    run(small, "test")
    folder = Path(small.run.output)
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    (folder / "state").write_text("stopped\n")

    assert run(small, "test") == 0

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert (folder / "events.jsonl").read_bytes() == (Path(whole.run.output) / "events.jsonl").read_bytes()


def test_a_resumed_run_may_ask_for_more_than_it_began_with(small, capsys):
    """Its first evaluation has no exact match to show beside the last one's."""
    begun = replace(small, optimizer=replace(small.optimizer, max_steps=2))
    assert run(begun, "test") == 0

    small = with_run(small, accept_changes=True)
    more = run(replace(small, data=replace(small.data, exact_match=True, answer_tokens=4)), "test")

    assert more == 0
    assert "exact_match" in [event for event in events(small) if "eval_loss" in event][-1]
    assert "Held-out records" in capsys.readouterr().out


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(small, tmp_path):
    """Stopped after step 4 (through the control of max_steps alone the schedule would change) and started again."""
    whole = with_run(small, output=str(tmp_path / "whole"))
    run(whole, "test")

    run(small, "test")
    folder = Path(small.run.output)
    (folder / "state").write_text("stopped\n")
    for name in ("COMPLETE", "index.json", "rank-00000.safetensors"):  # the crash came before step 6 was saved
        (folder / "checkpoints" / "step-000006" / name).unlink()
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    assert run(small, "test") == 0

    assert events(small) == events(whole)
    again, once = (load_file(Path(c.run.output) / "adapter" / "adapter_model.safetensors") for c in (small, whole))
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_a_best_loss_on_other_records_is_forgotten(small, tmp_path, capsys):
    """The file of held-out records is rewritten; --patience would count on against the old best loss."""
    file = tmp_path / "held_out.json"
    records = [record for record in json.loads(Path(small.data.data).read_text()) if len(record["instruction"]) < 40]
    file.write_text(json.dumps(records[:20]))
    begun = with_run(small, eval_every=1)
    begun = replace(begun, data=replace(begun.data, eval_data=str(file), eval_records=0))
    begun = replace(begun, optimizer=replace(begun.optimizer, schedule="constant", max_steps=2))
    run(begun, "test")
    folder = Path(begun.run.output)
    said = "the held-out samples are not those that this run was evaluated on until step 2"

    file.write_text(json.dumps([{**record, "output": "zyx wvu tsr"} for record in records[:20]]))
    run(replace(begun, optimizer=replace(begun.optimizer, max_steps=4)), "test")

    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert "3 earlier evaluations used other held-out records" in shown
    evaluated = [event for event in events(begun) if "eval_loss" in event]
    assert [event["step"] for event in evaluated] == [0, 1, 2, 2, 3, 4]  # the resume evaluates on the new ones first
    assert before_and_after(evaluated) == (
        ["", "step 2", "after"],
        [["loss", *(f"{evaluated[place]['eval_loss']:.4f}" for place in (3, -1))]],
    )
    before, after = (
        json.loads((folder / "checkpoints" / f"step-00000{step}" / "index.json").read_text())["meta"]["progress"]
        for step in (2, 4)
    )
    assert after["held_out"] != before["held_out"]
    assert after["best_loss"] == min(event["eval_loss"] for event in evaluated[3:])
    assert before["best_loss"] < after["best_loss"]
    run(replace(begun, optimizer=replace(begun.optimizer, max_steps=5)), "test")
    assert "held-out samples are not those" not in " ".join(capsys.readouterr().out.split())


def test_the_first_held_out_records_are_evaluated_on_where_the_resume_begins(small, tmp_path):
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps(json.loads(Path(small.data.data).read_text())[:20]))
    without = replace(small, data=replace(small.data, eval_records=0))
    without = replace(without, optimizer=replace(small.optimizer, schedule="constant", max_steps=2))
    run(without, "test")
    assert not any("eval_loss" in event for event in events(without))

    longer = replace(without, optimizer=replace(without.optimizer, max_steps=4))
    run(replace(longer, data=replace(longer.data, eval_data=str(file))), "test")

    assert [event["step"] for event in events(without) if "eval_loss" in event] == [2, 4]


def test_only_losses_on_the_same_records_stand_side_by_side():
    """The digest in each evaluation tells; runs of earlier versions have none, and are compared as before."""
    old, new = {"held_out": "a"}, {"held_out": "b"}

    def shown(*evaluations):
        return before_and_after([{"step": i, "eval_loss": i + 1.0, **line} for i, line in enumerate(evaluations)])

    assert shown({}, {}) == shown(old, old) == (["", "before", "after"], [["loss", "1.0000", "2.0000"]])
    assert shown(old, new) == (["", "after"], [["loss", "2.0000"]])
    assert shown(old, new, new) == (["", "step 1", "after"], [["loss", "2.0000", "3.0000"]])
    assert shown(old, new, old) == (["", "before", "after"], [["loss", "1.0000", "3.0000"]])
    assert shown({}, new) == (["", "before", "after"], [["loss", "1.0000", "2.0000"]])


def test_checkpoints_in_the_background_are_the_same(small, tmp_path):
    behind = with_run(small, output=str(tmp_path / "behind"), async_save=True, save_every=1, keep_last=2)
    run(small, "test")

    assert run(behind, "test") == 0

    assert events(behind) == events(small)
    folder = Path(behind.run.output) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000005", "step-000006"]
    found, once = (load_file(Path(c.run.output) / "checkpoints" / "step-000006" / "rank-00000.safetensors") for c in (behind, small))  # fmt: skip  # noqa: E501
    assert all(torch.equal(found[name], once[name]) for name in once)


def test_resume_with_a_path_goes_back_in_its_own_folder(small):
    run(small, "test")
    once, folder = events(small), Path(small.run.output) / "checkpoints"

    assert run(with_run(small, resume=str(folder / "step-000002")), "test") == 0

    assert events(small) == once
    assert {path.name.split(".")[0] for path in folder.glob("*.before-*")} == {"step-000004", "step-000006"}


@pytest.mark.slow
def test_resume_with_a_path_from_another_folder_is_where_a_run_begins(small, tmp_path):
    """Once it has checkpoints of its own, the same command resumes from those."""
    run(small, "test")
    source = Path(small.run.output) / "checkpoints" / "step-000002"
    branch = with_run(small, output=str(tmp_path / "branch"), resume=str(source))

    assert run(branch, "test") == 0
    shutil.rmtree(Path(branch.run.output) / "checkpoints" / "step-000006")
    (Path(branch.run.output) / "state").write_text("stopped\n")
    assert run(branch, "test") == 0

    after = [event for event in events(small) if event["step"] > 2]
    assert events(branch) == after


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "SHA256SUMS"])
def test_a_finished_adapter_that_was_damaged_is_named_and_made_again(small, name, capsys):
    run(small, "test")
    file = Path(small.run.output) / "adapter" / name
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])

    assert run(small, "test") == 0

    assert "SHA256SUMS" in "".join(capsys.readouterr().out.split())
    assert file.read_bytes() == content


def test_a_run_folder_without_a_readable_identity_is_refused(small, capsys):
    run(small, "test")
    shutil.rmtree(Path(small.run.output) / "checkpoints")
    (Path(small.run.output) / "config.json").write_bytes(b'{"identity": \xff')

    assert run(small, "test") == 2

    assert "config.json is damaged and no checkpoint tells which run this was" in capsys.readouterr().err


def test_a_finished_run_started_again_does_nothing(small, capsys):
    run(small, "test")
    before = (Path(small.run.output) / "events.jsonl").read_bytes()

    assert run(small, "test") == 0

    assert "already finished" in capsys.readouterr().out
    assert (Path(small.run.output) / "events.jsonl").read_bytes() == before


def test_the_best_checkpoint_is_kept_and_a_run_that_ended_early_is_finished(small, monkeypatch, capsys):
    """Held-out losses fall until step 3, where --save-every has no checkpoint. Then the same command does nothing."""
    losses = iter([5.0, 4.0, 3.5, 3.0, 3.1, 3.2])
    monkeypatch.setattr(loop, "evaluate", lambda training: {"eval_loss": next(losses)})
    patient = with_run(small, eval_every=1, save_every=2, keep_last=1, patience=2)

    assert run(patient, "test") == 0
    folder, shown = Path(small.run.output), capsys.readouterr().out
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert run(patient, "test") == 0

    assert kept == ["step-000003", "step-000005"]
    assert "finished 5 steps in" in shown
    assert f"{folder} is already finished at step 5" in capsys.readouterr().out
    assert not list(folder.glob("adapter.before-*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: replace(c, adapter=replace(c.adapter, rank=8)), "adapter was"),
        (lambda c: replace(c, adapter=replace(c.adapter, method="lora")), "adapter was"),
        (lambda c: replace(c, data=replace(c.data, max_length=64)), "data was"),
        (lambda c: replace(c, optimizer=replace(c.optimizer, seed=1)), "seed was 42, now 1"),
    ],
)
def test_another_run_in_the_folder_is_refused_by_name(small, change, named, capsys):
    run(small, "test")

    assert run(change(small), "test") == 2

    error = capsys.readouterr().err
    assert named in error
    assert "--output" in error


@pytest.mark.slow
def test_resume_never_sets_the_old_run_aside(small, tmp_path):
    run(small, "test")
    first = losses(small)

    other = replace(with_run(small, resume="never"), optimizer=replace(small.optimizer, seed=1))
    assert run(other, "test") == 0

    assert losses(other) != first
    aside = [path for path in tmp_path.iterdir() if path.name.startswith("run-before-")]
    assert len(aside) == 1
    assert (aside[0] / "adapter").is_dir()


def test_a_resume_with_smaller_micro_batches_has_the_curve_of_a_run_without_a_break(small, tmp_path, monkeypatch):
    """Samples stand in one row behind their shared beginning, four or two of them: float32 rounding only."""
    joined, own = [], tasks.join
    monkeypatch.setattr(tasks, "join", lambda data, rows: joined.append(len(rows)) or own(data, rows))
    small = replace(small, optimizer=replace(small.optimizer, batch_size=8, micro_batch_size=4))
    whole = with_run(small, output=str(tmp_path / "whole"))
    run(whole, "test")
    smaller = replace(small, optimizer=replace(small.optimizer, micro_batch_size=2))

    run(small, "test", on_step=lambda training, event: event["step"] == 3 and training.stop.request("the test"))
    assert max(joined) == 4
    joined.clear()
    run(smaller, "test")

    assert len(losses(smaller)) == 6
    torch.testing.assert_close(losses(smaller), losses(whole), atol=5e-6, rtol=0)
    assert max(joined) == 2


def test_a_run_does_not_resume_with_other_pivots_than_it_began_with(small, tmp_path, monkeypatch, capsys):
    """The cache is lost, and another device chooses otherwise between equal pivots: cores of other directions."""
    small = replace(small, optimizer=replace(small.optimizer, max_steps=4))
    stopped = {"on_step": lambda training, event: event["step"] == 2 and training.stop.request("the test")}
    assert run(small, "test", **stopped) == STOPPED
    own, last_two = loldu.lu_of_panel, [*range(14), 15, 14]
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(loldu, "lu_of_panel", lambda panel, pivots=None: own(panel, own(panel)[2][last_two]))
        patch.setattr(loldu, "lu_misfit", lambda *given, **how: None)  # these pivots are not equal, so it refuses them
        other = run(small, "test")
    said = capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")

    again = run(small, "test")

    assert (other, again) == (2, 0)
    assert "gone from the cache, and made again they differ" in said
    assert len(losses(small)) == 4


def test_no_rank_gives_up_while_another_reads_or_writes_what_is_as_large_as_the_model(small, monkeypatch):
    """140 GB take hours over a slow network file system."""
    waits = {}
    gather = Communicator.gather

    def recorded(self, what, value, timeout_s=WAIT_S):
        waits[what] = timeout_s
        return gather(self, what, value, timeout_s)

    monkeypatch.setattr(Communicator, "gather", recorded)
    run(small, "test")
    shutil.rmtree(Path(small.run.output) / "checkpoints" / "step-000006")
    run(small, "test")

    large = ("model", "engine", "restoring", "checkpoint", "checkpoint rows", "checkpoint index", "adapter")
    assert {what: waits[what] for what in large} == dict.fromkeys(large, SLOW_S)
    assert waits["tokenizer"] == WAIT_S
