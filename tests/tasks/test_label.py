"""Labels in place of answers: what is read, how it is batched and scored, and mistakes in the data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled_rows import config, write
from launching import Runs
from peft import get_peft_model_state_dict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from adapters import LoLDUConfig
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.data import token_cache
from launcher.data.crew import Crew
from launcher.data.limits import Limits
from launcher.models.build import build
from launcher.models.quantize import Quantised
from launcher.processes import Ranks
from launcher.tasks import label
from launcher.tasks import labels as labels_module
from launcher.training.ahead import Ahead
from launcher.training.loop import Clock, batch_loss, evaluate
from launcher.training.packing import Way
from launcher.training.report import Screen
from launcher.training.resolve import resolve
from launcher.training.run import run
from tests.communicators import together


@pytest.fixture
def tokenizer(tiny_roberta):
    return AutoTokenizer.from_pretrained(tiny_roberta)


def training_of(model, pad_id=0, *, train=None, held_out=None, world_size=1):
    """What evaluation and loss need of a training."""
    return SimpleNamespace(
        config=Config(), task=label.TASK, samples=SimpleNamespace(train=train, held_out=held_out),
        device=torch.device("cpu"), tokenizer=SimpleNamespace(pad_token_id=pad_id), packed_as=Way(),
        engine=SimpleNamespace(model=model, gathers=False), forward=model, clock=Clock(), ahead=Ahead(),
        comm=SimpleNamespace(ranks=Ranks(world_size=world_size)), stop=SimpleNamespace(asked=lambda: False),
        screen=Screen(is_main=False),
    )  # fmt: skip


def built(folder, classes, adapter=None, **model):
    how: dict = {"dtype": "float32", "attention": "sdpa", "device": torch.device("cpu"), "factors": lambda name: None}
    head = label.head_settings(classes, AutoTokenizer.from_pretrained(folder).pad_token_id)
    torch.manual_seed(0)
    return build(ModelConfig(model=str(folder), **model), Path(folder), adapter, head=head, **how).eval()


def test_a_row_is_tokenised_as_the_tokenizer_joins_its_texts(tokenizer, tmp_path):
    rows = [{"a": "good film", "b": "bad film", "label": "no"}, {"a": "good", "b": "a good one", "label": "yes"}]
    settings = config(write(tmp_path, rows), text_columns=("a", "b"))

    train, _, classes = label.load_splits(settings)
    found = label.encode(train, classes, tokenizer, settings)

    ids = found.ids.split(found.lengths)
    assert ids[0].tolist() == tokenizer("good film", "bad film")["input_ids"]
    assert classes == ("no", "yes")
    assert found.labels.tolist() == [0, 1]
    assert found.targets.tolist() == [1, 1]


def test_a_long_row_is_cut_and_counted(tokenizer, tmp_path):
    rows = [{"sentence": "good " * 60, "label": 1}, {"sentence": "bad", "label": 0}]
    settings = config(write(tmp_path, rows))

    train, _, classes = label.load_splits(settings)
    found = label.encode(train, classes, tokenizer, settings)

    assert found.lengths[0] == 48
    assert "1 cut at 48 tokens" in str(found.report)


@pytest.mark.parametrize("segments", [False, True])
def test_processes_share_the_work_and_the_next_start_finds_it(segments, tokenizer, tmp_path, monkeypatch):
    """Also for a model that is told which text a token belongs to. What is cut and counted is the same as in memory."""
    rows = [{"a": "good " * i, "b": "bad film", "label": ("no", "yes")[i % 2]} for i in range(1, 41)]
    settings = Config(data=config(write(tmp_path, rows), text_columns=("a", "b"), eval_records=9))
    if segments:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        pair = "<s>:0 $A:0 </s>:0 $B:1 </s>:1"
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair=pair, special_tokens=special
        )
    monkeypatch.setattr(token_cache, "CHUNK", 5)
    parts, own = [], label.LabelEncoder.part
    monkeypatch.setattr(label.LabelEncoder, "part", lambda self, some: parts.append(len(some)) or own(self, some))
    train, held_out, classes = label.load_splits(settings.data)
    wanted = [label.encode(some, classes, tokenizer, settings.data) for some in (train, held_out)]
    parts.clear()

    found = together(3, lambda comm: label.TASK.read_together(settings, tokenizer, tmp_path / "cache", Crew(comm)))
    once = sum(parts)
    again = label.TASK.read(settings, tokenizer, tmp_path / "cache")

    assert once == sum(parts) == len(rows) * (1 + segments)
    assert wanted[0].report.truncated
    for samples in (*found, again):
        for mine, alone in zip((samples.train, samples.held_out), wanted, strict=True):
            assert mine.digest() == alone.digest()
            assert torch.equal(mine.labels, alone.labels)
            assert (mine.segments is None) is not segments
            assert mine.segments is None or torch.equal(mine.segments, alone.segments)
            assert mine.report == alone.report
    if segments:
        end = found[0].train.lengths[0]
        assert found[0].train.segments[:end].tolist() == tokenizer(*train[0]["texts"])["token_type_ids"]
        assert set(found[0].train.segments.tolist()) == {0, 1}


def test_groups_of_rows_give_the_samples_of_all_at_once(tokenizer, tmp_path, monkeypatch):
    rows = [{"sentence": "word " * number, "label": number % 2} for number in range(1, 20)]
    found, _, labels = label.load_splits(config(write(tmp_path, rows)))
    at_once = label.encode(found, labels, tokenizer, config("x", max_length=16))

    monkeypatch.setattr(label.groups, "__defaults__", (100,))
    in_groups = label.encode(found, labels, tokenizer, config("x", max_length=16))

    assert in_groups.digest() == at_once.digest()
    assert in_groups.report == at_once.report
    assert in_groups.report.truncated


def test_a_text_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.data.limits.limits", lambda: Limits(text_characters=9))

    with pytest.raises(ValueError, match=r"record 1 of .*: its 'sentence' has 10 characters: .*LOLDU_TEXT_CHARACTERS"):
        label.load_splits(config(write(tmp_path, [{"sentence": "a" * size, "label": size} for size in (9, 10)])))


@pytest.mark.parametrize(("max_length", "code"), [(64, 0), (65, 2)])
def test_a_length_beyond_the_positions_of_roberta_is_refused(
    tiny_roberta, sst2_rows, tmp_path, max_length, code, capfd
):
    """Of its 66 positions two stand before the first token: a row of 65 would end the run with an index error."""
    rows = [{"sentence": "good " * 99, "label": 1}, {"sentence": "bad", "label": 0}]
    asked = Config(
        model=ModelConfig(model=str(tiny_roberta)),
        data=config(write(tmp_path, rows), max_length=max_length),
        adapter=AdapterConfig(rank=2, targets=("query",), modules_to_save=("classifier",)),
        optimizer=OptimizerConfig(batch_size=2, max_steps=1),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )

    assert run(asked, "test") == code

    assert ("is more than this model's context of 64 tokens" in capfd.readouterr().err) == bool(code)


def test_padding_changes_no_logit(tiny_roberta, tokenizer, sst2_rows, tmp_path):
    """RoBERTa counts positions from the mask, so a row in a batch is the row alone, to rounding."""
    settings = config(write(tmp_path, sst2_rows[:8]))
    train, _, classes = label.load_splits(settings)
    found = label.encode(train, classes, tokenizer, settings)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_roberta).eval()

    with torch.no_grad():
        together = model(**label.collate(found, range(8), tokenizer.pad_token_id)).logits
        alone = [model(**label.collate(found, [row], tokenizer.pad_token_id)).logits for row in range(8)]

    assert len(set(found.lengths)) > 1
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad_id", [None, 4])
def test_a_decoders_head_reads_the_last_token_before_the_tokenizers_padding(pad_id, tmp_path):
    """Even if the base's config names none, or one that the tokenizer does not pad with."""
    words = Tokenizer(WordLevel({"<pad>": 0, "good": 1, "bad": 2, "film": 3, "other": 4}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes: dict = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=5, pad_token_id=pad_id)).save_pretrained(tmp_path)
    batch = PreTrainedTokenizerFast.from_pretrained(tmp_path)(["good", "bad bad film"], padding=True)

    model = built(tmp_path, ("no", "yes"))

    with torch.no_grad():
        together = model(**{name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}).logits
        alone = [model(input_ids=torch.tensor([ids])).logits for ids in ([1], [2, 2, 3])]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)  # to rounding


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_a_quantised_base_gets_the_new_head_of_the_full_precision_base(kind, tiny_roberta):
    """From the same seed the same numbers, never rounded, and trained; the encoder's linear layers are quantised."""
    adapter = LoLDUConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")

    model = built(tiny_roberta, ("no", "yes"), adapter, quantize=kind)
    plain = built(tiny_roberta, ("no", "yes"))

    heads = [module.classifier for module in (model.base_model.model, plain)]
    trained = dict(heads[0].modules_to_save.default.named_parameters())
    assert {name: p.dtype for name, p in trained.items() if p.requires_grad} == dict.fromkeys(trained, torch.float32)
    for name, value in heads[1].named_parameters():
        assert torch.equal(trained[name], value), name
        assert value.any() or name.endswith("bias")
    packed = [name for name, module in model.named_modules() if isinstance(module, Quantised)]
    assert len(packed) == 2 * 6  # query, key, value, output and the two of the feed-forward part
    model(input_ids=torch.arange(5, 15)[None], labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_all_that_starts_from_the_seed_is_trained_and_saved(kind, tmp_path):
    """DistilBERT has a layer before its classifier, of which PEFT knows nothing."""
    torch.manual_seed(0)
    words = Tokenizer(WordLevel({"<pad>": 0, "good": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path)
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=8, dim=16, hidden_dim=32, n_layers=1, n_heads=2)).save_pretrained(
        tmp_path
    )
    some = LoLDUConfig(r=4, target_modules=["q_lin"], modules_to_save=["classifier"], task_type="SEQ_CLS")

    model = built(tmp_path, ("no", "yes"), some, quantize=kind)

    saved = get_peft_model_state_dict(model)
    assert {name for name in saved if "classifier" in name} == {
        f"base_model.model.{head}.{part}" for head in ("classifier", "pre_classifier") for part in ("weight", "bias")
    }
    assert model.base_model.model.pre_classifier.modules_to_save.default.weight.requires_grad


SHARDED = [("none", "fsdp2"), ("none", "zero3"), ("int8", "ddp"), ("nf4", "fsdp2"), ("fp4", "zero2")]


@pytest.fixture(scope="module")
def runs(tiny_roberta, sst2_rows, tmp_path_factory):
    """Four steps on film phrases, on one process and on two; without dropout, which each process draws for itself."""
    folder = tmp_path_factory.mktemp("labelled")
    base = shutil.copytree(tiny_roberta, folder / "base")
    settings = json.loads((base / "config.json").read_text()) | {"attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(settings))
    (folder / "rows.json").write_text(json.dumps(sst2_rows[:36]))
    runs = Runs(folder, base, folder / "rows.json")
    runs.base = replace(
        runs.base,
        data=config(str(folder / "rows.json"), eval_records=11),
        adapter=AdapterConfig(rank=7, targets=("all-linear",), modules_to_save=("classifier",)),
        optimizer=replace(runs.base.optimizer, max_steps=4, learning_rate=1e-2),
    )

    def change(kind):
        return lambda config: replace(config, model=replace(config.model, quantize=kind, dtype="float32"))

    for kind in {kind for kind, _ in SHARDED}:
        runs.alone(kind, change=change(kind))
    runs.start(2, *(runs.entry(f"{kind}-{engine}", engine, change=change(kind)) for kind, engine in SHARDED))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "engine"), SHARDED)
def test_labels_train_on_two_processes_to_the_curve_of_one(runs, kind, engine):
    """The new head too, which every process draws and keeps its part of; and the same adapter is saved."""
    name = f"{kind}-{engine}"

    torch.testing.assert_close(runs.losses(name), runs.losses(kind), atol=5e-6, rtol=0)  # the same sums, reordered
    ours, theirs = ([e for e in runs.events(each) if "accuracy" in e][-1] for each in (name, kind))
    assert ours["accuracy"] == theirs["accuracy"]
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=5e-6)
    settings = [
        json.loads((runs.folder / each / "adapter" / "adapter_config.json").read_text()) for each in (name, "none")
    ]
    assert settings[0]["base_fingerprint"] == settings[1]["base_fingerprint"]
    saved, once = runs.adapter(name), runs.adapter(kind)
    assert any("classifier" in key for key in once)
    torch.testing.assert_close(saved, once, atol=1e-4, rtol=0)  # Adam divides small sums


def test_a_classifier_that_cannot_compute_the_texts_is_refused_with_its_own_words(tmp_path, tiny_roberta, capfd):
    """T5's reads the state at the token that ends a text; this tokenizer writes another one."""
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": 384}
    T5Model(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=383)).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(tiny_roberta).save_pretrained(tmp_path / "t5")
    rows = [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}]
    asked = Config(
        model=ModelConfig(model=str(tmp_path / "t5")),
        data=config(write(tmp_path, rows)),
        adapter=AdapterConfig(rank=2, targets=("q",)),
        optimizer=OptimizerConfig(batch_size=2, max_steps=1),
        run=RunConfig(output=str(tmp_path / "run"), cache=str(tmp_path / "cache"), report=False),
    )

    assert run(asked, "test") == 2

    said = capfd.readouterr().err
    assert "error: a T5ForSequenceClassification does not compute these texts (ValueError: Each example must" in said
    assert "Traceback" not in said


def test_a_head_for_another_number_of_classes_is_named(tiny_roberta, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_roberta, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_roberta).save_pretrained(tmp_path)

    for kind in ("none", "nf4"):
        with pytest.raises(
            ValueError, match="has a head for 3 classes, but the data have 2: give a base without a head"
        ):
            built(tmp_path, ("no", "yes"), quantize=kind)

    assert built(tmp_path, ("a", "b", "c")).config.num_labels == 3


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_losses_of_micro_batches_add_up_to_that_of_the_batch(kind, tiny_roberta, tokenizer, sst2_rows, tmp_path):
    rows = [{**row, "label": row["label"] + 0.5 if kind == "numbers" else row["label"]} for row in sst2_rows[:8]]
    settings = config(write(tmp_path, rows))
    train, _, classes = label.load_splits(settings)
    found = label.encode(train, classes, tokenizer, settings)
    head = label.head_settings(classes, tokenizer.pad_token_id)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_roberta, **head).eval()
    training = training_of(model, tokenizer.pad_token_id, train=found)

    parts = [batch_loss(training, rows, 8) for rows in (range(5), range(5, 8))]
    whole = model(**label.collate(found, range(8), tokenizer.pad_token_id)).loss

    assert model.config.num_labels == (1 if kind == "numbers" else 2)
    torch.testing.assert_close(sum(parts), whole)


def test_metrics_are_accuracy_and_the_correlation_of_predictions_with_labels():
    """Matthews' coefficient is the correlation of two columns of zeros and ones. Parts on two ranks add up."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 2, generator=generator), torch.randint(0, 2, (50,), generator=generator)

    sums = labels_module.moments(logits[:20], labels[:20]) + labels_module.moments(logits[20:], labels[20:])
    found = labels_module.metrics(sums, ("no", "yes"))

    said = logits.argmax(-1)
    assert found["accuracy"] == pytest.approx(float((said == labels).float().mean()))
    assert found["correlation"] == pytest.approx(np.corrcoef(said, labels)[0, 1])


def test_the_metric_of_numbers_is_pearsons_correlation():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 1, generator=generator), torch.randn(50, generator=generator)

    found = labels_module.metrics(labels_module.moments(logits, labels), ())

    assert found == {"correlation": pytest.approx(np.corrcoef(logits[:, 0], labels)[0, 1], abs=1e-6)}


class Told(torch.nn.Module):
    """Predicts said[i] for a row whose first token is i."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, input_ids, **batch):
        return SimpleNamespace(loss=torch.zeros(()), logits=self.said[input_ids[:, 0], None])


def numbered(labels):
    """Rows of one token, the row's number, with these numbers as labels."""
    count = len(labels)
    return label.Labelled(
        ids=torch.arange(count, dtype=torch.int32), loss=torch.zeros(count, dtype=torch.bool),
        offsets=torch.arange(count + 1), targets=torch.ones(count, dtype=torch.int64),
        report=label.LabelReport(count, count, 0, 0, count, count, 48),
        classes=(), labels=labels, segments=None,
    )  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_correlates_numbers_that_are_far_from_zero(world_size, monkeypatch):
    """Years: the spread is a millionth of the squares. The other of two ranks has the same numbers."""
    generator = torch.Generator().manual_seed(0)
    labels = 2000 + torch.randn(64, generator=generator)
    said = labels + 0.5 * torch.randn(64, generator=generator)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(world_size))

    found = evaluate(training_of(Told(said), held_out=numbered(labels), world_size=world_size))

    assert found is not None
    mine = slice(None, None, world_size)
    expected = np.corrcoef(said.double()[mine], labels.double()[mine])[0, 1]
    assert found["correlation"] == pytest.approx(expected, abs=1e-6)  # float64's 1e-16, times squares of 4e6


def test_collating_labelled_batches_counts_as_waiting_for_data(monkeypatch):
    now, collate = [0.0], label.collate
    model = Told(torch.zeros(4))
    model.register_forward_hook(lambda *parts: now.__setitem__(0, now[0] + 5))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(label, "collate", lambda *of: now.__setitem__(0, now[0] + 2) or collate(*of))
    training = training_of(model, train=numbered(torch.zeros(4)))

    batch_loss(training, range(4), 4)

    assert training.clock.batches_s == 2


def test_a_constant_prediction_has_correlation_zero():
    sums = labels_module.moments(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))

    assert labels_module.metrics(sums, ("no", "yes")) == {"accuracy": 0.75, "correlation": 0.0}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("data", {"packing": True}),
        ("data", {"exact_match": True, "eval_records": 2}),
        ("data", {"text_columns": ("a", "b", "c")}),
        ("run", {"show_samples": 1}),
        ("adapter", {"method": "lorasb"}),
    ],
)
def test_settings_that_classification_does_not_support_are_refused(part, change):
    whole = Config(data=DataConfig(text_columns=("sentence",), eval_records=4), run=RunConfig())

    with pytest.raises(ValueError, match=r"text[_-]columns"):
        resolve(replace(whole, **{part: replace(getattr(whole, part), **change)}), Ranks())
