"""Preferences: the losses are TRL's, the reference is the base model, and every sharding gives one curve."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from launching import REPO, Runs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import LoLDUConfig
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.data import token_cache
from launcher.data.crew import Crew
from launcher.data.pairs import load_pairs
from launcher.data.templates import load_template
from launcher.models.head_loss import HeadLoss
from launcher.processes import Ranks
from launcher.tasks import prefer
from launcher.tasks.base import Layout
from launcher.training.resolve import resolve
from launcher.training.run import run
from tests.communicators import together

TINY = REPO / "recipes" / "tiny"
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def rows():
    """Right answers against those of other records."""
    records = json.loads((TINY / "instructions" / "train.json").read_text())[:41]
    return [
        {"prompt": f"{one['instruction']}\n{one['input']}", "chosen": one["output"], "rejected": f"{other['output']}!"}
        for one, other in itertools.pairwise(records)
    ]


@pytest.fixture
def config(rows, tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return Config(
        model=ModelConfig(model=str(TINY / "model"), dtype="float32"),
        data=DataConfig(
            task="prefer", data=str(tmp_path / "pairs.json"), eval_records=8, max_length=64, prompt_template="short"
        ),
        adapter=AdapterConfig(rank=15, targets=("all-linear",)),
        optimizer=OptimizerConfig(learning_rate=1e-2, batch_size=4, max_steps=8),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )


def batch_of(rows, tokenizer, tmp_path, max_length=256, **values):
    file = tmp_path / "some.json"
    file.write_text(json.dumps(rows))
    data = DataConfig(task="prefer", data=str(file), max_length=max_length, **values)
    template = load_template("short", tokenizer, conversations=False)
    encoded = prefer.encode_pairs(load_pairs(str(file)), tokenizer, data, template)
    return prefer.TASK.collate(encoded, range(len(encoded)), Layout(pad_id=0)), encoded


def perturbed(settings):
    """A model whose adapter gives other outputs than its base."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY / "model"), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


SETTINGS = {
    "loldu": LoLDUConfig(r=15, target_modules=["q_proj", "v_proj"]),
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


def events(config):
    return [json.loads(line) for line in open(f"{config.run.output}/events.jsonl")]


def test_processes_share_the_work_and_the_next_start_finds_it(config, tokenizer, tmp_path, monkeypatch):
    """Answers are cut, and pairs whose prompt fills a sample are dropped, as in memory."""
    rows = [{"prompt": "and " * (i % 30), "chosen": "yes " * (i % 7 + 1), "rejected": "no " * 9} for i in range(1, 48)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    config = replace(config, data=replace(config.data, max_length=80))
    monkeypatch.setattr(token_cache, "CHUNK", 5)
    parts, own = [], prefer.PairEncoder.part
    monkeypatch.setattr(prefer.PairEncoder, "part", lambda self, some: parts.append(len(some)) or own(self, some))
    train, held_out = prefer.TASK._pairs(config.data)
    template = load_template("short", tokenizer, conversations=False)
    wanted = [prefer.encode_pairs(some, tokenizer, config.data, template) for some in (train, held_out)]
    parts.clear()

    found = together(3, lambda comm: prefer.TASK.read_together(config, tokenizer, tmp_path / "cache", Crew(comm)))
    once = sum(parts)
    again = prefer.TASK.read(config, tokenizer, tmp_path / "cache")

    assert once == sum(parts) == len(rows)
    assert wanted[0].report.truncated
    assert wanted[0].report.dropped
    for samples in (*found, again):
        for mine, alone in zip((samples.train, samples.held_out), wanted, strict=True):
            assert mine.digest() == alone.digest()
            assert torch.equal(mine.targets, alone.targets)
            assert str(mine.report) == str(alone.report)


@pytest.mark.parametrize("method", SETTINGS)
def test_the_loss_and_its_gradients_are_those_of_trl(method, rows, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    batch, _ = batch_of(rows[:6], tokenizer, tmp_path)
    model = perturbed(SETTINGS[method])
    ours = prefer.TASK.loss(HeadLoss(model), batch, 6)
    ours.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model = perturbed(SETTINGS[method])
    tokenizer.pad_token = tokenizer.eos_token
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=0.1, report_to=[], use_cpu=True, gradient_checkpointing=False
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows[:6]),
    )
    model.delete_adapter(
        "ref"
    )  # TRL's copy of an adapter that is given: it then compares with the base, as for its own
    theirs = trainer._compute_loss(
        model,
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "completion_mask": (batch["labels"] != -100).long(),
        },
        return_outputs=False,
    )
    theirs.backward()

    assert float(ours.detach()) == pytest.approx(float(theirs), abs=1e-5)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grad, found[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", SETTINGS)
def test_the_reference_is_the_base_model_bit_for_bit(method, rows, tokenizer, tmp_path):
    batch, _ = batch_of(rows[:4], tokenizer, tmp_path)
    del batch["preference"]
    base, model = AutoModelForCausalLM.from_pretrained(TINY / "model"), perturbed(SETTINGS[method])
    trained = {name: p.requires_grad for name, p in model.named_parameters()}

    with torch.no_grad(), prefer.adapters_disabled(model):
        reference = HeadLoss(model).token_losses(**batch)

    assert torch.equal(reference, HeadLoss(base).token_losses(**batch))
    assert not torch.equal(reference, HeadLoss(model).token_losses(**batch))  # the adapter is back
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained


def test_orpo_is_the_formula_of_its_paper(rows, tokenizer, tmp_path):
    batch, _ = batch_of(rows[:4], tokenizer, tmp_path, preference_loss="orpo", preference_beta=0.5)
    model = AutoModelForCausalLM.from_pretrained(TINY / "model")

    losses, _ = prefer.compare(HeadLoss(model), batch)

    for i in range(4):
        p = []
        for row in (i, i + 4):
            labels = batch["labels"][row, 1:]
            logits = model(batch["input_ids"][row : row + 1]).logits[0, :-1].double()
            logp = logits.log_softmax(-1)[labels != -100].gather(1, labels[labels != -100, None])
            p.append(float(logp.mean().exp()))
        odds = math.log(p[0] / (1 - p[0])) - math.log(p[1] / (1 - p[1]))
        assert float(losses[i]) == pytest.approx(-math.log(p[0]) + 0.5 * math.log1p(math.exp(-odds)), abs=1e-5)


def test_micro_batches_add_up_to_the_batch(rows, tokenizer, tmp_path):
    _, encoded = batch_of(rows[:6], tokenizer, tmp_path)
    model = HeadLoss(perturbed(SETTINGS["loldu"]))
    loss = lambda rows: prefer.TASK.loss(model, prefer.TASK.collate(encoded, rows, Layout()), 6)  # noqa: E731

    torch.testing.assert_close(loss([0, 1]) + loss([2]) + loss([3, 4, 5]), loss(range(6)))


def test_a_long_answer_is_cut_and_a_long_prompt_drops_its_pair(tokenizer, tmp_path):
    rows = [
        {"prompt": "a", "chosen": "b " * 100, "rejected": "c"},
        {"prompt": "long " * 100, "chosen": "b", "rejected": "c"},
    ]

    _, encoded = batch_of(rows, tokenizer, tmp_path, max_length=64)

    assert len(encoded) == 1
    assert encoded.answers.lengths[0] == 64
    assert str(encoded.report).startswith("1 of 2 pairs")
    assert "1 answers lost their end at 64 tokens; 1 dropped" in str(encoded.report)


ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Good"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": [SAID], "rejected": [SAID | {"content": "Bad"}]},
        {"prompt": [ASKED], "chosen": "Good", "rejected": "Bad"},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID | {"content": "Bad"}]},
        {"prompt": "Hi", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID | {"content": "Bad"}]},
    ],
)
def test_the_public_forms_of_conversations_give_the_same_pair(row, tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps([row]))

    [pair] = load_pairs(str(tmp_path / "pairs.json"))

    assert [turn["content"] for turn in pair["chosen"]["messages"]] == ["Hi", "Good"]
    assert [turn["content"] for turn in pair["rejected"]["messages"]] == ["Hi", "Bad"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no 'rejected' answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the chosen and the rejected answer are the same"),
        ({"chosen": "b", "rejected": "c"}, "has no 'prompt'"),
        ({"chosen": [SAID], "rejected": [ASKED]}, "which must begin alike"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "record 0"),
        ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "record 0"),
        ("a", "is a str, expected"),
    ],
)
def test_odd_pairs_are_refused_by_name(row, message, tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps([row]))

    with pytest.raises(ValueError, match=message):
        load_pairs(str(tmp_path / "pairs.json"))


def test_columns_of_other_names_are_read(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps([{"q": "a", "good": "b", "bad": "c"}]))

    [pair] = load_pairs(str(tmp_path / "pairs.json"), columns=("prompt=q", "chosen=good", "rejected=bad"))

    assert (pair["chosen"]["instruction"], pair["chosen"]["output"], pair["rejected"]["output"]) == ("a", "b", "c")


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_a_run_prefers_the_chosen_answers_and_resumes_exactly(loss, config, tmp_path):
    config = replace(config, data=replace(config.data, preference_loss=loss))
    uninterrupted = replace(config, run=replace(config.run, output=str(tmp_path / "all")))

    def stop_at_three(training, event):
        if event["step"] == 3:
            training.stop.request("the test")

    assert run(config, "test", on_step=stop_at_three) == 75
    assert run(config, "test") == 0
    assert run(uninterrupted, "test") == 0

    assert events(config) == events(uninterrupted)
    first, last = (event for event in events(config) if "eval_loss" in event)
    assert last["eval_loss"] < first["eval_loss"]
    if loss == "dpo":
        assert (first["eval_loss"], first["margin"]) == (
            pytest.approx(math.log(2)),
            0,
        )  # the adapter starts as the base
        assert last["preferred"] > 0.5


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("data", {"packing": True}, "leave --packing"),
        ("adapter", {"method": "full"}, "give --preference-loss orpo, or another method"),
        ("adapter", {"method": "lorasb"}, "needs no gradients before training"),
        ("data", {"text_columns": ("a",), "task": "instruct"}, "--text-columns is for --task label"),
        ("adapter", {"method": "pissa"}, "init_lora_weights=pissa changes the weights of the base too"),
        ("data", {"task": "label"}, "--task label needs what to classify"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, part, values, message):
    with pytest.raises(ValueError, match=message):
        resolve(replace(config, **{part: replace(getattr(config, part), **values)}), Ranks())


@pytest.fixture(scope="module")
def runs(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "rows.json").write_text(json.dumps(rows))
    runs = Runs(folder, TINY / "model", folder / "rows.json")
    runs.base = replace(
        runs.base,
        data=replace(runs.base.data, task="prefer", eval_records=7),
        optimizer=replace(runs.base.optimizer, max_steps=4, learning_rate=1e-2),
    )
    runs.alone("one")
    runs.start(2, *(runs.entry(engine, engine) for engine in ENGINES))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_the_curve_of_one(runs, engine):
    torch.testing.assert_close(runs.losses(engine), runs.losses("one"), atol=5e-6, rtol=0)
    ours, theirs = ([e for e in runs.events(each) if "preferred" in e][-1] for each in (engine, "one"))
    assert ours["preferred"] == theirs["preferred"]
    assert ours["margin"] == pytest.approx(theirs["margin"], abs=5e-5)
