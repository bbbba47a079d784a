"""Checkpoints: whole or absent, verified, portable between numbers of ranks."""

import hashlib
import json
import math
import os
import shutil
import threading
from contextlib import contextmanager

import pytest
import torch
from communicators import together

from launcher.processes import Communicator, Ranks
from launcher.training import checkpoint
from launcher.training.checkpoint import Piece, Saver, load, newest, prune, save, set_aside_after
from launcher.training.checkpoint_index import TrainingState

ALONE = Communicator(Ranks())


def meta(step, **more):
    """What a run records about itself."""
    events = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    return {"identity": {}, "progress": vars(TrainingState(step=step)), "world_size": 1, "events": events, **more}


def write(root, step, value=1.0):
    return save(root, step, {"model/a": Piece.whole(torch.full((5, 3), value))}, meta(step), ALONE)


def reseal(folder, index):
    """Put another index there, with a matching checksum; index is JSON data, or text."""
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "index.json").write_text(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    tensors = {"f32": torch.randn(4, 2), "bf16": torch.randn(3).bfloat16(), "scalar": torch.tensor(2.5)}

    noted = meta(7, note=[1])
    folder = save(tmp_path, 7, {name: Piece.whole(value) for name, value in tensors.items()}, noted, ALONE)
    found = load(folder)

    assert folder.name == "step-000007"
    assert (found.step, found.meta) == (7, noted)
    assert found.meta["progress"]["best_loss"] == math.inf  # no evaluation yet
    for name, value in tensors.items():
        assert torch.equal(found.read(name, value.shape), value)
        assert found.read(name, value.shape).dtype == value.dtype


def test_rows_of_three_ranks_are_read_by_any_number(tmp_path):
    """Three ranks save their rows; a reader takes any slice, across the files."""
    whole, borders = torch.arange(20.0).view(10, 2), [(0, 4), (4, 7), (7, 10)]

    def save_rows(comm):
        low, high = borders[comm.ranks.rank]
        save(tmp_path, 1, {"w": Piece(whole[low:high], (10, 2), low)}, meta(1), comm)

    together(3, save_rows)
    found = newest(tmp_path)

    assert len(list(found.folder.glob("*.safetensors"))) == 3
    assert torch.equal(found.read("w", (10, 2)), whole)
    for start, count in [(0, 1), (3, 2), (2, 8), (9, 1)]:
        assert torch.equal(found.read("w", (10, 2), start, count), whole[start : start + count])


@pytest.mark.parametrize("victim", ["rank-00000.safetensors", "index.json", "COMPLETE"])
@pytest.mark.parametrize("damage", ["flip", "high bit", "cut", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, victim, damage):
    write(tmp_path, 1, 1.0)
    file = write(tmp_path, 2, 2.0) / victim
    content = bytearray(file.read_bytes())
    if damage in ("flip", "high bit"):
        content[len(content) // 2] ^= 1 if damage == "flip" else 128  # the latter is no UTF-8 any more
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1] if victim != "COMPLETE" else content[:-2])
    else:
        file.unlink()

    found = newest(tmp_path)

    assert found.step == 1
    assert "step-000002" in caplog.text
    assert victim in caplog.text or "index.json" in caplog.text


def test_a_save_that_dies_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_seal", die)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2)

    assert newest(tmp_path).step == 1
    monkeypatch.undo()
    write(tmp_path, 2)
    assert newest(tmp_path).step == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_is_the_users_mistake_and_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(
        ValueError, match=r"cannot write checkpoints to .*: no space is left; free some, or give --output elsewhere"
    ):
        write(tmp_path, 2)

    monkeypatch.undo()
    assert newest(tmp_path).step == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_newer_format_is_refused_by_number_and_never_passed_over(tmp_path):
    """Going back to an older one would write over what the later version has trained since."""
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    reseal(folder, {"format": 99, "what": "a later version writes"})

    for open_it in (lambda: load(folder), lambda: newest(tmp_path)):
        with pytest.raises(ValueError, match=r"step-000002 has format 99, this version reads up to 1: .*--output"):
            open_it()


def test_where_no_checkpoint_is_whole_the_warning_says_so(tmp_path, caplog):
    for step in (1, 2):
        (write(tmp_path, step) / "COMPLETE").unlink()

    assert newest(tmp_path) is None

    assert [record.message.rpartition("; ")[2] for record in caplog.records] == [
        "trying the checkpoint before it",
        "no older one is left",
    ]


def test_a_folder_that_one_rank_does_not_see_is_named_on_all(tmp_path):
    """As when the run folder is on one node's own disk."""

    def save_rows(comm):
        root = tmp_path / f"node{comm.ranks.rank}"
        save(root, 1, {"w": Piece(torch.ones(1, 2), (2, 2), comm.ranks.rank)}, meta(1), comm)

    errors = together(2, save_rows)

    assert all(isinstance(error, ValueError) and "cannot write checkpoints to" in str(error) for error in errors)


def test_the_next_save_removes_the_files_of_a_killed_one(tmp_path):
    (tmp_path / "step-000004.tmp").mkdir()

    write(tmp_path, 5)

    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_retention_keeps_the_last_ones_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)

    prune(tmp_path, keep_last=2, best_step=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]


def at(index, path, value):
    """The index with another value at that path of keys; without the key if value is None."""
    *above, last = path
    place = index
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return index


PIECE = ("tensors", "model/a", "pieces", 0)
PROGRESS = ("meta", "progress")
WRONG = [
    (("format",), None), (("format",), "1"), (("format",), 0), (("format",), 1.5), (("format",), True),
    (("step",), None), (("step",), "2"), (("step",), -3), (("step",), 10**9), (("step",), 10**30), (("step",), [2]),
    (("meta",), None), (("meta",), []), (("meta", "identity"), None), (("meta", "identity"), "a"),
    (("meta", "progress"), None), (("meta", "progress"), {"step": 2, "unknown": 1}),
    ((*PROGRESS, "step"), 10**9), ((*PROGRESS, "step"), -3), ((*PROGRESS, "step"), "2"), ((*PROGRESS, "step"), 2.0),
    ((*PROGRESS, "tokens"), -1), ((*PROGRESS, "best_loss"), "low"), ((*PROGRESS, "evaluated"), -2),
    (("meta", "events"), None), (("meta", "events"), []), (("meta", "events", "bytes"), "1"),
    (("meta", "events", "bytes"), -1), (("meta", "events", "sha256"), 7), (("meta", "world_size"), 0),
    (("files",), None), (("files",), ["rank-00000.safetensors"]), (("files", "../../other"), "0" * 64),
    (("files", "/etc/hostname"), "0" * 64), (("files", "rank-00000.safetensors"), None),
    (("files", "rank-00000.safetensors"), 7),
    (("tensors",), None), (("tensors",), []), (("tensors", "model/a"), 7), (("tensors", "model/b"), {}),
    (("tensors", "model/a", "shape"), [6, 3]), (("tensors", "model/a", "shape"), [-5, 3]),
    (("tensors", "model/a", "shape"), [10**30, 3]), (("tensors", "model/a", "shape"), 5),
    (("tensors", "model/a", "shape"), [5, 4]), (("tensors", "model/a", "dtype"), "float16"),
    (("tensors", "model/a", "dtype"), "object"), (("tensors", "model/a", "pieces"), []),
    ((*PIECE, "file"), "../../other"), ((*PIECE, "file"), "rank-00001.safetensors"), ((*PIECE, "file"), None),
    ((*PIECE, "start"), 1), ((*PIECE, "start"), -1), ((*PIECE, "start"), None), ((*PIECE, "rows"), 4),
    ((*PIECE, "rows"), "5"), ((*PIECE, "rows"), 10**12), ((*PIECE, "rows"), None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{'.'.join(map(str, p))}={v!r:.20}" for p, v in WRONG])
def test_a_wrong_index_is_reported_as_damage_and_the_earlier_checkpoint_is_used(tmp_path, caplog, path, value):
    """Its checksum is right: anyone who can write the index can write that too."""
    write(tmp_path, 1)
    shutil.copy(write(tmp_path, 2) / "rank-00000.safetensors", tmp_path / "other")
    folder = tmp_path / "step-000002"
    reseal(folder, at(index_of(folder), path, value))

    found = newest(tmp_path)

    assert found.step == 1
    assert torch.equal(found.read("model/a", (5, 3)), torch.ones(5, 3))
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint {folder} is damaged: ")
    assert line.endswith("; trying the checkpoint before it")


@pytest.mark.parametrize(
    "text", ["[]", "7", "null", "{", "", '{"format": 1}', "[" * 100_000, '{"a":' * 100_000, '{"format": NaN}', "\u2028"]
)
def test_an_index_of_another_kind_is_damaged(tmp_path, caplog, text):
    write(tmp_path, 1)
    reseal(write(tmp_path, 2), text)

    assert newest(tmp_path).step == 1
    assert "step-000002 is damaged: index.json" in caplog.text


def test_a_piece_that_is_a_link_or_a_fifo_is_not_read(tmp_path, caplog):
    write(tmp_path, 1)
    for step, replace in ((2, lambda file: file.symlink_to(tmp_path / "other")), (3, os.mkfifo)):
        file = write(tmp_path, step) / "rank-00000.safetensors"
        os.replace(file, tmp_path / "other")
        replace(file)
    for step, name in ((4, "index.json"), (5, "COMPLETE")):
        file = write(tmp_path, step) / name
        file.unlink()
        os.mkfifo(file)

    assert newest(tmp_path).step == 1
    assert caplog.text.count("rank-00000.safetensors is missing") == 2
    assert caplog.text.count("is not complete: not a regular file") == 2


def test_a_folder_renamed_to_another_step_is_damaged(tmp_path, caplog):
    """Else a copy named step-999999 would end the run at once as finished."""
    write(tmp_path, 1)
    os.replace(write(tmp_path, 2), tmp_path / "step-999999")

    assert newest(tmp_path).step == 1
    assert "step-999999 is damaged: its index is that of step 2" in caplog.text


def test_odd_names_beside_checkpoints_are_left_alone(tmp_path):
    write(tmp_path, 1)
    for name in ("step-" + "9" * 200, "step-1", "step-²²²²²²", "step-000009.before-5"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000007").symlink_to(tmp_path / "step-000001")

    assert newest(tmp_path).step == 1
    prune(tmp_path, keep_last=1, best_step=None)
    set_aside_after(tmp_path, 1)

    assert len(list(tmp_path.iterdir())) == 6


def test_checkpoints_behind_a_link_are_neither_written_nor_deleted(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for step in (1, 2, 3):
        write(elsewhere, step)
    (tmp_path / "checkpoints").symlink_to(elsewhere)

    for use in (
        lambda: prune(tmp_path / "checkpoints", keep_last=1, best_step=None),
        lambda: write(tmp_path / "checkpoints", 4),
    ):
        with pytest.raises(ValueError, match=r"checkpoints is a symbolic link to .*elsewhere.*--output"):
            use()

    assert len(list(elsewhere.iterdir())) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_neither_saved_nor_read(tmp_path, value, monkeypatch):
    write(tmp_path, 1)

    with pytest.raises(ValueError, match=r"model/a has numbers that are NaN or infinite after step 2"):
        write(tmp_path, 2, value)

    assert newest(tmp_path).step == 1
    assert not list(tmp_path.glob("*.tmp"))
    with monkeypatch.context() as patch:  # as an earlier version would have written them
        patch.setattr(torch.Tensor, "isfinite", lambda tensor: torch.tensor(True))
        folder = write(tmp_path, 3, value)
    with pytest.raises(ValueError, match=r"step-000003 is damaged: model/a has numbers that are NaN or infinite"):
        load(folder).read("model/a", (5, 3))


def test_a_tensor_of_another_model_is_named_with_both_shapes(tmp_path):
    found = load(write(tmp_path, 1))

    with pytest.raises(ValueError, match=r"trains model/a as \(5, 4\), but checkpoint .* has it as \(5, 3\)"):
        found.read("model/a", (5, 4))
    with pytest.raises(ValueError, match=r"trains model/b as \(2,\), but checkpoint .* has no such tensor"):
        found.read("model/b", (2,))


def test_the_wait_for_a_save_in_the_background_has_a_bar_of_its_bytes(tmp_path):
    """The save ends only once the bar is shown; a save that is done already shows none."""
    shown, begun = [], threading.Event()

    class Bars:
        @contextmanager
        def bar(self, what, total, **how):
            shown.append((what, total))
            begun.set()
            yield lambda done: shown.append(done)

    saver = Saver(tmp_path, ALONE, background=True)
    saver.save(3, {"model/a": Piece.whole(torch.ones(5, 3))}, meta(3), before=begun.wait)
    saver.finish(Bars())
    saver.finish(Bars())

    assert shown[0] == ("saving", 60)
    assert shown[-1] == 60
    assert shown.count(("saving", 60)) == 1
    assert newest(tmp_path).step == 3
