"""Model and adapter files from strangers: their code never runs without permission, and an adapter never changes its
base."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from asking import chat, generate
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trained_adapter import save_adapter
from transformers import AutoModelForCausalLM

from launcher import cli
from launcher.inference.adapter_folder import attach
from launcher.inference.load import load, load_model
from launcher.inference.sources import find

REPO = Path(__file__).resolve().parents[2]
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({proof!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class MineConfig(LlamaConfig):
    model_type = "mine-of-a-test"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(babyllama, tmp_path):
    """A model folder that loads only with its own Python code; the code leaves the file `proof` behind."""
    folder, proof = tmp_path / "with-code", tmp_path / "proof"
    shutil.copytree(babyllama, folder)
    (folder / "mine.py").write_text(CODE.format(proof=str(proof)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine-of-a-test", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, proof


def change(folder, to, **tensors):
    """A copy of an adapter folder with these tensors put into its file."""
    shutil.copytree(folder, to)
    file = to / "adapter_model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("command", ["generate", "chat", "merge", "export-lora", "generate on an adapter", "train"])
def test_code_in_a_model_folder_never_runs_unasked_even_if_standard_input_says_yes(
    command, with_code, adapter, tmp_path
):
    folder, proof = with_code
    command, _, on_adapter = command.partition(" ")
    words = [command, str(adapter if on_adapter else folder)]
    if command in ("merge", "export-lora") or on_adapter:
        words = [command, str(adapter), "--base", str(folder)]
    words += ["--out", str(tmp_path / "out")] if command in ("merge", "export-lora") else []
    words += ["--prompt", "hello"] if command == "generate" else []
    if command == "train":
        words = ["train", "llama2_alpaca_loldu", "--model", str(folder), "--output", str(tmp_path / "run")]

    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words], input="y\n" * 5, capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip

    assert done.returncode == 2
    assert not proof.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert "--trust-remote-code" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert len(done.stderr.rpartition("error: ")[2].splitlines()) == 1


def test_trusted_code_runs_for_answers_merging_and_exporting_and_is_copied_beside_merged_weights(
    with_code, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder, proof = with_code
    adapter = save_adapter(folder, tmp_path / "adapter", trust_remote_code=True)
    proof.unlink()

    answers = generate(str(adapter), prompt="hello", max_tokens=3, trust_remote_code=True)
    merged = cli.main(["merge", str(adapter), "--out", str(tmp_path / "merged"), "--trust-remote-code"])
    exported = cli.main(["export-lora", str(adapter), "--out", str(tmp_path / "lora"), "--trust-remote-code"])

    assert proof.exists()
    assert len(answers[0].ids) <= 3
    assert (merged, exported) == (0, 0)
    assert (tmp_path / "merged" / "mine.py").exists()
    assert generate(str(tmp_path / "merged"), prompt="hello", max_tokens=3, trust_remote_code=True)


def test_a_base_weight_hidden_in_an_adapter_file_is_refused_by_name(adapter, babyllama, tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    weight = load_model(find(str(babyllama))).get_parameter("model.layers.0.self_attn.q_proj.weight")
    bad = change(adapter, tmp_path / "bad", **{name: torch.zeros_like(weight)})
    base = load_model(find(str(babyllama)))

    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.weight"):
        attach(base, bad)

    assert torch.equal(base.get_parameter("model.layers.0.self_attn.q_proj.weight"), weight), "refused before loading"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "other"])
def test_any_other_tensor_in_an_adapter_file_is_refused_by_name(name, adapter, babyllama, tmp_path):
    size = load_file(babyllama / "model.safetensors")["model.norm.weight"].shape
    bad = change(adapter, tmp_path / "bad", **{f"base_model.model.{name}": torch.zeros(size)})

    with pytest.raises(ValueError, match="not part of the adapter") as caught:
        load(find(str(bad), base=str(babyllama)))

    assert name in str(caught.value)


def test_merging_refuses_a_hidden_base_weight_too(adapter, babyllama, tmp_path, capfd):
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    bad = change(adapter, tmp_path / "bad", **{name: torch.zeros(2, 2)})

    code = cli.main(["merge", str(bad), "--base", str(babyllama), "--out", str(tmp_path / "out")])

    assert code == 2
    assert "q_proj.base_layer.weight" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_lora_on_embeddings_whose_file_repeats_the_base_weights_still_loads(babyllama, tmp_path):
    """PEFT saves a copy of adapted embeddings, which changes nothing."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(babyllama), LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2)
    )
    model.save_pretrained(tmp_path / "lora")
    assert any(".base_layer." in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))

    loaded, _ = load(find(str(tmp_path / "lora"), base=str(babyllama)))

    assert loaded.peft_config["default"].r == 2


def test_a_core_that_is_nan_is_refused_by_name(adapter, babyllama, tmp_path):
    name, core = next(iter(load_file(adapter / "adapter_model.safetensors").items()))
    bad = change(adapter, tmp_path / "bad", **{name: torch.full_like(core.float(), float("nan"))})

    with pytest.raises(ValueError, match="holds NaN or infinite numbers") as caught:
        find(str(bad), base=str(babyllama))

    assert name in str(caught.value)


def test_a_scale_that_makes_every_logit_infinite_is_an_error_and_no_empty_answer(adapter, babyllama, tmp_path):
    bad = change(adapter, tmp_path / "bad")
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(config | {"scale": 1e308}))

    with pytest.raises(ValueError, match=r"(NaN or infinite; the cause is adapter|scale)"):
        load(find(str(bad), base=str(babyllama)))


def test_terminal_escapes_and_markup_in_records_reach_the_screen_as_text(babyllama, tmp_path, capsys):
    evil = "\x1b]0;title\x07\x1b[2J[/INST][/b]\u202e"
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"instruction": evil, "output": evil}, {"instruction": "x", "output": "y"}]))
    out = io.StringIO()

    generate(str(babyllama), data=str(records), prompt_template="short", max_tokens=2, out=out)

    assert "\\x1b]0;title\\x07\\x1b[2J[/INST][/b]\\u202e" in out.getvalue()
    assert not {"\x1b", "\x07", "\u202e"} & set(out.getvalue() + capsys.readouterr().err)


def test_json_lines_escape_control_characters_and_keep_the_value(babyllama, tmp_path):
    evil = "\x9b2J\u202e"
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"instruction": evil, "output": evil}]))
    out = io.StringIO()

    generate(str(babyllama), data=str(records), prompt_template="short", max_tokens=2, json=True, out=out)

    assert not {"\x9b", "\u202e"} & set(out.getvalue())
    assert json.loads(out.getvalue())["expected"] == evil


def test_chat_notes_are_text_and_never_markup(babyllama, capsys):
    chat(str(babyllama), lines=io.StringIO("/[/b]\x1b[2J\n"), out=io.StringIO(), prompt_template="short")

    assert "unknown command /[/b]\\x1b[2J" in capsys.readouterr().err
