"""Checkpoints: whole or absent, verified, portable between numbers of ranks."""

import hashlib
import json
import os

import pytest
import torch
from communicators import together

from launcher.processes import Communicator, Ranks
from launcher.training import checkpoint
from launcher.training.checkpoint import Piece, load, newest, prune, save

ALONE = Communicator(Ranks())


def write(root, step, value=1.0, **meta):
    return save(root, step, {"model/a": Piece.whole(torch.full((5, 3), value))}, meta, ALONE)


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    tensors = {"f32": torch.randn(4, 2), "bf16": torch.randn(3).bfloat16(), "scalar": torch.tensor(2.5)}

    folder = save(tmp_path, 7, {name: Piece.whole(value) for name, value in tensors.items()}, {"note": [1]}, ALONE)
    found = load(folder)

    assert folder.name == "step-000007"
    assert (found.step, found.meta) == (7, {"note": [1]})
    for name, value in tensors.items():
        assert torch.equal(found.read(name), value)
        assert found.read(name).dtype == value.dtype


def test_rows_of_three_ranks_are_read_by_any_number(tmp_path):
    """Three ranks save their rows; a reader takes any slice, across the files."""
    whole, borders = torch.arange(20.0).view(10, 2), [(0, 4), (4, 7), (7, 10)]

    def save_rows(comm):
        low, high = borders[comm.ranks.rank]
        save(tmp_path, 1, {"w": Piece(whole[low:high], (10, 2), low)}, {}, comm)

    together(3, save_rows)
    found = newest(tmp_path)

    assert len(list(found.folder.glob("*.safetensors"))) == 3
    assert torch.equal(found.read("w"), whole)
    for start, count in [(0, 1), (3, 2), (2, 8), (9, 1)]:
        assert torch.equal(found.read("w", start, count), whole[start : start + count])


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
    index = json.loads((folder / "index.json").read_text()) | {"format": 99}
    text = json.dumps(index)
    (folder / "index.json").write_text(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())

    for open_it in (lambda: load(folder), lambda: newest(tmp_path)):
        with pytest.raises(ValueError, match=r"step-000002 has format 99, this version reads up to 1: .*--output"):
            open_it()


def test_where_no_checkpoint_is_whole_the_warning_says_so(tmp_path, caplog):
    for step in (1, 2):
        (write(tmp_path, step) / "COMPLETE").unlink()

    assert newest(tmp_path) is None

    assert [record.message.rpartition("; ")[2] for record in caplog.records] == [
        "going back to the checkpoint before it",
        "none is left",
    ]


def test_a_folder_that_one_rank_does_not_see_is_named_on_all(tmp_path):
    """As where the run folder lies on one node's own disk."""

    def save_rows(comm):
        root = tmp_path / f"node{comm.ranks.rank}"
        save(root, 1, {"w": Piece(torch.ones(1, 2), (2, 2), comm.ranks.rank)}, {}, comm)

    errors = together(2, save_rows)

    assert all(isinstance(error, ValueError) and "cannot write checkpoints to" in str(error) for error in errors)


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path):
    (tmp_path / "step-000004.tmp").mkdir()

    write(tmp_path, 5)

    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_retention_keeps_the_last_ones_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)

    prune(tmp_path, keep_last=2, best_step=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]
