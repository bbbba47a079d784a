"""The factor cache: verified, atomic, content-addressed, pruned by age of use."""

import errno
import json
import logging
import multiprocessing
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from adapters.factors import Factors
from adapters.loldu import loldu_factors
from launcher.factorization import cache

KEY = "a" * 64


def some_factors(m: int = 40, n: int = 24, r: int = 6, seed: int = 0) -> Factors:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    probe = torch.arange(32, dtype=torch.uint8)
    factors = loldu_factors(weight[:, :r], lambda rows: weight[rows.long()])
    return factors._replace(write=factors.write.bfloat16(), probe=probe)


def stored(folder: Path, key: str = KEY, **shape: int) -> Path:
    return cache.store(folder, key, some_factors(**shape), {"name": "q_proj", "rank": 6}).file


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1  # a digit of the header stays a digit
    file.write_bytes(data)


def assert_same(a: Factors | None, b: Factors) -> None:
    assert a is not None
    for name in Factors._fields:
        ours, theirs = getattr(a, name), getattr(b, name)
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


def test_stored_factors_come_back_bit_for_bit_in_their_dtypes(tmp_path):
    factors = some_factors()

    entry = cache.store(tmp_path, KEY, factors, {"name": "q_proj", "rank": 6})
    again = cache.load(tmp_path, KEY)

    assert_same(again, factors)
    assert cache.find(tmp_path, KEY) == entry
    assert [factors.write.dtype, factors.read.dtype] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 17), slice(39, 40), slice(0, 40), slice(40, 40)])
def test_rows_read_alone_are_those_of_the_whole(tmp_path, monkeypatch, rows):
    """With small blocks, so that the rows start and end inside blocks."""
    monkeypatch.setattr(cache, "BLOCK_BYTES", 50)  # four rows of six bfloat16
    stored(tmp_path)

    part = cache.load(tmp_path, KEY, rows)

    assert_same(part, some_factors()._replace(write=some_factors().write[rows]))


def test_a_flipped_byte_anywhere_is_found_and_logged_and_the_file_set_aside(tmp_path, caplog):
    file = stored(tmp_path)
    size, whole = file.stat().st_size, file.read_bytes()

    for at in range(0, size, 7):
        file.write_bytes(whole)
        flip(file, at)
        caplog.clear()

        assert cache.load(tmp_path, KEY) is None, f"byte {at} of {size}"

        assert "is damaged" in caplog.text
        assert not file.exists()
        assert file.with_suffix(".damaged").exists()


def test_only_the_rows_that_are_read_are_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_BYTES", 50)
    file = stored(tmp_path)
    row = some_factors().write[20].contiguous().view(torch.uint8).numpy().tobytes()
    flip(file, file.read_bytes().index(row))

    untouched = cache.load(tmp_path, KEY, slice(0, 20))
    touched = cache.load(tmp_path, KEY, slice(20, 40))

    assert untouched is not None
    assert touched is None


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_truncated_file_is_set_aside_when_its_header_is_read(tmp_path, caplog, left):
    file = stored(tmp_path)
    file.write_bytes(file.read_bytes()[:left])

    found = cache.find(tmp_path, KEY)

    assert found is None
    assert "is damaged" in caplog.text
    assert cache.find(tmp_path, KEY) is None  # now it is missing


def test_a_file_under_another_key_counts_as_damaged(tmp_path):
    file = stored(tmp_path)
    os.rename(file, file.with_name(f"{'b' * 64}.safetensors"))

    assert cache.find(tmp_path, "b" * 64) is None
    assert cache.find(tmp_path, KEY) is None


def test_the_key_depends_on_recipe_bytes_shape_and_dtype():
    weight = torch.arange(12.0).reshape(3, 4)
    recipe = {"rank": 2}

    keys = [
        cache.content_key(recipe, weight),
        cache.content_key({"rank": 3}, weight),
        cache.content_key(recipe, weight.reshape(4, 3)),
        cache.content_key(recipe, weight.view(torch.int32)),
        cache.content_key(recipe, weight + 1),
        cache.content_key(recipe, weight, weight),
    ]

    assert len(set(keys)) == len(keys)
    assert cache.content_key(recipe, weight.T.contiguous().T) == keys[0]  # not on the layout in memory


def test_the_index_stores_values_and_detects_a_changed_one(tmp_path, caplog):
    identity = {"file": "/w.safetensors", "rank": 4}
    cache.remember(tmp_path, identity, KEY)
    (file,) = (tmp_path / "index").iterdir()

    right = cache.recall(tmp_path, identity)
    file.write_text(file.read_text().replace(KEY, "b" * 64))
    wrong = cache.recall(tmp_path, identity)

    assert right == KEY
    assert wrong is None
    assert "is damaged" in caplog.text
    assert cache.recall(tmp_path, {**identity, "rank": 5}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '["x"]', '["[1]", 2]'])
def test_a_broken_index_file_counts_as_missing(tmp_path, text):
    cache.remember(tmp_path, {"rank": 4}, KEY)
    (file,) = (tmp_path / "index").iterdir()
    file.write_text(text)

    assert cache.recall(tmp_path, {"rank": 4}) is None


def test_an_index_file_of_another_identity_counts_as_missing(tmp_path):
    cache.remember(tmp_path, {"rank": 4}, KEY)
    (first,) = (tmp_path / "index").iterdir()
    cache.remember(tmp_path, {"rank": 5}, "b" * 64)
    (second,) = set((tmp_path / "index").iterdir()) - {first}

    first.write_bytes(second.read_bytes())

    assert cache.recall(tmp_path, {"rank": 4}) is None


def _store_again_and_again(folder: Path, name: str, start, failed) -> None:
    start.wait()
    for _ in range(20):
        cache.store(folder, KEY, some_factors(m=400), {"name": name, "rank": 6})
        if cache.load(folder, KEY) is None:
            failed.set()


def test_eight_processes_storing_one_key_at_once_leave_one_valid_file(tmp_path):
    """Each also reads between its writes: at no moment is there a file that does not verify. Names of different length
    (one content under two names) make headers of different length, so a reader must not mix two files."""
    fork = multiprocessing.get_context("fork")
    start, failed = fork.Barrier(8), fork.Event()
    names = ["q" * (50 * i) for i in range(8)]
    writers = [fork.Process(target=_store_again_and_again, args=(tmp_path, name, start, failed)) for name in names]

    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    assert [writer.exitcode for writer in writers] == [0] * 8
    assert not failed.is_set()
    assert [file.name for file in (tmp_path / "factors").iterdir()] == [f"{KEY}.safetensors"]
    assert_same(cache.load(tmp_path, KEY), some_factors(m=400))


@pytest.mark.parametrize("error", [RuntimeError("size is smaller than the required mapping"), SafetensorError("bad")])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, caplog, error):
    """safetensors opens a file twice, and raises these errors if the second open finds another file."""
    stored(tmp_path)
    real, opened = cache.safe_open, []

    def open_while_another_job_stores(file, framework):
        opened.append(file)
        if len(opened) == 1:
            stored(tmp_path)
            raise error
        return real(file, framework=framework)

    monkeypatch.setattr(cache, "safe_open", open_while_another_job_stores)
    factors = cache.load(tmp_path, KEY)

    assert_same(factors, some_factors())
    assert caplog.text == ""


def test_running_out_of_memory_does_not_count_as_damage(tmp_path, monkeypatch):
    file = stored(tmp_path)

    def no_memory(*_args, **_options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(cache, "safe_open", no_memory)
    with pytest.raises(RuntimeError, match="allocate"):
        cache.load(tmp_path, KEY)

    assert file.exists()


def test_a_folder_that_is_not_writable_is_an_error_with_the_remedy(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")

    with pytest.raises(ValueError, match=r"cannot write cache files to .*/file/cache: .*--cache DIR"):
        stored(blocked / "cache")

    assert cache.find(blocked / "cache", KEY) is None
    assert cache.recall(blocked / "cache", {"rank": 4}) is None


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failing_write_leaves_no_partial_file(tmp_path, monkeypatch, call):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ValueError, match=r"no space is left; free some with `loldu cache prune.*--cache DIR"):
        stored(tmp_path)

    assert list((tmp_path / "factors").iterdir()) == []


def test_a_full_disk_leaves_existing_files_and_no_partial_file(tmp_path):
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {made.stderr.strip()}")
    try:
        kept = stored(tmp_path)

        with pytest.raises(ValueError, match="no space is left"):
            stored(tmp_path, "b" * 64, m=40_000)

        assert [file.name for file in (tmp_path / "factors").iterdir()] == [kept.name]
        assert_same(cache.load(tmp_path, KEY), some_factors())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def aged(folder: Path, days: dict[str, float]) -> dict[str, Path]:
    files = {}
    for name, age in days.items():
        files[name] = stored(folder, name * 64)
        cache.remember(folder, {"name": name}, name * 64)
        os.utime(files[name], (time.time() - age * 86400,) * 2)
    return files


def test_pruning_to_a_size_removes_the_least_recently_used_first(tmp_path):
    files = aged(tmp_path, {"a": 4, "b": 3, "c": 2, "d": 1})
    size = files["a"].stat().st_size
    cache.load(tmp_path, "a" * 64)  # the oldest, used just now

    pruned = cache.prune(tmp_path, max_bytes=2.5 * size)

    assert [name for name, file in files.items() if file.exists()] == ["a", "d"]
    assert pruned == cache.Pruned(2, 2 * size, 2 * size)
    assert cache.recall(tmp_path, {"name": "a"}) == "a" * 64
    assert cache.recall(tmp_path, {"name": "b"}) is None
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_pruning_by_age_counts_from_the_last_use_and_listing_is_not_a_use(tmp_path):
    files = aged(tmp_path, {"a": 4, "b": 3, "c": 2})
    cache.find(tmp_path, "a" * 64)
    cache.entries(tmp_path)
    cache.verify(tmp_path)

    cache.prune(tmp_path, older_than_s=2.5 * 86400)

    assert [name for name, file in files.items() if file.exists()] == ["a", "c"]


def test_pruning_removes_damaged_and_abandoned_files_but_not_one_being_written(tmp_path):
    kept = stored(tmp_path)
    folder = kept.parent
    old, new = (f".{KEY}.safetensors.{digit * 32}.tmp" for digit in "12")
    for name in (f"{'c' * 64}.damaged", old, new):
        (folder / name).write_bytes(b"123")
    os.utime(folder / old, (time.time() - 7200,) * 2)

    pruned = cache.prune(tmp_path, max_bytes=1e9)

    assert {file.name for file in folder.iterdir()} == {kept.name, new}
    assert (pruned.files, pruned.freed_bytes) == (2, 6)


def test_verify_reads_every_byte_and_entries_are_listed_by_last_use(tmp_path, caplog):
    files = aged(tmp_path, {"a": 1, "b": 3, "c": 2})
    flip(files["c"], files["c"].stat().st_size - 1)  # which also makes it the most recently used
    listed = [entry.key[0] for entry in cache.entries(tmp_path)]  # reads only headers, so the damage is not seen

    damaged = cache.verify(tmp_path)

    assert listed == ["c", "a", "b"]
    assert damaged == [files["c"].with_suffix(".damaged")]
    assert [entry.key[0] for entry in cache.entries(tmp_path)] == ["a", "b"]


def test_a_read_only_cache_can_be_read(tmp_path, monkeypatch, caplog):
    """Updating times fails silently; a damaged file stays in place and is still logged and refused."""
    file = stored(tmp_path)
    cache.remember(tmp_path, {"rank": 4}, KEY)

    def read_only(*_args, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    monkeypatch.setattr(os, "replace", read_only)

    assert cache.recall(tmp_path, {"rank": 4}) == KEY
    assert_same(cache.load(tmp_path, KEY), some_factors())
    flip(file, file.stat().st_size - 1)
    with caplog.at_level(logging.WARNING):
        assert cache.load(tmp_path, KEY) is None
    assert "is damaged" in caplog.text
    assert file.exists()


def test_the_header_describes_the_origin_of_the_factors(tmp_path):
    stored(tmp_path)

    entry = cache.find(tmp_path, KEY)

    assert entry is not None
    assert entry.about["name"] == "q_proj"
    assert entry.about["versions"]["torch"] == torch.__version__
    json.dumps(entry.about)


def test_the_default_folder_follows_xdg(tmp_path):
    assert cache.default_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "loldu"
    assert cache.default_folder({}) == Path.home() / ".cache" / "loldu"
    assert cache.default_folder({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "loldu"


@pytest.mark.parametrize(
    "name", ["factors/mine.damaged", "sub/.x.tmp", "factors/model.safetensors", "index/notes.json", "notes/x.damaged"]
)
def test_pruning_removes_only_files_that_are_named_as_the_cache_names_them(tmp_path, name):
    stored(tmp_path)
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("years of work")
    os.utime(foreign, (0, 0))

    cache.verify(tmp_path)
    cache.prune(tmp_path, max_bytes=0, older_than_s=0)

    assert foreign.read_text() == "years of work"
    assert cache.entries(tmp_path) == []


def test_a_folder_that_is_not_a_cache_is_refused_and_stays_as_it_was(tmp_path):
    model = tmp_path / "model"
    (model / "factors").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "factors" / f"{KEY}.safetensors").write_text("a weight")

    with pytest.raises(ValueError, match=r"model is not a factor cache \(it holds 'config.json'\).*--cache DIR"):
        cache.prune(model, max_bytes=0)

    assert (model / "factors" / f"{KEY}.safetensors").exists()


def test_a_cache_of_an_earlier_version_without_the_mark_is_still_one(tmp_path):
    file = stored(tmp_path)
    (tmp_path / cache.MARK).unlink()

    pruned = cache.prune(tmp_path, max_bytes=0)

    assert pruned.files == 1
    assert not file.exists()


def test_a_new_cache_belongs_to_its_owner_alone_and_an_existing_folder_keeps_its_permissions(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2770)

    stored(tmp_path / "own")
    stored(shared)

    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    assert shared.stat().st_mode & 0o7777 == 0o2770


HEADERS = [
    "[]", "3", '"x"', "{}", "[" * 100_000, "{", '{"key": 3, "checksums": {}}', '{"key": "KEY", "checksums": []}',
    '{"key": "KEY", "checksums": {"write": 3}}', '{"key": "KEY", "checksums": {"nothing": []}}',
    '{"key": "KEY", "checksums": {}, "rank": "six"}', '{"key": "KEY", "checksums": {}, "shape": 3}',
    '{"key": "KEY", "checksums": {}, "name": ["\\u001b[2J"]}',
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_a_wrong_header_is_reported_as_damage_without_a_traceback(tmp_path, header):
    """Its checksum is right: the author of the file computed a new one."""
    from safetensors.numpy import save_file

    file = stored(tmp_path)
    text = header.replace("KEY", KEY)
    tensors = {name: tensor.float().numpy() for name, tensor in some_factors()._asdict().items()}
    save_file(tensors, file, {"about": text, "seal": cache._checksum(text)})

    assert cache.load(tmp_path, KEY) is None
    assert not file.exists()


@pytest.mark.timeout(20)
def test_a_fifo_in_the_cache_is_damage_and_never_waited_for(tmp_path):
    file = stored(tmp_path)
    cache.remember(tmp_path, {"rank": 4}, KEY)
    (index,) = (tmp_path / "index").iterdir()
    for path in (file, index):
        path.unlink()
        os.mkfifo(path)

    assert cache.recall(tmp_path, {"rank": 4}) is None
    assert cache.entries(tmp_path) == []
    cache.prune(tmp_path, max_bytes=0)


@pytest.mark.parametrize("key", ["../../secret", "x", "", 3, None, ["a"], {"a": 1}, "A" * 64])
def test_an_index_that_points_outside_the_cache_finds_nothing(tmp_path, key):
    cache.remember(tmp_path, {"rank": 4}, key)

    assert cache.find(tmp_path, cache.recall(tmp_path, {"rank": 4})) is None
    assert cache.load(tmp_path, cache.recall(tmp_path, {"rank": 4})) is None


def test_without_a_home_directory_the_error_names_the_option(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)

    with pytest.raises(ValueError, match=r"HOME is not set.*--cache DIR"):
        cache.default_folder({})
