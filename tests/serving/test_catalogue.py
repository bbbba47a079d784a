"""Adapters that are added, changed and removed while the server runs."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from running_server import until, write_adapter
from scripted_engine import ScriptedEngine

from launcher.data.templates import Template
from launcher.serving import folders
from launcher.serving.catalogue import Catalogue, Served, watch
from launcher.serving.errors import Refused
from launcher.serving.folders import scan


@pytest.fixture
def catalogue(tmp_path):
    engine = ScriptedEngine()
    (tmp_path / "adapters").mkdir()
    base = Served("base", "base", Template("none", "{instruction}\n\n{input}", "{instruction}"), 0)
    return Catalogue(engine, [tmp_path / "adapters"], base)


def look_twice(catalogue):
    catalogue.refresh()
    catalogue.refresh()


def age(folder: Path, seconds=60):
    """As if the files had been there for a while; only a file system's own clock can set the time of a change."""
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - seconds,) * 2)


def test_an_adapter_that_appears_is_served_when_its_files_have_settled(catalogue, tmp_path):
    catalogue.refresh(first=True)
    write_adapter(tmp_path / "adapters" / "new", template="turns")

    catalogue.refresh()
    at_once = list(catalogue.adapters)
    catalogue.refresh()

    assert at_once == []
    assert list(catalogue.adapters) == ["new"]
    assert catalogue.find("new").template.name == "turns"
    assert catalogue.engine.models() == ["base", "new"]


def test_run_folders_are_adapters_and_other_folders_are_none(catalogue, tmp_path):
    root = tmp_path / "adapters"
    write_adapter(root / "run" / "adapter")
    write_adapter(root / ".hidden")
    (root / "empty").mkdir()
    (root / "README.md").write_text("x")

    look_twice(catalogue)

    assert list(catalogue.adapters) == ["run"]
    assert catalogue.engine.adapters["run"] == root / "run" / "adapter"
    assert catalogue.failures == {}


def test_a_half_copied_adapter_is_loaded_when_the_rest_arrives(catalogue, tmp_path):
    folder = write_adapter(tmp_path / "adapters" / "late")
    (folder / "adapter_model.safetensors").unlink()

    look_twice(catalogue)
    missing = catalogue.failures["late"].reason
    (folder / "adapter_model.safetensors").write_bytes(b"bad: half of it")
    look_twice(catalogue)
    half = catalogue.failures["late"].reason
    (folder / "adapter_model.safetensors").write_bytes(b"all of it")
    look_twice(catalogue)

    assert "has no adapter_model.safetensors" in missing
    assert "damaged or cut short" in half
    assert (list(catalogue.adapters), catalogue.failures) == (["late"], {})


def test_a_file_that_still_grows_is_not_loaded(catalogue, tmp_path):
    folder = write_adapter(tmp_path / "adapters" / "slow")

    for size in range(5):
        (folder / "adapter_model.safetensors").write_bytes(b"x" * size)
        catalogue.refresh()
    growing = list(catalogue.adapters)
    catalogue.refresh()

    assert (growing, list(catalogue.adapters)) == ([], ["slow"])


def test_a_quick_look_finds_what_is_new_or_gone_and_reads_no_loaded_folder(catalogue, tmp_path, monkeypatch):
    root, looked = tmp_path / "adapters", []
    write_adapter(root / "a")
    write_adapter(root / "gone")
    look_twice(catalogue)
    monkeypatch.setattr(folders, "look", lambda root, name, look=folders.look: looked.append(name) or look(root, name))

    write_adapter(root / "new")
    write_adapter(root / "a", b"other numbers")
    shutil.rmtree(root / "gone")
    for _ in range(2):
        catalogue.refresh(quick=True)
    quick, version = sorted(catalogue.adapters), catalogue.find("a").engine_name
    seen, looked[:] = list(looked), []
    look_twice(catalogue)

    assert (quick, seen) == (["a", "new"], ["new", "new"])
    assert looked == ["a", "new"] * 2
    assert catalogue.find("a").engine_name != version


def test_a_replaced_adapter_is_reloaded_and_a_running_answer_ends_with_the_old_one(catalogue, tmp_path):
    folder = write_adapter(tmp_path / "adapters" / "a")
    look_twice(catalogue)
    running = catalogue.begin("a")

    (folder / "adapter_model.safetensors").write_bytes(b"other numbers")
    look_twice(catalogue)
    during = catalogue.engine.models()
    new = catalogue.begin("a")
    catalogue.end(running)
    after = catalogue.engine.models()

    assert running.engine_name != new.engine_name
    assert during == ["base", running.engine_name, new.engine_name]
    assert after == ["base", new.engine_name]
    assert list(catalogue.adapters) == ["a"]


def test_a_new_version_that_does_not_load_leaves_the_old_one(catalogue, tmp_path):
    folder = write_adapter(tmp_path / "adapters" / "a")
    look_twice(catalogue)

    (folder / "adapter_model.safetensors").write_bytes(b"bad")
    look_twice(catalogue)

    assert "the version before stays served" in catalogue.failures["a"].reason
    assert catalogue.engine.models() == ["base", "a"]


def test_an_adapter_whose_folder_goes_is_not_served_any_more(catalogue, tmp_path):
    folder = write_adapter(tmp_path / "adapters" / "a")
    look_twice(catalogue)
    running = catalogue.begin("a")

    shutil.rmtree(folder)
    catalogue.refresh()
    once = list(catalogue.adapters)  # it may be a rename
    catalogue.refresh()

    assert (once, list(catalogue.adapters)) == (["a"], [])
    assert catalogue.engine.models() == ["base", "a"]  # its answer is still running
    catalogue.end(running)
    assert catalogue.engine.models() == ["base"]


def test_a_folder_that_cannot_be_read_for_a_while_takes_nothing_away(catalogue, tmp_path, caplog):
    write_adapter(tmp_path / "adapters" / "a")
    look_twice(catalogue)

    (tmp_path / "adapters").rename(tmp_path / "away")
    for _ in range(3):
        catalogue.refresh()

    assert list(catalogue.adapters) == ["a"]
    assert caplog.text.count("cannot be read") == 1


def test_a_client_unloads_and_loads_by_name(catalogue, tmp_path):
    write_adapter(tmp_path / "adapters" / "a")
    look_twice(catalogue)

    catalogue.unload("a")
    look_twice(catalogue)
    gone = list(catalogue.adapters)
    loaded, anew = catalogue.load("a")
    again = catalogue.load("a")

    assert gone == []
    assert (loaded.name, anew) == ("a", True)
    assert again == (loaded, False)
    assert catalogue.engine.models() == ["base", "a"]


def test_an_unloaded_adapter_comes_back_when_its_files_change(catalogue, tmp_path):
    folder = write_adapter(tmp_path / "adapters" / "a")
    look_twice(catalogue)
    catalogue.unload("a")

    write_adapter(folder, b"other numbers")
    look_twice(catalogue)

    assert list(catalogue.adapters) == ["a"]


@pytest.mark.parametrize(
    ("name", "status"),
    [("../secret", 400), ("/etc", 400), ("..", 400), (".", 400), ("a/b", 400), (".hidden", 400), ("a\x00b", 400),
     ("a\nb", 400), ("x" * 200, 400), ("nothing", 404), ("base", 400), ("outside", 400), ("linked", 400)],
)  # fmt: skip
def test_no_name_leads_out_of_the_folder(catalogue, tmp_path, name, status):
    root = tmp_path / "adapters"
    write_adapter(tmp_path / "secret")
    write_adapter(root / ".hidden")
    (root / "outside").symlink_to(tmp_path / "secret")
    write_adapter(root / "linked")
    (root / "linked" / "adapter_model.safetensors").unlink()
    (root / "linked" / "adapter_model.safetensors").symlink_to(tmp_path / "secret" / "adapter_model.safetensors")

    with pytest.raises(Refused) as refused:
        catalogue.load(name)
    look_twice(catalogue)

    assert refused.value.status == status
    assert catalogue.engine.adapters == {}


def test_a_link_within_the_folder_is_followed(catalogue, tmp_path):
    write_adapter(tmp_path / "adapters" / "a")
    (tmp_path / "adapters" / "alias").symlink_to("a")

    look_twice(catalogue)

    assert sorted(catalogue.adapters) == ["a", "alias"]


def test_files_that_are_none_and_names_that_clash_are_told(catalogue, tmp_path):
    root = tmp_path / "adapters"
    os.mkfifo(write_adapter(root / "pipe") / "prompt_template.json")
    write_adapter(root / "base")
    write_adapter(root / "con\ntrol")
    (write_adapter(root / "broken") / "prompt_template.json").write_text("{")

    look_twice(catalogue)

    assert catalogue.adapters == {}
    reasons = {name: failure.reason for name, failure in catalogue.failures.items()}
    assert "is not a regular file" in reasons["pipe"]
    assert "has the name of the base" in reasons["base"]
    assert "is no adapter's name" in reasons["con\ntrol"]
    assert "is damaged" in reasons["broken"]


def test_each_failure_is_logged_once(catalogue, tmp_path, caplog):
    write_adapter(tmp_path / "adapters" / "a", b"bad")

    for _ in range(6):
        catalogue.refresh()

    assert caplog.text.count("adapter a is not loaded") == 1


def test_two_folders_are_served_together_and_the_first_has_precedence(tmp_path):
    for root in ("x", "y"):
        write_adapter(tmp_path / root / "same")
        write_adapter(tmp_path / root / f"only-{root}")

    found, problems = scan([tmp_path / "x", tmp_path / "y"])

    assert sorted(found) == ["only-x", "only-y", "same"]
    assert found["same"].folder == tmp_path / "x" / "same"
    assert list(problems) == ["same"]


def test_the_watching_thread_finds_what_comes_and_ends_when_told(catalogue, tmp_path):
    stopped = threading.Event()
    thread = threading.Thread(target=watch, args=(catalogue, stopped.wait, 0.01))
    thread.start()

    write_adapter(tmp_path / "adapters" / "a")
    until(lambda: "a" in catalogue.adapters)
    shutil.rmtree(tmp_path / "adapters" / "a")
    until(lambda: not catalogue.adapters)
    stopped.set()
    thread.join(10)

    assert not thread.is_alive()


def test_adapters_are_added_and_removed_over_http(start):
    server = start("a")
    write_adapter(server.folder / "b", template="turns")

    added = server.post("/v1/adapters", name="b")
    again = server.post("/v1/adapters", name="b")
    answer = server.chat("b").json()["choices"][0]["message"]["content"]
    removed = server.client.delete("/v1/adapters/a")
    listed = server.client.get("/v1/adapters").json()

    assert (added.status_code, added.json()["id"], again.status_code) == (201, "b", 200)
    assert answer == "b: u: hi\na: "
    assert removed.json() == {"id": "a", "object": "adapter", "deleted": True}
    assert [adapter["id"] for adapter in listed["data"]] == ["b"]
    assert server.chat("a").status_code == 404


@pytest.mark.parametrize("body", [{}, {"name": 5}, {"name": ""}, {"name": "a", "path": "/etc"}, {"name": "../a"}])
def test_a_wrong_request_for_an_adapter_is_refused(start, body):
    response = start("a").client.post("/v1/adapters", json=body)

    assert response.status_code == 400


def test_an_adapter_that_is_removed_while_it_answers_ends_the_answer_with_an_error(start):
    server = start("a", "b")
    server.engine.hold_at = 3
    found = {}

    def ask(name, stream):
        messages = [{"role": "user", "content": "hi"}]
        found[name, stream] = (
            server.events(model=name, messages=messages)[-1] if stream else server.chat(name).json()
        )  # fmt: skip

    threads = [threading.Thread(target=ask, args=(name, stream)) for name in ("a", "b") for stream in (False, True)]
    for thread in threads:
        thread.start()
    until(lambda: [each.made for each in server.engine.requests.values()] == [3] * 4)

    server.client.delete("/v1/adapters/a")
    server.engine.hold_at = None
    for thread in threads:
        thread.join()

    assert found["a", False]["error"]["code"] == found["a", True]["error"]["code"] == "model_removed"
    assert found["b", True] == "[DONE]"
    assert found["b", False]["choices"][0]["message"]["content"] == "b: u: hi\na: "
