"""`loldu eval`: its scores against sums by hand, adapter and base side by side, and what it refuses."""

import io
import json
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch
from launching import finish, start
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters import LoLDUConfig
from launcher import progress
from launcher.cli import main
from launcher.data.templates import load_template
from launcher.evaluation import harness, run
from launcher.evaluation.choices import Choice, accuracy, read_choices
from launcher.evaluation.likelihood import Scorer, choice_scores, encoded
from launcher.evaluation.measured import notes
from launcher.evaluation.scores import mean, ratio
from launcher.files import weights_digest
from launcher.tasks.base import Layout
from tests.communicators import together

QUESTIONS = [
    {"question": "Which word is an animal?", "choices": ["The dog.", "Blue", "Seven"], "answer": 0},
    {"question": "Which is a colour?", "choices": {"text": ["Ten", "Red is."], "label": ["A", "B"]}, "answerKey": "B"},
    {"question": "Which is a number?", "choices": ["Ball", "Three", "Tree house"], "answer": "Three"},
    {
        "instruction": "Is it true?\n\nAnswer format: true/false",
        "input": "",
        "output": "the correct answer is false",
        "answer": "false",
    },
]


@pytest.fixture(scope="module")
def loaded(babyllama):
    return AutoModelForCausalLM.from_pretrained(babyllama).eval(), AutoTokenizer.from_pretrained(babyllama)


@pytest.fixture(scope="module")
def adapter(babyllama, tmp_path_factory):
    """A random adapter on the babyllama."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(babyllama)
    model = get_peft_model(base, LoLDUConfig(r=64, target_modules=["q_proj", "up_proj"], init_weights=False))
    model.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    return folder


def file_of(folder, content) -> str:
    file = folder / "data.json"
    file.write_text(json.dumps(content))
    return str(file)


def evaluated(capsys, *words: str) -> dict:
    assert main(["eval", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["tasks"]


def test_all_forms_of_questions_are_read():
    found = read_choices(QUESTIONS, "here")

    assert [each.right for each in found] == [0, 1, 1, 1]
    assert found[3].choices == ("the correct answer is true", "the correct answer is false")
    assert found[1].question == {"instruction": "Which is a colour?", "input": ""}
    assert read_choices([{"instruction": "Say hello", "output": "hello"}], "here") is None
    with pytest.raises(ValueError, match="record 1 of here is no multiple choice as the first one is"):
        read_choices([QUESTIONS[0], {"question": "?", "choices": ["a", "b"], "answer": "c"}], "here")


@pytest.mark.parametrize(
    ("labels", "answer"), [(["1", "2", "3"], 2), ([1, 2, 3], 2), (["1", "2", "3"], "2"), (["A", "B", "C"], 1)]
)
def test_a_number_is_a_label_if_labels_are_numbers_and_else_a_place(labels, answer):
    """ARC numbers some choices from 1."""
    row = {"question": "Which is a colour?", "choices": {"text": ["Ten", "Red", "Up"], "label": labels}}

    [found] = read_choices([row | {"answerKey": answer}], "here")

    assert found.right == 1


def test_a_choice_is_as_likely_as_its_own_tokens(loaded):
    """The sum of log-probabilities of its tokens after the prompt, in a pass of its own without padding."""
    model, tokenizer = loaded
    template = load_template("short", tokenizer, conversations=False)
    questions = read_choices(QUESTIONS, "here")
    by_hand = []
    for question in questions:
        likelihoods = []
        for choice in question.choices:
            prompt = f"### Instruction:\n{question.question['instruction']}\n### Response:\n"
            ids = [tokenizer.bos_token_id, *tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]]
            begin = 1 + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(logits[at - 1, ids[at]].item() for at in range(begin, len(ids))))
        by_hand.append(accuracy(question, likelihoods))

    found = choice_scores(Scorer(model, tokenizer), tokenizer, template, questions, range(4), lambda done: None)

    assert found == by_hand


def test_the_likeliest_choice_may_change_with_its_length():
    choice = Choice({}, ("short", "a much longer answer"), 1)

    assert accuracy(choice, [-5.0, -9.0]) == (0.0, 1.0)
    assert accuracy(choice, [-9.0, -5.0]) == (1.0, 1.0)


def test_losses_in_batches_are_those_of_single_samples(loaded):
    model, tokenizer = loaded
    records = [{"instruction": "Say " + "so " * i, "input": "", "output": "yes " * (i + 1)} for i in range(20)]
    data = encoded(records, tokenizer, model, load_template("short", tokenizer, conversations=False))

    scorer = Scorer(model, tokenizer)

    together = scorer.sample_losses(data, range(20), lambda done: None)
    alone = [scorer.sample_losses(data, [i], lambda done: None)[0] for i in range(20)]

    assert [count for _, count in together] == data.targets.tolist()
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in alone], rel=1e-5)


def test_choices_are_computed_behind_their_question_once_with_logits_of_their_own_tokens_alone(babyllama):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(babyllama), AutoTokenizer.from_pretrained(babyllama)
    template = load_template("short", tokenizer, conversations=False)
    [question] = read_choices([QUESTIONS[0] | {"question": "Which of these words is an animal? " * 4}], "here")
    data, computed = encoded(question.records(), tokenizer, model, template), []
    scorer = Scorer(model.eval(), tokenizer)
    scorer.sample_losses(data, [0, 1, 2], lambda done: None)  # which checks the model
    model.get_input_embeddings().register_forward_hook(lambda _, given, out: computed.append(given[0].shape))
    before = scorer.forward.logits_rows

    joined = scorer.sample_losses(data, [0, 1, 2], lambda done: None)

    assert computed == [(1, data.lengths[0] + sum(int(n) + 1 for n in data.targets[1:]))]  # and the token before each
    assert scorer.forward.logits_rows - before == int(data.targets.sum())
    scorer.layout = Layout()
    padded = scorer.sample_losses(data, [0, 1, 2], lambda done: None)
    assert [count for _, count in joined] == [count for _, count in padded] == data.targets.tolist()
    assert [loss for loss, _ in joined] == pytest.approx([loss for loss, _ in padded], rel=1e-6)


def test_standard_errors_are_those_of_statistics():
    values = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0]

    assert mean(values)["stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(6))
    assert ratio([(v, 1) for v in values])["stderr"] == pytest.approx(mean(values)["stderr"])
    assert ratio([(2.0, 1), (4.0, 3)])["value"] == 1.5
    assert math.isnan(mean([1.0])["stderr"])


def test_results_of_one_task_are_written_before_the_next_and_tokenising_is_shown(
    babyllama, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("launcher.progress.LINE_EVERY_S", 0.0)
    records = [{"instruction": f"Count to {i}", "input": "", "output": "one two"} for i in range(6)]
    good, bad = file_of(tmp_path, records), tmp_path / "bad.jsonl"
    bad.write_text("{")
    words = ["--tasks", good, str(bad), "--max-tokens", "0", "--prompt-template", "short"]

    code = main(["eval", str(babyllama), *words, f"--out={tmp_path / 'eval.json'}"])

    error = capsys.readouterr().err
    assert code == 2
    assert "tokenising data.json" in error
    assert "6/6" in error
    assert "bad.jsonl" in error
    assert set(json.loads((tmp_path / "eval.json").read_text())["tasks"]) == {"data"}


def test_an_adapter_stands_beside_its_base(capsys, babyllama, adapter, tmp_path):
    """The base's scores are those of the base alone, bit for bit."""
    records = [{"instruction": f"Count to {i}", "input": "", "output": "one two"} for i in range(6)]
    words = ["--tasks", file_of(tmp_path, records), "--limit", "5", "--max-tokens", "4", "--prompt-template", "short"]

    both = evaluated(capsys, str(adapter), "--base", str(babyllama), *words)["data"]["scores"]
    alone = evaluated(capsys, str(babyllama), *words)["data"]["scores"]

    assert both["base"] == alone["model"]
    assert both["adapter"]["loss"]["value"] != both["base"]["loss"]["value"]
    assert both["adapter"]["loss"]["n"] == both["adapter"]["exact_match"]["n"] == 5


def test_a_lora_that_changes_its_base_stands_alone(capsys, babyllama, tmp_path):
    """With such an adapter disabled, the model is what is left of the base after its first product was subtracted."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), lora).save_pretrained(folder := tmp_path / "lora")
    file = file_of(tmp_path, [{"instruction": "Count", "input": "", "output": "one two"}])
    words = ["--tasks", file, "--max-tokens", "0", "--prompt-template", "short"]

    assert main(["eval", str(folder), "--base", str(babyllama), *words, "--json"]) == 0

    shown = capsys.readouterr()
    assert list(json.loads(shown.out)["tasks"]["data"]["scores"]) == ["adapter"]
    assert "the base is left out: init_lora_weights=pissa changes its weights" in shown.err


def test_an_adapter_with_a_tokenizer_of_its_own_stands_alone(capsys, babyllama, adapter, tmp_path):
    """Its base would be asked in tokens that it does not know, and end its answers elsewhere."""
    own = shutil.copytree(adapter, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(babyllama)
    tokenizer.save_pretrained(own)
    file = file_of(tmp_path, [{"instruction": "Count", "input": "", "output": "one two"}])
    words = [str(own), "--base", str(babyllama), "--tasks", file, "--max-tokens", "0", "--prompt-template", "short"]

    same = evaluated(capsys, *words)["data"]["scores"]
    tokenizer.eos_token = "."
    tokenizer.save_pretrained(own)
    assert main(["eval", *words, "--json"]) == 0

    shown = capsys.readouterr()
    assert list(same) == ["base", "adapter"]
    assert list(json.loads(shown.out)["tasks"]["data"]["scores"]) == ["adapter"]
    assert "the base is left out: the adapter has a tokenizer of its own (its eos_token is '.'" in shown.err


def test_questions_longer_than_the_context_are_counted(capsys, babyllama, tmp_path):
    long = {"question": "word " * 3000, "choices": ["yes", "no"], "answer": 0}

    main(["eval", str(babyllama), "--tasks", file_of(tmp_path, [*QUESTIONS, long]), "--prompt-template", "short"])

    row = next(line for line in capsys.readouterr().out.splitlines() if "left_out" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["data", "left_out", "1", "1"]


def test_records_longer_than_the_context_are_counted_and_not_wrong(capsys, babyllama, tmp_path):
    whole = [{"instruction": "Say hello", "input": "", "output": "hello"}]
    cut = [{"instruction": "Say it", "input": "", "output": "so " * 3000}]
    long = [{"instruction": "word " * 3000, "input": "", "output": "hello"}]
    words = [str(babyllama), "--prompt-template", "short", "--max-tokens", "2", "--tasks"]

    scores = evaluated(capsys, *words, file_of(tmp_path, [*whole, *cut, *long]))["data"]["scores"]["model"]

    assert scores["truncated"]["value"] == scores["left_out"]["value"] == 1
    assert scores["loss"]["n"] == scores["exact_match"]["n"] == 2


def test_files_of_one_name_have_results_of_their_own(capsys, babyllama, tmp_path):
    questions = [tmp_path / name / "test.json" for name in "abc"]
    for file in questions:
        file.parent.mkdir()
        file.write_text(json.dumps(QUESTIONS[:2]))
    first, second, third = map(str, questions)
    words = [str(babyllama), "--prompt-template", "short", "--out", str(tmp_path / "eval.json"), "--tasks"]

    together = evaluated(capsys, *words, first, second)
    evaluated(capsys, *words, third)
    evaluated(capsys, *words, third)
    evaluated(capsys, *words, first)

    assert list(together) == [first, second]
    saved = json.loads((tmp_path / "eval.json").read_text())["tasks"]
    assert {name: result["task"] for name, result in saved.items()} == {first: first, second: second, "test": third}


def test_results_name_what_they_were_measured_on(capsys, babyllama, adapter, tmp_path):
    """A changed adapter and another precision are told; scores of other weights are not kept unmarked."""
    shutil.copytree(adapter, mine := tmp_path / "adapter")
    out, file = tmp_path / "eval.json", file_of(tmp_path, QUESTIONS[:2])
    words = [str(babyllama), "--adapter", str(mine), "--prompt-template", "short", "--no-compare", f"--out={out}"]

    def measured(task, *more):
        assert main(["eval", *words, "--tasks", str(task), *more]) == 0
        return json.loads(out.read_text())["tasks"], " ".join(capsys.readouterr().err.split())

    first, said = measured(file)
    assert "replaced" not in said
    known = first["data"]["measured"]
    assert known["weights"] == weights_digest(adapter)  # of a copy
    assert (known["dtype"], known["quantize"], known["prompt_template"]) == ("float32", "none", "short")

    again, said = measured(file, "--dtype", "bfloat16")
    assert again["data"]["measured"] == {**known, "dtype": "bfloat16"}
    assert "data: the scores with dtype float32 are replaced" in said

    weights = load_file(mine / "adapter_model.safetensors")
    cores = {name: tensor * 2 if name.endswith("core") else tensor for name, tensor in weights.items()}
    save_file(cores, mine / "adapter_model.safetensors", {"format": "pt"})
    shutil.copy(file, other := tmp_path / "more.json")
    both, said = measured(other)
    assert both["more"]["measured"]["weights"] != both["data"]["measured"]["weights"]
    assert "scores of other weights, or of weights not recorded, stay in the file: data" in said


@pytest.mark.parametrize(
    ("was", "now", "named"),
    [
        ({"base": "/models/other"}, {}, "base /models/other"),
        ({}, {"base": "/models/other"}, "the run's own base"),
        ({}, {"max_tokens": 64}, "no max_tokens"),
        ({"max_tokens": 64}, {}, "max_tokens 64"),
        ({"records": "a", "prompt_template": "alpaca"}, {}, "other records, prompt_template alpaca"),
        ({"records": "a"}, {"records": "a"}, None),
    ],
)
def test_a_setting_that_only_one_of_two_results_has_is_named(was, now, named):
    def entry(measured):
        return {"data": {"limit": None, "measured": {"weights": "w", "dtype": "float32", **measured}}}

    found = list(notes(entry(was), entry(now)))

    assert found == (
        [f"data: the scores with {named} are replaced; --out keeps others in a file of their own"] if named else []
    )
    unmarked = {"data": {"limit": None}}  # by an earlier version: nothing is known of its settings
    assert list(notes(unmarked, entry(now))) == []


def test_the_file_of_results_is_made_or_refused_before_the_model_loads(capsys, babyllama, tmp_path, monkeypatch):
    file = file_of(tmp_path, QUESTIONS[:1])
    words = ["eval", str(babyllama), "--prompt-template", "short", "--tasks", file, "--out"]

    assert main([*words, str(tmp_path / "new" / "folder" / "eval.json")]) == 0
    assert json.loads((tmp_path / "new" / "folder" / "eval.json").read_text())["tasks"]

    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert main([*words, str(Path(file) / "eval.json")]) == 2
    assert "cannot write the results to" in capsys.readouterr().err


def test_a_text_that_a_question_is_about_is_part_of_it():
    row = {"question": "Who barks?", "choices": ["The cat", "The dog"], "answer": 1}

    for name in ("context", "input", "passage"):
        [found] = read_choices([row | {name: "A dog and a cat."}], "here")
        assert found.question == {"instruction": "Who barks?", "input": "A dog and a cat."}
    assert read_choices([row | {"context": None}], "here")[0].question["input"] == ""


def test_likelihoods_that_are_not_finite_choose_nothing(babyllama):
    model = AutoModelForCausalLM.from_pretrained(babyllama).eval()
    tokenizer = AutoTokenizer.from_pretrained(babyllama)
    model.model.norm.weight.data.fill_(torch.nan)
    template = load_template("short", tokenizer, conversations=False)
    questions = read_choices(QUESTIONS[:1], "here")

    with pytest.raises(ValueError, match=r"Which word is an animal.* are NaN or infinite"):
        choice_scores(Scorer(model, tokenizer), tokenizer, template, questions, [0], lambda done: None)


def test_the_screen_shows_a_table_and_the_file(capsys, babyllama, tmp_path):
    out = tmp_path / "scores.json"
    words = ["--tasks", file_of(tmp_path, QUESTIONS), "--prompt-template", "short", "--out", str(out)]

    assert main(["eval", str(babyllama), *words]) == 0

    shown = capsys.readouterr().out
    assert "acc_norm" in shown
    assert "±" in shown
    assert json.loads(out.read_text())["tasks"]["data"]["scores"]["model"]["acc"]["n"] == 4


def test_results_of_commands_that_end_at_the_same_time_are_all_kept(tmp_path, monkeypatch):
    """Each one adds to what it reads; between reading and writing the others are let through, if they may."""
    real = run.write_atomically
    monkeypatch.setattr(run, "write_atomically", lambda *given: (time.sleep(0.01), real(*given)))
    threads = [Thread(target=run._write, args=(tmp_path / "eval.json", {f"task{n}": {"n": n}})) for n in range(12)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    tasks = json.loads((tmp_path / "eval.json").read_text())["tasks"]
    assert tasks == {f"task{n}": {"n": n} for n in range(12)}


@pytest.mark.parametrize("content", ['{"tasks": {"a', "[1]", '{"tasks": 3}'])
def test_a_file_of_results_that_cannot_be_read_is_refused_before_anything_is_evaluated(
    content, capsys, babyllama, tmp_path
):
    (tmp_path / "eval.json").write_text(content)

    code = main(["eval", str(babyllama), "--tasks", file_of(tmp_path, QUESTIONS), f"--out={tmp_path / 'eval.json'}"])

    assert code == 2
    assert "eval.json cannot be read as a file of results" in capsys.readouterr().err
    assert (tmp_path / "eval.json").read_text() == content


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["nowhere_task"], "is no file here; as a task of lm-evaluation-harness it needs that package"),
        ([], "--tasks is empty"),
    ],
)
def test_a_task_that_cannot_be_run_is_named(tasks, said, capsys, babyllama, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)

    assert main(["eval", str(babyllama), "--tasks", *tasks]) == 2

    assert said in capsys.readouterr().err


def test_the_prompts_of_a_task_of_the_harness_have_no_template_and_that_is_said(
    capsys, babyllama, monkeypatch, tmp_path
):
    """What the harness is asked for and what the screen says of it belong together."""
    asked = {}
    results = {"results": {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "n-samples": {"arc": {"effective": 4}}}

    def simple_evaluate(**settings):
        asked.update(settings)
        return results

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **settings: settings},
        "lm_eval.tasks": {"TaskManager": lambda **settings: SimpleNamespace(match_tasks=lambda names: names)},
    }
    for name, content in parts.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(harness, "check", lambda name: None)

    assert main(["eval", str(babyllama), "--tasks", "arc", "--prompt-template", "alpaca"]) == 0

    shown = capsys.readouterr()
    assert set(asked) == {"model", "tasks", "limit", "task_manager", "log_samples"}  # no apply_chat_template
    said = "arc: prompts as lm-evaluation-harness writes them, without a prompt or chat template"
    assert f"{said} (--prompt-template alpaca is for files)" in shown.err
    assert "0.5000 ± 0.1000" in shown.out

    (file := tmp_path / "arc.json").write_text(json.dumps(QUESTIONS[:1]))
    words = [str(babyllama), "--prompt-template", "short", "--tasks", str(file), "arc"]
    assert list(evaluated(capsys, *words)) == [str(file), "arc"]  # two tasks of one name


def test_a_task_of_the_harness_gives_the_accuracy_that_we_find(capsys, babyllama, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install 'loldu-launcher[eval]'")
    rows = [
        {"question": q["question"], "choices": list(c.choices), "answer": c.right}
        for q, c in zip(QUESTIONS[:3], read_choices(QUESTIONS, "here"), strict=False)
    ]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "local.yaml").write_text(
        "task: local_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.json'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: answer\ndoc_to_choice: choices\ntarget_delimiter: "\\n"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    prompt = tmp_path / "bare.txt"
    prompt.write_text("{instruction}\n")

    theirs = evaluated(capsys, str(babyllama), "--tasks", str(tmp_path / "local.yaml"), "--trust-remote-code")["local"][
        "scores"
    ]["model"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = ["--tasks", str(tmp_path / "data.json"), "--prompt-template", str(prompt)]
    ours = evaluated(capsys, str(babyllama), *words)["data"]["scores"]["model"]

    assert theirs["acc"]["n"] == 3
    for metric in ("acc", "acc_norm"):
        assert theirs[metric]["value"] == pytest.approx(ours[metric]["value"])
        assert theirs[metric]["stderr"] == pytest.approx(ours[metric]["stderr"])


def test_the_bar_counts_the_samples_of_all_processes(monkeypatch):
    for pause in ("LINE_EVERY_S", "LINE_EVERY_S_AT_MOST"):
        monkeypatch.setattr(progress, pause, -1.0)  # a line for each call
    written, first_is_done = [io.StringIO(), io.StringIO()], Event()

    def evaluate(comm):
        console = Console(file=written[comm.ranks.rank], quiet=not comm.ranks.is_main)
        loaded = SimpleNamespace(comm=comm, bars=progress.Bars(console))
        with run._progress(loaded, "task, model", 10) as tick:
            if comm.ranks.is_main:
                first_is_done.wait(60)
            for done in range(1, 6):
                tick(done)
            first_is_done.set()

    assert together(2, evaluate) == [None, None]

    assert [line.partition(",")[2].split(",")[0] for line in written[0].getvalue().splitlines()] == [
        f" model {count}/10" for count in range(6, 11)
    ]
    assert written[1].getvalue() == ""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(babyllama, tmp_path):
    records = [{"instruction": f"Count to {i}", "input": "", "output": "one two"} for i in range(7)]
    words = ["eval", str(babyllama), "--tasks", file_of(tmp_path, records), "--max-tokens", "4", "--json"]
    found = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        code, said = finish(start([*launch, "-m", "launcher", *words, "--out", str(out)]))
        assert code == 0, said
        found.append(json.loads(out.read_text())["tasks"]["data"]["scores"]["model"])

    one, two = found
    assert one["exact_match"] == two["exact_match"]
    assert one["loss"]["n"] == two["loss"]["n"] == 7
    assert one["loss"]["value"] == pytest.approx(two["loss"]["value"], rel=1e-5)


def test_a_yaml_file_of_a_task_runs_no_code_unless_it_is_trusted(babyllama, tmp_path, capsys):
    task = tmp_path / "local.yaml"
    task.write_text(f"task: local\nprocess_docs: !function owned.run\ndoc_to_text: '{tmp_path}'\n")
    (tmp_path / "owned.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    code = main(["eval", str(babyllama), "--tasks", str(task)])

    assert code == 2
    assert "give --trust-remote-code if you trust the file" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_template_is_named_once_for_all_tasks(capsys, babyllama, tmp_path):
    tasks = []
    for number in (1, 2):
        (tmp_path / f"{number}.json").write_text(json.dumps(QUESTIONS[:1]))
        tasks.append(str(tmp_path / f"{number}.json"))

    assert main(["eval", str(babyllama), "--tasks", *tasks]) == 0

    assert capsys.readouterr().err.count("prompt template: alpaca") == 1
