"""Files are replaced whole or not at all, readable as the umask allows, and a full disk is one line with a remedy."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.files import (
    allow_by_umask,
    digest,
    disk_errors,
    read_or_empty,
    read_text,
    replacing,
    user_path,
    write_atomically,
)

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=[0o022, 0o077, 0o027])
def allowed(request):
    """The mode of a new file under this umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


def test_a_written_text_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "state"
    file.write_text("running\n")

    write_atomically(file, "größer\n")

    assert read_or_empty(file) == "größer"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "weights"
    file.write_text("old")

    def write_half():
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()

    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_in_place_of_a_temporary_file_is_not_followed(tmp_path):
    """Every temporary name is new, so another user of the folder cannot prepare it."""
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / ".state.tmp").symlink_to(target)

    write_atomically(tmp_path / "state", "running\n")

    assert target.read_text() == "mine"


def test_a_tensor_file_has_the_permissions_of_any_new_file(tmp_path, allowed):
    with replacing(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.ones(2)}, temporary)
    (tmp_path / "adapter" / "code").mkdir(parents=True)
    for file in ("adapter/b.safetensors", "adapter/code/c.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / file)

    allow_by_umask(tmp_path / "adapter")

    for file in tmp_path.rglob("*.safetensors"):
        assert mode(file) == allowed, file
    assert mode(tmp_path / "adapter" / "code") & stat.S_IXUSR


def test_a_missing_or_odd_file_reads_as_far_as_it_can_be_read(tmp_path):
    (tmp_path / "odd").write_bytes(b"\xff stopped\n")

    assert read_or_empty(tmp_path / "missing") == ""
    assert read_or_empty(tmp_path) == ""
    assert read_or_empty(tmp_path / "odd") == "\ufffd stopped"


def test_the_digest_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 1_000_000)

    assert digest(tmp_path / "file") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


@pytest.mark.parametrize(
    ("error", "reads", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False, "no space is left; free some, or give --output"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True, "no space is left; free some, or give --output"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), False, "no space is left"),
        (PermissionError(errno.EACCES, "Permission denied"), True, "Permission denied; give --output"),
        (OSError(errno.EROFS, "Read-only file system"), True, "Read-only file system; give --output"),
        (OSError(errno.EFBIG, "File too large"), True, "File too large; give --output"),
        (OSError(errno.EIO, "Input/output error"), False, "Input/output error; give --output"),
    ],
)
def test_a_disk_error_is_one_line_with_a_remedy(tmp_path, error, reads, message):
    with (
        pytest.raises(ValueError, match=f"^cannot write checkpoints to {tmp_path}: {message}"),
        disk_errors("checkpoints", tmp_path, "give --output elsewhere", reads=reads),
    ):
        raise error


@pytest.mark.parametrize(("error", "reads"), [(OSError(errno.EIO, "a source"), True), (KeyError("ours"), False)])
def test_an_error_that_is_not_of_the_disk_stays_itself(tmp_path, error, reads):
    with pytest.raises(type(error)), disk_errors("checkpoints", tmp_path, "give --output elsewhere", reads=reads):
        raise error


def test_nothing_is_imported_but_the_standard_library():
    code = "import sys, launcher.files; assert not {'torch', 'safetensors', 'transformers'} & sys.modules.keys()"

    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def test_a_users_path_may_begin_with_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nobody-here.json").touch()

    assert user_path("~/my runs/x") == Path("/home/me/my runs/x")
    assert user_path("a/~/x") == Path("a/~/x")
    assert user_path("~nobody-here.json") == Path("~nobody-here.json")
    with pytest.raises(ValueError, match="~nobody-here/x: there is no such home directory; give an absolute path"):
        user_path("~nobody-here/x")


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1 << 20, (1 << 20) + 1, 3 << 20])
@pytest.mark.parametrize("most", [100, 1 << 20, 2 << 20])
def test_a_text_is_read_whole_or_named_as_too_long(size, most, tmp_path):
    (tmp_path / "text").write_bytes(b"x" * size)

    if size > most:
        with pytest.raises(ValueError, match=f"it is longer than {most} bytes"):
            read_text(tmp_path / "text", most)
    else:
        assert read_text(tmp_path / "text", most) == "x" * size


def test_a_short_file_takes_no_memory_for_a_long_one(tmp_path):
    (tmp_path / "text").write_text("x")
    tracemalloc.start()
    try:
        read_text(tmp_path / "text", 1 << 30)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 4 << 20
