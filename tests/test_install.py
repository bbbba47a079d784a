"""Installed from a wheel or an sdist into a fresh environment, the project works outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import adapters
import loldu

REPO = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", "runs", "build", "dist", "shared", "*.egg-info", "__pycache__", ".*_cache")


def test_the_wheel_holds_every_package():
    """pyproject.toml lists them, since setuptools finds no package under another name than its folder's."""
    listed = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [file for room in ("adapters", "launcher") for file in (REPO / room).rglob("*.py")]
    folders = {".".join(file.parent.relative_to(REPO).parts) for file in files}

    assert sorted(listed) == sorted({*folders, "loldu_recipes"})


def test_every_public_name_is_importable_from_loldu():
    assert all(getattr(loldu, name) is not None for name in loldu.__all__)
    assert {config.__name__ for config in adapters.METHODS.values()} <= set(loldu.__all__)
    with pytest.raises(ImportError, match="LoLDUConfg"):
        from loldu import LoLDUConfg  # noqa: F401


def test_importing_loldu_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", "import loldu, sys; print('torch' in sys.modules); loldu.Config; print(sys.modules)"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)},
    )  # fmt: skip

    first, modules = done.stdout.split("\n", 1)
    assert first == "False"
    assert "'torch'" not in modules


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def installed(request, tmp_path_factory):
    """The project in an environment of its own, which finds the packages of this one; returns its bin folder."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(REPO, folder / "source", ignore=LEFT_OUT)  # building leaves files in the source
    build = f"from setuptools import build_meta as b; print(b.build_{request.param}({str(folder)!r}))"
    built = run([sys.executable, "-c", build], folder / "source").stdout.split()[-1]
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], folder)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    (site / "packages-of-the-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "env" / "bin" / "python")
    run([python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed",
         str(folder / built)], folder)  # fmt: skip
    shutil.rmtree(folder / "source")
    return folder / "env" / "bin"


def run(command, cwd, code=0):
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environ |= {"XDG_CACHE_HOME": str(cwd / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_an_installed_project_trains_answers_and_finds_recipes_by_name_in_an_empty_folder(installed, tmp_path):
    quick = ["--tiny", "--max-steps", "2", "--no-exact-match", "--show-samples", "0", "--rank", "4"]
    command = str(installed / "loldu")
    (tmp_path / "hosts").write_text("no-such-host.invalid slots=1\n")

    trained = run([command, "train", "llama2_alpaca_loldu", *quick, "--output", "first"], tmp_path)
    run([command, "train", "llama2_alpaca_svfit", *quick, "--output", "second"], tmp_path)
    answered = run([command, "generate", "first", "--prompt", "Reverse the order of the letters."], tmp_path)
    script = run([command, "submit", "--dry-run", "roberta_glue_loldu", "--name", "x"], tmp_path).stdout
    launched = run([command, "launch", "--hostfile", "hosts", "llama2_alpaca_loldu"], tmp_path, code=2)
    where = run(
        [str(installed / "python"), "-c", "import adapters, launcher, loldu; print(loldu.LoLDUConfig)"], tmp_path
    )

    assert "training: 2 steps, batch size 16" in trained.stdout
    assert (tmp_path / "second" / "adapter" / "adapter_model.safetensors").is_file()
    assert answered.stdout.strip()
    assert f"{installed.parent}" in script
    assert "loldu_recipes/roberta_glue_loldu.py" in script
    assert "no recipe" not in launched.stderr
    assert "LoLDUConfig" in where.stdout
    assert str(REPO) not in trained.stdout + script


@pytest.mark.slow
def test_an_installed_project_is_typed_and_carries_its_data_files(installed):
    site = next(installed.parent.glob("lib/python*/site-packages"))

    for file in ("adapters/py.typed", "launcher/py.typed", "launcher/reports/page.html.jinja",
                 "loldu_recipes/accelerate/ddp.yaml", "loldu_recipes/tiny/model/model.safetensors",
                 "loldu_recipes/tiny/instructions/train.json", "loldu_recipes/tiny/vit/model.safetensors",
                 "loldu_recipes/tiny/digits.zip"):  # fmt: skip
        assert (site / file).is_file()
    assert not (site / "recipes").exists()
    assert not (site / "tests").exists()
