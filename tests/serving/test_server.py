"""The server's process: its start, its signals, its end, and its start again."""

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import httpx
import pytest
from running_server import until, write_adapter

from launcher.cli import main
from launcher.serving.commands import NEEDED
from launcher.serving.limits import Limits
from launcher.serving.server import run

HERE = Path(__file__).parent
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


class Process:
    """A server in a separate process; what it prints is collected."""

    def __init__(self, folder, **options):
        words = [f"{name}={value}" for name, value in options.items()]
        environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
        command = [sys.executable, str(HERE / "serve_scripted.py"), str(folder), *words]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.said += line

    def url(self):
        until(lambda: self.process.poll() is not None or " at http://" in self.said, 240)
        return re.search(r" at (http://\S+)", self.said)[1]

    def wait(self, seconds=180):
        code = self.process.wait(seconds)
        self.reader.join()
        return code


@pytest.fixture
def serve(tmp_path):
    started = []
    (tmp_path / "adapters").mkdir()
    write_adapter(tmp_path / "adapters" / "a", template="turns")

    def serve(**options):
        started.append(Process(tmp_path / "adapters", **options))
        return started[-1]

    yield serve
    for each in started:
        each.process.kill()
        each.wait()


def ask_in_thread(url, found, **fields):
    def ask():
        found.append(httpx.post(f"{url}/v1/chat/completions", json=CHAT | fields, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def text_of(streamed):
    """The text of a streamed chat."""
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def active(url, count=1):
    return f"loldu_requests_active {count}" in httpx.get(f"{url}/metrics").text


@pytest.mark.slow
def test_sigterm_lets_a_running_answer_end(serve, tmp_path):
    server, found = serve(hold_at=3, release=tmp_path / "release", drain_s=600), []
    thread = ask_in_thread(server.url(), found, stream=True)
    until(lambda: active(server.url()))

    server.process.send_signal(signal.SIGTERM)
    until(lambda: "stopping: 1 answers" in server.said)
    (tmp_path / "release").touch()

    assert server.wait(120) == 0
    thread.join()
    assert "stopping: 1 answers have 600 s to end" in server.said
    assert re.fullmatch(r"base: Below .*hi\n\n### Response:\n?", text_of(found[0]), re.DOTALL)
    assert found[0].text.endswith("data: [DONE]\n\n")


@pytest.mark.slow
def test_an_idle_server_ends_on_ctrl_c_with_exit_code_0(serve):
    server = serve(drain_s=600)
    kept = httpx.Client()
    kept.get(f"{server.url()}/health")  # an open connection does not hold it

    server.process.send_signal(signal.SIGINT)

    assert server.wait(120) == 0
    assert server.said.endswith("stopped\n")


@pytest.mark.slow
def test_a_signal_that_is_repeated_when_the_server_has_ended_does_not_change_its_exit_code(serve):
    server = serve(late=1)
    server.url()

    server.process.send_signal(signal.SIGTERM)

    assert server.wait(120) == 0
    assert server.said.endswith("stopped\nlate\n")


@pytest.mark.slow
def test_a_server_that_stops_takes_no_new_request_and_a_second_signal_ends_the_running_ones(serve):
    server, found = serve(hold_at=3, drain_s=600), []
    url = server.url()
    threads = [ask_in_thread(url, found, stream=stream) for stream in (False, True)]
    until(lambda: active(url, 2))

    server.process.send_signal(signal.SIGTERM)
    until(lambda: "stopping: 2 answers" in server.said)
    refused, health = httpx.post(f"{url}/v1/chat/completions", json=CHAT), httpx.get(f"{url}/health")
    server.process.send_signal(signal.SIGTERM)
    code = server.wait(120)
    for thread in threads:
        thread.join()

    assert (refused.status_code, health.status_code, health.json()) == (503, 503, {"status": "stopping"})
    assert "retry-after" in refused.headers
    assert code == 1
    assert "2 answers were cut short" in server.said
    assert sorted(answer.status_code for answer in found) == [200, 503]  # a stream had begun with 200
    assert all('"code":"stopping"' in answer.text.replace(" ", "") for answer in found)


@pytest.mark.slow
def test_a_killed_server_starts_again_on_its_port(serve):
    server, found = serve(hold_at=3), []
    url = server.url()

    def ask():
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: active(url))

    server.process.kill()
    server.wait()
    thread.join()
    again = serve(port=url.rpartition(":")[2])

    assert again.url() == url
    ask_in_thread(url, found, model="a").join()
    assert found[0].json()["choices"][0]["message"]["content"] == "a: u: hi\na: "


def test_a_base_that_does_not_load_ends_the_server_with_its_reason(tmp_path):
    def make_engine():
        raise ValueError("the base is broken: download it again")

    with pytest.raises(ValueError, match="the base is broken"):
        run(make_engine, folders=[tmp_path], host="127.0.0.1", port=0, keys=(), limits=Limits())


def test_other_machines_are_let_in_with_a_key_only(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("LOLDU_API_KEY", raising=False)

    code = main(["serve", "recipes/tiny/model", "--host", "0.0.0.0"])

    assert code == 2
    assert "--host 0.0.0.0 lets other machines in: give --api-key-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapters", "no/such/folder"], "--adapters no/such/folder is no folder"),
        (["--port", "70000"], "--port lies between 0"),
        (["--host", "no such host"], "--host no such host is no address of this machine"),
        (["--queue", "0"], "--queue is at least 1"),
        (["--watch-s", "-1"], "--watch-s is at least 0"),
        (["--api-key", "short"], "at least 16 ASCII characters"),
        (["--prot", "80"], "unknown option --prot; did you mean --port"),
    ],
)
def test_a_wrong_option_is_one_line_before_the_model_is_loaded(options, said, capsys):
    code = main(["serve", "recipes/tiny/model", *options])

    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert said in lines[-1]


def test_a_port_that_is_taken_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code = main(["serve", "recipes/tiny/model", "--port", str(taken.getsockname()[1])])

    assert code == 2
    assert "Address already in use; give another --port" in capsys.readouterr().err


def test_a_package_that_is_missing_or_too_old_is_named_with_the_command_that_installs_it(capsys, monkeypatch):
    find, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else find(name))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.9.2" if name == "transformers" else version(name))

    code = main(["serve", "recipes/tiny/model"])

    assert code == 2
    said = capsys.readouterr().err
    assert "needs uvicorn>=0.30 (missing here) and transformers>=5.23 (5.9.2 here)" in said
    assert "pip install 'uvicorn>=0.30' 'transformers>=5.23'" in said


def test_the_extra_names_the_packages_that_the_server_checks():
    extra = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]

    assert sorted(extra) == sorted(f"{name}>={least}" for name, least in NEEDED.items())
