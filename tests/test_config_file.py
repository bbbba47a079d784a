"""Settings from files: the fields of the command line, read strictly, and every mistake named with its place."""

import json

import pytest

from launcher.config import Config, OptimizerConfig, as_dict
from launcher.config_file import read_config
from launcher.files import MOST_BYTES

GOOD = """
# comments are fine
model: {model: small, quantize: none}
data:
  prompt_template: no       # text in YAML 1.2
adapter:
  targets: [q_proj, v_proj]
  exclude: []
optimizer:
  learning_rate: 3e-2
  epochs: 2
run:
  sharding: null
"""


# a list of ten lists of ten lists ... by aliases: 10^9 entries in a few hundred bytes
LAUGHS = "model:\n  model:\n    - &a [x, x, x, x, x, x, x, x, x, x]"
for name, before in zip("bcdefghi", "abcdefgh", strict=True):
    LAUGHS += f"\n    - &{name} [{', '.join([f'*{before}'] * 10)}]"


def write(folder, text, name="settings.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_yaml_file_holds_the_fields_of_config_and_numbers_as_everyone_writes_them(tmp_path):
    config = read_config(write(tmp_path, GOOD))

    assert config.model.model == "small"
    assert config.data.prompt_template == "no"
    assert config.adapter.targets == ("q_proj", "v_proj")
    assert (config.optimizer.learning_rate, config.optimizer.epochs) == (0.03, 2)
    assert config.run == Config().run


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_every_config_survives_a_file(suffix, tmp_path):
    config = Config(optimizer=OptimizerConfig(learning_rate=1e-5, seed=3))

    assert read_config(write(tmp_path, json.dumps(as_dict(config)), f"a.{suffix}")) == config


def test_records_beside_the_settings_are_ignored_and_the_run_gets_a_new_folder(tmp_path):
    values = as_dict(Config())
    values["run"] |= {"output": "runs/first", "resume": "runs/other/checkpoints/step-000010", "save_every": 7}
    recorded = {"config": values, "resolved": {"steps": 3}, "identity": {}, "versions": {"torch": "2"}}

    config = read_config(write(tmp_path, json.dumps(recorded), "config.json"))

    assert (config.run.output, config.run.resume, config.run.save_every) == (None, "auto", 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {learning_rat: 1}", r"setting optimizer\.learning_rat; did you mean optimizer\.learning_rate"),
        ("rank: 8", r"unknown setting rank; did you mean adapter\.rank\?"),
        ("data: {rank: 8}", r"unknown setting data\.rank; did you mean adapter\.rank\?"),
        ("optimiser: {}", "unknown setting optimiser; did you mean optimizer"),
        ("zzzzzzzz: 1", "valid names: adapter, data, model, optimizer, run"),
        ("model: small", r"model must hold settings \(name: value\), got 'small'"),
        ("", r"the file must hold settings"),
        ("- a\n- b", r"the file must hold settings"),
        ("adapter: {rank: many}", r"--rank \(adapter\.rank\) must be a whole number, got 'many'"),
        ("adapter: {rank: 8.5}", "must be a whole number, got 8.5"),
        ("adapter: {rank: true}", "must be a whole number, got True"),
        ("adapter: {targets: q_proj}", "must be a list, got 'q_proj'"),
        ("data: {packing: 1}", "must be true or false, got 1"),
        ("run: {sharding: half}", "must be one of none, ddp"),
        ("optimizer: {epochs: .inf}", "must be a finite number, got inf"),
        ("optimizer: {seed: 99999999999999999999}", "must be below 2.63"),
        ("model: {model: a}\ndata: {}\nmodel: {model: b}", "line 3: model is there twice"),
        ("adapter:\n  rank: 1\n  rank: 2", "line 3: rank is there twice"),
        ("model:\n  model: [a", r"line 2: not YAML|line 3: not YAML"),
        ("model:\n\tmodel: a", "line 2: not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "line 1: not YAML"),
        ("adapter: &a {options: *a}", "not YAML|must be a list|nested too deeply|unknown"),
        ("a: " + "[" * 5000, "nested too deeply|not YAML"),
        ("a: b\0", "not YAML"),
        ('run: {output: "x\\ud800"}', r"--output \(run\.output\) must be text in UTF-8, without '.ud800', got"),
        ('adapter: {targets: ["\\udfff"]}', "must be a list; each entry must be text in UTF-8"),
        (LAUGHS, "must be text, got .{,200}$"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_yaml_file_is_named_with_its_place(text, message, tmp_path):
    file = write(tmp_path, text)

    with pytest.raises(ValueError, match=message) as caught:
        read_config(file)

    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ('{"model": {},\n "model": {}}', "model is there twice"),
        ('{"optimizer": {"epochs": NaN}}', "must be a finite number"),
        ('{"config": {"model": {"modle": "a"}}}', r"unknown setting model\.modle; did you mean model\.model"),
        ('{"config": 3}', "must hold settings"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"optimizer": {"seed": ' + "9" * 5000 + "}}", "."),
        (" " * (MOST_BYTES + 1), "it is longer than"),
    ],
    ids=range(8),
)
def test_a_mistake_in_a_json_file_is_named(text, message, tmp_path):
    file = write(tmp_path, text, "settings.json")

    with pytest.raises(ValueError, match=message) as caught:
        read_config(file)

    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ValueError, match=r"a\.yaml: .*decode"):
        read_config(tmp_path / "a.yaml")
