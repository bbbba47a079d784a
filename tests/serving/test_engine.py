"""The engine on the embedded model: answers of a mixed batch are those that each adapter gives alone."""

import logging
import shutil
import threading
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from running_server import until
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig

from adapters import LoLDUConfig, LoRAXSConfig, SVFitConfig
from launcher.inference.load import load
from launcher.inference.sources import find
from launcher.models.files import load_tokenizer
from launcher.serving import engine as engine_module
from launcher.serving.cache_size import bytes_per_token, cache_size
from launcher.serving.engine import base_id, load_engine
from launcher.serving.requests import Request, Sampling, Token
from launcher.serving.suitable import check_attention, continuation

TINY = Path(__file__).parents[2] / "recipes" / "tiny" / "model"
QUESTIONS = ["What is 2 plus 3?", "Name a colour.", "Sort: 3 1 2", "Reverse the word stone.", "Say hello to Anna."]
MANY = 64


def base():
    return AutoModelForCausalLM.from_pretrained(TINY).eval()


class Asked:
    """A request in progress: its tokens as they arrive. held: its first token holds the engine until `release`."""

    def __init__(self, engine, model, prompt, sampling, id=None, held=False):
        self.tokens: list[Token] = []
        self.ended, self.begun, self.released = threading.Event(), threading.Event(), threading.Event()
        if not held:
            self.release()
        self.id = id or f"{model}-{time.perf_counter_ns()}"
        ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        engine.submit(Request(self.id, model, tuple(ids), sampling), self.emit)

    def emit(self, token):
        self.tokens.append(token)
        self.begun.set()
        assert self.released.wait(180), "not released in three minutes"
        if token.finish:
            self.ended.set()

    def release(self):
        self.released.set()

    def wait(self):
        assert self.ended.wait(180), "no answer in three minutes"
        return self

    @property
    def text(self):
        return "".join(token.text for token in self.tokens)

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    @property
    def finish(self):
        return self.tokens[-1].finish


def kind_of(number: int) -> int:
    """Most adapters are of the first kind."""
    return number % 16 if number % 16 < 5 else 0


def random_cores(model, seed, size):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".core") or "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Adapters by number, of several methods and ranks, that change the base's answers."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = [
        LoLDUConfig(r=8, target_modules="all-linear", normalize_directions=True),
        SVFitConfig(r=8, target_modules="all-linear"),
        LoRAXSConfig(r=4, target_modules="all-linear", normalize_directions=True),
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"]),
        LoLDUConfig(r=4, target_modules=["q_proj", "down_proj"]),  # another rank and other layers
    ]
    sizes = [4.0, 4.0, 1.0, 0.3, 4.0]
    for kind, (config, size) in enumerate(zip(kinds, sizes, strict=True)):
        model = get_peft_model(base(), config)
        for number in [n for n in range(MANY) if kind_of(n) == kind]:
            random_cores(model, number, size).save_pretrained(folder / f"a{number}")
    return folder


@pytest.fixture(scope="module")
def served(folder):
    """The running engine with all adapters."""
    engine, _ = load_engine(str(TINY), cache_bytes=200_000_000)
    for number in range(MANY):
        engine.add_adapter(f"a{number}", folder / f"a{number}")
    engine.start()
    yield engine
    engine.stop(0)


@cache
def stock(folder, kind):
    """Stock PEFT with the first adapter of a kind."""
    first = next(number for number in range(MANY) if kind_of(number) == kind)
    return PeftModel.from_pretrained(base(), folder / f"a{first}").eval()


def with_adapter(folder, number):
    """Stock PEFT with this adapter alone; its kind's model is used again."""
    if number is None:
        return base()
    model = stock(folder, kind_of(number))
    set_peft_model_state_dict(model, load_file(folder / f"a{number}" / "adapter_model.safetensors"))
    return model


def alone(folder, number, prompt, tokens):
    """transformers' own greedy answer of one adapter, with the token that ends it."""
    ids = torch.tensor([prompt])
    made = with_adapter(folder, number).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=1
    )
    return made[0, len(prompt) :].tolist()


def test_answers_of_64_adapters_in_shared_batches_are_those_of_each_alone(served, folder):
    before = dict(served.stats())
    prompts = {n: served.tokenizer.encode(QUESTIONS[n % len(QUESTIONS)] * (1 + n % 3)) for n in range(MANY)}

    asked = {None: Asked(served, served.base_id, prompts[0], Sampling(16), held=True)}  # until all have come
    asked |= {n: Asked(served, f"a{n}", prompts[n], Sampling(16)) for n in range(MANY)}
    asked[None].release()
    for each in asked.values():
        each.wait()

    prompts[None] = prompts[0]
    for n, each in asked.items():
        assert each.ids == alone(folder, n, prompts[n], 16), f"adapter {n}"
        assert each.finish == ("stop" if each.ids[-1] == 1 else "length")
        assert each.text == served.tokenizer.decode(each.ids, skip_special_tokens=True)
    alike = [n for n in range(MANY) if prompts[n] == prompts[0]]
    assert len({tuple(asked[n].ids) for n in alike}) > len(alike) // 2  # to one question they answer differently
    until_idle(served)
    after = served.stats()
    passes = after["forward_passes"] - before["forward_passes"]
    assert after["tokens"] - before["tokens"] == sum(len(each.ids) for each in asked.values())
    assert passes < 60  # one at a time would be up to 65 * 16


def test_adapters_of_two_ranks_share_the_batches_of_an_nf4_base(folder):
    engine, _ = load_engine(str(TINY), quantize="nf4", cache_bytes=8_000_000, running=8, batch_tokens=64)
    prompt = engine.tokenizer.encode(QUESTIONS[0])
    names = ["a0", "a4", "a5"]
    for name in names:
        engine.add_adapter(name, folder / name)
    engine.start()

    first = Asked(engine, engine.base_id, prompt, Sampling(12), held=True)  # until all have come
    asked = [Asked(engine, name, prompt, Sampling(12)) for name in names]
    first.release()
    answers = [each.wait().ids for each in (first, *asked)]
    engine.stop(0)

    alone = [load(find(str(place)), quantize="nf4")[0] for place in (TINY, *(folder / name for name in names))]
    ids = torch.tensor([prompt])
    for model, answer in zip(alone, answers, strict=True):
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=1
        )
        assert answer == made[0, len(prompt) :].tolist()
    assert len({tuple(answer) for answer in answers}) > 2  # they differ


def test_a_seed_gives_the_same_answer_whatever_else_is_in_the_batch(served):
    how = Sampling(24, temperature=1.5, top_p=0.95, seed=7)
    first = Asked(served, "a1", QUESTIONS[0], how).wait()

    others = [Asked(served, f"a{n}", QUESTIONS[2], Sampling(24, temperature=2.0)) for n in range(8)]
    again = Asked(served, "a1", QUESTIONS[0], how).wait()
    another = Asked(served, "a1", QUESTIONS[0], Sampling(24, temperature=1.5, top_p=0.95, seed=8)).wait()

    assert again.ids == first.ids
    assert another.ids != first.ids
    assert all(each.wait().finish in ("stop", "length") for each in others)


def test_log_probabilities_are_the_models_own(served, folder):
    prompt = served.tokenizer.encode(QUESTIONS[1])

    asked = Asked(served, "a0", prompt, Sampling(8, temperature=0.7, seed=1, logprobs=3)).wait()

    with torch.no_grad():
        logits = (
            with_adapter(folder, 0)(torch.tensor([prompt + asked.ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
    for row, token in zip(logits, asked.tokens, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-3)
        values, ids = row.topk(3)
        assert [id for id, _ in token.top] == ids.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_a_stop_text_ends_the_answer_before_it(served):
    whole = Asked(served, served.base_id, QUESTIONS[3], Sampling(24)).wait().text
    assert len(whole) > 3

    asked = Asked(served, served.base_id, QUESTIONS[3], Sampling(24, stop=(whole[2:4], "never"))).wait()

    assert asked.text == whole[: whole.find(whole[2:4])]
    assert asked.finish == "stop"


def until_idle(engine):
    """An answer's last token is sent before its request and its blocks are given back."""
    until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == engine.stats()["cache_blocks_used"] == 0)


def long_request(engine, model, held=False, **sampling):
    """One that has begun and has not ended: held, or sampled at a temperature where the end is unlikely."""
    how = Sampling(**{"max_tokens": 400, "temperature": 50.0, "seed": 3, **sampling})
    asked = Asked(engine, model, QUESTIONS[0], how, held=held)
    assert asked.begun.wait(180)
    return asked


def test_a_cancelled_request_ends_and_frees_its_blocks_while_others_go_on(served):
    other, asked = long_request(served, "a2", max_tokens=40), long_request(served, "a0", held=True)

    served.cancel(asked.id)
    asked.release()

    assert asked.wait().finish == "cancelled"
    assert other.wait().finish in ("length", "stop")
    assert len(asked.tokens) < 400
    served.cancel(asked.id)  # nothing happens
    until_idle(served)


def test_an_adapter_that_is_removed_ends_its_answers_with_an_error_and_no_others(served, folder):
    served.add_adapter("short-lived", folder / "a5")
    other, gone = long_request(served, "a6", max_tokens=60), long_request(served, "short-lived", held=True)

    served.remove_adapter("short-lived")
    gone.release()

    assert gone.wait().finish == "error"
    assert gone.tokens[-1].error == "adapter short-lived was removed"
    assert other.wait().finish in ("length", "stop")
    with pytest.raises(KeyError, match="short-lived"):
        Asked(served, "short-lived", QUESTIONS[0], Sampling(4))
    with pytest.raises(KeyError, match="short-lived"):
        served.remove_adapter("short-lived")
    served.add_adapter("short-lived", folder / "a7")  # takes the freed row
    prompt = served.tokenizer.encode(QUESTIONS[0])
    assert Asked(served, "short-lived", prompt, Sampling(8)).wait().ids == alone(folder, 7, prompt, 8)
    served.remove_adapter("short-lived")


def test_answers_of_an_adapter_end_before_its_numbers_are_gone(served, folder, monkeypatch):
    """A token that is computed when the row of the table is zero already is the base's."""
    asked = Asked(served, "a2", QUESTIONS[0], Sampling(200), held=True)
    assert asked.begun.wait(180)
    remove, endings = served.many.remove, []

    def removed(name):
        endings.extend(answer.ending for answer in served._answers.values() if answer.id == asked.id)
        remove(name)

    monkeypatch.setattr(served.many, "remove", removed)
    served.remove_adapter("a2")
    asked.release()
    asked.wait()
    served.add_adapter("a2", folder / "a2")

    assert endings == [("error", "adapter a2 was removed")]


def test_adapters_come_and_go_while_requests_run(served, folder):
    expected = alone(folder, 8, served.tokenizer.encode(QUESTIONS[4]), 16)
    stop, failures = threading.Event(), []

    def churn():
        round = 0
        while not stop.is_set():
            try:
                for n in range(12):
                    served.add_adapter(f"churn-{round}-{n}", folder / f"a{n}")
                for n in range(12):
                    served.remove_adapter(f"churn-{round}-{n}")
            except Exception as error:
                failures.append(error)
                return
            round += 1

    thread = threading.Thread(target=churn)
    thread.start()
    found = [Asked(served, "a8", QUESTIONS[4], Sampling(16)).wait().ids for _ in range(10)]
    stop.set()
    thread.join()

    assert not failures
    assert found == [expected] * 10


def test_one_adapter_whose_numbers_overflow_fails_alone(served, folder, tmp_path):
    huge = get_peft_model(base(), LoLDUConfig(r=8, target_modules="all-linear"))
    random_cores(huge, 0, 1e38).save_pretrained(tmp_path / "huge")
    with pytest.raises(ValueError, match="with adapter huge the logits are NaN or infinite"):
        served.add_adapter("huge", tmp_path / "huge")
    served.many.add("huge", tmp_path / "huge")  # as one that overflows on some prompts only would be
    prompt = served.tokenizer.encode(QUESTIONS[0])
    expected = alone(folder, 9, prompt, 24)

    asked = [Asked(served, name, prompt, Sampling(24)) for name in ("a9", "huge", "a9", "huge", "a9")]

    for place, each in enumerate(asked):
        each.wait()
        if place % 2:
            assert each.finish == "error"
            assert each.tokens[-1].error == "the logits of huge are NaN or infinite"
        else:
            assert each.ids == expected
    served.remove_adapter("huge")


def test_an_adapter_of_the_models_head_is_refused_while_others_are_answered(served, tmp_path):
    """The head sees the last token of each request, not each token of the row."""
    config = LoLDUConfig(r=4, target_modules=["q_proj", "lm_head"])
    get_peft_model(base(), config).save_pretrained(tmp_path / "head")
    running = long_request(served, "a3", max_tokens=60)

    with pytest.raises(ValueError, match=r"lm_head .* cannot share a batch"):
        served.add_adapter("head", tmp_path / "head")

    assert "head" not in served.models()
    assert running.wait().finish in ("length", "stop")


def test_what_cannot_be_answered_is_refused(served):
    with pytest.raises(KeyError, match="there is no model nobody"):
        Asked(served, "nobody", QUESTIONS[0], Sampling(4))
    with pytest.raises(ValueError, match="the prompt has 512 tokens; with at least one of an answer, at most 512 fit"):
        Asked(served, "a0", [5] * 512, Sampling(4))
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        Asked(served, "a0", [], Sampling(4))
    with pytest.raises(ValueError, match="token ids outside of the vocabulary, 0 to 355"):
        Asked(served, "a0", [5, 356], Sampling(4))
    with pytest.raises(ValueError, match="max_tokens is at least 1, got 0"):
        Asked(served, "a0", [5], Sampling(0))
    assert Asked(served, "a0", [5] * 511, Sampling(4)).wait().finish in ("length", "stop")
    assert len(Asked(served, "a0", [5] * 510, Sampling(9, temperature=50.0, seed=1)).wait().tokens) <= 2


def test_folders_that_are_no_adapter_of_this_base_are_refused(served, folder, tmp_path):
    with pytest.raises(ValueError, match="there is an adapter a0 already"):
        served.add_adapter("a0", folder / "a0")
    with pytest.raises(ValueError, match="is the base's name"):
        served.add_adapter(served.base_id, folder / "a0")
    with pytest.raises(ValueError, match="has no adapter_model"):
        served.add_adapter("none", tmp_path)
    assert "none" not in served.models()
    assert served.models()[0] == served.base_id


def small_engine(folder, **settings):
    engine, _ = load_engine(str(TINY), **{"cache_bytes": 8_000_000, "running": 8, "batch_tokens": 32, **settings})
    engine.add_adapter("a0", folder / "a0")
    return engine


def test_a_small_cache_answers_more_requests_than_it_holds(folder, caplog):
    """Requests wait for blocks, or give theirs up and are computed again; the memory stays within the bound."""
    with caplog.at_level(logging.WARNING):
        engine = small_engine(folder, cache_bytes=2_500_000)
    assert engine.context_length < 512
    assert "limits prompt and answer to" in caplog.text
    engine.start()
    config = engine.model.config
    cache = engine._manager.batch_processor.cache
    assert cache.cache_tensor.nbytes <= 2_500_000
    assert engine.size.bytes <= 2_500_000
    assert bytes_per_token(config, torch.float32, 32) > cache.cache_tensor.nbytes / cache.num_blocks / 32
    prompt = engine.tokenizer.encode(QUESTIONS[0])
    with pytest.raises(ValueError, match=f"at most {engine.context_length} fit"):
        Asked(engine, "a0", [5] * 500, Sampling(4))

    many = [Asked(engine, "a0", prompt, Sampling(60, temperature=50.0, seed=n)) for n in range(12)]

    lengths = [len(each.wait().tokens) for each in many]
    assert {each.finish for each in many} <= {"length", "stop"}
    single = [Asked(engine, "a0", prompt, Sampling(60, temperature=50.0, seed=n)).wait() for n in (0, 5)]
    assert [each.ids for each in single] == [many[0].ids, many[5].ids]
    assert sum(lengths) > engine.size.tokens  # more than the cache holds
    engine.stop(0)


def test_an_adapter_with_another_tokenizer_is_refused_and_one_with_the_bases_is_served(folder, tmp_path):
    engine, _ = load_engine(str(TINY), cache_bytes=20_000_000)
    same, other = (shutil.copytree(folder / "a0", tmp_path / name) for name in ("same", "other"))
    tokenizer = load_tokenizer(TINY)
    tokenizer.save_pretrained(same)
    tokenizer.eos_token = "."
    tokenizer.save_pretrained(other)

    engine.add_adapter("same", same)
    with pytest.raises(ValueError, match=r"eos_token is '\.', the base's '</s>'.*loldu merge .*other --out MERGED"):
        engine.add_adapter("other", other)

    assert engine.models() == [engine.base_id, "same"]


def test_the_cache_is_bounded_by_memory_and_by_what_can_be_used():
    config = base().config
    settings = {"context": 512, "running": 16, "batch_tokens": 64, "page": 32}

    little, much = (cache_size(config, torch.float32, **settings, budget=each) for each in (5_000_000, 10**12))

    assert little.bytes <= 5_000_000
    assert little.tokens < 512 * 16
    assert much.tokens == 512 * 16
    with pytest.raises(ValueError, match="for the cache is not enough"):
        cache_size(config, torch.float32, **settings, budget=100_000)


def test_a_containers_limit_bounds_the_cache(monkeypatch):
    monkeypatch.setattr("launcher.serving.cache_size.main_memory", lambda: (0, True))
    with pytest.raises(ValueError, match="0 GB for the cache is not enough"):
        load_engine(str(TINY))


@pytest.mark.parametrize(("drain_s", "finishes"), [(600, ("length", "stop")), (0, ("cancelled",))])
def test_stop_waits_for_what_runs_and_then_cancels_it(folder, drain_s, finishes):
    engine = small_engine(folder)
    with pytest.raises(RuntimeError, match="has not been started"):
        Asked(engine, "a0", QUESTIONS[0], Sampling(4))
    engine.start()
    running = long_request(engine, "a0", max_tokens=3, held=True)

    stopping = threading.Thread(target=engine.stop, args=(drain_s,))
    stopping.start()
    until(lambda: engine._refusing is not None)
    with pytest.raises(RuntimeError, match="the engine is stopping"):
        Asked(engine, "a0", QUESTIONS[0], Sampling(4))
    until(lambda: drain_s or engine._answers[running.id].ending)
    running.release()
    stopping.join(60)

    assert not engine._manager.is_running()
    assert running.wait().finish in finishes
    engine.stop(0)  # twice is fine


def test_a_failure_of_the_engines_thread_ends_every_request_and_refuses_more(folder, monkeypatch, caplog):
    engine = small_engine(folder)
    engine.start()
    # greedy: a random first token may be one that ends the answer
    asked = [Asked(engine, "a0", QUESTIONS[0], Sampling(400), held=True) for _ in range(3)]
    assert asked[0].begun.wait(180)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(engine.many, "packed", fail)
    for each in asked:
        each.release()

    for each in asked:
        assert each.wait().finish == "error"
        assert "out of memory, say" in each.tokens[-1].error
    engine._manager._generation_thread.join(30)
    with pytest.raises(RuntimeError, match="the engine has failed: out of memory, say"):
        Asked(engine, "a0", QUESTIONS[0], Sampling(4))
    engine.stop(1)


def test_a_receiver_that_fails_stops_no_other(served):
    def fail(token):
        raise OSError("gone")

    served.submit(Request("gone", "a0", (5, 6), Sampling(50)), fail)

    assert Asked(served, "a1", QUESTIONS[0], Sampling(4)).wait().finish in ("length", "stop")
    until_idle(served)


def test_a_model_whose_packed_answers_differ_is_refused(monkeypatch):
    """The second token is the first that reads the cache."""
    monkeypatch.setattr(
        engine_module, "continuation", lambda model, prompt: [continuation(model, prompt)[0], (5, -9.0)]
    )
    engine, _ = load_engine(str(TINY), cache_bytes=8_000_000, running=4, batch_tokens=32)

    with pytest.raises(ValueError, match="models of type llama cannot be served: in a packed batch"):
        engine.start()

    assert not engine._manager.is_running()


@pytest.mark.parametrize(
    ("config", "layers"),
    [(MambaConfig(), "linear_attention"), (SimpleNamespace(model_type="rwkv", hidden_size=8), "without attention")],
    ids=["mamba", "rwkv"],
)
def test_a_model_without_keys_and_values_is_refused(config, layers):
    with pytest.raises(
        ValueError, match=rf"cannot be served: requests share a cache .* layers \({layers}\) do not have"
    ):
        check_attention(config)


def test_an_adapter_given_as_the_model_is_refused(folder):
    with pytest.raises(ValueError, match="is an adapter: give its base"):
        load_engine(str(folder / "a0"))


def test_the_id_of_a_base_is_its_folders_name_or_that_on_the_hub():
    hub = Path("/cache/hub/models--meta-llama--Llama-2-7b-hf/snapshots/0123abcd")

    assert base_id(Path("/models/mine")) == "mine"
    assert base_id(hub) == "meta-llama/Llama-2-7b-hf"
