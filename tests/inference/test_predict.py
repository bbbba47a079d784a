"""`loldu predict`: the classes of texts and images that a run, an adapter or a plain model gives."""

import io
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from launcher.cli import main
from launcher.config import AdapterConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from launcher.inference.options import Classifying
from launcher.inference.predict import predict
from launcher.training.run import run


def split(folder, rows):
    """Training and held-out records as files."""
    files = folder / "train.json", folder / "held_out.json"
    for file, part in zip(files, (rows[:-20], rows[-20:]), strict=True):
        file.write_text(json.dumps(part))
    return files


def trained(folder, model, data, adapter=None, held_out=None, rate=3e-2, **settings):
    """A finished run and its last evaluation."""
    asked = Config(
        model=ModelConfig(model=str(model), dtype="float32", quantize=settings.pop("quantize", "none")),
        data=DataConfig(data=str(data), eval_data=held_out and str(held_out), max_length=48, **settings),
        adapter=adapter or AdapterConfig(rank=4, targets=("query", "value")),
        optimizer=OptimizerConfig(batch_size=8, max_steps=8, learning_rate=rate),
        run=RunConfig(output=str(folder / "run"), cache=str(folder / "cache"), report=False),
    )
    assert run(asked, "test") == 0
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    return folder / "run", [event for event in events if "eval_loss" in event][-1]


@pytest.fixture(scope="module")
def sentences(tiny_roberta, sst2_rows, tmp_path_factory):
    """A run on classes with names, its evaluation, and the file of its held-out records."""
    folder = tmp_path_factory.mktemp("sentences")
    names = ("bad", "good")
    data, held_out = split(folder, [{**row, "label": names[row["label"]]} for row in sst2_rows])
    return *trained(folder, tiny_roberta, data, held_out=held_out, text_columns=("sentence",)), held_out


def lines(model, how=Classifying(), **asked):  # noqa: B008 (frozen)
    out = io.StringIO()
    predict(str(model), how, json=True, out=out, **asked)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_the_share_of_right_predictions_is_the_runs_accuracy(sentences):
    folder, evaluation, data = sentences

    found = lines(folder, data=str(data))

    assert sum(line["match"] for line in found) / len(found) == evaluation["accuracy"]
    assert all(sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5) for line in found)
    assert [line["index"] for line in found] == list(range(20))


def test_a_text_alone_gets_the_prediction_that_it_gets_in_a_file(sentences, capsys):
    folder, _, data = sentences
    first = json.loads(data.read_text())[0]["sentence"]
    [in_file] = lines(folder, data=str(data), limit=1)

    assert main(["predict", str(folder / "adapter"), "--text", first]) == 0

    assert (
        capsys.readouterr().out == f"{first}: {in_file['class']} ({in_file['probabilities'][in_file['class']]:.1%})\n"
    )


def test_texts_of_which_only_the_beginning_is_read_are_counted(sentences, tmp_path, capsys):
    folder, _, data = sentences
    texts = ["a film", "a film " * 40, "not " * 40]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))

    found = lines(folder, Classifying(max_length=16), data=str(tmp_path / "texts.jsonl"))

    assert [line.get("truncated", False) for line in found] == [False, True, True]
    assert "2 of 3 texts have more than 16 tokens (--max-length): the rest was not read" in capsys.readouterr().err
    lines(folder, data=str(data), limit=2)
    assert "--max-length" not in capsys.readouterr().err


def test_records_without_labels_are_classified_and_nothing_is_scored(sentences, tmp_path, capsys):
    folder, _, data = sentences
    unlabelled = tmp_path / "new.jsonl"
    rows = [{"sentence": row["sentence"]} for row in json.loads(data.read_text())[:3]]
    unlabelled.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert main(["predict", str(folder), "--data", str(unlabelled)]) == 0

    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    assert "expected" not in shown.out
    assert "right" not in shown.err


@pytest.mark.parametrize(
    ("adapter", "quantize"),
    [(AdapterConfig(method="full"), "none"), (AdapterConfig(rank=4, targets=("all-linear",)), "nf4")],
    ids=["full", "nf4"],
)
def test_whole_models_and_quantised_bases_predict_as_they_were_evaluated(
    adapter, quantize, tiny_roberta, sst2_rows, tmp_path
):
    data, held_out = split(tmp_path, sst2_rows)
    folder, evaluation = trained(
        tmp_path, tiny_roberta, data, adapter, held_out=held_out, text_columns=("sentence",), quantize=quantize
    )  # fmt: skip

    found = lines(folder, data=str(held_out))

    assert sum(line["match"] for line in found) / 20 == evaluation["accuracy"]


def test_numbers_are_predicted_for_pairs_of_texts(tiny_roberta, sst2_rows, tmp_path, capsys):
    rows = [{"a": row["sentence"], "b": "yes", "score": row["label"] + 0.5} for row in sst2_rows[:60]]
    data, held_out = split(tmp_path, rows)
    columns = {"text_columns": ("a", "b"), "label_column": "score"}
    folder, evaluation = trained(tmp_path, tiny_roberta, data, held_out=held_out, **columns)

    found = lines(folder, data=str(held_out))
    capsys.readouterr()
    assert main(["predict", str(folder), "--data", str(held_out)]) == 0

    assert all(isinstance(line["value"], float) and "match" not in line for line in found)
    assert f"correlation {evaluation['correlation']:.4f} over 20" in capsys.readouterr().err
    assert main(["predict", str(folder), "--data", str(held_out), "--label-column", "a"]) == 2
    assert "the model predicts numbers. Give another --label-column" in capsys.readouterr().err
    assert main(["predict", str(folder), "--text", rows[0]["a"]]) == 2
    assert "--text takes 2 for this model, got 1" in capsys.readouterr().err


def test_images_get_the_classes_that_the_evaluation_counted(tiny_vit, image_folder, tmp_path, capsys):
    held = tmp_path / "held"
    for name in ("blue", "green", "red"):
        (held / "train" / name).mkdir(parents=True)
        (held / "test" / name).mkdir(parents=True)
        for i, file in enumerate(sorted((image_folder / name).iterdir())):
            shutil.copy(file, held / ("test" if i < 4 else "train") / name)
    adapter = AdapterConfig(rank=4, targets=("q_proj", "v_proj"))
    folder, evaluation = trained(tmp_path, tiny_vit, held, adapter, image_column="image")

    assert main(["predict", str(folder), "--data", str(held)]) == 0
    right = round(evaluation["accuracy"] * 12)
    shown = capsys.readouterr().err
    assert f"{right} of 12 right" in shown
    assert "images of the split test (not of train)" in shown

    shutil.make_archive(str(tmp_path / "packed"), "zip", held / "test")
    packed = bytearray((tmp_path / "packed.zip").read_bytes())
    at = packed.index(b"\x89PNG") if b"\x89PNG" in packed else 60
    packed[at + 20 : at + 40] = bytes(20)
    (tmp_path / "packed.zip").write_bytes(packed)
    assert main(["predict", str(folder), "--data", str(tmp_path / "packed.zip")]) == 2
    assert "cannot be read" in capsys.readouterr().err.splitlines()[-1]

    (held / "test" / "red").rename(held / "test" / "violet")
    assert main(["predict", str(folder), "--data", str(held)]) == 2
    assert capsys.readouterr().err.endswith(
        "has the label 'violet', the model knows: blue, green, red. To predict without labels, give --images FILE ...\n"
    )

    file = next((held / "test" / "violet").iterdir())
    [line] = lines(folder, images=[str(file)])
    assert line["image"] == str(file)
    assert set(line["probabilities"]) == {"blue", "green", "red"}


@pytest.fixture(scope="module")
def headed(tiny_roberta, tmp_path_factory):
    """A base with a head of its own, whose classes are not in the order of the alphabet."""
    torch.manual_seed(1)
    folder, names = tmp_path_factory.mktemp("headed"), {0: "good", 1: "bad"}
    AutoModelForSequenceClassification.from_pretrained(tiny_roberta, id2label=names).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_roberta).save_pretrained(folder)
    return folder


def named(folder, rows, names):
    file = folder / "named.json"
    file.write_text(json.dumps([{**row, "label": names[row["label"]]} for row in rows]))
    return file


def test_the_rows_of_a_head_keep_their_classes(headed, sst2_rows, tmp_path):
    """With no step to speak of, the trained model says what its base says."""
    data = named(tmp_path, sst2_rows, ("bad", "good"))
    adapter = AdapterConfig(rank=4, targets=("query", "value"))
    folder, _ = trained(tmp_path, headed, data, adapter, text_columns=("sentence",), eval_records=20, rate=1e-12)
    texts = ["a film", "good", "no, never"]

    for text in texts:
        [before], [after] = lines(headed, text=[text]), lines(folder, text=[text])
        assert list(after["probabilities"]) == ["good", "bad"]
        assert after["probabilities"] == pytest.approx(before["probabilities"], abs=1e-5)
    assert json.loads((folder / "adapter" / "classes.json").read_text()) == ["good", "bad"]


@pytest.mark.parametrize("names", [("no", "yes"), ("Bad", "Good")])
def test_a_head_for_other_classes_is_refused_and_a_base_without_it_gets_a_new_one(
    names, headed, sst2_rows, tmp_path, capsys
):
    data = named(tmp_path, sst2_rows, names)
    settings = {"text_columns": ("sentence",), "eval_records": 20}
    with pytest.raises(AssertionError):
        trained(tmp_path, headed, data, **settings)
    said = capsys.readouterr().err
    bare = shutil.copytree(headed, tmp_path / "bare", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    AutoModel.from_pretrained(headed).save_pretrained(bare)

    folder, _ = trained(tmp_path / "new", bare, data, **settings)

    assert f"has a head for the classes good, bad, and the labels are {', '.join(names)}, so its rows would" in said
    [line] = lines(folder, text=["a film"])
    assert list(line["probabilities"]) == list(names)


def test_numbers_are_the_rows_of_a_head_and_a_warning_names_them(headed, sst2_rows, tmp_path, capsys):
    trained(tmp_path, headed, named(tmp_path, sst2_rows, (0, 1)), text_columns=("sentence",), eval_records=20)

    assert "has rows for good, bad: the labels 0, 1, ... stand for these" in capsys.readouterr().out


def test_a_plain_classifier_gives_what_transformers_computes(tiny_roberta, tmp_path):
    torch.manual_seed(1)
    names = {0: "no", 1: "maybe", 2: "yes"}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_roberta, id2label=names).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**tokenizer("a good film", return_tensors="pt")).logits.softmax(-1)[0]

    [line] = lines(tmp_path, text=["a good film"])

    assert list(line["probabilities"]) == ["no", "maybe", "yes"]
    torch.testing.assert_close(torch.tensor(list(line["probabilities"].values())), expected, atol=1e-5, rtol=0)


def plain_bert(folder, tokenizer, **settings):
    """A random classifier with positions in a table, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_without_padding_classifies_one_text_at_a_time(tiny_roberta, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)
    tokenizer.pad_token = None
    model = plain_bert(tmp_path, tokenizer)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"text": "bad"}, {"text": "a good film"}]))

    [alone] = lines(model, text=["bad"])
    with pytest.raises(ValueError, match="has no padding token: give --batch-size 1"):
        lines(model, Classifying(columns=("text",)), data=str(data))
    first, _ = lines(model, Classifying(columns=("text",), batch_size=1), data=str(data))

    assert alone["probabilities"] == first["probabilities"]


def test_padding_follows_a_text_whatever_the_tokenizer_says(tiny_roberta, tmp_path):
    """Padding before a text would move it to other positions than in training."""
    model = plain_bert(tmp_path, AutoTokenizer.from_pretrained(tiny_roberta, padding_side="left"))
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"text": "bad"}, {"text": "a good film with good actors"}]))

    together = lines(model, Classifying(columns=("text",)), data=str(data))
    alone = lines(model, Classifying(columns=("text",), batch_size=1), data=str(data))

    for one, other in zip(together, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)


def test_a_classifier_with_several_labels_for_a_text_is_refused(tiny_roberta, tmp_path, capsys):
    """Its logits are not shares of one choice."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)
    model = plain_bert(tmp_path, tokenizer, problem_type="multi_label_classification", num_labels=3)

    assert main(["predict", str(model), "--text", "a"]) == 2

    assert "gives each text several labels (multi_label_classification)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nothing to classify: give one of --text TEXT, --images FILE ... and --data FILE"),
        (["--text", "a", "--data", "b"], "--text and --data cannot be combined"),
        (["--images", "a.png"], "classifies texts: give --text TEXT"),
        (["--text", "a", "b"], "--text takes 1 for this model, got 2"),
        (["--text", "a", "--max-length", "65"], "--max-length 65 is more than this model's context of 64"),
        (["--text", "a", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--data", "{data}", "--label-column", "sentence"], "the model knows: bad, good"),
    ],
)
def test_a_mistake_is_named(words, message, sentences, capsys):
    folder, _, data = sentences

    assert main(["predict", str(folder), *(word.format(data=data) for word in words)]) == 2

    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


def test_a_model_without_a_head_is_refused(tiny_roberta, tiny_vit, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")

    for model, words in ((tiny_roberta, ["--text", "a"]), (tiny_vit, ["--images", str(tmp_path / "black.png")])):
        assert main(["predict", str(model), *words]) == 2
        assert "has no classification head" in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_of_a_language_model_is_refused(sentences, tmp_path, capsys):
    copied = tmp_path / "adapter"
    shutil.copytree(sentences[0] / "adapter", copied)
    settings = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))

    assert main(["predict", str(copied), "--text", "a"]) == 2

    assert "belongs to a language model, which names no classes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[1, 2]", '["one"]', None])
def test_classes_that_are_missing_or_damaged_are_named(text, sentences, tmp_path, capsys):
    copied = tmp_path / "adapter"
    shutil.copytree(sentences[0] / "adapter", copied)
    (copied / "classes.json").unlink() if text is None else (copied / "classes.json").write_text(text)

    assert main(["predict", str(copied), "--text", "a"]) == 2

    assert "classes.json" in capsys.readouterr().err
