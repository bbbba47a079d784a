"""A conversation: answers stream, the history is kept, cut and cleared, Ctrl-C stops only an answer."""

import io
import signal

import pytest
from asking import chat

from launcher.data.templates import Template, load_template
from launcher.inference import chat as module
from launcher.inference.chat import fit
from launcher.inference.sources import find
from launcher.models.files import load_tokenizer


def talk(model, *lines, out=None, **settings):
    """The model's answers to these lines."""
    out = out or io.StringIO()
    chat(str(model), lines=io.StringIO("".join(f"{line}\n" for line in lines)), out=out, **settings)
    return out.getvalue()


@pytest.fixture
def asked(monkeypatch):
    """The prompts the model got, as token ids; it answers for real."""
    seen = []
    real = module.stream

    def spy(model, tokenizer, ids, *rest):
        seen.append(tokenizer.decode(ids, skip_special_tokens=False))
        return real(model, tokenizer, ids, *rest)

    monkeypatch.setattr(module, "stream", spy)
    return seen


def test_each_turn_sees_the_turns_before_it_until_reset(chat_model, asked):
    said = talk(chat_model, "Hi", "More", "/reset", "New", max_tokens=4)

    first = said.split("\n")[0]
    assert asked[0] == "u: Hi\na: "
    assert asked[1] == f"u: Hi\na: {first}\nu: More\na: "
    assert asked[2] == "u: New\na: "


def test_help_shows_the_commands_again(chat_model, capsys):
    assert talk(chat_model, "/help") == ""

    assert capsys.readouterr().err.count("/quit or Ctrl-D exits") == 2


def test_the_system_text_comes_first_and_begins_the_talk_anew(chat_model, asked):
    talk(chat_model, "Hi", "/system Be kind", "Hello", max_tokens=2)

    assert asked[1] == "s: Be kind\nu: Hello\na: "


def test_a_system_text_that_the_template_does_not_write_is_refused(chat_model, asked, tmp_path, capsys):
    template = tmp_path / "users.jinja"
    template.write_text("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")

    talk(chat_model, "Hi", "/system", "Hello", system="Be kind", prompt_template=str(template), max_tokens=2)

    assert asked == ["Hello"]
    assert "does not write messages of the role system" in capsys.readouterr().err


def test_with_an_alpaca_template_every_line_is_an_instruction_of_its_own_and_that_is_said_once(
    babyllama, asked, capsys
):
    talk(babyllama, "Name a bird.", "And a fish.", "/system x", prompt_template="short", max_tokens=3)

    notes = capsys.readouterr().err
    assert asked == [f"<s> ### Instruction:\n{line}\n### Response:\n" for line in ("Name a bird.", "And a fish.")]
    assert notes.count("each line is a separate instruction") == 1
    assert "has no system prompt" in notes


def test_quit_leaves_and_an_unknown_command_is_no_question(chat_model, asked, capsys):
    talk(chat_model, "/what", "/quit", "never asked", max_tokens=2)

    assert asked == []
    assert "unknown command /what" in capsys.readouterr().err


def test_a_long_conversation_drops_its_oldest_questions_with_a_message(chat_model, asked, capsys):
    talk(chat_model, *(f"question {i}, a long one " * 2 for i in range(4)), max_tokens=20)

    assert [f"u: question {i}" in asked[2] for i in range(3)] == [True, True, True]
    assert [f"u: question {i}" in asked[3] for i in range(4)] == [False, True, True, True]
    assert capsys.readouterr().err.count("no longer fits") == 1


def test_a_question_that_is_too_long_is_refused_and_the_conversation_continues(chat_model, asked, capsys):
    said = talk(chat_model, "x" * 400, "Hi", max_tokens=3)

    assert "context is 256" in capsys.readouterr().err
    assert asked[1] == "u: Hi\na: "
    assert len(said.splitlines()) == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(chat_model, asked, capsys):
    class Impatient(io.StringIO):
        """Presses Ctrl-C at the third piece of the first answer."""

        pieces = 0

        def write(self, text):
            self.pieces += 1
            if self.pieces == 3:
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    said = talk(chat_model, "Hi", "Again", out=Impatient(), max_tokens=30)

    stopped, second = said.split("\n")[:2]
    assert len(stopped) < 5 < len(second)
    assert "(stopped)" in capsys.readouterr().err
    assert asked[1].startswith(f"u: Hi\na: {stopped}")


def test_what_is_kept_of_a_talk_is_the_longest_end_that_fits(chat_model):
    tokenizer = load_tokenizer(find(str(chat_model)).tokenizer)
    template: Template = load_template("chat", tokenizer, conversations=True)
    turns = [{"role": role, "content": "0123456789"} for role in ("user", "assistant", "user", "assistant", "user")]
    whole, _ = fit(turns, "S", template, tokenizer, 1000)

    ids, kept = fit(turns, "S", template, tokenizer, len(whole) - 1)

    assert kept == turns[2:]
    assert tokenizer.decode(ids).startswith("s: S\nu: 0123456789")
    assert fit(turns, "S", template, tokenizer, len(whole))[1] == turns
    assert fit(turns, "S", template, tokenizer, 1)[1] == turns[4:]


def test_a_system_text_without_a_chat_template_is_refused(babyllama):
    with pytest.raises(ValueError, match="--system needs a chat template"):
        talk(babyllama, prompt_template="short", system="Be kind")
