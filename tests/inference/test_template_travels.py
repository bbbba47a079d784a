"""A run trained with a template file still answers with it when the file is gone and the adapter has been moved."""

import io
import json
import shutil

import pytest
from asking import generate
from transformers import AutoTokenizer

from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.data.templates import load_template, prompt_ids
from launcher.inference.export import export_lora
from launcher.inference.merge import merge
from launcher.training.run import run

JINJA = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def trained(babyllama, tmp_path_factory):
    """A run of two steps in a folder, made with a .jinja file that is gone afterwards; and that template."""
    folder = tmp_path_factory.mktemp("template")
    base = shutil.copytree(babyllama, folder / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages[0].content }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    file, data = folder / "talk.jinja", folder / "a.json"
    file.write_text(JINJA)
    data.write_text(json.dumps([{"prompt": f"Say {i}.", "completion": "yes " * (i + 1)} for i in range(8)]))
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = load_template(str(file), tokenizer, conversations=False)
    config = Config(
        model=ModelConfig(model=str(base), dtype="float32"),
        data=DataConfig(data=str(data), prompt_template=str(file), max_length=128, eval_records=2),
        adapter=AdapterConfig(rank=4),
        optimizer=OptimizerConfig(batch_size=2, max_steps=2),
        run=RunConfig(output=str(folder / "run"), cache=str(folder / "cache")),
    )
    assert run(config, "template") == 0
    file.unlink()
    return folder, template


@pytest.mark.parametrize("place", ["run", "run/adapter", "copied", "merged"])
def test_answers_use_the_template_of_the_training(trained, place, capsys):
    folder, _ = trained
    if place == "copied":
        shutil.copytree(folder / "run" / "adapter", folder / place)
    if place == "merged":
        merge(str(folder / "run"), out=str(folder / place))
    out = io.StringIO()

    generate(str(folder / place), prompt="Say 3.", max_tokens=4, json=True, out=out)

    assert json.loads(out.getvalue())["prompt"] == "user: Say 3.\nassistant: "
    assert "saved with the model" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["run/adapter", "merged", "lora"])
def test_a_folder_gives_other_programs_the_same_tokens(trained, place):
    """To transformers alone, as in other people's servers, although the base has another template of its own."""
    folder, template = trained
    if place == "merged" and not (folder / place).exists():
        merge(str(folder / "run"), out=str(folder / place))
    if place == "lora":
        export_lora(str(folder / "run"), out=str(folder / place))
    tokenizer = AutoTokenizer.from_pretrained(folder / place)
    record = {"instruction": "Say 3.", "input": "", "output": ""}

    sent = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 3."}], add_generation_prompt=True, return_dict=False
    )

    assert sent == prompt_ids(record, template, tokenizer)
    assert "chat_template" not in json.loads((folder / place / "tokenizer_config.json").read_text())
    assert json.loads((folder / place / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_an_adapter_whose_prompts_are_the_bases_own_has_no_tokenizer(chat_model, tmp_path):
    """Its weights take kilobytes, a tokenizer megabytes, and thousands of adapters may share a base."""
    data = tmp_path / "a.json"
    data.write_text(json.dumps([{"prompt": f"Say {i}.", "completion": "yes " * (i + 1)} for i in range(8)]))
    config = Config(
        model=ModelConfig(model=str(chat_model), dtype="float32"),
        data=DataConfig(data=str(data), prompt_template="chat", max_length=128),
        adapter=AdapterConfig(rank=4),
        optimizer=OptimizerConfig(batch_size=2, max_steps=1),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )
    assert run(config, "template") == 0
    adapter = tmp_path / "run" / "adapter"

    assert (adapter / "chat_template.jinja").read_text() == AutoTokenizer.from_pretrained(chat_model).chat_template
    assert not (adapter / "tokenizer.json").exists()
    assert not list(adapter.glob("tokenizer*"))


def test_the_loss_on_held_out_records_needs_no_template_file(trained):
    folder, _ = trained

    merge(str(folder / "run"), out=str(folder / "quantised"), quantize="int8")

    assert (folder / "quantised" / "chat_template.jinja").read_text() == JINJA
