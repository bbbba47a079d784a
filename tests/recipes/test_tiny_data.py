"""The bundled tiny model and its instruction sets: reproducible, small, and honestly held out."""

import hashlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
sys.path.insert(0, str(TINY))  # the scripts of this folder import each other by bare name

import pretrain  # noqa: E402
import pretraining_text  # noqa: E402
import tasks  # noqa: E402

Records = list[dict[str, str]]
SET_NAMES = ("train", "validation", "test", "test_unseen")


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


@pytest.fixture(scope="module")
def sets() -> dict[str, Records]:
    return {name: json.loads((TINY / "instructions" / f"{name}.json").read_text()) for name in SET_NAMES}


@pytest.fixture(scope="module")
def pretraining_questions() -> list[tuple[str, str]]:
    """Everything the shipped model was pretrained on: prompts in terse notation and their answers."""
    return list(pretraining_text.pretraining_questions(pretrain.SEED, pretrain.DOCUMENTS))


@pytest.mark.parametrize("name", SET_NAMES)
def test_the_generator_writes_the_committed_set_byte_for_byte(name: str):
    committed = (TINY / "instructions" / f"{name}.json").read_bytes()

    generated = tasks.to_json(tasks.instruction_sets()[name]).encode()

    assert generated == committed


@pytest.mark.parametrize("name", SET_NAMES)
def test_every_answer_is_what_its_skill_says(sets: dict[str, Records], name: str):
    skill_of = {w: skill for skill in tasks.SKILLS.values() for w in skill.wordings + skill.unseen_wordings}

    wrong = [r for r in sets[name] if skill_of[r["instruction"]].apply(r["input"]) != r["output"]]

    assert wrong == []


@pytest.mark.parametrize("name", ["validation", "test", "test_unseen"])
def test_no_held_out_pair_and_no_held_out_word_is_in_the_training_set(sets: dict[str, Records], name: str):
    trained_pairs = {digest(r["instruction"] + "\0" + r["input"]) for r in sets["train"]}
    trained_words = {digest(r["input"]) for r in sets["train"]}

    held_out_pairs = {digest(r["instruction"] + "\0" + r["input"]) for r in sets[name]}
    held_out_words = {digest(r["input"]) for r in sets[name]}

    assert not held_out_pairs & trained_pairs
    assert not held_out_words & trained_words
    assert len(held_out_pairs) == len(sets[name])


def test_validation_and_test_share_no_word(sets: dict[str, Records]):
    chosen_on = {r["input"] for r in sets["validation"]}

    reported_on = {r["input"] for name in ("test", "test_unseen") for r in sets[name]}

    assert not chosen_on & reported_on


def test_unseen_wordings_are_in_no_other_set(sets: dict[str, Records]):
    tuned_on = {r["instruction"] for name in ("train", "validation", "test") for r in sets[name]}

    unseen = {r["instruction"] for r in sets["test_unseen"]}

    assert not unseen & tuned_on
    assert len(unseen) == sum(len(skill.unseen_wordings) for skill in tasks.SKILLS.values())


def test_no_word_of_any_instruction_or_of_the_prompt_is_in_the_pretraining_text(
    sets: dict[str, Records], pretraining_questions: list[tuple[str, str]]
):
    """Stronger than n-grams: not one word of two letters or more is shared, so no wording and no template is."""
    prompt = "### Instruction:\n### Input:\n### Response:\n"
    asked = tasks.words_of(" ".join([prompt, *(r["instruction"] for records in sets.values() for r in records)]))

    text = "\0".join(prompt + answer for prompt, answer in pretraining_questions)
    pretrained_on = {digest(word) for word in tasks.words_of(text)}

    assert len(asked) > 100
    assert not {digest(word) for word in asked} & pretrained_on
    assert "###" not in text


def test_no_held_out_word_is_asked_about_in_the_pretraining_text(
    sets: dict[str, Records], pretraining_questions: list[tuple[str, str]]
):
    """Answers are left out: the reverse of a trained word may happen to be a held-out one."""
    held_out = {digest(r["input"]) for name in ("validation", "test", "test_unseen") for r in sets[name]}

    text = "\0".join(prompt for prompt, _ in pretraining_questions)
    pretrained_on = {digest(word) for word in tasks.words_of(text)}

    assert not held_out & pretrained_on


def test_the_words_of_a_split_stay_in_it():
    rng = random.Random(0)

    splits = {split: {tasks.split_of(tasks.draw_word(rng, split)) for _ in range(50)} for split in SET_NAMES[:3]}

    assert splits == {split: {split} for split in SET_NAMES[:3]}


@pytest.mark.parametrize("text", ["### Input:\nlomi\n", "  two  spaces ", "naïve 東京 🙂", "a\tb\r\n"])
def test_the_tokenizer_gives_any_text_back(text: str):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")

    ids = tokenizer(text)["input_ids"]

    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids


def test_the_model_folder_loads_and_answers_in_terse_notation():
    """A word of the test split, so the answer is computed rather than remembered."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    word = tasks.draw_word(random.Random(5), "test")
    prompt = tokenizer(f"upp({word})=", return_tensors="pt")

    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]

    assert tokenizer.decode(ids, skip_special_tokens=True) == word.upper()
    assert ids[-1] == tokenizer.eos_token_id


def test_the_pretraining_script_runs_and_writes_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrain, "STEPS", 1)
    monkeypatch.setattr(pretrain, "DOCUMENTS", 100)
    monkeypatch.setattr(pretrain, "TESTED_PER_SKILL", 1)

    pretrain.main(["--output", str(tmp_path)])

    for shipped in (path for part in ("model", "instructions") for path in (TINY / part).iterdir()):
        made = tmp_path / shipped.relative_to(TINY)
        assert made.exists()
        if shipped.suffix == ".json":
            assert made.read_bytes() == shipped.read_bytes()


def test_the_shipped_files_are_small():
    model_bytes = sum(path.stat().st_size for path in (TINY / "model").iterdir())
    instruction_bytes = sum(path.stat().st_size for path in (TINY / "instructions").iterdir())

    assert model_bytes < 5e6
    assert instruction_bytes < 2e6
