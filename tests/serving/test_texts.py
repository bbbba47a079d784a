"""Text and choices, token by token."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from launcher.serving.choosing import choose, draw, number
from launcher.serving.requests import Sampling
from launcher.serving.texts import Text

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "tiny" / "model")


def pieces(ids, stop=()):
    text = Text(TOKENIZER, stop)
    return [text.add(token, last=place == len(ids) - 1) for place, token in enumerate(ids)]


@pytest.mark.parametrize("text", ["Hello  there, friend.\n\n  indented", "naïve café 😀 漢字 ok", "\n", " x"])
def test_pieces_are_the_text_and_never_half_a_character(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)

    found = pieces(ids)

    assert "".join(found) == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in found)


def test_any_tokens_give_the_text_that_they_decode_to():
    """Even bytes that are not text, except for how many U+FFFD replace them: text that was shown is not changed."""
    ordinary = [i for i in range(3, len(TOKENIZER)) if "\ufffd" not in TOKENIZER.decode([i])]
    for seed in range(50):
        drawn = random.Random(seed)
        ids, wild = drawn.choices(ordinary, k=40), drawn.choices(range(3, len(TOKENIZER)), k=40)

        assert "".join(pieces(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)
        assert len("".join(pieces(wild))) == pytest.approx(
            len(TOKENIZER.decode(wild, skip_special_tokens=True)), abs=10
        )


def test_a_stop_text_ends_the_text_before_it_wherever_tokens_end():
    ids = TOKENIZER.encode("one two three four", add_special_tokens=False)
    text = Text(TOKENIZER, (" three", "never"))

    shown = ""
    for token in ids:
        shown += text.add(token)
        assert " th" not in shown
        if text.stopped:
            break

    assert shown == "one two"
    assert text.end() == ""


def test_the_beginning_of_a_stop_text_is_shown_once_it_is_none():
    text = Text(TOKENIZER, ("th!",))
    shown = [text.add(token) for token in TOKENIZER.encode("with", add_special_tokens=False)]

    assert "".join(shown) in ("wi", "")
    assert "".join(shown) + text.end() == "with"


def test_draws_follow_the_probabilities_of_what_top_p_leaves():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    numbers = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    rows = p.log().expand(2000, 4)

    for top_p, left in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.75, [0.625, 0.375, 0, 0]), (1e-9, [1, 0, 0, 0])):
        tokens = draw(rows, torch.ones(2000), torch.full((2000,), top_p), numbers)
        found = torch.bincount(tokens, minlength=4) / 2000
        torch.testing.assert_close(found, torch.tensor(left, dtype=found.dtype), atol=2e-3, rtol=0)

    warm = draw(rows, torch.full((2000,), 2.0), torch.ones(2000), numbers)
    torch.testing.assert_close(torch.bincount(warm, minlength=4) / 2000, p.sqrt() / p.sqrt().sum(), atol=2e-3, rtol=0)


def test_a_temperature_next_to_zero_takes_the_likeliest_token():
    logits = torch.tensor([[1.0, 3.0, 2.0]])

    for temperature in (1e-20, 1e-50, 5e-324):
        assert choose(logits, [Sampling(1, temperature=temperature)], [0.999])[0].id == 1


def test_greedy_and_sampled_requests_share_a_batch():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    logits[3] = torch.nan
    how = [Sampling(1), Sampling(1, temperature=1.0, top_p=0.9, logprobs=2), Sampling(1, logprobs=0), Sampling(1)]

    chosen = choose(logits, how, [0.1, 0.9999, 0.5, 0.5])

    assert chosen[0].id == int(logits[0].argmax())
    assert chosen[0].logprob is None
    assert chosen[1].id == int(draw(logits[1:2], torch.ones(1), torch.tensor([0.9]), torch.tensor([0.9999]))[0])
    assert len(chosen[1].top) == 2
    assert chosen[1].top[0][0] == int(logits[1].argmax())
    assert chosen[2].id == int(logits[2].argmax())
    assert chosen[2].logprob == pytest.approx(float(logits[2].log_softmax(0).max()))
    assert [each.ok for each in chosen] == [True, True, True, False]
    assert number(7, 3) == number(7, 3) != number(7, 4)
    assert 0 <= number(7, 3) < 1
