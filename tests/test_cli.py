"""The front door and the command line, as a shell sees them."""

import os
import re
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import loldu
from adapters import Factors
from launcher import cli, processes, start
from launcher.config import Config
from launcher.exit_codes import Failed
from launcher.factorization import cache

REPO = Path(__file__).resolve().parents[1]


def test_every_command_has_options_and_help(capsys):
    """Each entry of the table names a function whose signature becomes options."""
    for name in cli.COMMANDS:
        try:
            code = cli.main([*name.split(), "--help"])
        except SystemExit as left:
            code = left.code

        assert code == 0
        assert f"loldu {name}" in capsys.readouterr().out


HELPS = [[*name.split(), "--help"] for name in cli.COMMANDS]


def test_a_reader_that_has_ended_gives_no_traceback():
    """As in `loldu --help | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--help"], stdout=writing, stderr=subprocess.PIPE, cwd=REPO
    )
    os.close(writing)

    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *HELPS, ["cache", "ls"], ["cache", "prune", "--max-gb", "1"], ["status"]],
    ids=" ".join,
)
def test_help_and_listings_import_nothing_heavy(arguments, tmp_path):
    """torch, transformers and peft take seconds to import; these commands answer in a fraction of a second."""
    code = (
        "import atexit, sys, loldu; atexit.register(lambda: print(*sys.modules));"
        "sys.argv[1:] = eval(sys.argv[1]); sys.exit(loldu.main())"
    )
    place = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO)}
    about = {"name": "q_proj", "method": "loldu", "shape": [2, 2], "rank": 1, "dtype": "float32"}
    cache.store(tmp_path / "loldu", "0" * 64, Factors(*torch.ones(5, 1)), about)

    done = subprocess.run(
        [sys.executable, "-c", code, str(arguments)], capture_output=True, text=True, cwd=tmp_path, env=place
    )

    *shown, modules = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert shown or done.stderr
    assert "launcher.cli" in modules
    assert not {"torch", "peft", "transformers", "datasets", "accelerate"} & set(modules.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["factorise"], "there is no command loldu factorise; did you mean factorize"),
        (["cache"], "cache ls"),
        (["status", "--jsn"], "unknown option --jsn; did you mean --json"),
        (["cache", "ls", "all"], "'all' belongs to no option"),
        (["logs"], "the following arguments are required: RUN (loldu logs --help)"),
        (["cache", "prune", "--max-gb", "much"], "--max-gb: expected a number, got 'much'"),
        (["cache", "prune"], "nothing to prune by: give --max-gb X"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_says_what_to_type(arguments, said, capfd):
    assert cli.main(arguments) == 2

    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_warning_is_a_line_without_the_place_in_our_files(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")

        code = start.guarded(lambda: warnings.warn("the base is another one", stacklevel=1))

    assert code == 0
    assert capsys.readouterr().err == "warning: the base is another one\n"


def test_a_result_that_must_not_be_used_is_one_line_and_exit_code_1(capsys):
    def refuse():
        raise Failed("the merged model was deleted again")

    assert start.guarded(refuse) == 1
    assert capsys.readouterr().err == "error: the merged model was deleted again\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_a_lack_of_main_memory_is_one_line(error, capsys):
    def swell():
        raise error

    assert start.guarded(swell) == 2
    assert re.fullmatch("error: this process got no more main memory: raise its limit .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["x" * 300, b"\xff" * 300])
def test_a_file_that_cannot_be_used_is_one_line(name, capsys):
    assert start.guarded(lambda: os.stat(name)) == 2
    assert re.fullmatch(r"error: File name too long: .{1,210}\n", capsys.readouterr().err)


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_only_one_of_several_processes_prints_a_command_line_error(rank, lines, monkeypatch, capfd):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(processes, "PATIENCE_S", 0)

    code = start.run_recipe("test", Config, Config, ["--rank=0"])

    assert code == 2
    assert capfd.readouterr().err.count("\n") == lines


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin="/elsewhere/adapters/__init__.py")])
def test_another_package_named_adapters_is_one_clear_error(found, capsys):
    """PyPI has a project of that name; a stranger's machine may have it installed."""
    with pytest.raises(SystemExit) as left:
        loldu.check_packages(lambda name: found)

    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "pip uninstall adapters" in error
    assert str(REPO / "adapters") in error


def test_our_own_packages_pass():
    loldu.check_packages()


def test_a_foreign_launcher_on_the_path_is_caught_when_a_recipe_starts(tmp_path):
    """The check runs before anything of the foreign package is imported."""
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").write_text("raise RuntimeError('a stranger ran')")

    done = subprocess.run(
        [sys.executable, "-c", "import loldu; loldu.main()"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{REPO}"},
    )

    assert done.returncode == 2
    assert "Python finds" in done.stderr
    assert "a stranger ran" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "replaced"),
    [
        ([], True),
        (["--seed", "3"], True),
        (["--tiny"], False),
        (["--model", "mine"], False),
        (["--data=m.json"], False),
    ],
)
def test_what_the_user_names_is_never_replaced(arguments, replaced, monkeypatch):
    """The embedded default may be used only if neither --model nor --data nor --tiny was given."""
    default = Config()
    tiny = replace(default, model=replace(default.model, model="small"))
    ran = []
    monkeypatch.setattr("launcher.training.run.run", lambda config, name, instead: ran.append((config, instead)))

    start.run_recipe("test", lambda: default, lambda: tiny, arguments)

    [(config, instead)] = ran
    assert config.model.model == {"--tiny": "small", "--model": "mine"}.get("".join(arguments[:1]), default.model.model)
    assert (instead is not None) == replaced
    assert not replaced or instead().model.model == "small"


def test_the_hub_is_given_ten_seconds_and_no_more(monkeypatch):
    """A name lookup that hangs is abandoned."""
    from launcher import availability

    monkeypatch.setattr(availability, "LIMIT_S", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answered = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, timeout: answered.wait(60))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: answered.wait(60))

    reason = availability.unavailable("nobody/nothing", "nobody/none")
    answered.set()

    assert "no answer within" in reason


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("scale=2",)),
        (["--method", "lora"], ()),
        (["--method=lora", "--options", "lora_alpha=8"], ("lora_alpha=8",)),
        (["--method", "loldu"], ("scale=2",)),
    ],
)
def test_another_method_does_not_get_the_options_of_the_recipes_own(arguments, expected, monkeypatch, caplog):
    default = Config()
    default = replace(default, adapter=replace(default.adapter, options=("scale=2",)))
    ran = []
    monkeypatch.setattr("launcher.training.run.run", lambda config, name, instead: ran.append(config))

    start.run_recipe("test", lambda: default, None, arguments)

    assert ran[0].adapter.options == expected
    assert ("scale=2 belongs to loldu" in caplog.text) == (expected == ())


def test_a_command_leaves_nothing_for_the_last_search_of_the_garbage_collector():
    """That search took a second after torch and transformers had been imported."""
    code = "import atexit, gc, loldu; atexit.register(lambda: print(len(gc.get_objects()))); loldu.main()"

    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)

    assert int(done.stdout.splitlines()[-1]) < 100
