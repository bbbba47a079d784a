"""Several processes tokenise the same as one, share one file, and learn of each other's failures."""

import hashlib
import itertools
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from launcher.config import DataConfig
from launcher.data import encode, encoded, records, token_cache
from launcher.data.crew import ALONE, Crew
from launcher.data.stored import store_splits, stored_splits
from launcher.data.templates import frame, template_of
from launcher.data.token_cache import encode_once
from launcher.data.tokens import stop_ids
from launcher.factorization import cache, watch
from launcher.processes import Ranks, Stopped
from tests.communicators import together

RECORDS = [{"instruction": f"Say {n}.", "input": "", "output": "yes " * (n % 9 + 1)} for n in range(40)]
SETTINGS = DataConfig(prompt_template="short", max_length=48)


@pytest.fixture
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(encoded, "CHUNK", 3)
    monkeypatch.setattr(token_cache, "CHUNK", 3)


def two_nodes(rank: int, world: int) -> Ranks:
    return Ranks(rank, world, rank % 2, 2)


def test_processes_together_give_the_file_of_one(tokenizer, tmp_path):
    alone = encode_once(RECORDS, tokenizer, SETTINGS, tmp_path / "one")

    found = together(3, lambda comm: encode_once(RECORDS, tokenizer, SETTINGS, tmp_path / "three", Crew(comm)))

    in_memory = encode.encode(RECORDS, tokenizer, SETTINGS)
    for each in [alone, *found]:
        assert each.digest() == in_memory.digest()
        assert torch.equal(each.targets, in_memory.targets)
        assert each.report == in_memory.report
    files = [list((tmp_path / name / "tokenised").iterdir()) for name in ("one", "three")]
    assert [len(some) for some in files] == [1, 1]  # no folder of work is left
    assert files[0][0].read_bytes() == files[1][0].read_bytes()


def test_every_process_takes_a_share(tokenizer, tmp_path, monkeypatch):
    taken, both = [], threading.Barrier(2, timeout=60)
    part = encode.Encoder.part

    def counting(self, some):
        if threading.current_thread() not in taken:
            both.wait()  # each thread has taken a chunk before any takes a second
        taken.append(threading.current_thread())
        return part(self, some)

    monkeypatch.setattr(encode.Encoder, "part", counting)

    together(2, lambda comm: encode_once(RECORDS, tokenizer, SETTINGS, tmp_path, Crew(comm)))

    assert len(taken) == 14
    assert len(set(taken)) == 2


def test_the_tokens_are_mapped_and_not_copied(tokenizer, tmp_path):
    made = encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)

    [file] = (tmp_path / "tokenised").iterdir()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    for tensor in (made.ids, made.loss, made.offsets, made.targets):
        assert any(start <= tensor.data_ptr() < stop for start, stop in spans)


def test_the_key_is_the_hash_of_one_json_text(tokenizer, tmp_path):
    template = template_of(SETTINGS, RECORDS[0], tokenizer)
    depends_on = [
        token_cache.FORMAT, token_cache.tokenizers.__version__, tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.special_tokens_map), template, frame(template, tokenizer), sorted(stop_ids(tokenizer)),
        SETTINGS.max_length, SETTINGS.loss_on, SETTINGS.on_bad_record, RECORDS,
    ]  # fmt: skip
    expected = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()

    encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)

    assert [file.stem for file in (tmp_path / "tokenised").iterdir()] == [expected]
    stored = stored_in(tmp_path / "work", replace(SETTINGS, data=write(tmp_path, "a.json", RECORDS), eval_records=0))[0]
    assert token_cache._key(stored, tokenizer, SETTINGS) == expected


def test_only_the_machine_that_lacks_the_file_makes_it(tokenizer, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    encode_once(RECORDS, tokenizer, SETTINGS, folders[0])
    before = [file.stat().st_ino for file in (folders[0] / "tokenised").iterdir()]

    found = together(
        4,
        lambda comm: encode_once(RECORDS, tokenizer, SETTINGS, folders[comm.ranks.rank // 2], Crew(comm)),
        ranks=two_nodes,
    )

    assert len({each.digest() for each in found}) == 1
    assert [file.stat().st_ino for file in (folders[0] / "tokenised").iterdir()] == before
    assert len(list((folders[1] / "tokenised").iterdir())) == 1


def test_two_jobs_at_once_end_with_one_good_file(tokenizer, tmp_path):
    results: list = []
    jobs = [
        threading.Thread(
            target=lambda: results.extend(
                together(2, lambda comm: encode_once(RECORDS, tokenizer, SETTINGS, tmp_path, Crew(comm)))
            )
        )
        for _ in range(2)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)

    assert len({each.digest() for each in results}) == 1
    assert len(results) == 4
    [file] = (tmp_path / "tokenised").iterdir()
    assert token_cache._verified(file) == results[0].digest()


def test_a_cache_that_cannot_be_written_still_gives_mapped_tokens_to_all(tokenizer, tmp_path, caplog):
    (tmp_path / "a file").touch()

    found = together(2, lambda comm: encode_once(RECORDS, tokenizer, SETTINGS, tmp_path / "a file", Crew(comm)))

    assert {each.digest() for each in found} == {encode.encode(RECORDS, tokenizer, SETTINGS).digest()}


BAD = [
    {"instruction": "a", "input": f"no place for {n}" if n % 10 == 7 else "", "output": "b"} for n in range(200)
]  # fmt: skip


@pytest.fixture
def no_input(tmp_path):
    """Settings whose template has no place for an input."""
    (tmp_path / "template.txt").write_text("{instruction}: ")
    return replace(SETTINGS, prompt_template=str(tmp_path / "template.txt"))


def test_bad_records_are_told_on_every_process_as_one_tells_them(tokenizer, tmp_path, no_input):
    with pytest.raises(ValueError, match="20 of 200 records cannot be used") as alone:
        encode.encode(BAD, tokenizer, no_input)

    found = together(3, lambda comm: encode_once(BAD, tokenizer, no_input, tmp_path / "cache", Crew(comm)))

    assert {(type(error), str(error)) for error in found} == {(ValueError, str(alone.value))}
    assert "no place for 97" in str(alone.value)  # the tenth
    assert "and 10 more" in str(alone.value)
    assert not list((tmp_path / "cache" / "tokenised").iterdir())


def test_bad_records_that_are_skipped_are_counted_over_all_processes(tokenizer, tmp_path, no_input):
    settings = replace(no_input, on_bad_record="skip")
    alone = encode.encode(BAD, tokenizer, settings)

    found = together(3, lambda comm: encode_once(BAD, tokenizer, settings, tmp_path / "cache", Crew(comm)))

    assert {each.digest() for each in found} == {alone.digest()}
    assert all(each.report == alone.report for each in found)
    assert "20 left out (--on-bad-record skip)" in alone.report.notes[0]


@pytest.mark.parametrize(("error", "kind"), [(ValueError("half a token"), ValueError), (KeyError("x"), RuntimeError)])
def test_a_failure_of_one_process_ends_all(tokenizer, tmp_path, monkeypatch, error, kind):
    """The failing process raises its own error, the others name it, and nobody tokenises to the end."""
    parts, count = encode.Encoder.part, itertools.count()

    def failing(self, some):
        if next(count) == 4:
            raise error
        return parts(self, some)

    monkeypatch.setattr(encode.Encoder, "part", failing)
    many = RECORDS * 100

    found = together(2, lambda comm: encode_once(many, tokenizer, SETTINGS, tmp_path, Crew(comm)))

    assert sorted(type(each).__name__ for each in found) == sorted([type(error).__name__, kind.__name__])
    assert all(str(error) in str(each) for each in found)
    assert next(count) < 4000 / 3
    assert not list((tmp_path / "tokenised").iterdir())


def test_a_process_that_dies_is_named_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "SILENCE_S", 1.0)
    started = time.monotonic()

    def do(comm):
        if comm.ranks.rank == 1:  # what is left of a killed process: it had begun
            token = comm.from_main("a name for tokenising", lambda: None)
            return watch.Watch(comm, token, 1, lambda *_: None).beat(0, "tokenising")
        return Crew(comm).work("tokenising", 1, lambda tick: [tick(0) or time.sleep(0.05) for _ in range(10_000)])

    found = together(2, do)

    assert isinstance(found[0], RuntimeError)
    assert "no heartbeat from rank 1 for 1 s, the last one at tokenising" in str(found[0])
    assert "start again: the data are read again" in str(found[0])
    assert time.monotonic() - started < 50


@pytest.mark.parametrize("world", [1, 2])
def test_a_request_to_stop_ends_the_work_on_all(tokenizer, tmp_path, world):
    def do(comm):
        asked = itertools.count()

        def check():
            if comm.ranks.rank == world - 1 and next(asked) > 2:
                raise Stopped("SIGTERM")

        return Crew(comm, check=check).work(
            "tokenising", 1, lambda tick: [tick(i) or time.sleep(0.01) for i in range(10_000)]
        )

    found = together(world, do) if world > 1 else [stopped(lambda: do(ALONE.comm))]

    assert [type(each) for each in found] == [Stopped] * world


def stopped(do):
    try:
        return do()
    except Stopped as error:
        return error


def test_abandoned_folders_of_work_are_pruned_and_new_ones_are_not(tokenizer, tmp_path):
    encode_once(RECORDS, tokenizer, SETTINGS, tmp_path)
    old, new = (cache.working_folder(tmp_path) for _ in range(2))
    for folder in (old, new):
        (folder / "ids").write_text("tokens")
    for path in (old / "ids", old):
        os.utime(path, (0, 0))

    pruned = cache.prune(tmp_path)

    assert (pruned.files, pruned.freed_bytes) == (1, 6)
    assert not old.exists()
    assert (new / "ids").exists()


# --- records on disk ---


def write(folder, name, rows) -> str:
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def stored_in(folder, config):
    folder.mkdir()
    store_splits(config, folder)
    return stored_splits(folder)


TALK = {"messages": [{"role": "user", "content": "é\u2028"}, {"role": "assistant", "content": "ho", "weight": 1}]}
TOOL = {
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant", "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1, "a": {"y": 2.5, "b": None}}}}],
        },
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "how"),
    [
        ({"a.json": RECORDS}, {"data": "a.json", "eval_records": 7}),
        ({"a.json": RECORDS, "b.json": RECORDS[:9]}, {"data": ("a.json:0.5", "b.json:2.5"), "eval_records": 3}),
        ({"a.json": RECORDS, "b.json": [TALK, TOOL] * 3}, {"data": ("a.json", "b.json"), "eval_records": 5}),
        ({"a.json": [TALK, TOOL] * 4}, {"data": "a.json", "eval_records": 2}),
        ({"a.json": RECORDS, "b.json": [TALK] * 6}, {"data": "a.json", "eval_data": "b.json", "eval_records": 4}),
        ({"a.json": RECORDS, "b.json": RECORDS[::-1]}, {"data": "a.json", "eval_data": "b.json", "eval_records": 0}),
        ({"a.json": RECORDS[:5]}, {"data": "a.json", "eval_records": 100, "fewer_eval_records": True}),
        ({"a.json": [*RECORDS, {"no": "record"}]}, {"data": "a.json", "eval_records": 0, "on_bad_record": "skip"}),
    ],
)
def test_records_on_disk_are_those_in_memory(tmp_path, monkeypatch, files, how):
    monkeypatch.chdir(tmp_path)
    for name, rows in files.items():
        write(tmp_path, name, rows)
    config = DataConfig(**how)

    train, held_out = stored_in(tmp_path / "work", config)

    expected = records.splits_of(config)
    assert (list(train), list(held_out)) == expected
    assert [json.dumps(one) for one in train[:3] if "messages" in one] == [
        json.dumps(one) for one in expected[0][:3] if "messages" in one
    ]  # in the same order, which templates write
    for stored, listed in zip((train, held_out), expected, strict=True):
        assert list(stored.sorted_json()) == [json.dumps(one, sort_keys=True) for one in listed]
    assert list(train[2:4]) == expected[0][2:4]


def test_a_mistake_in_the_data_is_told_as_in_memory(tmp_path):
    config = DataConfig(data=write(tmp_path, "a.json", [*RECORDS, {"no": "record"}]), eval_records=0)

    with pytest.raises(ValueError) as in_memory:  # noqa: PT011 (compared below)
        records.splits_of(config)
    with pytest.raises(ValueError) as on_disk:  # noqa: PT011
        stored_in(tmp_path / "work", config)

    assert str(on_disk.value) == str(in_memory.value)
    assert "record 40" in str(on_disk.value)
