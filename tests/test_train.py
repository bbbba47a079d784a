"""`loldu train`: a recipe by name, a Python file, or a file of settings; from config.json the same run again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher import cli, recipes
from launcher.config import Config, DataConfig, RunConfig
from launcher.start import _parse

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "recipes" / "tiny"
QUICK = ["--tiny", "--max-steps", "3", "--no-exact-match", "--show-samples", "0", "--rank", "4"]


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Trains as `loldu train` does, in this process and an empty folder; returns exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["loldu"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cli.main(["train", "--help"])

    def call(*words):
        code = cli.main(["train", *map(str, words)])
        return code, capfd.readouterr().err

    return call


def losses(run):
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found = [event["loss"] for event in events if "loss" in event]
    assert found
    return found


@pytest.fixture
def first(train, tmp_path):
    """A finished run of the embedded model, started by the recipe's name."""
    assert train("llama2_alpaca_loldu", *QUICK, "--output", "runs/first")[0] == 0
    return tmp_path / "runs" / "first"


def test_a_run_is_repeated_from_its_own_config_json_in_a_new_folder_with_the_same_losses(train, first, tmp_path):
    assert train("runs/first/config.json")[0] == 0
    assert train("runs/first/config.json", "--max-steps", "2", "--output", "runs/shorter")[0] == 0

    again = next(path for path in (tmp_path / "runs").iterdir() if path.name.startswith("first-"))
    assert losses(again) == losses(first)
    assert losses(tmp_path / "runs" / "shorter") != losses(first)
    assert len(losses(tmp_path / "runs" / "shorter")) == 2


def test_the_same_settings_as_yaml_give_the_same_losses(train, first, tmp_path):
    settings = {
        "model": {"model": str(TINY / "model")},
        "data": {
            "data": str(TINY / "instructions" / "train.json"), "eval_data": str(TINY / "instructions" / "test.json"),
            "prompt_template": "short", "max_length": 192,
        },
        "adapter": {"rank": 4, "targets": ["all-linear"], "options": ["normalize_directions=true"]},
        "optimizer": {"learning_rate": 0.1, "batch_size": 16, "max_steps": 3, "warmup_ratio": 0.03},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))

    assert train("mine.yaml", "--output=runs/mine")[0] == 0

    assert losses(tmp_path / "runs" / "mine") == losses(first)


@pytest.mark.parametrize("given", ["option", "quoted option", "settings"])
def test_a_path_may_begin_with_the_home_folder_everywhere(given, train, tmp_path, monkeypatch):
    """A shell fills it in for --output ~/x alone."""
    home = tmp_path / "home" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (home / "model").symlink_to(TINY / "model")
    (home / "train.json").write_text(json.dumps([{"instruction": "Say yes.", "input": "", "output": "yes"}] * 4))
    paths = {"model": "~/model", "data": "~/train.json", "output": "~/my runs/x", "cache": "~/my cache"}
    sections = {"model": "model", "data": "data", "output": "run", "cache": "run"}
    others = ["--max-steps=1", "--rank=4", "--eval-records=0", "--batch-size=2"]
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {part: {name: paths[name] for name in paths if sections[name] == part} for part in sections.values()}
        )
    )
    words = {
        "option": ["llama2_alpaca_loldu", *(f"--{name}={path}" for name, path in paths.items())],
        "quoted option": [
            "llama2_alpaca_loldu",
            *(word for name, path in paths.items() for word in (f"--{name}", path)),
        ],
        "settings": ["mine.yaml"],
    }[given]

    code, error = train(*words, *others)

    assert (code, error) == (0, error)
    assert (home / "my runs" / "x" / "adapter").is_dir()
    assert (home / "my cache").is_dir()
    assert not (tmp_path / "~").exists()


def test_a_python_file_runs_as_python_would_run_it(train, tmp_path, capfd):
    (tmp_path / "other.py").write_text("value = 5")
    (tmp_path / "mine.py").write_text(
        "import sys, other\nprint(__name__, __file__, sys.argv[1:], other.value)\nsys.exit(3)"
    )

    code = cli.main(["train", "mine.py", "--a", "b"])

    assert code == 3
    assert capfd.readouterr().out.endswith(f"__main__ {tmp_path / 'mine.py'} ['--a', 'b'] 5\n")


def test_an_error_in_a_python_file_is_shown_from_its_own_first_line_on(train, tmp_path):
    (tmp_path / "mine.py").write_text("def broken():\n    raise ValueError('mine')\nbroken()")

    code, error = train("mine.py")

    assert code == 1
    assert error.splitlines()[1].startswith(f'  File "{tmp_path / "mine.py"}", line 3')


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama2"], "there is no recipe or file llama2; give one of llama2_alpaca_loldu, llama2_alpaca_svfit, rob"),
        (["--tiny", "llama2_alpaca_loldu"], "the recipe or file comes first: loldu train RECIPE --tiny"),
        (["bad.yaml"], "bad.yaml: line 1: not YAML"),
        (["unknown.yaml"], "unknown.yaml: unknown setting adapter.rnak; did you mean adapter.rank?"),
        (["good.yaml", "--rnak", "4"], "unknown option --rnak; did you mean --rank"),
        (["good.yaml", "--tiny"], "unknown option --tiny"),
        (["llama2_alpaca_loldu", "--rnak", "4"], "(loldu train llama2_alpaca_loldu --help)"),
        (["folder"], "folder is a folder: give folder/config.json to repeat that run"),
        (["../etc/passwd"], "there is no recipe or file ../etc/passwd"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, train, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "unknown.yaml").write_text("adapter: {rnak: 4}")
    (tmp_path / "good.yaml").write_text("adapter: {rank: 4}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")

    code, error = train(*words)

    assert code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_help_lists_the_recipes_and_each_recipe_lists_its_options(train, capfd):
    codes = cli.main(["train", "--help"]), cli.main(["train", "llama2_alpaca_loldu", "--help"])

    out = capfd.readouterr().out
    assert codes == (0, 0)
    assert all(f"\n  {name}\n" in out for name in recipes.recipe_names())
    assert "usage: loldu train llama2_alpaca_loldu" in out


@pytest.mark.slow
def test_two_processes_of_torchrun_repeat_a_run_from_its_config_json(tmp_path):
    def torchrun(*words):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*command, "-m", "launcher", "train", *words], capture_output=True, text=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    torchrun("llama2_alpaca_loldu", *QUICK, "--output", "first")
    torchrun("first/config.json", "--output", "second")

    assert json.loads((tmp_path / "second" / "config.json").read_text())["resolved"]["world_size"] == 2
    assert losses(tmp_path / "second") == losses(tmp_path / "first")


@pytest.mark.parametrize("given", ["llama2_alpaca_loldu", "mine.yaml", "runs/first/config.json"])
def test_slurm_jobs_start_from_whatever_train_accepts(given, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for name in ("mine.yaml", "runs/first/config.json"):
        (tmp_path / name).write_text("{}")
    file = {"llama2_alpaca_loldu": REPO / "recipes" / "llama2_alpaca_loldu.py"}.get(given, tmp_path / given)

    code = cli.main(["submit", given, "--dry-run", "--name", "x", "--", "--rank", "4"])

    out, error = capfd.readouterr()
    assert code == 0, error
    assert f"{file} --rank 4 --output={tmp_path / 'runs' / 'x'}" in out


def test_a_rank_of_a_cluster_starts_from_settings_too(tmp_path):
    settings = {"model": {"model": str(TINY / "model")}, "data": {"data": str(TINY / "instructions" / "test.json")}}
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    options = ["--max-steps", "1", "--batch-size", "2", "--rank", "2", "--prompt-template", "short"]
    environ = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    done = subprocess.run(
        [sys.executable, str(REPO / "launcher" / "cluster" / "rank.py"), "--run", str(tmp_path), "--",
         str(tmp_path / "mine.json"), *options, "--output", str(tmp_path / "run")],
        capture_output=True, text=True, cwd=tmp_path, env=environ,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_another_task_leaves_out_what_the_recipe_sets_for_its_own(rank, caplog, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    recipe = Config(
        data=DataConfig(eval_data="own.json", exact_match=True, prompt_template="short"), run=RunConfig(show_samples=3)
    )

    found = _parse(recipe, ["--task", "prefer", "--data=mine.json", "--eval-records=4", "--show-samples", "2"], "loldu")

    assert (found.data.eval_data, found.data.exact_match, found.data.prompt_template) == (None, False, "auto")
    assert (found.data.data, found.data.eval_records, found.run.show_samples) == ("mine.json", 4, 2)
    told = (
        "left out, as the recipe has them for another task than prefer: --exact-match, --prompt-template, --eval-data"
    )
    assert (told in caplog.text) is (rank == "0")


@pytest.mark.slow
def test_accelerate_starts_two_processes_with_the_losses_of_one(first, tmp_path):
    """`accelerate launch -m launcher train RECIPE`, as `loldu train --help` has it, on two CPU processes."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", REPO / "recipes/accelerate/ddp.yaml"]
    train = ["--num_processes", "2", "--main_process_port", "0", "-m", "launcher", "train", "llama2_alpaca_loldu"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}

    ended = subprocess.run(
        [*start, *train, *QUICK, "--output", "runs/two"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    assert "2 processes (ddp)" in ended.stdout
    assert losses(tmp_path / "runs" / "two") == pytest.approx(losses(first), abs=5e-6)


@pytest.mark.slow
def test_a_plain_run_and_then_a_quantised_one_work_in_one_process(tmp_path):
    """As in a notebook: the first run hides bitsandbytes from PEFT, which imports it slowly and does not need it."""
    script = tmp_path / "notebook.py"
    words = ["train", "llama2_alpaca_loldu", "--tiny", "--max-steps", "1", "--eval-records", "0", "--show-samples", "0"]
    script.write_text(
        "import sys\nfrom launcher.cli import main\n"
        f"words = {words} + ['--no-exact-match', '--method', 'lora', '--cache', 'cache', '--output']\n"
        "assert main([*words, 'plain']) == 0\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "assert main([*words, 'quantised', '--quantize', 'nf4']) == 0\n"
        "assert main(['generate', 'quantised', '--prompt', 'Sort: cab', '--max-tokens', '2']) == 0\n"
    )

    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert "nf4" in (tmp_path / "quantised" / "config.json").read_text()
