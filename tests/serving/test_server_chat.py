"""`loldu chat --server`: a conversation with a model of a running server."""

import io
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine

from launcher.cli import main
from launcher.inference.options import Answering
from launcher.inference.server_chat import Server, chat_with_server

KEY = "a-key-of-24-characters-x"
REPO = Path(__file__).resolve().parents[2]


def talk(url, *lines, model=None, how=Answering(), **settings):  # noqa: B008 (frozen)
    out = io.StringIO()
    typed = io.StringIO("".join(f"{line}\n" for line in lines))
    chat_with_server(url, model, how, lines=typed, out=out, **settings)
    return out.getvalue()


def test_each_turn_sees_the_turns_before_it_until_another_model_is_chosen(start, capsys):
    server = start("pirate", "poet")

    said = talk(server.url, "one", "two", "/model poet", "three", "/model parrot", "/quit", model="pirate")

    first = "pirate: u: one\na: "
    second = f"pirate: u: one\na: {first}\nu: two\na: "
    assert said == f"{first}\n{second}\npoet: u: three\na: \n"
    notes = capsys.readouterr().err
    assert "pirate, one of 3 models" in notes
    assert "there is no model 'parrot'" in notes


def test_the_system_prompt_and_the_sampling_are_sent(start, capsys):
    server = start("pirate")

    said = talk(server.url, "hi", model="pirate", system="be brief", how=Answering(max_tokens=24))

    assert said == "pirate: s: be brief\nu: h\n"
    assert "maximum number of tokens" in capsys.readouterr().err


def test_a_long_conversation_loses_its_oldest_part(start, capsys):
    server = start("pirate", engine=ScriptedEngine("yes"))

    said = talk(server.url, "first " * 30, "second " * 30, "third " * 30, model="pirate")

    assert said == "yes\nyes\nyes\n"
    assert capsys.readouterr().err.count("no longer fits the context") == 1


def test_an_error_of_the_server_is_told_and_the_conversation_goes_on(start, capsys):
    server = start("pirate")

    said = talk(server.url, "x" * 600, "hi", model="pirate")

    assert said == "pirate: u: hi\na: \n"
    assert "shorten it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [(b"data: 5", "no object"), (b'data: {"error": "busy"}', "busy"), (b"data: {", "not JSON"), (b"", "ended before")],
)
def test_an_event_that_is_no_answer_is_told(line, told, monkeypatch, capsys):
    monkeypatch.setattr(Server, "models", lambda self: ["model"])
    monkeypatch.setattr(Server, "ask", lambda *_: nullcontext([line + b"\n"]))

    talk("localhost", "hi")

    assert told in capsys.readouterr().err


def test_control_characters_in_an_answer_are_written_out(start):
    server = start(engine=ScriptedEngine("red"))
    server.engine.tokenizer.decode = lambda tokens, **_: "\x1b[2J"

    assert "\\x1b[2J" in talk(server.url, "hi")


def test_the_key_comes_from_a_file_or_the_environment(start, tmp_path, monkeypatch, capsys):
    server = start(keys=(KEY,))
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.delenv("LOLDU_API_KEY", raising=False)

    code = main(["chat", "--server", server.url])
    said = capsys.readouterr().err
    from_file = talk(server.url, "hi", api_key_file=str(tmp_path / "key"))
    monkeypatch.setenv("LOLDU_API_KEY", KEY)
    from_environment = talk(server.url, "hi")

    assert code == 2
    assert "a valid API key is needed" in said
    assert "LOLDU_API_KEY" in said
    assert from_file == from_environment == "base: hi\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--server", "http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer"),
        (["--server", "ftp://x"], "--server ftp://x is no address"),
        (["--server", "http://x:port"], "--server http://x:port is no address"),
        (["--server", "http://127.0.0.1:1", "runs/x"], "leave runs/x out, or give --model ID"),
        (["--server", "http://127.0.0.1:1", "--adapter", "x"], "--adapter is the server's to choose"),
        (["--model", "x"], "--model belongs to --server URL"),
        (["a", "b"], "loldu chat takes one model, got 2"),
        ([], "loldu chat takes one model, got 0"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, said, capsys):
    code = main(["chat", *arguments])

    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_the_server_does_not_have_is_told_with_the_nearest(start, capsys):
    server = start("pirate")

    assert main(["chat", "--server", server.url, "--model", "pirat"]) == 2
    assert "does not serve pirat; did you mean pirate?" in capsys.readouterr().err


def test_chatting_with_a_server_imports_no_torch():
    code = "import sys, launcher.inference.server_chat; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
