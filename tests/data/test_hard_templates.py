"""Chat templates that rewrite earlier turns, fail, or take too much time or memory."""

import threading
import time
from types import SimpleNamespace

import pytest
from byte_records import CHAT, CHATML, byte_tokenizer, encode, shown

from launcher.data import templates
from launcher.data.limits import Clock, Limits, _interrupt, _TooSlow, bounded, limits

# --- templates that rewrite earlier turns ---

FORGETS_THINKING = (  # Qwen 3's way: thinking is written in the last answer alone
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPENS_THINKING = (  # R1's way: the prompt opens the thinking, and no answer shows it
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def thinking(*answers, in_content=False):
    messages = []
    for reasoning, content in answers:
        messages.append({"role": "user", "content": "?"})
        messages.append({"role": "assistant", "content": content})
        if in_content:
            messages[-1]["content"] = f"<think>\n{reasoning}\n</think>\n\n{content}"
        else:
            messages[-1]["reasoning_content"] = reasoning
    return {"messages": messages}


def test_each_answer_is_a_sample_where_the_template_rewrites_earlier_turns(caplog):
    tokenizer = byte_tokenizer(FORGETS_THINKING)

    encoded = encode([thinking(("r", "a"), ("s", "b"))], tokenizer, prompt_template="chat")

    assert [shown(encoded, tokenizer, i) for i in range(len(encoded))] == [
        ("<|user|>?</s>\n<|assistant|><think>r</think>a</s>\n", "<think>r</think>a</s>"),
        (
            "<|user|>?</s>\n<|assistant|>a</s>\n<|user|>?</s>\n<|assistant|><think>s</think>b</s>\n",
            "<think>s</think>b</s>",
        ),
    ]
    assert "1 conversations became one sample for each answer" in caplog.text
    assert encoded.report.records == encoded.report.kept == 2


@pytest.mark.parametrize("in_content", [False, True])
def test_a_prompt_that_opens_the_thinking_is_followed_by_thinking(in_content):
    tokenizer = byte_tokenizer(OPENS_THINKING)

    record = thinking(("r", "a"), ("s", "b"), in_content=in_content)
    encoded = encode([record], tokenizer, prompt_template="chat")

    blanks = "\n\n" if in_content else ""
    assert [shown(encoded, tokenizer, i)[1] for i in range(2)] == ["r\n</think>\n\na</s>", "s\n</think>\n\nb</s>"]
    assert shown(encoded, tokenizer, 1)[0].startswith(
        f"<|user|>?</s><|assistant|>{blanks}a</s><|user|>?</s><|assistant|><think>\ns"
    )
    template = templates.load_template("chat", tokenizer, conversations=True)
    ids = encoded.ids[: encoded.offsets[1]].tolist()
    prompt = templates.prompt_ids({"messages": record["messages"][:1]}, template, tokenizer)
    assert ids[: len(prompt)] == prompt


# --- templates as programs ---


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0]['content'] + 1 }}", r"the chat template fails on the conversation .*: TypeError"),
        ("{{ 'a'.split()[3] }}|{{ messages[9].content }}", r"refuses|fails"),
        ("{{ 1 // 0 }}", r"fails on the conversation that begins 'Be brief\.': ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"fails on the conversation .*: RecursionError"),
        ("{{ 3 ** 10 ** 9 }}", r"line 1 of the chat template uses \*\*"),
        ("{% for m in messages %}", r"--prompt-template chat: line 1 of the chat template is not Jinja"),
        ("{{ '%99999999999s' % 'a' }}", r"takes too much memory: .*LOLDU_TEMPLATE_BYTES"),
        ("{{ 'a' * 10000000000 }}", r"takes too much memory"),
        (
            "{% set ns = namespace(t='aa') %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
            r"takes more than 0\.5 seconds|takes too much memory",
        ),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            r"takes more than 0\.5 seconds: the limit is 0\.5; raise it with LOLDU_TEMPLATE_SECONDS",
        ),
        (
            "{% for a in range(99999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
            r"takes more than 0\.5 seconds|takes too much memory",
        ),
        ("{{ 'a' * 20000000 }}", r"writes 20,000,000 characters for one conversation: .*LOLDU_TEXT_CHARACTERS"),
    ],
)
def test_a_template_that_fails_or_takes_too_much_is_refused(template, expected, monkeypatch):
    seconds = 0.5 if "0\\.5 seconds" in expected else 60
    monkeypatch.setattr("launcher.data.limits.limits", lambda: Limits(template_seconds=seconds))

    with pytest.raises(ValueError, match=expected):
        encode([{"messages": CHAT}], byte_tokenizer(template), prompt_template="chat")


def loop_for_ever():
    while True:
        time.sleep(0.01)


@pytest.fixture
def clock_by_hand(monkeypatch):
    """Let `pass_time(seconds)` set the time that limits see, and wait until the watching thread has looked at it."""
    now, looks = [0.0], []

    def monotonic():
        looks.append(threading.current_thread())
        return now[0]

    def pass_time(seconds):
        now[0] += seconds
        looks.clear()
        while sum(thread is not threading.main_thread() for thread in [*looks]) < 2:
            time.sleep(0.001)

    monkeypatch.setattr("launcher.data.limits.time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr("launcher.data.limits.limits", lambda: Limits(template_seconds=1.5))
    return pass_time


def test_the_time_counts_for_each_conversation(clock_by_hand):
    with bounded("rendering") as clock:
        for _ in range(3):
            clock_by_hand(1.4)
            clock.restart()
    with pytest.raises(ValueError, match=r"rendering takes more than 1\.5 seconds"), bounded("rendering"):
        clock_by_hand(1.6)


def test_a_template_that_ends_just_in_time_is_not_interrupted_afterwards():
    """The watching thread may send the interrupt when the work is done, and it may arrive while the clock stops."""
    clock = Clock(60.0)

    class Held:
        """The clock's lock; when it is taken first, the interrupt arrives."""

        taken = 0

        def __enter__(self):
            self.taken += 1
            if self.taken == 1:
                clock.fired = True
                _interrupt(threading.get_ident(), _TooSlow)
                loop_for_ever()

        def __exit__(self, *_):
            pass

    clock.lock = held = Held()

    clock.stop()

    assert (held.taken, clock.ended.is_set()) == (2, True)


def test_limits_are_raised_by_environment_variables(monkeypatch):
    monkeypatch.setenv("LOLDU_TEMPLATE_SECONDS", "9.5")
    assert limits.__wrapped__().template_seconds == 9.5

    monkeypatch.setenv("LOLDU_TEMPLATE_BYTES", "much")
    with pytest.raises(ValueError, match="LOLDU_TEMPLATE_BYTES=much is not a number"):
        limits.__wrapped__()


def test_the_memory_limit_is_lifted_after_rendering():
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    encode([{"messages": CHAT}], byte_tokenizer(CHATML), prompt_template="chat")

    assert resource.getrlimit(resource.RLIMIT_AS) == before
