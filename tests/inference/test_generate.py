"""Answers: the same alone and in a batch, the likeliest token each time, from every kind of folder."""

import io
import json
import shutil
import signal
import types

import pytest
import torch
from asking import generate
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

from launcher.cli import main
from launcher.data.templates import load_template, prompt_ids
from launcher.inference.load import load
from launcher.inference.sources import find
from launcher.models import generation
from launcher.models.generation import Sampling, answer, stop_tokens, stream

BARE = types.SimpleNamespace(eos_token_id=None)  # all that `answer` asks of a tokenizer


@pytest.fixture(scope="module")
def loaded(babyllama):
    return load(find(str(babyllama)))


@pytest.fixture(scope="module")
def prompts(loaded):
    words = ["Once", "upon", "a", "time", "there", "was", "a", "little", "dog"]
    return [loaded[1](" ".join(words[i % 5 : i // 2 + 3]))["input_ids"] for i in range(14)]


def likeliest(model, prompt, count):
    """Greedy continuation by one whole forward pass per token: no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_in_batches_are_those_of_whole_passes_without_cache_or_padding(loaded, prompts):
    model, tokenizer = loaded

    batched = answer(model, tokenizer, prompts, 12, stop_ids=[], batch_size=5)

    assert len({len(prompt) for prompt in prompts}) > 5
    assert batched == [likeliest(model, prompt, 12) for prompt in prompts]


def test_a_batch_reports_how_many_prompts_are_answered(loaded, prompts):
    counts = []

    answer(*loaded, prompts, 2, stop_ids=[], batch_size=5, answered=counts.append)

    assert counts == [5, 10, 14]


class FailsWithACache(GPT2LMHeadModel):
    """Stands for hybrids whose cache transformers cannot read yet."""

    def forward(self, *args, use_cache=None, position_ids=None, **kwargs):
        if use_cache:
            raise ValueError("no such cache")
        return super().forward(*args, use_cache=False, position_ids=position_ids, **kwargs)


class IgnoresTheMask(GPT2LMHeadModel):
    """Stands for models that read padding as text."""

    def forward(self, *args, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 64}
RWKV = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}


@pytest.mark.parametrize(
    ("kind", "settings", "warnings"),
    [
        (GPT2LMHeadModel, GPT2Config(**SMALL), []),
        (FailsWithACache, GPT2Config(**SMALL), ["without a cache, which is slow: with it it fails (ValueError: no su"]),
        (IgnoresTheMask, GPT2Config(**SMALL), ["reads padding"]),
        (RwkvForCausalLM, RwkvConfig(**RWKV), ["without a cache, which is slow: with it its logits", "reads padding"]),
    ],
    ids=lambda kind: getattr(kind, "__name__", ""),
)
def test_a_cache_or_padding_that_changes_the_answers_is_not_used(kind, settings, warnings, caplog):
    torch.manual_seed(0)
    model = kind(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    prompts = [[3, 9, 4, 7, 1, 8, 2], [5, 6, 11], [9, 4, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]

    answers = answer(model, BARE, prompts, 6, stop_ids=[])

    assert answers == [likeliest(model, prompt, 6) for prompt in prompts]
    assert len(caplog.messages) == len(warnings)
    assert all(text in said for text, said in zip(warnings, caplog.messages, strict=True))


def test_an_answer_does_not_depend_on_the_other_prompts_of_the_batch(loaded, prompts):
    model, tokenizer = loaded

    together = answer(model, tokenizer, prompts, 10)

    assert together == [answer(model, tokenizer, [prompt], 10)[0] for prompt in prompts]
    assert together[::-1] == answer(model, tokenizer, prompts[::-1], 10, batch_size=3)


def test_an_answer_ends_before_its_stop_token(loaded, prompts):
    model, tokenizer = loaded
    whole = likeliest(model, prompts[0], 12)
    stop = whole[5]

    cut = answer(model, tokenizer, prompts, 12, stop_ids=[stop])

    assert cut[0] == whole[: whole.index(stop)]
    assert not any(stop in ids for ids in cut)


def test_answers_end_where_learned_positions_end(gpt2):
    model = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    prompts = [[1] * length for length in (4, 20, 23, 24)]

    answers = answer(model, BARE, prompts, 8, stop_ids=[])

    assert [len(ids) for ids in answers] == [8, 4, 1, 0]


def test_habits_of_the_models_own_generation_config_do_not_count(loaded, prompts):
    model, tokenizer = loaded
    plain = answer(model, tokenizer, prompts[:3], 10)
    habits = model.generation_config
    model.generation_config = type(habits)(repetition_penalty=5.0, do_sample=True, num_beams=2, eos_token_id=2)

    try:
        same = answer(model, tokenizer, prompts[:3], 10)
        kept = model.generation_config.repetition_penalty
    finally:
        model.generation_config = habits

    assert same == plain
    assert kept == 5.0


def test_a_model_in_training_mode_answers_and_stays_in_training_mode(adapter, prompts):
    model, tokenizer = load(find(str(adapter)))
    expected = answer(model, tokenizer, prompts[:2], 6)
    model.train()
    core = next(p for name, p in model.named_parameters() if name.endswith("core"))
    core.requires_grad_(True)

    answers = answer(model, tokenizer, prompts[:2], 6)
    model(torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss.backward()

    assert answers == expected
    assert model.training
    assert core.grad is not None


def test_stop_tokens_are_those_of_model_and_tokenizer(loaded):
    model, tokenizer = loaded
    habits = model.generation_config
    model.generation_config = type(habits)(eos_token_id=[7, 2, 9])

    try:
        stop = stop_tokens(model, tokenizer)
    finally:
        model.generation_config = habits

    assert stop == [7, 2, 9]


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        answer(*loaded, [[1], []], 4)


def test_streamed_pieces_are_the_answer_and_keep_blanks_at_line_starts(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = tokenizer("He said:\n  I am here\n  é ☃", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    streamer = generation._Pieces(tokenizer, [2], pieces.append)

    streamer.put(torch.tensor([[1, 5]]))  # the prompt
    for token in [*ids, 2]:
        streamer.put(torch.tensor([token]))
    streamer.end()

    assert len(pieces) > 5
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_gives_the_same_answer_as_a_batch(loaded, prompts):
    model, tokenizer = loaded
    written: list[str] = []

    streamed = stream(model, tokenizer, prompts[3], Sampling(max_tokens=9), written.append)

    assert streamed.ids == answer(model, tokenizer, [prompts[3]], 9)[0]
    assert "".join(written) == streamed.text == tokenizer.decode(streamed.ids)


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(loaded):
    with pytest.raises(ValueError, match=r"256 tokens, .* context is 256"):
        stream(*loaded, [5] * 256, Sampling(), print)


def test_the_same_seed_draws_the_same_answer_and_another_seed_another(babyllama):
    def drawn(seed):
        out = io.StringIO()
        generate(
            str(babyllama), prompt="Once", prompt_template="none", temperature=1.0, seed=seed, max_tokens=30, out=out
        )
        return out.getvalue()

    first, again, other = drawn(1), drawn(1), drawn(2)

    assert first == again != other


def test_a_run_brings_its_base_its_adapter_and_its_template(run_folder, babyllama, capsys):
    out = io.StringIO()

    (answered,) = generate(str(run_folder), prompt="Say hello.", max_tokens=8, out=out)

    model, tokenizer = load(find(str(run_folder / "adapter")))
    record = {"instruction": "Say hello.", "input": "", "output": ""}
    ids = prompt_ids(record, load_template("short", tokenizer, conversations=False), tokenizer)
    assert answered.ids == likeliest(model, ids, 8)
    assert out.getvalue() == answered.text + "\n"
    assert "short (" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_and_keeps_the_answers_so_far(babyllama):
    class Impatient(io.StringIO):
        """Presses Ctrl-C at the third piece."""

        pieces = 0

        def write(self, text):
            self.pieces += len(text) > 0
            if self.pieces == 3:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    out = Impatient()

    with pytest.raises(KeyboardInterrupt):
        generate(str(babyllama), prompt="Once", prompt_template="none", max_tokens=40, out=out)

    assert 2 <= len(out.getvalue()) <= 5


def test_an_adapter_finds_its_base_alone_and_with_adapter_on_a_named_base_answers_alike(adapter, babyllama):
    settings = {"prompt": "Once", "prompt_template": "none", "max_tokens": 8, "out": io.StringIO()}

    alone = generate(str(adapter), **settings)
    named = generate(str(babyllama), adapter=str(adapter), **settings)
    base = generate(str(babyllama), **settings)

    assert alone[0].ids == named[0].ids != base[0].ids


def test_json_lines_hold_the_records_in_order_batched_like_streamed(babyllama, tmp_path):
    records = [
        {"instruction": f"Tell me about {thing}", "output": "yes"} for thing in ("a dog", "the sea and sky", "it")
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    out = io.StringIO()
    settings = {"prompt_template": "short", "max_tokens": 6}

    generate(str(babyllama), data=str(tmp_path / "data.json"), limit=2, json=True, out=out, **settings)

    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    alone = [generate(str(babyllama), prompt=r["instruction"], out=io.StringIO(), **settings)[0] for r in records[:2]]
    assert [line["index"] for line in lines] == [0, 1]
    assert [line["answer"] for line in lines] == [one.text for one in alone]
    assert all(line["tokens"] == 6 and not line["complete"] and line["match"] is False for line in lines)
    assert lines[0]["prompt"].startswith("### Instruction:\nTell me about a dog")


def test_prompts_that_fill_the_context_are_counted_and_an_answer_that_fills_it_is_not_complete(
    babyllama, tmp_path, capsys
):
    """Of the context, a trained prompt takes its tokens too."""
    tuning = PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(babyllama), tuning).save_pretrained(tmp_path / "prompt")
    records = [{"instruction": "a " * count, "output": "yes"} for count in (2, 115, 128)]  # 2 n + 2 tokens
    (tmp_path / "data.json").write_text(json.dumps(records))
    out = io.StringIO()

    generate(
        str(tmp_path / "prompt"), base=str(babyllama), data=str(tmp_path / "data.json"), json=True, out=out,
        prompt_template="none", max_tokens=8,
    )  # fmt: skip

    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines[0]["tokens"] == 8
    assert 0 < lines[1]["tokens"] < 8
    assert lines[2]["tokens"] == 0
    assert not any(line["complete"] for line in lines)
    assert "1 prompts fill the model's context (256 tokens) and have no answer" in capsys.readouterr().err


def test_the_prompt_comes_from_standard_input_where_none_is_given(babyllama, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon\n"))
    settings = {"prompt_template": "none", "max_tokens": 5, "out": io.StringIO()}

    piped = generate(str(babyllama), **settings)

    assert piped[0].ids == generate(str(babyllama), prompt="Once upon", **settings)[0].ids


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "a", "data": "b.json"}, "--prompt and --data cannot be combined"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a", "max_tokens": 0}, "--max-tokens is at least 1"),
        ({"prompt": "a", "temperature": -1.0}, "--temperature is 0"),
        ({"prompt": "a", "top_p": 0.0}, "--top-p lies in"),
        ({"prompt": "a", "limit": 3}, "--limit 3 counts the records of --data"),
        ({"prompt_file": "/nowhere.txt"}, "--prompt-file /nowhere.txt cannot be read"),
        ({"data": "/nowhere.json"}, "no such file"),
        ({"prompt": "a", "prompt_template": "shrot"}, "--prompt-template shrot"),
        ({"prompt": "a", "dtype": "int8"}, "--dtype int8 is unknown"),
    ],
)
def test_a_mistake_in_the_options_is_one_line_that_names_the_option(babyllama, given, said):
    with pytest.raises(ValueError, match=said) as caught:
        generate(str(babyllama), **given)

    assert "\n" not in str(caught.value)


def test_tokens_that_the_model_has_no_embedding_of_are_named(adapter, babyllama, tmp_path, capsys):
    """An adapter with more tokens was trained on a base whose embedding had been resized."""
    own = shutil.copytree(adapter, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(babyllama)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(own)
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"instruction": "Call <b>", "input": "", "output": "yes"}]))

    codes = [
        main([*words, str(own), "--prompt-template", "none"])
        for words in (
            ["generate", "--prompt", "Call <b>"],
            ["eval", "--tasks", str(file), "--max-tokens", "0"],
        )
    ]

    said = capsys.readouterr().err
    assert codes == [2, 2]
    assert said.count("but the embedding of the model has 361 rows") == 2
