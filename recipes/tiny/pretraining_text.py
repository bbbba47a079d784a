"""The tiny model's pretraining text: the skills of `tasks.py` in terse notation and in an invented language.

`rev(lomi)=imol` and `Vec tatewola rev hogeki.` teach a skill. The text shares no word with the instructions or the
prompt template, does not use the prompt's layout, and has no word that is held out for testing.
"""

import random
from collections.abc import Iterator

from tasks import CODES, INSTRUCTION_WORDS, SKILLS, Split, draw_word, split_of, spoken_word, words_of


def lexicon(seed: int = 0, synonyms: int = 12, empty: int = 60) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """An invented language: `synonyms` words per skill, its codes among them, and `empty` words that mean nothing."""
    rng = random.Random(seed)
    taken = set(CODES | INSTRUCTION_WORDS)  # and no word that is held out

    def invent() -> str:
        while (word := spoken_word(rng, rng.randint(2, 9))) in taken or split_of(word) != "train":
            pass
        taken.add(word)
        return word

    words = {name: skill.codes + tuple(invent() for _ in range(synonyms)) for name, skill in SKILLS.items()}
    return words, tuple(invent() for _ in range(empty))


SYNONYMS, EMPTY_WORDS = lexicon()

TERSE_NOTATIONS = (
    "{code}({x})=",
    "{x}.{code}=",
    "{code} {x} > ",
    "{x} | {code} | ",
    "[{code}] {x}: ",
    "{code}\n{x}\n",
    "{code}\n\n{x}\n\n",
)
SPOKEN_NOTATIONS = (  # none lays a page out as the prompt does: heading, request, heading, word, heading
    "{request} {x} -> ",
    "{request}\n{x}\n",
    "{heading}\n{request}\n{x}\n",
    "{request}\n{heading}\n{x}\n",
    "{request}\n{x}\n{heading}\n",
    "{heading}\n{request}\n{heading}\n{x}\n",
)


def empty_word(rng: random.Random) -> str:
    """A word without meaning: mostly one of the language, at times any letters."""
    return rng.choice(EMPTY_WORDS) if rng.random() < 0.6 else draw_word(rng)


def heading(rng: random.Random) -> str:
    """One or two empty words set off as a heading, such as `== Noru:`."""
    words = " ".join(empty_word(rng) for _ in range(rng.choice((1, 1, 2))))
    mark = rng.choice(("", "# ", "## ", "-- ", "== ", "* "))
    return mark + rng.choice((words, words.capitalize())) + rng.choice(":: ")


def request(rng: random.Random, skill: str) -> str:
    """A sentence of the invented language: one to three words for the skill among up to five empty ones."""
    words = [rng.choice(SYNONYMS[skill]) for _ in range(rng.choice((1, 2, 3)))]
    words += [empty_word(rng) for _ in range(rng.randint(0, 5))]
    rng.shuffle(words)
    sentence = " ".join(words)
    return rng.choice((sentence, sentence.capitalize())) + rng.choice(("", ".", ".", "?"))


def question(rng: random.Random, skill: str, notation: str, split: Split = "train") -> tuple[str, str]:
    """A prompt in one notation and its answer, both free of every word that the instructions or the template use."""
    while True:
        x = draw_word(rng, split)
        y = SKILLS[skill].apply(x)
        first, *rest = notation.split("{heading}")
        layout = first + "".join(heading(rng) + part for part in rest)
        prompt = layout.format(x=x, code=rng.choice(SKILLS[skill].codes), request=request(rng, skill))
        if not words_of(f"{prompt} {y}") & INSTRUCTION_WORDS:
            return prompt, y


def pretraining_questions(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """`count` pairs (prompt, answer) to pretrain on: the first third in terse notations, the rest in spoken ones too.

    Without the easy start, finding the word among others is not learnt within the time there is.
    """
    rng = random.Random(seed)
    names = tuple(SKILLS)
    for i in range(count):
        spoken = i >= count // 3 and rng.random() < 0.7
        yield question(rng, rng.choice(names), rng.choice(SPOKEN_NOTATIONS if spoken else TERSE_NOTATIONS))
